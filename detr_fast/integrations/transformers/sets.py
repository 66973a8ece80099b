"""Sets of predictions of equal shape: put together without copies, matched and judged in one call each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from detr_fast.criterion import _Entries
from detr_fast.integrations.constants import Constants
from detr_fast.matcher import HungarianMatcher
from detr_fast.ops.set_loss import weighted_set_loss
from detr_fast.structures import Predictions, Targets

Entries = tuple[tuple[str, int, bool], ...]  # of each layer: name, column, whether it has a gradient


class Part(NamedTuple):
    """Predictions of some layers; the suffix of each in the dictionary of losses."""

    logits: Tensor  # [N, B, Q, C]
    boxes: Tensor  # [N, B, Q, 4]
    suffixes: tuple[str, ...]


class Pieces(NamedTuple):
    """A part that is yet to be put together along its first axis."""

    logits: tuple[Tensor, ...]  # each [n, B, Q, C]
    boxes: tuple[Tensor, ...]  # each [n, B, Q, 4]
    suffixes: tuple[str, ...]


class ClassLoss(NamedTuple):
    """The class loss of :func:`set_loss`."""

    kind: str
    alpha: float = 0.25
    gamma: float = 2.0
    class_weight: Tensor | None = None  # [C]


class Losses(NamedTuple):
    """Losses of one set."""

    total: Tensor  # [] weighted, to differentiate
    values: Tensor  # [N, 5]
    weight: Tensor  # [N, 5]
    suffixes: tuple[str, ...]


def is_last_layer(
    result: Tensor,  # [B, Q, ...]
    layers: Tensor,  # [L, B, Q, ...], or [B, L, Q, ...]
    axis: int = 0,
) -> bool:
    """Whether `result` is a view of the last of `layers`, through which gradients reach it just the same."""
    if torch.compiler.is_compiling():
        return False
    base = layers if layers._base is None else layers._base
    is_slice = (
        result._base is base
        and result.shape == layers.shape[:axis] + layers.shape[axis + 1 :]
        and result.stride() == layers.stride()[:axis] + layers.stride()[axis + 1 :]
        and result.storage_offset() == layers.storage_offset() + (layers.shape[axis] - 1) * layers.stride(axis)
        and result.dtype == layers.dtype
    )
    # A detached slice, or one whose own gradient is looked at, must stay itself.
    is_transparent = result.requires_grad == layers.requires_grad and not result.retains_grad
    return is_slice and is_transparent and not result._backward_hooks


def pieces_of(
    layers: Tensor,  # [L, ...]
    result: Tensor,  # [...]
    others: int,
    is_last: bool,
) -> tuple[Tensor, ...]:  # together [others + 1, ...]
    """The first `others` layers and `result`: `layers` itself where that is all of it, which saves the copy."""
    if is_last and others == len(layers) - 1:
        return (layers,)
    # The gradient of a slice would be a zeroed tensor and a copy into it.
    return layers.split((others, len(layers) - others))[0], result[None]


def united(sources: Iterable[Pieces]) -> list[Part]:
    """Everything of equal shape becomes one set, in one copy."""
    groups: dict[tuple[torch.Size, torch.dtype], list[Pieces]] = {}
    for source in sources:
        groups.setdefault((source.logits[0].shape[1:], source.logits[0].dtype), []).append(source)
    return [
        Part(
            _joined([piece for source in group for piece in source.logits]),
            _joined([piece for source in group for piece in source.boxes]),
            tuple(suffix for source in group for suffix in source.suffixes),
        )
        for group in groups.values()
    ]


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def pack(
    labels: Sequence[Mapping[str, Tensor]], device: torch.device, num_labels: int, with_masks: bool = False
) -> Targets:
    """The targets of transformers' models; masks only where a loss needs them.

    Raises:
        ValueError: annotations are malformed or, if they are on the CPU, a label is not in ``[0, num_labels)``, a box
            not finite, of negative size or in pixels; the message names the image.
    """
    for image, own in enumerate(labels):
        if "class_labels" not in own:
            raise ValueError(f"labels of image {image} of the batch: 'class_labels' is missing, got {sorted(own)}")
    names = {"class_labels": "labels", "boxes": "boxes"} | ({"masks": "masks"} if with_masks else {})
    renamed = [{name: own[key] for key, name in names.items() if key in own} for own in labels]
    has_values = not any(isinstance(own.get("class_labels"), FakeTensor) for own in labels)
    return Targets.pack(renamed, num_labels, check_values=has_values).to(device)


def losses_of(
    part: Part,
    query_of_target: Tensor,  # [N, T] int32
    targets: Targets,
    num_boxes: Tensor | None,  # []
    weights: tuple[tuple[float, ...], ...],  # of each layer, in the order of TERMS
    loss: ClassLoss,
) -> Losses:
    weight = constant(weights, part.logits.device)
    found = weighted_set_loss(
        part.logits,
        part.boxes,
        query_of_target,
        targets.labels,
        targets.boxes,
        targets.offsets,
        weight,
        num_boxes,
        loss.class_weight,
        loss.kind,  # type: ignore[arg-type]
        loss.alpha,
        loss.gamma,
    )
    return Losses(found.total, found.losses, weight, part.suffixes)


def total_of(losses: Sequence[Losses]) -> Tensor:
    total = losses[0].total
    for other in losses[1:]:
        total = total + other.total
    return total


_constants = Constants()


def constant(numbers: tuple[Any, ...], device: torch.device) -> Tensor:
    """A float32 tensor, kept: the copy to a device waits once."""
    return _constants.get((numbers, device), lambda: torch.tensor(numbers, dtype=torch.float32).to(device))


def named(
    values: Tensor,  # [N, terms]
    suffixes: tuple[str, ...],
    entries: Entries,
) -> dict[str, Tensor]:
    """Each number under its name with the layer's suffix; the gradients return to `values` in one piece."""
    names, positions, keeps = _places(suffixes, entries, values.shape[1])
    if torch.compiler.is_compiling():
        flat = values.flatten().unbind()
        tensors: Sequence[Tensor] = [
            flat[at].clone() if keep else flat[at].detach().clone() for at, keep in zip(positions, keeps, strict=True)
        ]
    else:
        tensors = _Entries.apply(values, positions, keeps)
    return dict(zip(names, tensors, strict=True))


@lru_cache(maxsize=1024)
def _places(suffixes: tuple[str, ...], entries: Entries, terms: int) -> tuple[list[str], list[int], list[bool]]:
    order = sorted(range(len(suffixes)), key=lambda row: suffixes[row] != "")  # the result comes first
    rows = [(row, suffixes[row], *entry) for row in order for entry in entries]
    names = [name + suffix for _, suffix, name, _, _ in rows]
    return names, [row * terms + column for row, _, _, column, _ in rows], [keeps for *_, keeps in rows]


@torch.no_grad()
def objects_found_error(
    logits: Tensor,  # [N, B, Q, C]
    offsets: Tensor,  # [B + 1] int32
) -> Tensor:  # [N]
    """Mean over images of |queries with a probability above one half - targets|, of sigmoid models."""
    found = (logits.amax(-1) > 0).sum(-1)
    return (found - offsets.diff()).abs().mean(-1, dtype=torch.float32)


def in_order(losses: dict[str, Tensor], suffixes: Iterable[str], names: Sequence[str]) -> dict[str, Tensor]:
    """The same entries layer by layer in the order of `suffixes`."""
    wanted = [name + suffix for suffix in suffixes for name in names]
    return {name: losses[name] for name in wanted if name in losses}


class Matchers:
    """Matchers that are kept from call to call, so that they can report."""

    def __init__(self, invalid: str) -> None:
        self.invalid = invalid
        self._matchers: dict[tuple[Any, ...], HungarianMatcher] = {}

    def get(self, costs: tuple[float, float, float], kind: str, alpha: float, gamma: float) -> HungarianMatcher:
        """The matcher with these costs of class, box and GIoU."""
        key = (*costs, kind, alpha, gamma)
        if key not in self._matchers:
            self._matchers[key] = HungarianMatcher(
                *costs,
                kind=kind,  # type: ignore[arg-type]
                alpha=alpha,
                gamma=gamma,
                invalid=self.invalid,  # type: ignore[arg-type]
            )
        return self._matchers[key]

    def report(self) -> str | None:
        found = [report for report in (matcher.report() for matcher in self._matchers.values()) if report is not None]
        return "; ".join(map(str, found)) or None


def predictions_of(part: Part) -> Predictions:
    return Predictions(part.logits, part.boxes)
