"""Matcher of D-FINE, DEIM and DEIMv2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from detr_fast import matcher as core
from detr_fast.boxes import box_cxcywh_to_xyxy, paired_giou
from detr_fast.integrations.further_cost import note_forbidden
from detr_fast.integrations.mode import Mode
from detr_fast.integrations.rtdetr.matcher import HungarianMatcher as RTDETRMatcher
from detr_fast.matcher import check_batch_size, pairs_of, replaced
from detr_fast.ops.assignment import assign
from detr_fast.ops.matching_cost import matching_cost
from detr_fast.structures import Predictions, Targets

USED_UP = 1e6  # published cost of a query that an earlier round has matched


class HungarianMatcher(RTDETRMatcher):
    """``matcher(outputs, targets)`` is ``{"indices": pairs}``; with ``return_topk=k`` it is ``{"indices_o2m": pairs}``.

    Costs as of RT-DETR's matcher. With `return_topk` every image is matched k times, each time without the queries of
    the times before, and the pairs are joined. With `change_matcher` (DEIM), from `matcher_change_epoch` on the cost is
    -p IoU^iou_order_alpha with the probability p of the target's label.

    Modes differ in:

    - the class cost: "compat" has 1e-8 inside its logarithms, which flattens it for logits beyond about 15;
    - boxes of negative width or height, which D-FINE's decoder can make: for GIoU their size is 0; for L1 it is what it
      is in "compat", as published, and 0 in "stable";
    - pairs without finite cost (NaN or infinite predictions): in "compat" NaN counts 1 and infinities the largest
      numbers, as published, so that where good pairs cost more than 1 a query that is NaN is preferred to them;
      "stable" matches such pairs never. Both report them by :meth:`report`, and match no target whose label is out of
      range;
    - `return_topk`: "compat" also gives up the queries 0 to n - 1 of an image with n targets after the first time, as
      the published code takes target numbers for queries; and a used query may return if there is no other left.
      "stable" gives up exactly the used ones, and leaves targets unmatched when none are left.
    """

    def __init__(
        self,
        weight_dict: Mapping[str, float],
        use_focal_loss: bool = False,
        alpha: float = 0.25,
        gamma: float = 2.0,
        change_matcher: bool = False,
        iou_order_alpha: float = 1.0,
        matcher_change_epoch: int = 10000,
        *,
        mode: Mode = "stable",
    ) -> None:
        super().__init__(weight_dict, use_focal_loss, alpha, gamma, mode=mode)
        self.change_matcher, self.iou_order_alpha = change_matcher, iou_order_alpha
        self.matcher_change_epoch = matcher_change_epoch

    @staticmethod
    def _policy(mode: Mode) -> Any:
        return "skip" if mode == "stable" else "as_one"

    @torch.no_grad()
    def forward(self, outputs: Any, targets: Any, return_topk: int = 0, epoch: int = 0) -> Any:
        if isinstance(outputs, Predictions) and isinstance(targets, Targets):
            if self.mode == "stable" and not self._is_changed(epoch):
                return super().forward(with_sizes(outputs), targets)
            return assign(self._costs(outputs, targets, epoch), targets.offsets, targets.max_count)
        if isinstance(outputs, Predictions) or isinstance(targets, Targets):
            raise TypeError(
                "HungarianMatcher: give Predictions with Targets, or a dictionary with a list of dictionaries, "
                f"got {type(outputs).__name__} with {type(targets).__name__}"
            )
        predictions, packed = self._structured(outputs, targets)
        if return_topk:
            return {"indices_o2m": self._several(predictions, packed, return_topk, epoch)}
        return {"indices": pairs_of(self(predictions, packed, epoch=epoch)[0], packed.offsets)}

    def _is_changed(self, epoch: int) -> bool:
        return self.change_matcher and epoch >= self.matcher_change_epoch

    def _structured(
        self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]
    ) -> tuple[Predictions, Targets]:
        predictions = Predictions.of_layer(outputs)
        check_batch_size("HungarianMatcher", predictions.logits.shape[1], len(targets))
        packed = Targets.pack(targets, self.num_labels(predictions.logits.shape[-1]))
        return predictions, packed.to(predictions.logits.device)

    def _costs(self, predictions: Predictions, targets: Targets, epoch: int) -> Tensor:  # [L, T, Q]
        cost = (
            self._scores(predictions, targets) if self._is_changed(epoch) else self._usual_costs(predictions, targets)
        )
        if self.mode == "stable":
            return cost
        cost = replaced(cost, "as_one", targets.max_count)
        return cost.where(self.has_label(predictions, targets), torch.nan)

    def _usual_costs(self, predictions: Predictions, targets: Targets) -> Tensor:  # [L, T, Q]
        logits, boxes = predictions.logits, sized(predictions.boxes)
        arguments = (logits, boxes, targets.labels, targets.boxes, targets.offsets)
        costs = (self.cost_class, self.cost_bbox, self.cost_giou)
        status = self._status_on(logits.device)
        cost = matching_cost(*arguments, *costs, self.kind, self.alpha, self.gamma, status=status)
        if self.mode == "stable":
            return cost
        below = (boxes - predictions.boxes).float().sum(-1)  # [L, B, Q], what is missing in the distance
        return cost + self.cost_bbox * below[:, targets.image_of_row()]

    def _scores(self, predictions: Predictions, targets: Targets) -> Tensor:  # [L, T, Q]
        """-p IoU^iou_order_alpha of each target and the queries of its image."""
        image, is_known = targets.image_of_row(), self.has_label(predictions, targets)
        logits = predictions.logits.float()
        p = logits.sigmoid() if self.use_focal_loss else logits.softmax(-1)
        p = p[:, image, :, targets.labels.where(is_known[:, 0], 0)].transpose(0, 1)
        boxes = box_cxcywh_to_xyxy(sized(predictions.boxes.float()))[:, image]  # [L, T, Q, 4]
        iou, _, _ = paired_giou(boxes, box_cxcywh_to_xyxy(targets.boxes)[:, None])
        cost = (-p * iou**self.iou_order_alpha).where(is_known, torch.nan)
        terms = [("class", p.isnan()), ("GIoU", iou.isnan()), ("label", ~is_known)]
        note_forbidden(self._status_on(logits.device), ~cost.isfinite(), terms, targets)
        return cost

    def _several(self, predictions: Predictions, targets: Targets, rounds: int, epoch: int) -> core.Pairs:
        cost = self._costs(predictions, targets, epoch)
        images = list(pairwise(targets.offsets.tolist()))
        is_known = self.has_label(predictions, targets)
        blocked = torch.inf if self.mode == "stable" else USED_UP
        found = []
        for _ in range(rounds):
            allowed = cost.where(is_known, torch.nan)
            pairs = pairs_of(assign(allowed, targets.offsets, targets.max_count)[0], targets.offsets)
            found.append(pairs)
            for (start, end), (queries, numbers) in zip(images, pairs, strict=True):
                used = queries if self.mode == "stable" else torch.cat([queries, numbers])
                cost[0, start:end, used.to(cost.device)] = blocked
        joined = zip(*found, strict=True)
        return [(torch.cat([q for q, _ in image]), torch.cat([t for _, t in image])) for image in joined]


def with_sizes(predictions: Predictions) -> Predictions:
    """With boxes of no negative width or height."""
    return Predictions(predictions.logits, sized(predictions.boxes))


def sized(boxes: Tensor) -> Tensor:  # [..., 4] cxcywh
    return torch.cat([boxes[..., :2], boxes[..., 2:].clamp(min=0)], -1)
