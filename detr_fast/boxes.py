"""Box formats and overlaps in plain PyTorch.

``cxcywh`` is centre, width, height; ``xyxy`` is two corners.
"""

from __future__ import annotations

import torch
from torch import Tensor


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:  # [..., 4] -> [..., 4]
    centre, size = boxes.split(2, -1)
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], -1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:  # [..., 4] -> [..., 4]
    low, high = boxes.split(2, -1)
    return torch.cat([(low + high) / 2, high - low], -1)


def paired_giou(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, union and GIoU of xyxy boxes, element by element with broadcasting: ``[..., 4] -> [...]`` each.

    No epsilon: two boxes without area have no defined IoU (NaN). Source: Rezatofighi et al., "Generalized Intersection
    over Union", CVPR 2019.
    """
    size1, size2 = boxes1[..., 2:] - boxes1[..., :2], boxes2[..., 2:] - boxes2[..., :2]
    low = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    high = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    union = size1.prod(-1) + size2.prod(-1) - overlap
    low = torch.minimum(boxes1[..., :2], boxes2[..., :2])
    high = torch.maximum(boxes1[..., 2:], boxes2[..., 2:])
    hull = (high - low).prod(-1)
    iou = overlap / union
    return iou, union, iou - (hull - union) / hull


def box_iou(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and union of every pair of xyxy boxes: ``[N, 4], [M, 4] -> [N, M], [N, M]``."""
    iou, union, _ = paired_giou(boxes1[:, None], boxes2[None])
    return iou, union


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """GIoU of every pair of xyxy boxes: ``[N, 4], [M, 4] -> [N, M]``."""
    return paired_giou(boxes1[:, None], boxes2[None])[2]


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Tight xyxy boxes of masks, from the first to the last pixel inclusive: ``[N, H, W] -> [N, 4]``; 0 if empty."""
    if masks.numel() == 0:
        return masks.new_zeros((len(masks), 4), dtype=torch.float32)
    masks = masks != 0
    sides = []
    for hits in (masks.any(1), masks.any(2)):  # [N, W] for x, [N, H] for y
        first = hits.int().argmax(1)
        last = hits.shape[1] - 1 - hits.flip(1).int().argmax(1)
        sides.append((first, last))
    (x1, x2), (y1, y2) = sides
    boxes = torch.stack([x1, y1, x2, y2], 1).float()
    return boxes * masks.flatten(1).any(1)[:, None]
