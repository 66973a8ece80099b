"""What a matching says about training: how stable it is, what was left out, and which term of the cost decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detr_fast.ops.matching_cost import giou_of_boxes, matching_cost
from detr_fast.structures import Predictions, Targets

if TYPE_CHECKING:
    from detr_fast.matcher import HungarianMatcher

TERMS = ("class", "bbox", "giou")


@dataclass(frozen=True)
class MatchingDiagnostics:
    """Of one batch, on its device; nothing waits for the device before :meth:`as_dict`."""

    changed: Tensor  # [L - 1] float32, share of the targets whose query is another one than in the layer before
    dropped: Tensor  # [] int64, targets without a query because their image has more targets than queries
    forbidden: Tensor  # [B, 3] int64, pairs of all layers whose class, bbox or giou term is not finite
    cost: Tensor  # [L, 3] float32, mean of the matched pairs' weighted terms; finite ones only

    def as_dict(self) -> dict[str, Any]:
        """Numbers for a log, with the images that have forbidden pairs. Waits for the device once."""
        shapes = [self.changed.shape, self.dropped.shape, self.forbidden.shape, self.cost.shape]
        parts = (self.changed, self.dropped, self.forbidden, self.cost)
        flat = torch.cat([part.flatten().double() for part in parts]).cpu().split([shape.numel() for shape in shapes])
        changed, dropped, forbidden, cost = (x.view(shape) for x, shape in zip(flat, shapes, strict=True))
        faulty = {
            image: {term: int(count) for term, count in zip(TERMS, row, strict=True) if count}
            for image, row in enumerate(forbidden.tolist())
            if any(row)
        }
        return {
            "changed": changed.tolist(),
            "dropped": int(dropped),
            "forbidden": faulty,
            "cost": {term: column.tolist() for term, column in zip(TERMS, cost.unbind(1), strict=True)},
        }


@torch.no_grad()
def diagnose(
    matcher: HungarianMatcher,
    predictions: Predictions,
    targets: Targets,
    query_of_target: Tensor,  # [L, T] int32, of this matcher
) -> MatchingDiagnostics:
    """Diagnostics of a matching; some launches, none of which waits, and memory for some numbers ``[L, T, Q]``."""
    counts = targets.offsets.diff()
    rows = torch.arange(len(targets.labels), device=targets.labels.device)
    is_target = rows < targets.offsets[-1]
    image = targets.image_of_row()
    moved = (query_of_target[1:] != query_of_target[:-1]) & is_target
    matched = (query_of_target >= 0) & is_target
    query = query_of_target.clamp(min=0)[..., None].long()
    forbidden, cost = [], []
    for term in _terms(matcher, predictions, targets, image):
        bad = (~term.isfinite()).sum((0, 2)) * is_target
        forbidden.append(torch.zeros(len(counts), dtype=torch.int64, device=bad.device).index_add(0, image, bad))
        own = term.gather(2, query).squeeze(2)
        counted = matched & own.isfinite()
        cost.append(own.where(counted, 0).sum(1) / counted.sum(1).clamp(min=1))
    return MatchingDiagnostics(
        changed=moved.sum(1) / targets.offsets[-1].clamp(min=1),
        dropped=(counts - predictions.logits.shape[2]).clamp(min=0).sum(),
        forbidden=torch.stack(forbidden, 1),
        cost=torch.stack(cost, 1).float(),
    )


def _terms(matcher: HungarianMatcher, predictions: Predictions, targets: Targets, image: Tensor) -> Iterator[Tensor]:
    """The weighted terms of the cost, one after the other, each ``[L, T, Q]``."""
    yield matching_cost(
        predictions.logits,
        torch.full_like(predictions.boxes, 0.5),  # no box may spoil the class term
        targets.labels,
        torch.full_like(targets.boxes, 0.5),
        targets.offsets,
        matcher.cost_class,
        0.0,
        0.0,
        matcher.kind,
        matcher.alpha,
        matcher.gamma,
        max_count=targets.max_count,
        dialect=matcher.dialect,
    )
    boxes, goals = predictions.boxes[:, image].float(), targets.boxes[:, None]
    yield matcher.cost_bbox * (boxes - goals).abs().sum(-1)
    yield -matcher.cost_giou * giou_of_boxes(boxes, goals, matcher.dialect)
