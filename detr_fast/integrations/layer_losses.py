"""Losses of layers under the names of a code base, and what adapters need for sets beside the decoder's.

In the forward of a criterion that has decoder layers, encoder proposals and denoising groups::

    ENTRIES = (Entry("loss_ce", "class"), Entry("class_error", "class_error", ("",)), Entry("loss_bbox", "bbox"))
    self.named = LayerLosses(ENTRIES)                              # in __init__; with weight_dict: weighted
    ...
    num_boxes = box_count(targets.offsets)                         # over ranks, [] at least 1
    decoder = set_loss(..., num_boxes=num_boxes)                   # [L, 5]
    encoder = set_loss(..., num_boxes=num_boxes)                   # [1, 5]
    query_of_target, repeated = denoising_pairs(targets, groups, stride)
    denoised = set_loss(..., num_boxes=num_boxes * groups)         # [L, 5]
    suffixes = (*suffixes_of(L), "_enc", *suffixes_of(L, "_dn", "_dn_{}"))
    return self.named(torch.cat([decoder, encoder, denoised]), suffixes)

Columns may be joined to the five of set_loss, with their names in `terms`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr_fast.criterion import _Entries, mean_box_count
from detr_fast.integrations.constants import Constants
from detr_fast.ops.set_loss import TERMS
from detr_fast.structures import Predictions, Targets

ListedTargets = Targets | Sequence[Mapping[str, Tensor]]


class Entry(NamedTuple):
    """One number of every layer in a code base's dictionary of losses."""

    name: str  # without the layer's suffix
    term: str  # the column
    suffixes: tuple[str, ...] | None = None  # the only suffixes that it has; None: all
    has_gradient: bool = True


class LayerLosses:
    """Turns losses ``[N, terms]`` of N layers into the dictionary of a code base: name + suffix -> 0-d tensor.

    Args:
        entries: what to take of each layer, in this order.
        weight_dict: None: the numbers as they are. Otherwise each is multiplied by the weight of its name without
            suffix, looked up at every call, and entries without a weight are left out.
        terms: names of the columns.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        weight_dict: Mapping[str, float] | None = None,
        terms: Sequence[str] = TERMS,
    ) -> None:
        self.entries, self.weight_dict, self.terms = tuple(entries), weight_dict, tuple(terms)
        for entry in self.entries:
            if entry.term not in self.terms:
                raise ValueError(f"LayerLosses: term of {entry.name} must be of {self.terms}, got {entry.term!r}")
        if weight_dict is not None and len({entry.term for entry in self.entries}) < len(self.entries):
            raise ValueError("LayerLosses: entries must each have a term of their own if they are weighted")
        self._constants = Constants(64)

    def __call__(self, values: Tensor, suffixes: Sequence[str]) -> dict[str, Tensor]:
        """``values [N, terms]`` with a suffix for each row. A row without suffix, the result, is named first.

        Gradients of the tensors return to `values` in one piece; the tensors share no storage that autograd knows of,
        so that callers may multiply them in place.
        """
        if values.shape != (len(suffixes), len(self.terms)):
            raise ValueError(
                f"LayerLosses: values must be [{len(suffixes)}, {len(self.terms)}], got {list(values.shape)}"
            )
        found = list(self.positions(suffixes))
        if self.weight_dict is not None:
            values = values * self._weights(values)
        if torch.compiler.is_compiling():  # which makes one launch of them
            flat = values.flatten().unbind()
            return {name: flat[at].clone() if keeps else flat[at].detach().clone() for name, at, keeps in found}
        tensors = _Entries.apply(values, [at for _, at, _ in found], [keeps for _, _, keeps in found])
        return {name: tensor for (name, _, _), tensor in zip(found, tensors, strict=True)}

    def positions(self, suffixes: Sequence[str]) -> Iterator[tuple[str, int, bool]]:
        """Full name, position in the flat values, and whether it has a gradient."""
        for row in sorted(range(len(suffixes)), key=lambda row: suffixes[row] != ""):
            for entry in self.entries:
                is_wanted = entry.suffixes is None or suffixes[row] in entry.suffixes
                if is_wanted and (self.weight_dict is None or entry.name in self.weight_dict):
                    at = row * len(self.terms) + self.terms.index(entry.term)
                    yield entry.name + suffixes[row], at, entry.has_gradient

    def _weights(self, values: Tensor) -> Tensor:  # [terms]
        """Kept on the device while they stay the same: a copy to it would wait."""
        assert self.weight_dict is not None
        known = {entry.term: float(self.weight_dict.get(entry.name, 1.0)) for entry in self.entries}
        row = [known.get(term, 1.0) for term in self.terms]
        key = (*row, values.device, values.dtype)
        return self._constants.get(key, lambda: torch.tensor(row, dtype=values.dtype).to(values.device))


def suffixes_of(layers: int, last: str = "", other: str = "_{}") -> list[str]:
    """Suffixes of decoder layers: "_0", "_1", ... and the last one's. RT-DETR: ``other="_aux_{}"``."""
    return [*(other.format(layer) for layer in range(layers - 1)), last]


def without_class(targets: Targets) -> Targets:
    """With label 0 for all, as encoder proposals of two stages are trained."""
    return replace(targets, labels=torch.zeros_like(targets.labels))


def at_least_one(
    count: Tensor | None,  # [] float32; None: the targets of this process
    offsets: Tensor,  # [B + 1]
) -> Tensor:
    """What losses are divided by, ``[]`` float32."""
    return (offsets[-1].to(torch.float32) if count is None else count).clamp(min=1)


def box_count(offsets: Tensor) -> Tensor:
    """Normaliser of the published code, ``[]`` float32: targets of all ranks by the number of ranks, at least 1."""
    return at_least_one(mean_box_count(offsets), offsets)


def answers_of(matcher: Any, predictions: Predictions, targets: Targets, **options: Any) -> Iterator[Any]:
    """What a matcher with a code base's call says of each layer. Reads the targets' number back."""
    bounds = [slice(*pair) for pair in pairwise(targets.offsets.tolist())]
    listed = [{"labels": targets.labels[own], "boxes": targets.boxes[own]} for own in bounds]
    for logits, boxes in zip(predictions.logits.detach(), predictions.boxes.detach(), strict=True):
        with torch.no_grad():
            answer = matcher({"pred_logits": logits, "pred_boxes": boxes}, listed, **options)
        yield answer


def denoising_pairs(targets: Targets, groups: int, stride: int) -> tuple[Tensor, Targets]:
    """Query of each target in each denoising group ``[T * groups]`` int32, and the targets repeated to match.

    Target t of an image is query ``group * stride + t``. Nothing is read back.
    """
    repeated, group, target = targets.in_groups(groups)
    is_there = torch.arange(len(group), device=group.device) < repeated.offsets[-1]
    return (group * stride + target).where(is_there, -1).to(torch.int32), repeated


@torch.no_grad()
def cardinality_error(logits: Tensor, offsets: Tensor) -> Tensor:
    """``[L]``: mean over images of |queries whose largest logit is not the last - targets|.

    For sets whose pairs are repeated while the published number counts each target once.
    """
    found = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)  # [L, B]
    return (found - offsets.diff()).abs().to(torch.float32).mean(-1)
