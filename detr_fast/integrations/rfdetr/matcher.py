"""RF-DETR's matcher: groups of queries, masks; from dictionaries to pairs, or all layers on their device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast import matcher as core
from detr_fast.integrations.further_cost import match_with_cost, report_of, weighted
from detr_fast.integrations.layer_losses import ListedTargets
from detr_fast.integrations.mask_cost import logits_at, point_mask_cost, sample, targets_at
from detr_fast.integrations.mode import Mode, check_mode
from detr_fast.matcher import Pairs, check_batch_size, pairs_of
from detr_fast.ops.dialect import Dialect
from detr_fast.ops.matching_cost import ForbiddenPairs
from detr_fast.structures import Predictions, Targets

DIALECT = Dialect(giou_floor=1e-7)
GAMMA = 2.0


class HungarianMatcher(nn.Module):
    """Drop-in for ``rfdetr.models.matcher.HungarianMatcher`` (rfdetr 1.11), with groups and masks, without keypoints.

    ``matcher(outputs, targets, group_detr=1)`` returns a pair of CPU int64 tensors ``(queries, targets)`` for each
    image: group after group, queries ascending. :meth:`match_layers` matches all decoder layers and groups in one call
    of the op and leaves the result on the device.

    Both modes compute RF-DETR's cost: log-sigmoids without epsilon, GIoU with areas of at least 1e-7. They differ where
    a cost is not finite: "compat" replaces it, as RF-DETR does, by a number above the largest; "stable" leaves such
    pairs out, matches the rest at least cost, and :meth:`report` tells.

    Differences to RF-DETR in both modes:

    - Everything is computed in float32, also of half types.
    - A predicted box of negative width or height is an invalid pair; there it counts as a box without area.
    - "compat" takes the largest cost of the layer's pairs within an image, RF-DETR that of all pairs across images.
    - A label out of range is an error on the CPU and an invalid pair on a device; there a negative one wraps around.
    - Equal optima may be resolved otherwise than by SciPy.

    Args:
        use_pos_only, use_position_modulated_cost: without effect, as there.
        mask_point_sample_ratio, cost_mask_ce, cost_mask_dice: as there, used if targets have ``masks``: one draw of
            points for the batch and layer, by ``torch.rand`` on the masks' device.
        num_keypoints_per_class, keypoint_l1_loss_coef and others: kept; keypoints in outputs and targets are an error.
        mode: see above.

    Raises:
        ValueError: all of the first three weights are 0, keypoints, rows of targets that are padding (``valid``),
            `group_detr` does not divide the queries, or targets are malformed (with the image).

    Source: Robinson et al., "RF-DETR", 2025; Chen et al., "Group DETR", ICCV 2023.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_bbox: float = 1,
        cost_giou: float = 1,
        focal_alpha: float = 0.25,
        use_pos_only: bool = False,
        use_position_modulated_cost: bool = False,
        mask_point_sample_ratio: int = 16,
        cost_mask_ce: float = 1,
        cost_mask_dice: float = 1,
        num_keypoints_per_class: list[int] | None = None,
        keypoint_l1_loss_coef: float = 0.0,
        keypoint_findable_loss_coef: float = 0.0,
        keypoint_visible_loss_coef: float = 0.0,
        keypoint_nll_loss_coef: float = 0.0,
        *,
        mode: Mode = "stable",
    ) -> None:
        super().__init__()
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.focal_alpha, self.mode = focal_alpha, mode
        self.mask_point_sample_ratio = mask_point_sample_ratio
        self.cost_mask_ce, self.cost_mask_dice = cost_mask_ce, cost_mask_dice
        self.num_keypoints_per_class = num_keypoints_per_class or []
        self.keypoint_l1_loss_coef, self.keypoint_findable_loss_coef = (
            keypoint_l1_loss_coef,
            keypoint_findable_loss_coef,
        )
        self.keypoint_visible_loss_coef, self.keypoint_nll_loss_coef = (
            keypoint_visible_loss_coef,
            keypoint_nll_loss_coef,
        )
        self._matcher = core_matcher(self, mode)

    def enable_compiled_l1_cost(self, compile_options: Mapping[str, Any] | None = None) -> None:
        """RF-DETR calls it where it compiles its model; there is nothing to compile here."""

    @torch.no_grad()
    def forward(
        self,
        outputs: Mapping[str, Any],
        targets: Sequence[Mapping[str, Tensor]],
        group_detr: int = 1,
        target_side_safety: object = None,
    ) -> Pairs:
        return pairs_of_layers(self, following(self._matcher, self), [outputs], targets, group_detr)[0]

    @torch.no_grad()
    def match_layers(self, predictions: Predictions, targets: Targets, group_detr: int = 1) -> Tensor:
        """query_of_target ``[L, T * group_detr]`` int32, queries in ``[0, Q)``, of the rows of
        ``targets.repeated(group_detr)``, as :func:`detr_fast.ops.set_loss` takes both. Boxes and classes only.
        """
        return following(self._matcher, self).match_groups(predictions, targets, group_detr)

    def report(self) -> ForbiddenPairs | None:
        """Pairs without a finite cost since the last report, with the position of the first. Waits for the device."""
        return report_of(self._matcher)

    def extra_repr(self) -> str:
        return (
            f"cost_class={self.cost_class}, cost_bbox={self.cost_bbox}, cost_giou={self.cost_giou}, "
            f"focal_alpha={self.focal_alpha}, mode={self.mode!r}"
        )


def core_matcher(matcher: Any, mode: Mode) -> core.HungarianMatcher:
    """What computes for `matcher`, ours or RF-DETR's own."""
    check_mode("HungarianMatcher", mode)
    return core.HungarianMatcher(
        matcher.cost_class,
        matcher.cost_bbox,
        matcher.cost_giou,
        kind="focal_stable",
        alpha=matcher.focal_alpha,
        gamma=GAMMA,
        invalid="above_largest" if mode == "compat" else "skip",
        dialect=DIALECT,
    )


def following(computes: core.HungarianMatcher, matcher: Any) -> core.HungarianMatcher:
    """What computes for `matcher`, with its weights of now."""
    costs = (matcher.cost_class, matcher.cost_bbox, matcher.cost_giou)
    return weighted(computes, *costs, alpha=matcher.focal_alpha)


def pairs_of_layers(
    matcher: Any,  # with RF-DETR's attributes
    computes: core.HungarianMatcher,
    layers: Sequence[Mapping[str, Any]],  # of equal shapes
    targets: Sequence[Mapping[str, Tensor]],
    groups: int,
) -> list[Pairs]:
    """Pairs of each layer; one call of the ops and one copy from the device."""
    predictions = _stacked(layers)
    logits = predictions.logits
    check_batch_size("HungarianMatcher", logits.shape[1], len(targets))
    check_groups(logits.shape[2], groups)
    packed = packed_targets(layers[0], targets, logits.shape[-1]).to(logits.device)
    if packed.masks is None:
        found = computes.match_groups(predictions, packed, groups)
    else:
        extra = torch.cat([_mask_cost(matcher, layer["pred_masks"], packed) for layer in layers])
        found = match_with_cost(computes, predictions, packed, extra, groups)
    offsets = packed.offsets.cpu()
    return [pairs_of(row, offsets, groups) for row in found.cpu()]


def _stacked(layers: Sequence[Mapping[str, Any]]) -> Predictions:
    """Without a copy of one layer, or of layers that are slices of one tensor."""
    if len(layers) == 1:
        return Predictions.of_layer(layers[0])
    parts = [{name: layer[name] for name in ("pred_logits", "pred_boxes")} for layer in layers]
    return Predictions.from_dict({**parts[-1], "aux_outputs": parts[:-1]})


def packed_targets(outputs: Mapping[str, Any], targets: ListedTargets, classes: int) -> Targets:
    if isinstance(targets, Targets):
        return targets
    for image, target in enumerate(targets):
        if "valid" in target:
            raise ValueError(
                f"HungarianMatcher: targets of image {image} of the batch must have no padded rows, got 'valid'; "
                "leave pad_targets_to unset"
            )
        if "keypoints" in target and "pred_keypoints" in outputs:
            raise ValueError("HungarianMatcher: outputs must have no keypoints, got 'pred_keypoints'")
    return Targets.pack(targets, classes)


def check_groups(queries: int, groups: int) -> None:
    if groups < 1 or queries % groups:
        raise ValueError(f"HungarianMatcher: group_detr must divide {queries} queries, got {groups}")


def _mask_cost(matcher: Any, masks: Tensor | Mapping[str, Tensor], targets: Targets) -> Tensor:  # [1, T, Q]
    """Of one layer: ``masks [B, Q, h, w]``, or the features that they are the products of."""
    pixels = masks if isinstance(masks, Tensor) else masks["spatial_features"]
    count = pixels.shape[-2] * pixels.shape[-1] // matcher.mask_point_sample_ratio
    points = torch.rand(1, count, 2, device=pixels.device)
    if isinstance(masks, Tensor):
        logits = logits_at(masks[None], points[None], "border")
    else:
        features = sample(pixels, points.expand(len(pixels), -1, -1), "bilinear", "border")  # [B, C, P]
        queries, bias = (masks[name].to(features.dtype) for name in ("query_features", "bias"))
        with torch.autocast(pixels.device.type, enabled=False):
            logits = (queries @ features + bias)[None]
    assert targets.masks is not None
    wanted = targets_at(targets.masks, points[None], 1, "nearest", "border")
    return point_mask_cost(logits, wanted, len(targets.labels), matcher.cost_mask_ce, matcher.cost_mask_dice)
