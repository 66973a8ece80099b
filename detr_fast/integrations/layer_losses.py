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
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from detr_fast.captured import CapturedCriterion
from detr_fast.criterion import SetCriterion, _Entries, _Matched, mean_box_count
from detr_fast.integrations.mode import Mode, check_mode
from detr_fast.ops.dialect import DETR, Dialect
from detr_fast.ops.set_loss import TERMS, LossKind, set_loss
from detr_fast.structures import Predictions, Targets

Outputs = Mapping[str, Any]
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
        self._latest: tuple[object, Tensor] | None = None

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
        key = (tuple(known.values()), values.device, values.dtype)
        if self._latest is None or self._latest[0] != key:
            row = [known.get(term, 1.0) for term in self.terms]
            with torch.inference_mode(False):
                self._latest = key, torch.tensor(row, dtype=values.dtype).to(values.device)
        return self._latest[1]


def suffixes_of(layers: int, last: str = "", other: str = "_{}") -> list[str]:
    """Suffixes of decoder layers: "_0", "_1", ... and the last one's. RT-DETR: ``other="_aux_{}"``."""
    return [*(other.format(layer) for layer in range(layers - 1)), last]


def without_class(targets: Targets) -> Targets:
    """With label 0 for all, as encoder proposals of two stages are trained."""
    return replace(targets, labels=torch.zeros_like(targets.labels))


def box_count(offsets: Tensor) -> Tensor:
    """Normaliser of the published code, ``[]`` float32: targets of all ranks by the number of ranks, at least 1."""
    count = mean_box_count(offsets)
    return (offsets[-1].to(torch.float32) if count is None else count).clamp(min=1)


def denoising_pairs(targets: Targets, groups: int, stride: int) -> tuple[Tensor, Targets]:
    """Query of each target in each denoising group ``[T * groups]`` int32, and the targets repeated to match.

    Target t of an image is query ``group * stride + t``. Rows are in the order image, group, target; offsets are still
    those of images, so that both fit set_loss. Nothing is read back.
    """
    repeated = targets.repeated(groups)
    offsets = repeated.offsets  # [B * groups + 1]
    rows = torch.arange(len(repeated.labels), device=offsets.device, dtype=torch.int32)
    problem = (torch.searchsorted(offsets, rows, right=True, out_int32=True) - 1).clamp(max=len(offsets) - 2)
    query = problem % groups * stride + rows - offsets[problem.long()]
    query = query.where(rows < offsets[-1], -1).to(torch.int32)
    most = targets.max_count * groups
    return query, replace(repeated, offsets=offsets[::groups].contiguous(), max_count=most)


@torch.no_grad()
def cardinality_error(logits: Tensor, offsets: Tensor) -> Tensor:
    """``[L]``: mean over images of |queries whose largest logit is not the last - targets|.

    For sets whose pairs are repeated while the published number counts each target once.
    """
    found = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)  # [L, B]
    return (found - offsets.diff()).abs().to(torch.float32).mean(-1)


class MatchedLayers(NamedTuple):
    """Losses of some layers and the matching that they were computed with."""

    values: Tensor  # [N, terms]
    suffixes: Sequence[str]  # of the layers
    query_of_target: Tensor  # [N, T] int32


class LayeredCriterion(SetCriterion):
    """A :class:`SetCriterion` with the names of another code base and sets of layers beside the decoder's.

    A subclass says what the entries of each of its `losses` are, and adds its sets in ``forward``: those that
    :meth:`decoder` and :meth:`evaluate` return go to :meth:`dictionary`. Where `outputs` has one of `further_sets`,
    :meth:`weighted_loss` is the weighted sum of what ``forward`` returns, without its one launch, and :meth:`capture`
    is refused.
    """

    entries: ClassVar[Mapping[str, tuple[Entry, ...]]]
    terms: ClassVar[tuple[str, ...]] = TERMS
    further_sets: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        losses: Sequence[str],
        mode: Mode,
        *,
        kind: LossKind = "focal",
        alpha: float = 0.25,
        gamma: float = 2.0,
        eos_coef: float = 1.0,
        dialect: Dialect = DETR,
    ) -> None:
        name = type(self).__name__
        check_mode(name, mode)
        for loss in losses:
            if loss not in self.entries:
                raise ValueError(f"{name}: losses must be of {', '.join(self.entries)}, got {loss!r}")
        check_focal_alpha(name, alpha)
        options: dict[str, Any] = {"kind": kind, "alpha": alpha, "gamma": gamma, "dialect": dialect}
        super().__init__(num_classes, matcher, weight_dict, eos_coef, [], **options)
        self.losses, self.mode = list(losses), mode
        if kind != "softmax":  # the published criteria have no state then
            self.register_buffer("empty_weight", self.empty_weight, persistent=False)

    def named(self) -> LayerLosses:
        return LayerLosses([entry for loss in self.losses for entry in self.entries[loss]], terms=self.terms)

    def _entries(self, layers: int) -> Iterator[tuple[str, int, bool]]:
        return self.named().positions(suffixes_of(layers))

    def decoder(
        self, outputs: Predictions | Outputs, targets: ListedTargets
    ) -> tuple[Predictions, Targets, MatchedLayers, Tensor]:
        """Predictions and packed targets of the decoder, its layers, and the normaliser ``[]`` of all sets."""
        matched = self._matched(outputs, targets)
        count = matched.targets.offsets[-1].to(torch.float32) if matched.num_boxes is None else matched.num_boxes
        num_boxes, predictions = count.clamp(min=1), matched.predictions
        values = self.values(predictions, matched.targets, matched.query_of_target, num_boxes)
        layers = MatchedLayers(values, suffixes_of(len(values)), matched.query_of_target)
        return predictions, matched.targets, layers, num_boxes

    def evaluate(
        self,
        outputs: Predictions | Outputs,
        targets: Targets,
        suffixes: Sequence[str],
        num_boxes: Tensor,
        listed: ListedTargets | None = None,
    ) -> MatchedLayers:
        """Matches the layers of `outputs` in one call and computes their losses in another.

        A foreign matcher is given `listed` in place of `targets`.
        """
        predictions, _ = self.structured(outputs, targets)
        query_of_target = self._match(predictions, targets, outputs, targets if listed is None else listed)
        values = self.values(predictions, targets, query_of_target, num_boxes)
        return MatchedLayers(values, suffixes, query_of_target)

    def values(
        self, predictions: Predictions, targets: Targets, query_of_target: Tensor, num_boxes: Tensor
    ) -> Tensor:  # [L, terms]
        arguments = _Matched(predictions, targets, query_of_target, num_boxes).arguments()
        return set_loss(*arguments, *self._loss_options(num_boxes))

    def dictionary(self, *sets: MatchedLayers) -> dict[str, Tensor]:
        values = torch.cat([own.values for own in sets]) if len(sets) > 1 else sets[0].values
        return self.named()(values, [suffix for own in sets for suffix in own.suffixes])

    def weighted_loss(
        self, outputs: Predictions | Outputs, targets: ListedTargets, joint: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self._sets_beside(outputs) is None:
            return super().weighted_loss(outputs, targets, joint)
        if joint is not None:
            raise ValueError(f"{type(self).__name__}.weighted_loss: joint must be None for outputs with further sets")
        losses = self(outputs, targets)
        return self.weighted_sum(losses), {name: value.detach() for name, value in losses.items()}

    def capture(self, example: Predictions | Outputs, capacity: int, max_count: int | None = None) -> CapturedCriterion:
        found = self._sets_beside(example)
        if found is not None:
            raise ValueError(
                f"{type(self).__name__}.capture: outputs must be decoder layers alone, matched one to one, got {found}"
            )
        return super().capture(example, capacity, max_count)

    def _sets_beside(self, outputs: Predictions | Outputs) -> str | None:
        """The first set that `outputs` has beside its decoder layers."""
        if isinstance(outputs, Predictions):
            return None
        return next((name for name in self.further_sets if name in outputs), None)


def check_focal_alpha(name: str, alpha: float) -> None:
    """The published losses take any alpha, and a negative one for no weights at all."""
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"{name}: alpha of the focal loss must be in [0, 1], got {alpha}; "
            "a loss without alpha is the one of 0.5 with twice its weight in weight_dict"
        )


def policy_of(mode: Mode) -> dict[str, Any]:
    """Options of a focal :class:`HungarianMatcher`: the published formula and a check, or exact and never waiting."""
    if mode == "compat":
        return {"kind": "focal", "invalid": "raise"}
    return {"kind": "focal_stable", "invalid": "skip"}
