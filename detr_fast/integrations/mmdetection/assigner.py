"""mmdetection's Hungarian assigner, and the same for a whole batch and all layers at once."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from detr_fast import matcher as core
from detr_fast.integrations.further_cost import cost_by, match_with_cost, weighted
from detr_fast.integrations.mmdetection.costs import (
    BBoxL1Cost,
    ClassificationCost,
    Cost,
    FocalLossCost,
    build_cost,
)
from detr_fast.integrations.mode import Mode, check_mode
from detr_fast.matcher import check_batch_size
from detr_fast.ops.dialect import Dialect
from detr_fast.ops.matching_cost import ClassKind, ForbiddenPairs
from detr_fast.structures import Predictions, Targets

_SMALLEST_AREA = 1e-6  # in square pixels


@dataclass
class AssignResult:
    """What an assigner returns; the fields of mmdetection's, whose own is used where it is installed."""

    num_gts: int
    gt_inds: Tensor  # [Q] int64: 0 background, otherwise 1 + the target's index
    max_overlaps: Tensor | None
    labels: Tensor  # [Q] int64: -1 background

    @property
    def num_preds(self) -> int:
        return len(self.gt_inds)


class HungarianAssigner:
    """Drop-in for mmdetection 3's ``HungarianAssigner(match_costs)``.

    ``assigner.assign(pred_instances, gt_instances, img_meta)`` matches one image: ``scores [Q, C]`` are logits,
    ``bboxes`` x1, y1, x2, y2 in pixels, ``labels [T]``; ``img_meta["img_shape"]`` is (height, width). It returns an
    AssignResult on the predictions' device. :meth:`assign_batch` matches all images and layers in one call, from what a
    DETR head has: normalised boxes.

    Args:
        match_costs: a cost or a list of them, as dictionaries with ``type`` or as objects of this module. Each of
            :class:`ClassificationCost` or :class:`FocalLossCost`, :class:`BBoxL1Cost`, :class:`IoUCost` at most once.
        mode: "compat": mmdetection's epsilons; an invalid cost raises a ValueError, as SciPy's does, with its position.
            "stable": FocalLossCost by log-sigmoids without epsilon, which differs where |logit| exceeds about 20;
            invalid pairs are left out, the rest is matched at least cost, and :meth:`report` tells.

    Differences to mmdetection in both modes:

    - Everything is computed in float32, also of half types, with boxes divided by the image's size: GIoU differs by
      rounding, and where a union is below 1e-6 square pixels by up to 1e-6 divided by the hull.
    - :meth:`assign_batch` with images of several sizes takes that least area from the largest image.
    - A box of negative width or height is an invalid pair.
    - Equal optima may be resolved otherwise than by SciPy.

    Raises:
        ValueError: another cost, one given twice, or targets that are malformed.

    Source: Carion et al., ECCV 2020; Chen et al., "MMDetection", 2019.
    """

    def __init__(
        self, match_costs: Mapping[str, Any] | Cost | Sequence[Mapping[str, Any] | Cost], *, mode: Mode = "stable"
    ) -> None:
        check_mode("HungarianAssigner", mode)
        listed = [match_costs] if isinstance(match_costs, (Mapping, Cost)) else list(match_costs)
        if not listed:
            raise ValueError("HungarianAssigner: match_costs must have at least one cost, got none")
        self.match_costs, self.mode = [build_cost(cost) for cost in listed], mode
        self._of: dict[str, Cost] = {}
        for cost in self.match_costs:
            name = "class" if isinstance(cost, (ClassificationCost, FocalLossCost)) else type(cost).__name__
            if name in self._of:
                raise ValueError(f"HungarianAssigner: match_costs must have one {name} cost, got {cost!r} as another")
            self._of[name] = cost
        self._matcher = _core_matcher(self._of, mode)

    def assign(
        self, pred_instances: Any, gt_instances: Any, img_meta: Mapping[str, Any] | None = None, **_: Any
    ) -> AssignResult:
        shape = _shape_of(img_meta)
        scores, boxes = (
            pred_instances.scores[None, None],
            _normalised(_tensor(pred_instances.bboxes), shape)[None, None],
        )
        found = self._matched(scores, boxes, [gt_instances], [shape])
        return _results(*found, [len(gt_instances.labels)], scores.shape)[0][0]

    def assign_batch(
        self,
        cls_scores: Tensor,  # [L, B, Q, C] logits
        bbox_preds: Tensor,  # [L, B, Q, 4] cxcywh divided by the image's size
        batch_gt_instances: Sequence[Any],  # an image: labels [t], bboxes [t, 4] corners in pixels
        batch_img_metas: Sequence[Mapping[str, Any]],
    ) -> list[list[AssignResult]]:
        """Results of each layer and image; a fixed number of launches, and nothing is read back in mode "stable"."""
        found = self.match_batch(cls_scores, bbox_preds, batch_gt_instances, batch_img_metas)
        return _results(*found, [len(own.labels) for own in batch_gt_instances], cls_scores.shape)

    @torch.no_grad()
    def match_batch(
        self,
        cls_scores: Tensor,  # [L, B, Q, C]
        bbox_preds: Tensor,  # [L, B, Q, 4]
        batch_gt_instances: Sequence[Any],
        batch_img_metas: Sequence[Mapping[str, Any]],
    ) -> tuple[Tensor, Targets]:
        """As :meth:`assign_batch`: query_of_target ``[L, T]`` int32 on the device, and the targets, normalised."""
        if cls_scores.dim() != 4 or bbox_preds.shape != (*cls_scores.shape[:3], 4):
            shapes = f"{list(cls_scores.shape)} and {list(bbox_preds.shape)}"
            raise ValueError(
                f"HungarianAssigner: cls_scores, bbox_preds must be [L, B, Q, C], [L, B, Q, 4], got {shapes}"
            )
        check_batch_size("HungarianAssigner", cls_scores.shape[1], len(batch_gt_instances))
        return self._matched(cls_scores, bbox_preds, batch_gt_instances, [_shape_of(meta) for meta in batch_img_metas])

    @torch.no_grad()
    def cost(self, pred_instances: Any, gt_instances: Any, img_meta: Mapping[str, Any] | None = None) -> Tensor:
        """Sum of all costs of one image: ``[T, Q]``."""
        shape = _shape_of(img_meta)
        scores, boxes = (
            pred_instances.scores[None, None],
            _normalised(_tensor(pred_instances.bboxes), shape)[None, None],
        )
        predictions, targets = Predictions(scores, boxes), self._targets([gt_instances], [shape], scores)
        cost = cost_by(self._current([shape]), predictions, targets)
        return (cost + self._of_corners(predictions, targets))[0]

    def report(self) -> ForbiddenPairs | None:
        """Pairs left out since the last report, with the position of the first; None if there were none. Waits."""
        return self._matcher.report()

    def _matched(
        self, scores: Tensor, boxes: Tensor, instances: Sequence[Any], shapes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Targets]:
        predictions, targets = Predictions(scores, boxes), self._targets(instances, shapes, scores)
        matcher = self._current(shapes)
        with torch.no_grad():
            if self._has_corners():
                extra = self._of_corners(predictions, targets)
                return match_with_cost(matcher, predictions, targets, extra), targets
            return matcher(predictions, targets), targets

    def _targets(self, instances: Sequence[Any], shapes: Sequence[tuple[int, int]], scores: Tensor) -> Targets:
        listed = [{"labels": own.labels, "boxes": _tensor(own.bboxes).float()} for own in instances]
        packed = Targets.pack(listed, check_values=False)
        sizes = torch.tensor([[width, height] * 2 for height, width in shapes], dtype=torch.float32).reshape(-1, 4)
        counts = torch.tensor([len(own["labels"]) for own in listed])
        of_rows = sizes.repeat_interleave(counts, 0).to(packed.boxes.device, non_blocking=True)
        packed = replace(packed, boxes=_centers(packed.boxes) / of_rows)
        if packed.labels.device.type == "cpu":
            packed.check_values(self._matcher.num_labels(scores.shape[-1]))
        return packed.to(scores.device)

    def _current(self, shapes: Sequence[tuple[int, int]]) -> core.HungarianMatcher:
        """What computes, with the costs' weights and options of now, and the least area in pixels of these images."""
        of_class, distance, overlap = (self._of.get(name) for name in ("class", "BBoxL1Cost", "IoUCost"))
        largest = max((height * width for height, width in shapes), default=1)
        dialect = Dialect(giou_floor=_SMALLEST_AREA / max(largest, 1))
        options: dict[str, Any] = {}
        if isinstance(of_class, FocalLossCost):
            dialect = dialect._replace(class_epsilon=of_class.eps)
            options = {"alpha": of_class.alpha, "gamma": of_class.gamma}
        weights = (of_class, None if self._has_corners() else distance, overlap)
        return weighted(self._matcher, *(cost.weight if cost else 0.0 for cost in weights), dialect=dialect, **options)

    def _has_corners(self) -> bool:
        distance = self._of.get("BBoxL1Cost")
        return isinstance(distance, BBoxL1Cost) and distance.box_format == "xyxy"

    def _of_corners(self, predictions: Predictions, targets: Targets) -> Tensor:
        """Cost of BBoxL1Cost of "xyxy": ``[L, T, Q]``, or 0."""
        if not self._has_corners():
            return predictions.boxes.new_zeros(())
        own = _corners(predictions.boxes.float())[:, targets.image_of_row()]  # [L, T, Q, 4]
        return self._of["BBoxL1Cost"].weight * (own - _corners(targets.boxes)[:, None]).abs().sum(-1)


def _results(
    query_of_target: Tensor,  # [L, T]
    targets: Targets,
    counts: Sequence[int],
    shape: Sequence[int],
) -> list[list[AssignResult]]:
    layers, images, queries = shape[:3]
    device = query_of_target.device
    image = targets.image_of_row()
    place = torch.where(query_of_target >= 0, image * queries + query_of_target, images * queries)
    gt_inds = torch.zeros(layers, images * queries + 1, dtype=torch.int64, device=device)
    number = torch.arange(1, len(targets.labels) + 1, device=device) - targets.offsets[image]
    gt_inds.scatter_(1, place, number.expand(layers, -1))
    labels = torch.full_like(gt_inds, -1).scatter_(1, place, targets.labels.expand(layers, -1))
    gt_inds, labels = (part[:, :-1].unflatten(1, (images, queries)) for part in (gt_inds, labels))
    make = _result_class()
    return [
        [make(count, own, None, labels=own_labels) for count, own, own_labels in zip(counts, *layer, strict=True)]
        for layer in zip(gt_inds, labels, strict=True)
    ]


def _core_matcher(costs: Mapping[str, Cost], mode: Mode) -> core.HungarianMatcher:
    of_class = costs.get("class")
    kind: ClassKind = "focal_stable"  # without a class cost: of weight 0, and with as many labels as there are scores
    if isinstance(of_class, ClassificationCost):
        kind = "softmax"
    elif isinstance(of_class, FocalLossCost) and mode == "compat":
        kind = "focal"
    return core.HungarianMatcher(kind=kind, invalid="raise" if mode == "compat" else "skip")


def _tensor(boxes: Any) -> Tensor:  # [N, 4]
    """A tensor, or mmdetection's boxes around one."""
    return boxes if isinstance(boxes, Tensor) else boxes.tensor


def _shape_of(meta: Mapping[str, Any] | None) -> tuple[int, int]:
    if meta is None or "img_shape" not in meta:
        raise ValueError("HungarianAssigner: img_meta must have 'img_shape', the image's (height, width)")
    height, width = meta["img_shape"][:2]
    return height, width


def _normalised(corners: Tensor, shape: tuple[int, int]) -> Tensor:
    """Corners in pixels to cxcywh divided by the image's size."""
    x0, y0, x1, y1 = corners.float().unbind(-1) if corners.dtype != torch.float64 else corners.unbind(-1)
    height, width = shape
    return torch.stack([(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height], -1)


def _centers(corners: Tensor) -> Tensor:
    low, high = corners[..., :2], corners[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def _corners(boxes: Tensor) -> Tensor:
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([center - size / 2, center + size / 2], -1)


def _result_class() -> Any:
    """mmdetection's, if it is in use."""
    module = sys.modules.get("mmdet.models.task_modules.assigners")
    return AssignResult if module is None else module.AssignResult
