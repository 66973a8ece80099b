"""What mmdetection 3.3 (mmdet.models.task_modules.assigners) computes, as plain PyTorch and SciPy.

Scores are logits [Q, C], boxes x1, y1, x2, y2 in pixels, shapes (height, width).
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment

SMALLEST_AREA = 1e-6


def classification_cost(scores, labels, weight=1.0):
    return -scores.softmax(-1)[:, labels] * weight


def focal_loss_cost(scores, labels, alpha=0.25, gamma=2, eps=1e-12, weight=1.0):
    p = scores.sigmoid()
    negative = -(1 - p + eps).log() * (1 - alpha) * p.pow(gamma)
    positive = -(p + eps).log() * alpha * (1 - p).pow(gamma)
    return (positive[:, labels] - negative[:, labels]) * weight


def center_form(boxes):
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)


def bbox_l1_cost(boxes, goals, shape, box_format="xyxy", weight=1.0):
    if box_format == "xywh":
        boxes, goals = center_form(boxes), center_form(goals)
    height, width = shape
    scale = boxes.new_tensor([width, height, width, height])
    return torch.cdist(boxes / scale, goals / scale, p=1) * weight


def giou_cost(boxes, goals, weight=1.0):
    a, b = boxes[:, None], goals[None]
    area_a, area_b = (a[..., 2:] - a[..., :2]).prod(-1), (b[..., 2:] - b[..., :2]).prod(-1)
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = (area_a + area_b - overlap).clamp(min=SMALLEST_AREA)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = hull.clamp(min=SMALLEST_AREA)
    return -(overlap / union - (hull - union) / hull) * weight


def assign(cost, labels):
    """cost [Q, T] to gt_inds [Q] (0 background, else target + 1) and labels [Q] (-1 background)."""
    gt_inds = torch.zeros(len(cost), dtype=torch.int64)
    assigned = torch.full((len(cost),), -1, dtype=torch.int64)
    if cost.shape[1]:
        rows, columns = (torch.as_tensor(side) for side in linear_sum_assignment(cost.detach().cpu().numpy()))
        gt_inds[rows] = columns + 1
        assigned[rows] = labels[columns]
    return gt_inds, assigned
