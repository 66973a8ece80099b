"""Losses of boxes as distributions: fine-grained localisation (FGL) and decoupled distillation (DDF).

Axis letters beside the usual: K sets with corner logits, K' of them with a teacher, R rows of pairs, N = reg_max bins
plus 1. Each box has four edges; an edge's offset from its reference point is the mean of W(n) over a distribution on
n = 0 .. reg_max.
Source: Peng et al., "D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement", ICLR 2025.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.boxes import box_cxcywh_to_xyxy
from detr_fast.integrations.constants import Constants

TEMPERATURE = 5.0
_weightings = Constants(16)


class Bins(NamedTuple):
    """Where the edges of targets lie between two neighbouring bins."""

    left: Tensor  # [K or 1, R, 4] int64, in [0, reg_max)
    weight: Tensor  # [K or 1, R, 4], of the right one; 1 - weight of the left one

    def rearranged(self, row_of_row: Tensor) -> Bins:  # [K, R]
        index = row_of_row[..., None].expand(-1, -1, 4)
        shape = (len(row_of_row), -1, -1)
        return Bins(self.left.expand(shape).gather(1, index), self.weight.expand(shape).gather(1, index))


def size_of(scale: Tensor | float) -> Tensor | float:
    return scale.detach().float().abs() if isinstance(scale, Tensor) else abs(scale)


def weighting(reg_max: int, up: Tensor, reg_scale: Tensor | float) -> Tensor:
    """W(n) ``[reg_max + 1]``: 0 in the middle, growing like a power to +-up reg_scale, then +-2 up reg_scale."""
    bound = up.detach().flatten()[0].abs() * size_of(reg_scale)
    half = reg_max // 2 - 1
    n = torch.arange(-half, half + 1, device=up.device)
    step = (bound + 1) ** (2 / (reg_max - 2))
    inner = n.sign() * (step ** n.abs() - 1)
    outer = (2 * bound).reshape(1)
    return torch.cat([-outer, inner, outer])


def _constant_weighting(reg_max: int, up: float, reg_scale: float, device: torch.device) -> Tensor:
    return _weightings.get(
        (reg_max, up, reg_scale, device),
        lambda: weighting(reg_max, torch.tensor([up], device="cpu"), reg_scale).to(device),
    )


@torch.no_grad()
def bins_of(
    points: Tensor,  # [..., R, 4] x, y, width, height
    goals: Tensor,  # [R, 4] cxcywh
    reg_max: int,
    reg_scale: Tensor | float,
    up: Tensor | float,  # with a tensor W is computed at each call, with two numbers once for all
) -> Bins:
    """Distances of the targets' edges from reference points, in units of the point's size, between the bins of W.

    Beyond the first and last value of W all weight is on that bin.
    """
    scale = size_of(reg_scale)
    points, corners = points.float(), box_cxcywh_to_xyxy(goals)
    sides = torch.cat([points[..., :2] - corners[:, :2], corners[:, 2:] - points[..., :2]], -1)
    size = points[..., 2:] / scale + 1e-16
    distance = sides / torch.cat([size, size], -1) - 0.5 * scale
    if isinstance(up, Tensor):
        values = weighting(reg_max, up.float(), scale)
    else:
        values = _constant_weighting(reg_max, up, float(scale), points.device)
    left = (torch.searchsorted(values, distance, right=True) - 1).clamp(0, reg_max - 1)
    low, high = values[left], values[left + 1]
    return Bins(left, ((distance - low) / (high - low)).clamp(0, 1))


class Pairs(NamedTuple):
    """Matched queries of K sets; one row in `slot`, `is_pair` and the bins if all sets have the same."""

    slot: Tensor  # [K or 1, R] int64, image * Q + query; any valid one where there is no pair
    is_pair: Tensor  # [K or 1, R]
    iou: Tensor  # [K, R]
    bins: Bins  # of the targets' edges


class Teacher(NamedTuple):
    """What K' = `students` sets from `first` on shall agree with; one row if it is the same for all."""

    corners: Tensor  # [K' or 1, B, Q, 4 N]
    logits: Tensor  # [K' or 1, B, Q, C]
    first: int
    students: int


def rows_of_pairs(is_pair: Tensor, most: int) -> Tensor | slice:  # [1, R]
    """Index of at most that many rows, with all pairs among them; `most` is the number of queries of the batch.

    Saves a fifth of D-FINE's step with 100 targets an image, where most rows of the union are empty.
    """
    if is_pair.shape[1] <= most:
        return slice(None)
    return (~is_pair[0]).to(torch.uint8).argsort(stable=True)[:most]


def rows_at(values: Tensor, slot: Tensor) -> Tensor:  # [K, B, Q, W], [K or 1, R] -> [K, R, W]
    """Rows of some queries; neighbouring axes of `values` need not lie together in memory."""
    image, query = slot // values.shape[2], slot % values.shape[2]
    if len(slot) == 1:
        return values[:, image[0], query[0]]
    return values[torch.arange(len(values), device=values.device)[:, None], image, query]


def balance_of(is_pair: Tensor, places: int) -> Tensor:  # [K or 1, R] -> [K or 1]
    """Share of matched edges in DDF: they and the others count as the roots of their numbers.

    Published code multiplies both numbers by a batch scale (1 / B or 8 / B), which cancels.
    """
    number = is_pair.sum(1)
    matched, others = number.sqrt(), (places - number).sqrt()
    return matched / (matched + others)


def edge_losses(
    corners: Tensor,  # [K, B, Q, 4 N]
    pairs: Pairs,
    num_boxes: Tensor,  # []
    teacher: Teacher | None,
    balance: Tensor | None = None,  # [K' or 1], of `balance_of`; None: of each student's own pairs
) -> tuple[Tensor, Tensor]:  # [K], [K']
    """FGL of all sets and DDF of those with a teacher, differentiable once, in `corners`.

    - FGL: cross-entropy of an edge with its two bins, weighted by them and by the pair's IoU, summed over pairs and
      divided by `num_boxes`;
    - DDF: divergence of the edges' distributions from the teacher's, both at temperature 5, times 25. An edge is
      weighted by the IoU of its pair, or by the teacher's largest probability where it has none; the means over matched
      and other edges are joined in the shares of `balance`.

    No query may be in two pairs of a set.
    """
    weight = (pairs.iou / num_boxes).where(pairs.is_pair, 0)
    if teacher is None:
        return _EdgeLosses.apply(corners, pairs, weight, None, None, 0)
    share = _shares(teacher, pairs, balance, corners.shape)
    return _EdgeLosses.apply(corners, pairs, weight, teacher.corners.detach(), share, teacher.first)


@torch.no_grad()
def _shares(teacher: Teacher, pairs: Pairs, balance: Tensor | None, shape: torch.Size) -> Tensor:  # [K', B, Q]
    """Factor of the divergence of each query's edges in DDF."""
    sets, images, queries, _ = shape
    spare = images * queries  # where rows go that are no pair
    of_students = slice(teacher.first, teacher.first + teacher.students)
    slot, is_pair, iou = (part.expand(sets, -1)[of_students] for part in pairs[:3])
    index = slot.where(is_pair, spare)
    confidence = F.pad(teacher.logits.float().amax(-1).sigmoid().flatten(1), (0, 1)).expand(len(index), -1)
    weight = confidence.scatter(1, index, iou)[:, :spare]
    matched = torch.zeros_like(confidence).scatter(1, index, 1.0)[:, :spare]
    number = 4 * matched.sum(1)
    balance = balance_of(is_pair, spare) if balance is None else balance
    of_matched = balance / number.clamp(min=1)
    of_others = (1 - balance) / (4 * spare - number).clamp(min=1)
    share = torch.where(matched > 0, of_matched[:, None], of_others[:, None])
    return (weight * share * TEMPERATURE**2).view(-1, images, queries)


class _EdgeLosses(torch.autograd.Function):
    """Both sums with one gradient of the corners: a step of D-FINE's criterion takes 23 ms instead of 29 (one core)."""

    @staticmethod
    def forward(
        ctx: Any,
        corners: Tensor,
        pairs: Pairs,
        weight: Tensor,
        teacher: Tensor | None,
        share: Tensor | None,
        first: int,
    ) -> tuple[Tensor, Tensor]:
        logs = _edges(rows_at(corners, pairs.slot)).log_softmax(-1)  # [K, R, 4, N]
        bins = torch.stack([pairs.bins.left, pairs.bins.left + 1], -1).expand(len(corners), -1, -1, -1)
        of_bins = torch.stack([1 - pairs.bins.weight, pairs.bins.weight], -1).expand_as(bins)
        entropy = -(logs.gather(-1, bins) * of_bins).sum((-1, -2))  # [K, R]
        fine_grained = (entropy * weight).where(pairs.is_pair, 0).sum(1)
        if teacher is None or share is None:
            ctx.save_for_backward(logs, bins, of_bins, weight, pairs.slot, pairs.is_pair)
            distilled = corners.new_zeros(0, dtype=torch.float32)
        else:
            own = corners[first : first + len(share)]
            of_students = (_edges(own) / TEMPERATURE).log_softmax(-1)  # [K', B, Q, 4, N]
            of_teacher = (_edges(teacher) / TEMPERATURE).log_softmax(-1)
            p = of_teacher.exp()
            distilled = ((of_teacher - of_students).mul_(p).sum((-1, -2)) * share).flatten(1).sum(1)
            kept = (of_students, p, share)
            ctx.save_for_backward(logs, bins, of_bins, weight, pairs.slot, pairs.is_pair, *kept)
        ctx.shape, ctx.type, ctx.first = corners.shape, corners.dtype, first
        return fine_grained, distilled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, fine_grained: Tensor, distilled: Tensor) -> tuple[Tensor | None, ...]:
        logs, bins, of_bins, weight, slot, is_pair, *kept = ctx.saved_tensors
        gradient = logs.new_zeros(ctx.shape) if not kept else logs.new_empty(ctx.shape)
        if kept:
            of_students, p, share = kept
            end = ctx.first + len(share)
            gradient[: ctx.first] = 0
            gradient[end:] = 0
            scale = share * (distilled / TEMPERATURE).view(-1, 1, 1)
            part = _edges(gradient[ctx.first : end])
            torch.exp(of_students, out=part)
            part.sub_(p).mul_(scale[..., None, None])
        rows = logs.exp().scatter_add_(-1, bins, -of_bins)
        rows *= (weight * fine_grained[:, None])[..., None, None]
        rows = rows.masked_fill_(~is_pair[..., None, None], 0).flatten(-2)
        flat = gradient.flatten(1, 2)
        if len(slot) == 1:
            flat.index_add_(1, slot[0], rows)
        else:
            flat.scatter_add_(1, slot[..., None].expand_as(rows), rows)
        return gradient.to(ctx.type), None, None, None, None, None


def _edges(corners: Tensor) -> Tensor:  # [..., 4 N] -> [..., 4, N] float32
    return corners.unflatten(-1, (4, -1)).float()
