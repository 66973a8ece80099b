"""A criterion with the names of another code base and sets of layers beside the decoder's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from detr_fast.captured import CapturedCriterion
from detr_fast.criterion import SetCriterion, _Matched
from detr_fast.integrations.layer_losses import (
    Entry,
    LayerLosses,
    ListedTargets,
    at_least_one,
    denoising_pairs,
    suffixes_of,
)
from detr_fast.integrations.mode import Mode, check_mode, check_same_mode
from detr_fast.matcher import HungarianMatcher
from detr_fast.ops.dialect import DETR, Dialect
from detr_fast.ops.set_loss import TERMS, LossKind, set_loss
from detr_fast.structures import Predictions, StaticTargets, Targets

Outputs = Mapping[str, Any]


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

    Raises:
        ValueError: an unknown loss or mode, alpha out of range, or a matcher of this package that computes otherwise:
            of another mode, or by softmax for a sigmoid loss, whose last label it would take for "no object".
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
        check_same_mode(name, mode, matcher)
        for loss in losses:
            if loss not in self.entries:
                raise ValueError(f"{name}: losses must be of {', '.join(self.entries)}, got {loss!r}")
        check_focal_alpha(name, alpha)
        if isinstance(matcher, HungarianMatcher) and matcher.kind == "softmax" and kind != "softmax":
            raise ValueError(
                f"{name}: matcher must have a sigmoid class cost, as the class loss; one by softmax would take the "
                f"last of {num_classes} labels for 'no object'"
            )
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
        num_boxes, predictions = at_least_one(matched.num_boxes, matched.targets.offsets), matched.predictions
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

    def denoised(
        self, known: Predictions | Outputs, targets: Targets, num_boxes: Tensor, groups: int, stride: int
    ) -> tuple[Predictions, MatchedLayers]:
        """The layers of denoising queries and their losses: target t of an image has query ``group * stride + t``.

        Raises:
            ValueError: there are more or fewer queries, or more targets than queries of a group.
        """
        predictions, _ = self.structured(known, targets)
        queries, name = predictions.logits.shape[2], type(self).__name__
        if groups < 1 or queries != groups * stride:
            raise ValueError(f"{name}: denoising queries must be {groups} groups of {stride}, got {queries} queries")
        if targets.max_count > stride and not isinstance(targets, StaticTargets):  # whose count is a bound
            raise ValueError(
                f"{name}: a denoising group must have a query for each of {targets.max_count} targets, got {stride}"
            )
        query, repeated = denoising_pairs(targets, groups, stride)
        query_of_target = query.repeat(len(predictions.logits), 1)
        values = self.values(predictions, repeated, query_of_target, num_boxes * groups)
        return predictions, MatchedLayers(values, suffixes_of(len(values), "_dn", "_dn_{}"), query_of_target)

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
        return self.weighted(self(outputs, targets), joint)

    def weighted(self, losses: dict[str, Tensor], joint: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """What :meth:`weighted_loss` returns, from what ``forward`` does."""
        if joint is not None:
            raise ValueError(f"{type(self).__name__}.weighted_loss: joint must be None for outputs with further sets")
        return self.weighted_sum(losses), {name: value.detach() for name, value in losses.items()}

    def capture(self, example: Predictions | Outputs, capacity: int, max_count: int | None = None) -> CapturedCriterion:
        found = self._sets_beside(example)
        if found is not None:
            raise ValueError(
                f"{type(self).__name__}.capture: losses must be of decoder layers alone, matched one to one, here also "
                f"of {found}"
            )
        return super().capture(example, capacity, max_count)

    def _sets_beside(self, outputs: Predictions | Outputs) -> str | None:
        """The first set that has losses beside the decoder layers of `outputs`."""
        if isinstance(outputs, Predictions):
            return None
        return next((name for name in self.further_sets if name in outputs), None)


class FocalAlpha:
    """The published name of `alpha`."""

    alpha: float

    @property
    def focal_alpha(self) -> float:
        return self.alpha

    @focal_alpha.setter
    def focal_alpha(self, value: float) -> None:
        self.alpha = value


def zeros_of(names: Sequence[str], suffixes: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """Zeros under the names of losses of denoising queries, where there are none."""
    wanted = [f"{name}_dn{suffix}" for suffix in suffixes for name in names]
    return dict(zip(wanted, torch.zeros(len(wanted), device=device).unbind(), strict=True))


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
