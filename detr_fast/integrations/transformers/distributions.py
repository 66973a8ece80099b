"""Losses of D-FINE's box edges, which are distributions over bins: fine-grained localisation and distillation."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from detr_fast.boxes import box_cxcywh_to_xyxy, paired_giou

_TEMPERATURE = 5.0


class Bins(NamedTuple):
    """The bins of an edge, as D-FINE's configuration names them."""

    number: int  # max_num_bins; an edge has one logit more
    up: float
    reg_scale: float


class Pairs(NamedTuple):
    """Matched queries and their targets, with places for targets without a query."""

    place: Tensor  # [N, T] int64 in [0, B * Q): image and query; 0 where there is none
    matched: Tensor  # [N, T] bool
    iou: Tensor  # [N, T] 0 where there is none
    target_boxes: Tensor  # [T, 4] cxcywh


@torch.no_grad()
def pairs_of(
    boxes: Tensor,  # [N, B, Q, 4] cxcywh
    query_of_target: Tensor,  # [N, T] int32, -1 = unmatched
    target_boxes: Tensor,  # [T, 4]
    offsets: Tensor,  # [B + 1] int32
) -> Pairs:
    rows = torch.arange(len(target_boxes), device=offsets.device, dtype=torch.int32)
    image = (torch.searchsorted(offsets, rows, right=True) - 1).clamp(0, boxes.shape[1] - 1)
    matched = query_of_target >= 0
    place = torch.where(matched, image * boxes.shape[2] + query_of_target, 0)
    own = _at(boxes.float(), place)
    iou, _, _ = paired_giou(box_cxcywh_to_xyxy(own), box_cxcywh_to_xyxy(target_boxes)[None])
    return Pairs(place, matched, torch.where(matched, iou, 0), target_boxes)


def fine_grained_loss(
    corners: Tensor,  # [N, B, Q, 4 * (bins + 1)] logits of left, top, right, bottom
    points: Tensor,  # [N, B, Q, 4] reference boxes cxcywh
    pairs: Pairs,
    bins: Bins,
    num_boxes: Tensor,  # []
) -> Tensor:  # [N]
    """Cross entropy with the two bins around each edge's distance, weighted by IoU, summed, divided by `num_boxes`.

    Source: Peng et al., "D-FINE", ICLR 2025, section 4.1.
    """
    left, weight_right = _bins_of(_at(points.detach().float(), pairs.place), pairs.target_boxes, bins)
    log_p = _at(corners, pairs.place).float().unflatten(-1, (4, bins.number + 1)).log_softmax(-1)
    both = log_p.gather(-1, torch.stack([left, left + 1], -1))  # [N, T, 4, 2]
    loss = -(both[..., 0] * (1 - weight_right) + both[..., 1] * weight_right).sum(-1)
    return (loss * pairs.iou).sum(-1) / num_boxes


def distillation_loss(
    corners: Tensor,  # [N, B, Q, 4 * (bins + 1)]
    teacher_corners: Tensor,  # [B, Q, 4 * (bins + 1)]
    teacher_logits: Tensor,  # [B, Q, C]
    pairs: Pairs,
    bins: Bins,
) -> Tensor:  # [N]
    """Divergence of each edge from the teacher's at a temperature of 5.

    Weighted by the IoU of matched queries and the teacher's confidence of the others; means over matched and other
    queries, weighted by the roots of their numbers. Source: Peng et al., "D-FINE", ICLR 2025, section 4.2.
    """
    layers, images, queries, _ = corners.shape
    shape = (4, bins.number + 1)
    log_p = (corners.float() / _TEMPERATURE).unflatten(-1, shape).log_softmax(-1)
    goal = (teacher_corners.detach().float() / _TEMPERATURE).unflatten(-1, shape).log_softmax(-1)
    divergence = (goal.exp() * (goal - log_p)).sum((-2, -1)).flatten(1)  # [N, B * Q]
    with torch.no_grad():
        confidence = teacher_logits.float().sigmoid().amax(-1).flatten()
        # Targets without a query write to one place more than there are.
        places = torch.where(pairs.matched, pairs.place, images * queries)
        spare = torch.zeros(layers, images * queries + 1, device=corners.device)
        is_matched = spare.scatter(1, places, 1.0)[:, :-1]
        weight = spare.scatter(1, places, pairs.iou.float())[:, :-1] + confidence * (1 - is_matched)
        counts = torch.stack([is_matched.sum(1), (1 - is_matched).sum(1)])  # [2, N]
        roots = counts.sqrt()
        share = roots / roots.sum(0) / (4 * counts).clamp(min=1)  # of each edge
        scale = _TEMPERATURE**2 * weight * torch.where(is_matched > 0, share[0, :, None], share[1, :, None])
    return (divergence * scale).sum(1)


def _at(values: Tensor, place: Tensor) -> Tensor:  # [N, B, Q, W], [N, T] -> [N, T, W]
    layer = torch.arange(len(values), device=values.device)[:, None]
    return values[layer, place // values.shape[2], place % values.shape[2]]


@torch.no_grad()
def _bins_of(points: Tensor, target_boxes: Tensor, bins: Bins) -> tuple[Tensor, Tensor]:  # [N, T, 4], [T, 4]
    """Bin to the left of each edge's distance, ``[N, T, 4]`` int64, and the weight of the one to its right."""
    scale = abs(bins.reg_scale)
    center, size = points[..., :2], points[..., 2:]
    box = box_cxcywh_to_xyxy(target_boxes)
    step = size / scale + 1e-16
    distance = torch.cat([(center - box[..., :2]) / step, (box[..., 2:] - center) / step], -1) - 0.5 * scale
    values = _values_of(bins, points.device)
    found = (values <= distance[..., None]).sum(-1) - 1  # [N, T, 4] in [-1, bins]
    left = found.clamp(0, bins.number - 1)
    before, after = (distance - values[left]).abs(), (values[left + 1] - distance).abs()
    weight_right = before / (before + after)
    weight_right = torch.where(found < 0, 0.0, torch.where(found >= bins.number, 1.0, weight_right))
    return left, weight_right


@lru_cache(maxsize=16)
def _values_of(bins: Bins, device: torch.device) -> Tensor:
    """Distance that each bin stands for, ``[bins + 1]``: geometric steps, dense around zero."""
    bound = abs(torch.tensor(bins.up)) * abs(bins.reg_scale)
    step = (bound + 1) ** (2 / (bins.number - 2))
    right = torch.stack([step**i - 1 for i in range(1, bins.number // 2)])
    zero, bound = torch.zeros(1), 2 * bound[None]
    with torch.inference_mode(False):
        return torch.cat([-bound, -right.flip(0), zero, right, bound]).to(device)
