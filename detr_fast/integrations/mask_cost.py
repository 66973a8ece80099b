"""Costs of masks at sampled points beside the matching cost: Mask2Former, Mask DINO, RF-DETR's segmentation.

The parts, each for all decoder layers at once and without waiting for a device::

    points = torch.rand(L, B, P, 2)                                        # x, y in [0, 1]
    logits = logits_at(masks, points)                                      # [L, B, Q, h, w] -> [L, B, Q, P]
    wanted = targets_at(targets.masks, points, L)                          # an image: [L, t, P]
    extra = point_mask_cost(logits, wanted, len(targets.labels), 5.0, 5.0) # [L, T, Q]
    query_of_target = match_with_cost(matcher, predictions, targets, extra)

with ``match_with_cost`` of :mod:`detr_fast.integrations.further_cost`. Every target is compared with the queries of its
own image only, nothing is padded. :class:`HungarianMatcher` is Mask2Former's, made of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast import matcher as core
from detr_fast.integrations.further_cost import match_with_cost, report_of, weighted
from detr_fast.integrations.mode import Mode, check_mode
from detr_fast.matcher import Pairs, check_batch_size, pairs_of
from detr_fast.ops.matching_cost import ForbiddenPairs
from detr_fast.structures import Predictions, Targets


class HungarianMatcher(nn.Module):
    """Drop-in for Mask2Former's ``HungarianMatcher(cost_class, cost_mask, cost_dice, num_points)``.

    cost = cost_class (-softmax(logits)[label]) + cost_mask cross-entropy + cost_dice dice, the last two of the masks at
    `num_points` random points, both interpolated with zeros outside. ``matcher(outputs, targets)`` takes
    ``pred_logits [B, Q, C]`` and ``pred_masks [B, Q, h, w]`` (logits), a list of ``labels [t]`` and
    ``masks [t, H, W]``, and returns a pair of CPU int64 tensors ``(queries, targets)`` for each image. Points are drawn
    for one image after the other by ``torch.rand`` on the masks' device, so that with the same seed they are those
    of Mask2Former; `generator` draws them from a generator of your own.

    :meth:`match_layers` matches all decoder layers in one call and leaves the result on the device.

    Differences to Mask2Former:

    - Everything is computed in float32 (float64 if an input is): there, half types are sampled in half precision.
    - Costs that are NaN or infinite: mode "compat" raises a ValueError as SciPy does, with the position of the first;
      "stable" leaves such pairs out, matches the rest at least cost, and :meth:`report` tells. Otherwise the modes are
      equal.
    - `num_points` of 0, the default there, makes every cost NaN there; here it must be at least 1.

    Args:
        generator: of random points; None: the default generator of the masks' device.

    Raises:
        ValueError: all weights are 0, `num_points` is less than 1, or targets are malformed (with the image).

    Source: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", CVPR 2022, section 4.1.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_mask: float = 1,
        cost_dice: float = 1,
        num_points: int = 0,
        *,
        mode: Mode = "stable",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_mode("HungarianMatcher", mode)
        if cost_class == cost_mask == cost_dice == 0:
            raise ValueError("HungarianMatcher: at least one of cost_class, cost_mask, cost_dice must not be 0")
        if num_points < 1:
            raise ValueError(f"HungarianMatcher: num_points must be at least 1, got {num_points}")
        self.cost_class, self.cost_mask, self.cost_dice = cost_class, cost_mask, cost_dice
        self.num_points, self.mode, self.generator = num_points, mode, generator
        self._matcher = core.HungarianMatcher(1, 0, 0, invalid="raise" if mode == "compat" else "skip")

    @torch.no_grad()
    def forward(self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]) -> Pairs:
        logits, masks = outputs["pred_logits"][None], outputs["pred_masks"][None]
        check_batch_size("HungarianMatcher", logits.shape[1], len(targets))
        packed = pack_with_masks(targets, logits.shape[-1] - 1).to(logits.device)
        return pairs_of(self.match_layers(logits, masks, packed)[0], packed.offsets)

    @torch.no_grad()
    def match_layers(
        self,
        logits: Tensor,  # [L, B, Q, C]
        masks: Tensor,  # [L, B, Q, h, w] logits
        targets: Targets,  # with masks
        points: Tensor | None = None,  # [L or 1, B or 1, P, 2] x, y in [0, 1]
    ) -> Tensor:
        """query_of_target ``[L, T]`` int32 on the device. Without `points` they are drawn layer by layer.

        Waits for the device only in mode "compat".
        """
        if points is None:
            points = self._draw(len(logits), logits.shape[1], masks.device)
            points = points.double() if masks.dtype == torch.float64 else points
        of_targets = targets_at(_masks(targets), points, len(logits))
        extra = point_mask_cost(
            logits_at(masks, points), of_targets, len(targets.labels), self.cost_mask, self.cost_dice
        )
        # The same box everywhere: its distance is 0 and its GIoU 1, and both weights are 0.
        boxes = logits.new_full((), 0.5).expand(*logits.shape[:3], 4)
        same = replace(targets, boxes=torch.full_like(targets.boxes, 0.5))
        matcher = weighted(self._matcher, self.cost_class, 0, 0)
        return match_with_cost(matcher, Predictions(logits, boxes), same, extra)

    def _draw(self, layers: int, images: int, device: torch.device) -> Tensor:  # [L, B, P, 2]
        drawn = [
            torch.rand(1, self.num_points, 2, device=device, generator=self.generator) for _ in range(layers * images)
        ]
        if not drawn:
            return torch.zeros(layers, images, self.num_points, 2, device=device)
        return torch.cat(drawn).view(layers, images, self.num_points, 2)

    def report(self) -> ForbiddenPairs | None:
        """Pairs left out since the last report, with the position of the first; None if there were none. Waits."""
        return report_of(self._matcher)

    def extra_repr(self) -> str:
        return (
            f"cost_class={self.cost_class}, cost_mask={self.cost_mask}, cost_dice={self.cost_dice}, "
            f"num_points={self.num_points}, mode={self.mode!r}"
        )


def pack_with_masks(targets: Sequence[Mapping[str, Tensor]], num_classes: int | None = None) -> Targets:
    """As :meth:`Targets.pack` of ``labels`` and ``masks``; boxes, if there are none, are of the whole image."""
    for image, target in enumerate(targets):
        if "masks" not in target:
            raise ValueError(f"targets of image {image} of the batch: 'masks' is missing, got {sorted(target)}")
    if not targets:
        return Targets.pack(targets, num_classes)
    # One tensor for all, filled where it lies: a copy to a device would wait.
    most = max(len(target["labels"]) for target in targets)
    whole = torch.full((most, 4), 0.5, device=targets[0]["labels"].device)
    whole[:, 2:] = 1.0
    return Targets.pack([{"boxes": whole[: len(target["labels"])], **target} for target in targets], num_classes)


def logits_at(
    masks: Tensor,  # [L, B, Q, h, w]
    points: Tensor,  # [L or 1, B or 1, P, 2]
    padding: str = "zeros",
) -> Tensor:
    """Bilinear interpolation of predicted masks at points: ``[L, B, Q, P]`` float32 (float64 stays)."""
    layers, images, queries, height, width = masks.shape
    grid = points.expand(layers, images, -1, -1).reshape(layers * images, -1, 2)
    values = sample(masks.reshape(layers * images, queries, height, width), grid, "bilinear", padding)
    return values.view(layers, images, queries, -1)


def targets_at(
    masks: Sequence[Tensor],  # an image: [t, H, W]
    points: Tensor,  # [L or 1, B or 1, P, 2]
    layers: int,
    sampling: str = "bilinear",
    padding: str = "zeros",
) -> list[Tensor]:
    """Target masks at the same points: ``[L, t, P]`` an image, ``[1, t, P]`` if all layers share points.

    In float32, or float64 if the points are.
    """
    if len(points) not in (1, layers):
        raise ValueError(f"targets_at: points must be of 1 or {layers} layers, got {len(points)}")
    points = points.expand(-1, len(masks), -1, -1)
    values = []
    for image, own in enumerate(masks):  # one after the other: masks of an image in float32 are large
        grid = points[:, image].reshape(1, -1, 2)
        values.append(sample(own[None], grid, sampling, padding)[0].unflatten(1, (len(points), -1)).transpose(0, 1))
    return values


def sample(masks: Tensor, points: Tensor, sampling: str, padding: str) -> Tensor:
    """Masks ``[N, C, h, w]`` at ``[N, P, 2]``: ``[N, C, P]``."""
    count, channels, height, width = masks.shape
    if 0 in (count, channels, height, width, points.shape[1]):
        return masks.new_zeros((count, channels, points.shape[1]), dtype=torch.float32)
    dtype = torch.float64 if torch.float64 in (masks.dtype, points.dtype) else torch.float32
    grid = (2 * points.to(dtype) - 1)[:, None]
    values = F.grid_sample(masks.to(dtype), grid, mode=sampling, padding_mode=padding, align_corners=False)
    return values[:, :, 0]


def point_mask_cost(
    logits: Tensor,  # [L, B, Q, P]
    wanted: Sequence[Tensor],  # an image: [L or 1, t, P] in [0, 1]
    capacity: int,  # T
    ce_weight: float = 1.0,
    dice_weight: float = 1.0,
) -> Tensor:
    """Cost ``[L, T, Q]`` of masks at points, in float32 or float64: row t against the queries of its own image.

    cost = ce_weight mean over points of the binary cross-entropy + dice_weight (1 - (2 p y + 1) / (p + y + 1)), with
    sums over points, p = sigmoid(logit) and y the target. The cross-entropy of all pairs is one product, because
    y softplus(-x) + (1 - y) softplus(x) = softplus(x) - x y. Rows past the targets are 0.

    Source: Cheng et al., CVPR 2022; Milletari et al., "V-Net", 3DV 2016 (dice).
    """
    layers, _, queries, _ = logits.shape
    cost = logits.new_zeros((layers, capacity, queries))
    start = 0
    for image, own in enumerate(wanted):
        end = start + own.shape[1]
        if end > start:
            cost[:, start:end] = _cost_of_image(logits[:, image], own.to(logits.dtype), ce_weight, dice_weight)
        start = end
    return cost


def _cost_of_image(x: Tensor, y: Tensor, ce_weight: float, dice_weight: float) -> Tensor:  # [L, Q, P], [L or 1, t, P]
    with torch.autocast(x.device.type, enabled=False):
        p = x.sigmoid()
        if len(y) == 1:  # one product of all layers
            y = y[0]
        entropy = (F.softplus(x).sum(-1, keepdim=True) - x @ y.mT) / x.shape[-1]
        total = p.sum(-1, keepdim=True) + y.sum(-1)[..., None, :]
        dice = 1 - (2 * (p @ y.mT) + 1) / (total + 1)
        return (ce_weight * entropy + dice_weight * dice).mT


def _masks(targets: Targets) -> tuple[Tensor, ...]:
    if targets.masks is None and targets.max_count > 0:
        raise ValueError("HungarianMatcher: targets must have masks, got None")
    return targets.masks if targets.masks is not None else tuple(targets.boxes.new_zeros(len(targets), 0, 1, 1))
