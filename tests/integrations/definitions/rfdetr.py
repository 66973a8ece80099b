"""What RF-DETR 1.11 (rfdetr.models.matcher, rfdetr.models.criterion) computes, as plain PyTorch and SciPy."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

GAMMA = 2
SMALLEST_AREA = 1e-7


def corners(boxes):
    center, size = boxes[..., :2], boxes[..., 2:].clamp(min=0)
    return torch.cat([center - size / 2, center + size / 2], -1)


def iou_and_giou(boxes, goals):
    """Of boxes in cxcywh whose leading shapes broadcast."""
    a, b = corners(boxes), corners(goals)
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    iou = overlap / union.clamp(min=SMALLEST_AREA)
    return iou, iou - (hull - union) / hull.clamp(min=SMALLEST_AREA)


def cost_of_image(logits, boxes, target, cost_class=1, cost_bbox=1, cost_giou=1, alpha=0.25):
    """[Q, T]: every query with every target."""
    x = logits[:, target["labels"]]
    p = x.sigmoid()
    of_class = alpha * (1 - p) ** GAMMA * F.softplus(-x) - (1 - alpha) * p**GAMMA * F.softplus(x)
    distance = (boxes[:, None] - target["boxes"]).abs().sum(-1)
    _, giou = iou_and_giou(boxes[:, None], target["boxes"])
    return cost_bbox * distance + cost_class * of_class - cost_giou * giou


def without_infinities(cost):
    """RF-DETR's sentinel for what is NaN or infinite: above the largest finite cost."""
    finite = cost.isfinite()
    if finite.all():
        return cost
    if not finite.any():
        return torch.full_like(cost, torch.finfo(cost.dtype).max)
    known = cost[finite]
    return cost.where(finite, known.max() + known.abs().max() + 1)


def pairs_of_groups(cost, groups):
    """[Q, T]: SciPy for each group of queries, one after the other; int64 queries and targets."""
    width = len(cost) // groups
    queries, targets = [], []
    for group in range(groups):
        rows, columns = linear_sum_assignment(cost[group * width : (group + 1) * width].float().cpu().numpy())
        queries.append(rows + group * width)
        targets.append(columns)
    return torch.as_tensor(np.concatenate(queries)), torch.as_tensor(np.concatenate(targets))


def match(outputs, targets, group_detr=1, **weights):
    pairs = []
    for image, target in enumerate(targets):
        cost = cost_of_image(outputs["pred_logits"][image], outputs["pred_boxes"][image], target, **weights)
        pairs.append(pairs_of_groups(without_infinities(cost), group_detr))
    return pairs


def class_loss(logits, boxes, pairs, targets, num_boxes, alpha, ia_bce):
    positive = torch.zeros_like(logits)
    negative = logits.sigmoid() ** GAMMA if ia_bce else None
    for image, (queries, own) in enumerate(pairs):
        labels = targets[image]["labels"][own]
        if not ia_bce:
            positive[image, queries, labels] = 1.0
            continue
        iou, _ = iou_and_giou(boxes[image, queries], targets[image]["boxes"][own])
        score = logits[image, queries, labels].sigmoid() ** alpha * iou ** (1 - alpha)
        score = score.clamp(min=0.01).detach().to(logits.dtype)
        positive[image, queries, labels] = score
        negative = negative.clone()
        negative[image, queries, labels] = 1 - score
    if ia_bce:
        return (positive * F.softplus(-logits) + negative * F.softplus(logits)).sum() / num_boxes
    p = logits.sigmoid()
    loss = torch.where(
        positive > 0,
        alpha * (1 - p) ** GAMMA * F.softplus(-logits),
        (1 - alpha) * p**GAMMA * F.softplus(logits),
    )
    return loss.sum() / num_boxes


def losses_of_layer(layer, pairs, targets, num_boxes, alpha, ia_bce, losses):
    logits, boxes = layer["pred_logits"], layer["pred_boxes"]
    found = {}
    if "labels" in losses:
        found["loss_ce"] = class_loss(logits, boxes, pairs, targets, num_boxes, alpha, ia_bce)
        right = [
            logits[image, queries].argmax(-1) == targets[image]["labels"][own]
            for image, (queries, own) in enumerate(pairs)
        ]
        right = torch.cat(right).float()
        found["class_error"] = 100 - 100 * right.mean() if len(right) else torch.tensor(100.0)
    if "boxes" in losses:
        box = torch.cat([boxes[image, queries] for image, (queries, _) in enumerate(pairs)])
        goal = torch.cat([targets[image]["boxes"][own] for image, (_, own) in enumerate(pairs)])
        found["loss_bbox"] = (box - goal).abs().sum() / num_boxes
        found["loss_giou"] = (1 - iou_and_giou(box, goal)[1]).sum() / num_boxes
    if "cardinality" in losses:
        confident = (logits.sigmoid().amax(-1) > 0.5).sum(1)
        counts = torch.tensor([len(target["labels"]) for target in targets])
        found["cardinality_error"] = (confident - counts).abs().float().mean()
    return found


def criterion(
    outputs,
    targets,
    weights,
    alpha=0.25,
    groups=1,
    sum_group_losses=False,
    ia_bce=True,
    losses=("labels", "boxes", "cardinality"),
    num_boxes=None,
):
    """`groups` is 1 in evaluation; `weights` are those of the matching."""
    if num_boxes is None:
        count = sum(len(target["labels"]) for target in targets)
        num_boxes = max(count if sum_group_losses else count * groups, 1)
    layers = {"": outputs}
    layers |= {f"_{index}": layer for index, layer in enumerate(outputs.get("aux_outputs", ()))}
    if "enc_outputs" in outputs:
        layers["_enc"] = outputs["enc_outputs"]
    result = {}
    for suffix, layer in layers.items():
        detached = {name: layer[name].detach() for name in ("pred_logits", "pred_boxes")}
        pairs = match(detached, targets, groups, alpha=alpha, **weights)
        for name, value in losses_of_layer(layer, pairs, targets, num_boxes, alpha, ia_bce, losses).items():
            if name != "class_error" or not suffix:
                result[name + suffix] = value
    return result
