"""HungarianMatcher and SetCriterion of IDEA-Research/DINO, ``models/dino/matcher.py`` and ``models/dino/dino.py``.

from detr_fast.integrations.dino import SetCriterion, build_matcher
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from detr_fast import matcher
from detr_fast.criterion import _Matched
from detr_fast.integrations import deformable_detr
from detr_fast.integrations.layer_losses import Entry, ListedTargets, cardinality_error
from detr_fast.integrations.layered_criterion import (
    FocalAlpha,
    LayeredCriterion,
    MatchedLayers,
    Outputs,
    policy_of,
    zeros_of,
)
from detr_fast.integrations.mode import Mode, check_mode
from detr_fast.matcher import Pairs, pairs_of
from detr_fast.ops.set_loss import TERMS
from detr_fast.structures import Predictions, Targets

_OF_CENTER, _OF_SIZE = Entry("loss_xy", "xy", has_gradient=False), Entry("loss_hw", "hw", has_gradient=False)
_ENTRIES = {
    **deformable_detr.ENTRIES,
    "boxes": (*deformable_detr.ENTRIES["boxes"], _OF_CENTER, _OF_SIZE),
}
_WITHOUT_DENOISING = ("loss_bbox", "loss_giou", "loss_ce", "loss_xy", "loss_hw", "cardinality_error")


class HungarianMatcher(FocalAlpha, matcher.HungarianMatcher):
    """Matcher of DINO: class cost of the focal loss with alpha `focal_alpha` and gamma 2.

    Args:
        focal_alpha: in [0, 1].
        mode: as of :class:`detr_fast.integrations.deformable_detr.HungarianMatcher`.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_bbox: float = 1,
        cost_giou: float = 1,
        focal_alpha: float = 0.25,
        *,
        mode: Mode = "stable",
    ) -> None:
        check_mode("HungarianMatcher", mode)
        super().__init__(cost_class, cost_bbox, cost_giou, alpha=focal_alpha, gamma=2.0, **policy_of(mode))
        self.mode = mode


class SetCriterion(FocalAlpha, LayeredCriterion):
    """Criterion of DINO: sigmoid focal loss, L1, GIoU of decoder, denoising groups and encoder.

    ``criterion(outputs, targets)`` returns unweighted 0-d tensors: ``loss_ce``, ``class_error``, ``cardinality_error``,
    ``loss_bbox``, ``loss_giou`` and, without gradient, ``loss_xy`` and ``loss_hw`` (``loss_mask``, ``loss_dice``) of
    the last layer; all but class_error and masks with ``_0`` to ``_{L-2}`` of the others, ``_interm`` of
    ``outputs["interm_outputs"]``, ``_enc_{i}`` of ``outputs["enc_outputs"]``, and ``_dn`` and ``_dn_{i}`` of the
    layers in ``outputs["dn_meta"]["output_known_lbs_bboxes"]``; these are zero in evaluation or without denoising.
    Denoising query ``group * (pad_size / num_dn_group) + t`` belongs to target t; its losses are divided by the number
    of groups, too.

    With ``return_indices=True`` it returns ``(losses, matchings)``: pairs of decoder layers 0 to L - 2, of
    "interm_outputs" and "enc_outputs", and last of the last layer. That waits for the device; nothing else does.

    Each set is matched in one call and its losses computed in another. As published, cardinality_error takes the last
    class for "no object", which it is not here. The published code fails with masks and denoising together; here
    masks are then of the last layer only.

    Args:
        num_classes, focal_alpha, mode: as of :class:`detr_fast.integrations.deformable_detr.SetCriterion`, which also
            says what becomes of faulty annotations.
    """

    entries = _ENTRIES
    terms = (*TERMS, "xy", "hw")

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        focal_alpha: float,
        losses: Sequence[str],
        *,
        mode: Mode = "stable",
    ) -> None:
        super().__init__(num_classes, matcher, weight_dict, losses, mode, alpha=focal_alpha)

    @overload
    def forward(
        self, outputs: Predictions | Outputs, targets: ListedTargets, return_indices: Literal[False] = False
    ) -> dict[str, Tensor]: ...
    @overload
    def forward(
        self, outputs: Predictions | Outputs, targets: ListedTargets, return_indices: Literal[True]
    ) -> tuple[dict[str, Tensor], list[Pairs]]: ...
    def forward(
        self, outputs: Predictions | Outputs, targets: ListedTargets, return_indices: bool = False
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], list[Pairs]]:
        predictions, packed, decoder, num_boxes = self.decoder(outputs, targets)
        further: Outputs = {} if isinstance(outputs, Predictions) else outputs
        sets = [decoder]
        proposals = [(own, f"_enc_{i}") for i, own in enumerate(further.get("enc_outputs", ()))]
        if "interm_outputs" in further:
            proposals.insert(0, (further["interm_outputs"], "_interm"))
        sets += [self.evaluate(own, packed, [suffix], num_boxes, targets) for own, suffix in proposals]

        meta = further.get("dn_meta")
        masks = self._mask_losses(_Matched(predictions, packed, decoder.query_of_target, num_boxes))
        if self.training and meta and "output_known_lbs_bboxes" in meta:
            losses = self.dictionary(*sets, self._denoised(meta, packed, num_boxes)) | masks
        else:
            losses = self.dictionary(*sets) | masks
            losses |= zeros_of(_WITHOUT_DENOISING, decoder.suffixes, packed.offsets.device)
        if not return_indices:
            return losses
        rows = [row for own in sets for row in own.query_of_target]
        last = rows.pop(len(predictions.logits) - 1)
        return losses, [pairs_of(row, packed.offsets) for row in (*rows, last)]

    def _denoised(self, meta: dict[str, Any], targets: Targets, num_boxes: Tensor) -> MatchedLayers:
        groups, size = meta["num_dn_group"], meta["pad_size"]
        if groups < 1 or size % groups != 0:
            raise ValueError(f"SetCriterion: pad_size of dn_meta must be a multiple of {groups} groups, got {size}")
        known = meta["output_known_lbs_bboxes"]
        predictions, layers = self.denoised(known, targets, num_boxes, groups, size // groups)
        if "cardinality" not in self.losses:
            return layers
        at, values = self.terms.index("cardinality_error"), layers.values
        found = cardinality_error(predictions.logits, targets.offsets).to(values.dtype)  # each target counted once
        return layers._replace(values=torch.cat([values[:, :at], found[:, None], values[:, at + 1 :]], dim=1))

    def values(
        self, predictions: Predictions, targets: Targets, query_of_target: Tensor, num_boxes: Tensor
    ) -> Tensor:  # [L, terms]
        values = super().values(predictions, targets, query_of_target, num_boxes)
        parts = center_and_size_distance(predictions.boxes, targets, query_of_target) / num_boxes
        return torch.cat([values, parts.to(values.dtype)], dim=1)

    def _sets_beside(self, outputs: Predictions | Outputs) -> str | None:
        return "denoising queries"


@torch.no_grad()
def center_and_size_distance(
    boxes: Tensor,  # [L, B, Q, 4] cxcywh
    targets: Targets,
    query_of_target: Tensor,  # [L, T] int32, -1 = unmatched
) -> Tensor:
    """The two halves of the L1 distance of matched boxes, of centers and of sizes, summed: ``[L, 2]``."""
    rows = torch.arange(len(targets.labels), device=boxes.device, dtype=torch.int32)
    image = targets.image_of_row()
    query = query_of_target.long()
    layer = torch.arange(len(boxes), device=boxes.device)[:, None]
    chosen = boxes[layer, image, query.clamp(min=0)]  # [L, T, 4]
    is_matched = (query >= 0) & (rows < targets.offsets[-1])
    distance = (chosen - targets.boxes).abs().where(is_matched[..., None], 0)
    return distance.view(*distance.shape[:2], 2, 2).sum((1, 3))


def build_matcher(args: Namespace, *, mode: Mode = "stable") -> HungarianMatcher:
    """The matcher of the published command line: ``matcher_type``, ``set_cost_*`` and ``focal_alpha``."""
    if args.matcher_type != "HungarianMatcher":
        raise ValueError(f"build_matcher: matcher_type must be 'HungarianMatcher', got {args.matcher_type!r}")
    costs = (args.set_cost_class, args.set_cost_bbox, args.set_cost_giou)
    return HungarianMatcher(*costs, args.focal_alpha, mode=mode)
