"""Losses that are not part of the fused set loss: masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.structures import Targets


def mask_losses(
    masks: Tensor,  # [B, Q, h, w] logits
    query_of_target: Tensor,  # [T] int32, -1 = unmatched
    targets: Targets,  # with masks
    num_boxes: Tensor,  # []
) -> tuple[Tensor, Tensor]:
    """Focal (alpha 0.25, gamma 2) and dice loss of matched masks, each summed and divided by `num_boxes`.

    Computed in float32, or in float64 if `masks` is. Predictions are resized (bilinear) to the largest height and width
    of the batch's annotated masks; pixels of padding count as background, as in the published code. Source: Carion et
    al. 2020, section 5; Milletari et al., 3DV 2016.
    """
    if targets.masks is None:
        raise ValueError("mask_losses: targets must have masks, got None")
    total = sum(len(mask) for mask in targets.masks)
    if total == 0:
        zero = masks[..., :0].sum()
        return zero, zero
    height = max(mask.shape[-2] for mask in targets.masks)
    width = max(mask.shape[-1] for mask in targets.masks)
    padded = [F.pad(mask, (0, width - mask.shape[-1], 0, height - mask.shape[-2])) for mask in targets.masks]
    dtype = torch.promote_types(masks.dtype, torch.float32)
    goal = torch.cat(padded).to(masks.device, dtype).flatten(1)  # [T, height * width]

    image = targets.image_of_row()[:total]
    query = query_of_target[:total].long()
    matched = (query >= 0).to(dtype)
    chosen = masks[image, query.clamp(min=0)].to(dtype)
    logits = F.interpolate(chosen[:, None], (height, width), mode="bilinear", align_corners=False).flatten(1)

    focal = torch.where(
        goal > 0.5,
        0.25 * torch.sigmoid(-logits) ** 2 * F.softplus(-logits),
        0.75 * torch.sigmoid(logits) ** 2 * F.softplus(logits),
    ).mean(1)
    p = logits.sigmoid()
    dice = 1 - (2 * (p * goal).sum(1) + 1) / (p.sum(1) + goal.sum(1) + 1)
    return (focal * matched).sum() / num_boxes, (dice * matched).sum() / num_boxes
