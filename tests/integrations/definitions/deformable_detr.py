"""What Deformable DETR (and Conditional DETR, the same but for its proposals) computes, in plain PyTorch and SciPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from integrations.definitions.detr import (
    Costs,
    Outputs,
    Pairs,
    Target,
    box_losses,
    cardinality_error,
    class_error,
    classes,
    count_of,
    layers_of,
    match,
    pairwise_giou,
)
from torch import Tensor

EPSILON = 1e-8


def focal_cost(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """``[Q, C], [T] -> [Q, T]``"""
    p = logits.sigmoid()[:, labels]
    positive = alpha * (1 - p) ** gamma * -(p + EPSILON).log()
    negative = (1 - alpha) * p**gamma * -(1 - p + EPSILON).log()
    return positive - negative


def focal_loss(
    outputs: Outputs, targets: Sequence[Target], pairs: Pairs, num_boxes: float, alpha: float, gamma: float = 2.0
) -> Tensor:
    logits = outputs["pred_logits"]
    count = logits.shape[-1]
    goal = F.one_hot(classes(outputs, targets, pairs, count), count + 1)[..., :-1].to(logits.dtype)
    p = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
    missed = p * (1 - goal) + (1 - p) * goal
    weight = alpha * goal + (1 - alpha) * (1 - goal)
    return (weight * missed**gamma * entropy).sum() / num_boxes


def layer_losses(
    outputs: Outputs,
    targets: Sequence[Target],
    pairs: Pairs,
    num_boxes: float,
    alpha: float,
    giou: Callable[[Tensor, Tensor], Tensor] = pairwise_giou,
) -> dict[str, Tensor]:
    return {
        "loss_ce": focal_loss(outputs, targets, pairs, num_boxes, alpha),
        "class_error": class_error(outputs, targets, pairs),
        "cardinality_error": cardinality_error(outputs, targets),
        **box_losses(outputs, targets, pairs, num_boxes, giou),
    }


def without_class(targets: Sequence[Target]) -> list[Target]:
    return [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]


def criterion(outputs: Outputs, targets: Sequence[Target], costs: Costs, focal_alpha: float) -> dict[str, Tensor]:
    """Unweighted losses labels, boxes and cardinality."""
    num_boxes, losses = count_of(targets), {}
    jobs = [(suffix, layer, targets) for suffix, layer in layers_of(outputs)]
    if "enc_outputs" in outputs:
        jobs.append(("_enc", outputs["enc_outputs"], without_class(targets)))
    for suffix, layer, own in jobs:
        values = layer_losses(layer, own, match(layer, own, costs, focal_cost), num_boxes, focal_alpha)
        if suffix:
            del values["class_error"]
        losses |= {name + suffix: value for name, value in values.items()}
    return losses
