"""Matching with a further cost beside the matcher's own, or another in its place, and what went wrong in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr_fast import matcher as core
from detr_fast.matcher import replaced
from detr_fast.ops.assignment import assign, cost_limit
from detr_fast.ops.matching_cost import ForbiddenPairs, matching_cost
from detr_fast.structures import Predictions, Targets

_BITS = {"class": 0, "box": 1, "GIoU": 2, "label": 3, "sum": 4}  # of a status


def match_with_cost(
    matcher: core.HungarianMatcher,
    predictions: Predictions,
    targets: Targets,
    extra: Tensor,  # [L, T, Q]
    groups: int = 1,
) -> Tensor:
    """As ``matcher.match_groups(predictions, targets, groups)``, with a further cost of each pair.

    Returns query_of_target ``[L, T * groups]`` int32. The matcher's policy for invalid pairs holds for the sum.
    :func:`report_of` tells of them; where the other terms are finite, the term is "extra".
    """
    status, most = matcher._status_on(predictions.logits.device), targets.max_count
    base = cost_by(matcher, predictions, targets, status)
    cost = base + extra.to(base.dtype)
    invalid = is_allowed(base) & ~is_allowed(cost)
    note_forbidden(status, invalid, [("sum", invalid)], targets)
    if matcher.invalid == "raise" or (matcher.invalid is None and cost.device.type == "cpu"):
        found = report_of(matcher)
        if found is not None:
            raise ValueError(f"HungarianMatcher: {found}")
    elif matcher.invalid not in (None, "skip"):
        cost = replaced(cost, matcher.invalid, most).where(matcher.has_label(predictions, targets), torch.nan)
    return assign(cost, targets.offsets, most, groups)


def cost_by(
    matcher: core.HungarianMatcher, predictions: Predictions, targets: Targets, status: Tensor | None = None
) -> Tensor:
    """The matcher's own cost ``[L, T, Q]``."""
    return matching_cost(
        predictions.logits,
        predictions.boxes,
        targets.labels,
        targets.boxes,
        targets.offsets,
        matcher.cost_class,
        matcher.cost_bbox,
        matcher.cost_giou,
        matcher.kind,
        matcher.alpha,
        matcher.gamma,
        status=status,
        max_count=targets.max_count,
        dialect=matcher.dialect,
    )


def report_of(matcher: core.HungarianMatcher) -> ForbiddenPairs | None:
    """``matcher.report()`` after :func:`match_with_cost`, where the further cost is called "extra"."""
    found = matcher.report()
    return None if found is None else replace(found, terms=tuple("extra" if t == "sum" else t for t in found.terms))


def is_allowed(cost: Tensor) -> Tensor:  # [...] bool
    """Where the assignment does not take a cost for a forbidden pair."""
    return cost.abs() < cost_limit(cost.dtype)


def note_forbidden(
    status: Tensor,  # [2] int64
    invalid: Tensor,  # [L, T, Q] bool
    terms: Sequence[tuple[str, Tensor]],  # names of ForbiddenPairs.terms, where they are to blame: [L, T, Q] or less
    targets: Targets,
) -> None:
    """Adds pairs to the status of a matcher, as the ops add theirs."""
    if invalid.numel() == 0:
        return
    _, count, queries = invalid.shape
    is_there = torch.arange(count, device=invalid.device) < targets.offsets[-1]
    invalid = invalid & is_there[:, None]
    found, first = invalid.sum(), invalid.flatten().to(torch.uint8).argmax()  # of equal ones the first
    row = first // queries % count
    image = targets.image_of_row().take(row)
    packed = first // (queries * count)
    bits = sum(where.expand_as(invalid).take(first).long() << _BITS[term] for term, where in terms)
    # As ForbiddenPairs reads them.
    for value, width in ((image, 16), (row - targets.offsets.take(image), 14), (first % queries, 20), (bits, 5)):
        packed = packed << width | value
    order = torch.where(found > 0, torch.iinfo(torch.int64).max - packed, 0)
    status.copy_(torch.stack([status[0] + found, torch.maximum(status[1], order)]))


def weighted(
    matcher: core.HungarianMatcher, cost_class: float, cost_bbox: float, cost_giou: float, **options: Any
) -> core.HungarianMatcher:
    """The matcher with the weights and options of now: schedules change those of the matcher that it computes for."""
    matcher.cost_class, matcher.cost_bbox, matcher.cost_giou = cost_class, cost_bbox, cost_giou
    for name, value in options.items():
        setattr(matcher, name, value)
    return matcher
