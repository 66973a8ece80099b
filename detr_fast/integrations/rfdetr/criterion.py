"""RF-DETR's criterion for detection: IoU-aware classification of grouped queries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast import matcher as core
from detr_fast.integrations.layer_losses import (
    Entry,
    LayerLosses,
    ListedTargets,
    answers_of,
    box_count,
    suffixes_of,
)
from detr_fast.integrations.mode import Mode, check_mode
from detr_fast.integrations.rfdetr.matcher import (
    DIALECT,
    GAMMA,
    HungarianMatcher,
    check_groups,
    core_matcher,
    following,
    packed_targets,
)
from detr_fast.matcher import check_batch_size, queries_of
from detr_fast.ops.set_loss import TERMS, set_loss
from detr_fast.structures import Predictions, Targets

_ENTRIES = {
    "labels": (Entry("loss_ce", "class"), Entry("class_error", "class_error", ("",), has_gradient=False)),
    "boxes": (Entry("loss_bbox", "bbox"), Entry("loss_giou", "giou")),
    "cardinality": (Entry("cardinality_error", "cardinality_error", has_gradient=False),),
}


class SetCriterion(nn.Module):
    """Drop-in for ``rfdetr.models.criterion.SetCriterion`` (rfdetr 1.11) of detection models.

    ``criterion(outputs, targets, num_boxes=None)`` returns the unweighted ``loss_ce``, ``class_error`` (of the last
    layer), ``loss_bbox``, ``loss_giou`` and ``cardinality_error``, with suffix ``_0`` and so on for ``aux_outputs`` and
    ``_enc`` for ``enc_outputs``. All layers of one shape, and all groups, are matched in one call and their losses and
    gradients computed in another; nothing is read back from a device.

    In training there are `group_detr` groups of queries, in evaluation one. Losses are divided by the number of targets
    (`num_boxes_for_targets`) or by the `num_boxes` that is given, which is taken as it is, also below 1.

    Both modes compute the same numbers wherever all costs are finite; see :class:`HungarianMatcher`. Differences to
    RF-DETR in both modes:

    - Losses are computed and returned in float32, also of half types.
    - A matched box of negative width or height has GIoU NaN; there it counts as a box without area. Mode "stable" does
      not match such boxes.

    Args:
        num_classes: as there: kept; the number of logits decides.
        matcher: a :class:`HungarianMatcher`, or RF-DETR's own, in whose place this package computes with its weights;
            anything else is called layer by layer, ``matcher(outputs, targets, group_detr=...)``.
        ia_bce_loss: IoU-aware binary cross-entropy, RF-DETR's default configuration; False: sigmoid focal loss.
        use_varifocal_loss, use_position_supervised_loss: an error unless `ia_bce_loss` overrules them.
        losses: of "labels", "boxes", "cardinality".
        mask_point_sample_ratio, num_keypoints_per_class: kept.
        mode: of the matching where `matcher` is RF-DETR's own; a :class:`HungarianMatcher` has its mode itself.

    Raises:
        ValueError: an option that is not computed here, malformed targets (with the image), or what the matcher raises.

    Source: Robinson et al., "RF-DETR", 2025; Chen et al., "LW-DETR", 2024 (IoU-aware loss).
    """

    supports_loss_normalizer_override: bool = True

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        focal_alpha: float,
        losses: list[str],
        group_detr: int = 1,
        sum_group_losses: bool = False,
        use_varifocal_loss: bool = False,
        use_position_supervised_loss: bool = False,
        ia_bce_loss: bool = False,
        mask_point_sample_ratio: int = 16,
        num_keypoints_per_class: list[int] | None = None,
        *,
        mode: Mode = "stable",
    ) -> None:
        super().__init__()
        check_mode("SetCriterion", mode)
        self.num_classes, self.matcher, self.weight_dict = num_classes, matcher, weight_dict
        self.focal_alpha, self.losses = focal_alpha, losses
        self.group_detr, self.sum_group_losses = group_detr, sum_group_losses
        self.use_varifocal_loss, self.use_position_supervised_loss = use_varifocal_loss, use_position_supervised_loss
        self.ia_bce_loss, self.mask_point_sample_ratio = ia_bce_loss, mask_point_sample_ratio
        self.num_keypoints_per_class = num_keypoints_per_class or []
        self.mode = mode
        self._computes: core.HungarianMatcher | None = None  # for a matcher of RF-DETR's own
        problem = unsupported(self)
        if problem is not None:
            raise ValueError(f"SetCriterion: {problem}")

    def enable_compiled_detection_losses(self) -> None:
        """RF-DETR calls it where it compiles its model; there is nothing to compile here."""

    def num_boxes_for_targets(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """What losses are divided by, ``[]`` float32 on the outputs' device: the mean over ranks, at least 1."""
        counts = sum(len(target["labels"]) for target in targets)
        device = next(value for value in outputs.values() if isinstance(value, Tensor)).device
        return box_count(torch.full((1,), counts * _times(self), device=device))

    def forward(
        self,
        outputs: Mapping[str, Any],
        targets: ListedTargets,
        num_boxes: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        return criterion_losses(self, self._match, outputs, targets, num_boxes)

    def _match(self, predictions: Predictions, targets: Targets, groups: int) -> Tensor:
        if isinstance(self.matcher, HungarianMatcher):
            return self.matcher.match_layers(predictions, targets, groups)
        if not _is_rfdetrs(self.matcher):
            return _match_by(self.matcher, predictions, targets, groups)
        if self._computes is None:
            self._computes = core_matcher(self.matcher, self.mode)
        return following(self._computes, self.matcher).match_groups(predictions, targets, groups)

    def matcher_report(self) -> str | None:
        """What the matcher skipped since the last report, or None. Waits for the device."""
        matcher = self.matcher if isinstance(self.matcher, HungarianMatcher) else self._computes
        found = None if matcher is None else matcher.report()
        return None if found is None else str(found)


def criterion_losses(
    criterion: Any,  # with RF-DETR's attributes
    match: Callable[[Predictions, Targets, int], Tensor],
    outputs: Mapping[str, Any],
    targets: ListedTargets,
    num_boxes: Tensor | float | None,
) -> dict[str, Tensor]:
    """RF-DETR's dictionary of losses; `match` takes predictions, targets and the number of groups."""
    sets, suffixes = _sets_of(outputs)
    logits = sets[0].logits
    check_batch_size("SetCriterion", logits.shape[1], len(targets))
    groups = criterion.group_detr if criterion.training else 1
    packed = packed_targets(outputs, targets, logits.shape[-1]).to(logits.device)
    divisor = _divisor(num_boxes, logits.device)
    count = box_count(packed.offsets[-1:] * _times(criterion)) if divisor is None else None
    values, repeated = [], packed.repeated(groups)
    for predictions in sets:
        check_groups(predictions.logits.shape[2], groups)
        found = match(predictions, packed, groups)
        values.append(_losses(criterion, predictions, found, repeated, packed.offsets, count))
    table = torch.cat(values)
    if divisor is not None:
        table = torch.cat([table[:, :3] / divisor, table[:, 3:]], 1)
    entries = [entry for name in criterion.losses for entry in _ENTRIES[name]]
    return LayerLosses(entries)(table, suffixes)


def _sets_of(outputs: Mapping[str, Any]) -> tuple[list[Predictions], list[str]]:
    """Predictions that are matched together, and the suffix of each of their layers."""
    decoder = Predictions.from_dict(outputs)
    suffixes = suffixes_of(len(decoder.logits))
    if "enc_outputs" not in outputs:
        return [decoder], suffixes
    encoder = Predictions.from_dict(outputs["enc_outputs"])
    suffixes = [*suffixes, "_enc"]
    if encoder.logits.shape[1:] != decoder.logits.shape[1:]:
        return [decoder, encoder], suffixes
    logits, boxes = torch.cat([decoder.logits, encoder.logits]), torch.cat([decoder.boxes, encoder.boxes])
    return [Predictions(logits, boxes)], suffixes


def _losses(
    criterion: Any,
    predictions: Predictions,
    query_of_target: Tensor,  # [L, T * groups]
    repeated: Targets,
    offsets: Tensor,  # [B + 1] of targets counted once
    count: Tensor | None,  # []; None: 1
) -> Tensor:  # [L, terms]
    values = set_loss(
        predictions.logits,
        predictions.boxes,
        query_of_target,
        repeated.labels,
        repeated.boxes,
        repeated.offsets,
        torch.ones((), device=offsets.device) if count is None else count,
        kind="ia_bce" if criterion.ia_bce_loss else "focal_stable",
        alpha=criterion.focal_alpha,
        gamma=GAMMA,
        dialect=DIALECT,
    )
    at = TERMS.index("cardinality_error")
    if "cardinality" not in criterion.losses:
        return values
    cardinality = _cardinality_error(predictions.logits, offsets).to(values.dtype)
    return torch.cat([values[:, :at], cardinality[:, None], values[:, at + 1 :]], 1)


@torch.no_grad()
def _cardinality_error(logits: Tensor, offsets: Tensor) -> Tensor:
    """``[L]``: mean over images of |queries whose largest probability is above a half - targets|."""
    confident = (logits.amax(-1).sigmoid() > 0.5).sum(-1)  # [L, B]
    return (confident - offsets.diff()).abs().float().mean(-1)


def _times(criterion: Any) -> int:
    return criterion.group_detr if criterion.training and not criterion.sum_group_losses else 1


def _divisor(num_boxes: Tensor | float | None, device: torch.device) -> Tensor | None:
    if num_boxes is None:
        return None
    if isinstance(num_boxes, Tensor):
        return num_boxes.to(device=device, dtype=torch.float32)
    return torch.full((), float(num_boxes), dtype=torch.float32, device=device)


def _is_rfdetrs(matcher: Any) -> bool:
    """RF-DETR's own matcher, with nothing around it that wants to be called."""
    module = sys.modules.get("rfdetr.models.matcher")
    is_own = module is not None and type(matcher) is module.HungarianMatcher
    return is_own and not (matcher._forward_pre_hooks or matcher._forward_hooks)


def _match_by(matcher: Any, predictions: Predictions, targets: Targets, groups: int) -> Tensor:
    """As :meth:`HungarianMatcher.match_layers`, by any matcher with RF-DETR's call."""
    counts = targets.offsets.diff().tolist()
    repeated = targets.repeated(groups)
    width = predictions.logits.shape[2] // groups
    rows = []
    for pairs in answers_of(matcher, predictions, targets, group_detr=groups):
        moved = [(queries, queries // width * count + own) for (queries, own), count in zip(pairs, counts, strict=True)]
        rows.append(queries_of(moved, repeated, predictions.logits.shape[2]))
    return torch.stack(rows)


def unsupported(criterion: Any) -> str | None:
    """What of a criterion's options is not computed here, in words, or None."""
    for name in criterion.losses:
        if name not in _ENTRIES:
            return f"losses must be of {', '.join(_ENTRIES)}, got {name!r}"
    for name in ("use_varifocal_loss", "use_position_supervised_loss"):
        if getattr(criterion, name) and not criterion.ia_bce_loss:
            return f"{name} must be False where ia_bce_loss is False, got True"
    return None
