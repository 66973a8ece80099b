"""DETR's matching and loss as the paper's code base computes them, layer by layer: the plain PyTorch to compare with.

Source: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.scenes import COST_WEIGHTS
from detr_fast.matcher import Pairs, queries_of
from detr_fast.ops.set_loss import set_loss_reference
from detr_fast.structures import Predictions, Targets


@torch.no_grad()
def match(
    logits: Tensor,  # [B, Q, C]
    boxes: Tensor,  # [B, Q, 4]
    targets: Sequence[dict[str, Tensor]],
) -> Pairs:
    """Pairs of every image, from the cost of all queries with the targets of all images."""
    labels = torch.cat([target["labels"] for target in targets])
    goals = torch.cat([target["boxes"] for target in targets]).to(boxes.dtype)
    flat = boxes.flatten(0, 1)
    class_cost = -logits.flatten(0, 1).softmax(-1)[:, labels]
    distance = torch.cdist(flat, goals, p=1)
    class_weight, box_weight, giou_weight = COST_WEIGHTS
    cost = box_weight * distance + class_weight * class_cost - giou_weight * giou(flat, goals)
    by_image = cost.view(*logits.shape[:2], -1).cpu().split([len(target["labels"]) for target in targets], -1)
    pairs = [linear_sum_assignment(part[image]) for image, part in enumerate(by_image)]
    return [(torch.as_tensor(queries), torch.as_tensor(own)) for queries, own in pairs]


def losses(predictions: Predictions, targets: Sequence[dict[str, Tensor]], class_weight: Tensor) -> Tensor:
    """Losses ``[L, 5]`` of :data:`detr_fast.ops.set_loss.TERMS`, one layer after the other."""
    packed = Targets.pack(targets)
    layers = zip(predictions.logits, predictions.boxes, strict=True)
    matched = torch.stack(
        [queries_of(match(logits, boxes, targets), packed, logits.shape[1]) for logits, boxes in layers]
    )
    num_boxes = packed.offsets[-1].to(torch.float32).clamp(min=1)
    inputs = (predictions.logits, predictions.boxes, matched, packed.labels, packed.boxes, packed.offsets)
    return set_loss_reference(*inputs, num_boxes, class_weight)


def giou(boxes: Tensor, goals: Tensor) -> Tensor:  # [N, 4], [T, 4] cxcywh -> [N, T]
    """Generalised IoU of all pairs. Both looks at the sizes wait for a GPU, as published."""
    low, high = _corners(boxes)
    goal_low, goal_high = _corners(goals)
    assert (high >= low).all()
    assert (goal_high >= goal_low).all()
    overlap = _area(torch.max(low[:, None], goal_low), torch.min(high[:, None], goal_high))
    union = _area(low, high)[:, None] + _area(goal_low, goal_high) - overlap
    hull = _area(torch.min(low[:, None], goal_low), torch.max(high[:, None], goal_high))
    return overlap / union - (hull - union) / hull


def _area(low: Tensor, high: Tensor) -> Tensor:  # [..., 2] -> [...]
    sides = (high - low).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return centre - half, centre + half
