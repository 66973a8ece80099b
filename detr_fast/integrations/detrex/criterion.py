"""Criteria of detrex: SetCriterion, TwoStageCriterion, DINOCriterion and Group DETR's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detr_fast import matcher
from detr_fast.integrations.detrex.matcher import DIALECT, GroupHungarianMatcher, check_queries
from detr_fast.integrations.layer_losses import Entry, ListedTargets, box_count, suffixes_of, without_class
from detr_fast.integrations.layered_criterion import LayeredCriterion, MatchedLayers, Outputs, zeros_of
from detr_fast.integrations.mode import Mode
from detr_fast.matcher import pairs_of
from detr_fast.ops.set_loss import LossKind
from detr_fast.structures import Predictions, Targets

_ENTRIES = {
    "class": (Entry("loss_class", "class"),),
    "boxes": (Entry("loss_bbox", "bbox"), Entry("loss_giou", "giou")),
}
_DENOISING = ("output_known_lbs_bboxes", "dn_num", "single_padding")
_WITHOUT_DENOISING = ("loss_bbox", "loss_giou", "loss_class")
_KINDS: dict[str, LossKind] = {"focal_loss": "focal", "ce_loss": "softmax"}


class _Batch(NamedTuple):
    targets: Targets
    listed: ListedTargets  # as they were given
    num_boxes: Tensor  # []
    decoder: MatchedLayers


class SetCriterion(LayeredCriterion):
    """detrex's SetCriterion: class loss, L1 and GIoU of all decoder layers.

    ``criterion(outputs, targets)`` returns unweighted 0-d tensors: ``loss_class``, ``loss_bbox`` and ``loss_giou`` of
    the last layer, with ``_0`` to ``_{L-2}`` of the others. With ``return_indices=True`` it returns
    ``(losses, matchings)``: pairs of layers 0 to L - 1, for which it waits for the device. Nothing else is read back.

    Args:
        losses: of "class" and "boxes".
        eos_coef: weight of "no object" in "ce_loss"; `empty_weight` is in the state dict then.
        loss_class_type: "focal_loss" with `alpha` in [0, 1] and `gamma` on logits of `num_classes`, or "ce_loss" with
            one more logit. The published loss without alpha, for a negative one, is the one of 0.5 with twice its
            weight.
        mode: that of the matcher, whose docstring says what differs; the losses have the published numbers in both.

    Raises:
        ValueError: `mode` is not that of a matcher that has one, or a matcher with "ce_cost" is given to "focal_loss",
            whose last label it would take for "no object" (the published one does not).
    """

    entries = _ENTRIES

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        losses: Sequence[str] = ("class", "boxes"),
        eos_coef: float | None = 0.1,
        loss_class_type: str = "focal_loss",
        alpha: float = 0.25,
        gamma: float = 2.0,
        *,
        mode: Mode = "stable",
    ) -> None:
        name = type(self).__name__
        if loss_class_type not in _KINDS:
            raise ValueError(
                f"{name}: loss_class_type must be {' or '.join(map(repr, _KINDS))}, got {loss_class_type!r}"
            )
        if eos_coef is None and loss_class_type == "ce_loss":
            raise ValueError(f"{name}: eos_coef must be a number for loss_class_type 'ce_loss', got None")
        weight = 1.0 if eos_coef is None else eos_coef
        options: dict[str, Any] = {"kind": _KINDS[loss_class_type], "alpha": alpha, "gamma": gamma, "eos_coef": weight}
        super().__init__(num_classes, matcher, weight_dict, losses, mode, dialect=DIALECT, **options)
        self.loss_class_type = loss_class_type

    def forward(self, outputs: Predictions | Outputs, targets: ListedTargets, return_indices: bool = False) -> Any:
        batch = self._batch(outputs, targets)
        sets = self._sets(outputs, batch)
        losses = self.dictionary(*sets)
        if not return_indices:
            return losses
        return losses, [pairs_of(row, batch.targets.offsets) for row in sets[0].query_of_target]

    def _batch(self, outputs: Predictions | Outputs, targets: ListedTargets) -> _Batch:
        _, packed, decoder, num_boxes = self.decoder(outputs, targets)
        return _Batch(packed, targets, num_boxes, decoder)

    def _sets(self, outputs: Predictions | Outputs, batch: _Batch) -> list[MatchedLayers]:
        """The decoder's layers, and sets beside them."""
        return [batch.decoder]


class TwoStageCriterion(SetCriterion):
    """detrex's TwoStageCriterion: :class:`SetCriterion` and, with ``_enc``, losses of ``outputs["enc_outputs"]``.

    Args:
        two_stage_binary_cls: every target has label 0 for the proposals.
        mode: "compat": with `two_stage_binary_cls` the dictionaries of `targets` are left with labels of 0, as the
            published code leaves them, which :class:`DINOCriterion` then takes for denoising, and the next user of the
            targets, too. "stable": targets stay as they are. Otherwise as of :class:`SetCriterion`.
    """

    further_sets = ("enc_outputs",)

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        losses: Sequence[str] = ("class", "boxes"),
        eos_coef: float | None = None,
        loss_class_type: str = "focal_loss",
        alpha: float = 0.25,
        gamma: float = 2.0,
        two_stage_binary_cls: bool = False,
        *,
        mode: Mode = "stable",
    ) -> None:
        options = (eos_coef, loss_class_type, alpha, gamma)
        super().__init__(num_classes, matcher, weight_dict, losses, *options, mode=mode)
        self.two_stage_binary_cls = two_stage_binary_cls

    def _sets(self, outputs: Predictions | Outputs, batch: _Batch) -> list[MatchedLayers]:
        sets = super()._sets(outputs, batch)
        if isinstance(outputs, Predictions) or "enc_outputs" not in outputs:
            return sets
        own, listed = batch.targets, batch.listed
        if self.two_stage_binary_cls:
            own = listed = without_class(own)
            if self.mode == "compat" and not isinstance(batch.listed, Targets):
                for target in batch.listed:
                    target["labels"] = torch.zeros_like(target["labels"])  # type: ignore[index]
        return [*sets, self.evaluate(outputs["enc_outputs"], own, ["_enc"], batch.num_boxes, listed)]


class DINOCriterion(TwoStageCriterion):
    """detrex's DINOCriterion: :class:`TwoStageCriterion` and losses of denoising groups.

    ``criterion(outputs, targets, dn_metas)`` adds, with ``_dn`` and ``_dn_{i}``, losses of the layers in
    ``dn_metas["output_known_lbs_bboxes"]``; zeros without them. Query ``group * single_padding + t`` belongs to
    target t, and losses are divided by ``dn_num``, too.

    Args:
        mode: as of :class:`TwoStageCriterion`: with `two_stage_binary_cls` and ``enc_outputs``, "compat" denoises with
            labels of 0, "stable" with the real ones.
    """

    def forward(  # type: ignore[override]
        self,
        outputs: Predictions | Outputs,
        targets: ListedTargets,
        dn_metas: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        batch = self._batch(outputs, targets)
        sets = self._sets(outputs, batch)
        if dn_metas and "output_known_lbs_bboxes" in dn_metas:
            forgets = self.mode == "compat" and self.two_stage_binary_cls and len(sets) > 1
            own = without_class(batch.targets) if forgets else batch.targets
            known, groups, stride = (dn_metas[name] for name in _DENOISING)
            return self.dictionary(*sets, self.denoised(known, own, batch.num_boxes, groups, stride)[1])
        zeros = zeros_of(_WITHOUT_DENOISING, sets[0].suffixes, batch.num_boxes.device)
        return self.dictionary(*sets) | zeros

    def weighted_loss(  # type: ignore[override]
        self,
        outputs: Predictions | Outputs,
        targets: ListedTargets,
        dn_metas: Mapping[str, Any] | None = None,
        joint: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum to differentiate, ``[]``, and all entries of ``forward``, detached; `joint` must be None."""
        return self.weighted(self(outputs, targets, dn_metas), joint)

    def _sets_beside(self, outputs: Predictions | Outputs) -> str | None:
        return "denoising queries"


class GroupSetCriterion(LayeredCriterion):
    """Criterion of detrex's Group DETR: in training, every group of queries has all targets.

    Entries and `mode` as of :class:`SetCriterion`; box and class losses are divided by the number of groups, too.

    Args:
        matcher: a :class:`GroupHungarianMatcher`, or another :class:`detr_fast.HungarianMatcher`; a class with a
            ``forward`` of its own is refused, because all groups are matched in one call of ``match_groups``.
        group_nums: groups of queries in training; in evaluation there is one.
    """

    entries = _ENTRIES

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        group_nums: int = 11,
        losses: Sequence[str] = ("class", "boxes"),
        alpha: float = 0.25,
        gamma: float = 2.0,
        *,
        mode: Mode = "stable",
    ) -> None:
        super().__init__(num_classes, matcher, weight_dict, losses, mode, alpha=alpha, gamma=gamma, dialect=DIALECT)
        self.group_nums = group_nums

    def forward(self, outputs: Predictions | Outputs, targets: ListedTargets) -> dict[str, Tensor]:
        groups = self.group_nums if self.training else 1
        if groups == 1:
            return super().forward(outputs, targets)
        known = (matcher.HungarianMatcher.forward, GroupHungarianMatcher.forward)
        if not isinstance(self.matcher, matcher.HungarianMatcher) or type(self.matcher).forward not in known:
            raise TypeError(
                "GroupSetCriterion: matcher must be a GroupHungarianMatcher of detr_fast without a forward of its own, "
                f"got {type(self.matcher)}"
            )
        self.latest = None  # diagnostics are of matchings one to one
        predictions, packed = self.structured(outputs, targets)
        check_queries("GroupSetCriterion", predictions.logits.shape[2], groups)
        packed = packed.to(predictions.logits.device)
        query_of_target, repeated = self.matcher.match_groups(predictions, packed, groups), packed.repeated(groups)
        values = self.values(predictions, repeated, query_of_target, box_count(repeated.offsets))
        return self.dictionary(MatchedLayers(values, suffixes_of(len(values)), query_of_target))

    def _sets_beside(self, outputs: Predictions | Outputs) -> str | None:
        return "further groups of queries" if self.training and self.group_nums > 1 else None
