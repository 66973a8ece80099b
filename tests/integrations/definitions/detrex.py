"""What detrex computes, in plain PyTorch and SciPy, an image and a layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from integrations.definitions.deformable_detr import focal_cost, focal_loss, without_class
from integrations.definitions.detr import (
    Costs,
    Outputs,
    Pairs,
    Target,
    areas,
    box_losses,
    classes,
    count_of,
    layers_of,
    match,
    softmax_cost,
)
from integrations.definitions.dino import denoising_pairs
from torch import Tensor

EPSILON = 1e-6


def pairwise_giou(first: Tensor, second: Tensor) -> Tensor:  # [N, 4], [M, 4] cxcywh -> [N, M]
    union, hull, overlap = areas(first, second)
    return overlap / (union + EPSILON) - (hull - union) / (hull + EPSILON)


def matching(
    outputs: Outputs,
    targets: Sequence[Target],
    costs: Costs,
    cost_class_type: str = "focal_loss_cost",
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Pairs:
    focal = partial(focal_cost, alpha=alpha, gamma=gamma)
    return match(
        outputs, targets, costs, focal if cost_class_type == "focal_loss_cost" else softmax_cost, pairwise_giou
    )


def group_matching(outputs: Outputs, targets: Sequence[Target], costs: Costs, groups: int) -> Pairs:
    """Groups of ``Q // groups`` queries, each matched alone; queries that are left over belong to none."""
    size = outputs["pred_logits"].shape[1] // groups
    found = []
    for group in range(groups):
        own = slice(group * size, (group + 1) * size)
        part = {name: outputs[name][:, own] for name in ("pred_logits", "pred_boxes")}
        found.append([(queries + group * size, t) for queries, t in matching(part, targets, costs)])
    return [tuple(map(torch.cat, zip(*image, strict=True))) for image in zip(*found, strict=True)]


def values_of(
    outputs: Outputs,
    targets: Sequence[Target],
    pairs: Pairs,
    num_boxes: float,
    alpha: float = 0.25,
    gamma: float = 2.0,
    class_weight: Tensor | None = None,  # of the softmax loss, which is then meant
) -> dict[str, Tensor]:
    if class_weight is None:
        loss = focal_loss(outputs, targets, pairs, num_boxes, alpha, gamma)
    else:
        goal = classes(outputs, targets, pairs, len(class_weight) - 1)
        loss = F.cross_entropy(outputs["pred_logits"].transpose(1, 2), goal, class_weight)
    return {"loss_class": loss, **box_losses(outputs, targets, pairs, num_boxes, pairwise_giou)}


def criterion(
    outputs: Outputs, targets: Sequence[Target], costs: Costs, class_weight: Tensor | None = None, **options: float
) -> tuple[dict[str, Tensor], list[Pairs]]:
    """SetCriterion: unweighted losses class and boxes, and the matchings in the order of `return_indices`."""
    losses, matchings = {}, []
    kind = "focal_loss_cost" if class_weight is None else "ce_cost"
    for suffix, layer in layers_of(outputs):
        pairs = matching(layer, targets, costs, kind, **options)
        matchings.append(pairs)
        values = values_of(layer, targets, pairs, count_of(targets), class_weight=class_weight, **options)
        losses |= {name + suffix: value for name, value in values.items()}
    return losses, [*matchings[1:], matchings[0]]


def two_stage(outputs: Outputs, targets: Sequence[Target], costs: Costs, binary: bool) -> dict[str, Tensor]:
    losses, _ = criterion(outputs, targets, costs)
    own = without_class(targets) if binary else targets
    layer = outputs["enc_outputs"]
    values = values_of(layer, own, matching(layer, own, costs), count_of(targets))
    return losses | {name + "_enc": value for name, value in values.items()}


def denoising(outputs: Outputs, targets: Sequence[Target], groups: int, stride: int) -> dict[str, Tensor]:
    """Of ``dn_metas["output_known_lbs_bboxes"]``."""
    pairs, losses = denoising_pairs(targets, groups, stride), {}
    for suffix, layer in layers_of(outputs):
        values = values_of(layer, targets, pairs, count_of(targets) * groups)
        losses |= {name + "_dn" + suffix: value for name, value in values.items()}
    return losses


def groups(outputs: Outputs, targets: Sequence[Target], costs: Costs, count: int) -> dict[str, Tensor]:
    num_boxes, losses = max(float(sum(len(target["labels"]) for target in targets)) * count, 1.0), {}
    for suffix, layer in layers_of(outputs):
        values = values_of(layer, targets, group_matching(layer, targets, costs, count), num_boxes)
        losses |= {name + suffix: value for name, value in values.items()}
    return losses
