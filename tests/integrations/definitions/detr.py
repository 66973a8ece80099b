"""What facebookresearch/detr computes, in plain PyTorch and SciPy, an image and a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Outputs = Mapping[str, Any]
Target = Mapping[str, Tensor]
Pairs = list[tuple[Tensor, Tensor]]
Costs = tuple[float, float, float]  # class, bbox, giou


def corners(boxes: Tensor) -> Tensor:  # [N, 4] cxcywh -> xyxy
    center, size = boxes[:, :2], boxes[:, 2:]
    return torch.cat([center - size / 2, center + size / 2], dim=1)


def pairwise_giou(first: Tensor, second: Tensor) -> Tensor:  # [N, 4], [M, 4] cxcywh -> [N, M]
    union, hull, overlap = areas(first, second)
    return overlap / union - (hull - union) / hull


def areas(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Union, hull and overlap, each ``[N, M]``."""
    a, b = corners(first)[:, None], corners(second)[None]
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    return union, hull, overlap


def softmax_cost(logits: Tensor, labels: Tensor) -> Tensor:  # [Q, C], [T] -> [Q, T]
    return -logits.softmax(-1)[:, labels]


@torch.no_grad()
def match(
    outputs: Outputs,
    targets: Sequence[Target],
    costs: Costs,
    class_cost: Callable[[Tensor, Tensor], Tensor] = softmax_cost,
    giou: Callable[[Tensor, Tensor], Tensor] = pairwise_giou,
) -> Pairs:
    pairs = []
    for logits, boxes, target in zip(outputs["pred_logits"], outputs["pred_boxes"], targets, strict=True):
        cost = (
            costs[0] * class_cost(logits, target["labels"])
            + costs[1] * (boxes[:, None] - target["boxes"][None]).abs().sum(-1)
            - costs[2] * giou(boxes, target["boxes"])
        )
        queries, own = linear_sum_assignment(cost.cpu())
        pairs.append((torch.as_tensor(queries, dtype=torch.int64), torch.as_tensor(own, dtype=torch.int64)))
    return pairs


def chosen(outputs: Outputs, name: str, pairs: Pairs) -> Tensor:
    """Rows of the matched queries, image after image."""
    return torch.cat([x[queries] for x, (queries, _) in zip(outputs[name], pairs, strict=True)])


def wanted(targets: Sequence[Target], name: str, pairs: Pairs) -> Tensor:
    return torch.cat([target[name][own] for target, (_, own) in zip(targets, pairs, strict=True)])


def classes(outputs: Outputs, targets: Sequence[Target], pairs: Pairs, nothing: int) -> Tensor:  # [B, Q]
    """Class of each query; `nothing` where it has no target."""
    result = torch.full(outputs["pred_logits"].shape[:2], nothing)
    for row, target, (queries, own) in zip(result, targets, pairs, strict=True):
        row[queries] = target["labels"][own]
    return result


def class_error(outputs: Outputs, targets: Sequence[Target], pairs: Pairs) -> Tensor:
    labels = wanted(targets, "labels", pairs)
    if len(labels) == 0:
        return torch.tensor(100.0)
    return 100 - 100 * (chosen(outputs, "pred_logits", pairs).argmax(-1) == labels).float().mean()


def cardinality_error(outputs: Outputs, targets: Sequence[Target]) -> Tensor:
    found = (outputs["pred_logits"].argmax(-1) != outputs["pred_logits"].shape[-1] - 1).sum(1)
    return (found - torch.tensor([len(target["labels"]) for target in targets])).abs().float().mean()


def box_losses(
    outputs: Outputs,
    targets: Sequence[Target],
    pairs: Pairs,
    num_boxes: float,
    giou: Callable[[Tensor, Tensor], Tensor] = pairwise_giou,
) -> dict[str, Tensor]:
    boxes, goal = chosen(outputs, "pred_boxes", pairs), wanted(targets, "boxes", pairs)
    return {
        "loss_bbox": (boxes - goal).abs().sum() / num_boxes,
        "loss_giou": (1 - giou(boxes, goal).diag()).sum() / num_boxes,
    }


def count_of(targets: Sequence[Target]) -> float:
    return max(float(sum(len(target["labels"]) for target in targets)), 1.0)


def layers_of(outputs: Outputs) -> list[tuple[str, Outputs]]:
    """Suffix and outputs, the last layer first."""
    return [("", outputs), *((f"_{i}", layer) for i, layer in enumerate(outputs.get("aux_outputs", ())))]


def criterion(
    outputs: Outputs, targets: Sequence[Target], num_classes: int, costs: Costs, eos_coef: float
) -> dict[str, Tensor]:
    """Unweighted losses labels, boxes and cardinality."""
    num_boxes, losses = count_of(targets), {}
    weight = torch.ones(num_classes + 1)
    weight[-1] = eos_coef
    for suffix, layer in layers_of(outputs):
        pairs = match(layer, targets, costs)
        goal = classes(layer, targets, pairs, num_classes)
        values = {"loss_ce": F.cross_entropy(layer["pred_logits"].transpose(1, 2), goal, weight)}
        if not suffix:
            values["class_error"] = class_error(layer, targets, pairs)
        values["cardinality_error"] = cardinality_error(layer, targets)
        values |= box_losses(layer, targets, pairs, num_boxes)
        losses |= {name + suffix: value for name, value in values.items()}
    return losses
