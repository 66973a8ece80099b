"""Matchers of detrex, whose IoU and GIoU have 1e-6 added to their denominators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast import matcher
from detr_fast.integrations.layered_criterion import Outputs, policy_of
from detr_fast.integrations.mode import Mode, check_mode
from detr_fast.matcher import Pairs, check_batch_size, pairs_of
from detr_fast.ops.dialect import Dialect
from detr_fast.ops.matching_cost import ForbiddenPairs
from detr_fast.structures import Predictions, Targets

DIALECT = Dialect(giou_epsilon=1e-6)
_KINDS = ("focal_loss_cost", "ce_cost")


class HungarianMatcher(matcher.HungarianMatcher):
    """detrex's HungarianMatcher: focal or softmax class cost, L1, GIoU.

    Args:
        cost_class_type: "focal_loss_cost" with `alpha` in [0, 1] and `gamma`, or "ce_cost", for which the last logit
            is "no object" and no target may have it as its label. The published one leaves that to its user.
        mode: "compat": the focal class cost is the published one, with 1e-8 inside its logarithms, and a pair without a
            finite cost (NaN or infinite predictions, boxes of negative size) an error, for which it waits for the
            device. "stable": the focal class cost is exact, which differs by more than 1e-4 for logits
            below -10 or above 9; pairs without a finite cost are not matched, and ``report()`` tells.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_bbox: float = 1,
        cost_giou: float = 1,
        cost_class_type: str = "focal_loss_cost",
        alpha: float = 0.25,
        gamma: float = 2.0,
        *,
        mode: Mode = "stable",
    ) -> None:
        check_mode("HungarianMatcher", mode)
        if cost_class_type not in _KINDS:
            raise ValueError(
                f"HungarianMatcher: cost_class_type must be {' or '.join(map(repr, _KINDS))}, got {cost_class_type!r}"
            )
        policy = policy_of(mode)
        if cost_class_type == "ce_cost":
            policy["kind"] = "softmax"
        super().__init__(cost_class, cost_bbox, cost_giou, alpha=alpha, gamma=gamma, dialect=DIALECT, **policy)
        self.mode = mode

    @property
    def cost_class_type(self) -> str:
        return "ce_cost" if self.kind == "softmax" else "focal_loss_cost"


class GroupHungarianMatcher(matcher.HungarianMatcher):
    """Matcher of detrex's Group DETR: every group of queries is matched with all targets.

    ``matcher(outputs, targets, group_nums)`` returns for each image a pair of CPU int64 tensors, group after group, in
    a group queries ascending. All groups are matched in one call. The class cost is the focal one of alpha 0.25 and
    gamma 2; `mode` as of :class:`HungarianMatcher`.

    Raises:
        ValueError: the number of queries is no multiple of `group_nums`. The published code leaves the rest unmatched.
    """

    def __init__(
        self, cost_class: float = 1, cost_bbox: float = 1, cost_giou: float = 1, *, mode: Mode = "stable"
    ) -> None:
        check_mode("GroupHungarianMatcher", mode)
        super().__init__(cost_class, cost_bbox, cost_giou, alpha=0.25, gamma=2.0, dialect=DIALECT, **policy_of(mode))
        self.mode = mode

    @torch.no_grad()
    def forward(self, outputs: Any, targets: Any, group_nums: int = 1) -> Any:
        if group_nums == 1:
            return super().forward(outputs, targets)
        if isinstance(outputs, Predictions):
            raise TypeError("GroupHungarianMatcher: call match_groups for groups of Predictions")
        return self._pairs(outputs, targets, group_nums)

    def _pairs(self, outputs: Outputs, targets: Sequence[Mapping[str, Tensor]], group_nums: int) -> Pairs:
        predictions = Predictions.of_layer(outputs)
        images, queries, classes = predictions.logits.shape[1:]
        check_queries("GroupHungarianMatcher", queries, group_nums)
        check_batch_size("GroupHungarianMatcher", images, len(targets))
        packed = Targets.pack(targets, self.num_labels(classes)).to(predictions.logits.device)
        return pairs_of(self.match_groups(predictions, packed, group_nums)[0], packed.offsets, group_nums)


def check_queries(name: str, queries: int, groups: int) -> None:
    if groups < 1 or queries % groups != 0:
        raise ValueError(f"{name}: group_nums must divide the {queries} queries, got {groups}")


class FocalLossCost(nn.Module):
    """Class cost of the focal loss, ``[Q, T]`` times `weight`."""

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0, weight: float = 1.0, eps: float = 1e-8) -> None:
        super().__init__()
        self.alpha, self.gamma, self.weight, self.eps = alpha, gamma, weight, eps

    def forward(
        self,
        pred_logits: Tensor,  # [Q, C]
        gt_labels: Tensor,  # [T] int64
    ) -> Tensor:  # [Q, T]
        p = pred_logits[:, gt_labels].sigmoid()
        positive = self.alpha * (1 - p) ** self.gamma * -(p + self.eps).log()
        negative = (1 - self.alpha) * p**self.gamma * -(1 - p + self.eps).log()
        return (positive - negative) * self.weight


class CrossEntropyCost(nn.Module):
    """Class cost of the softmax, ``[Q, T]``: minus the probability of the label, times `weight`."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self,
        pred_logits: Tensor,  # [Q, C]
        gt_labels: Tensor,  # [T] int64
    ) -> Tensor:  # [Q, T]
        return -pred_logits.softmax(-1)[:, gt_labels] * self.weight


class L1Cost(nn.Module):
    """L1 distance of boxes, ``[Q, T]`` times `weight`."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self,
        pred_bboxes: Tensor,  # [Q, 4] cxcywh
        gt_bboxes: Tensor,  # [T, 4] cxcywh
    ) -> Tensor:  # [Q, T]
        return torch.cdist(pred_bboxes, gt_bboxes, p=1) * self.weight


class GIoUCost(nn.Module):
    """Minus the GIoU of boxes with detrex's epsilon, ``[Q, T]`` times `weight`."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self,
        pred_bboxes: Tensor,  # [Q, 4] xyxy
        gt_bboxes: Tensor,  # [T, 4] xyxy
    ) -> Tensor:  # [Q, T]
        queries, targets = pred_bboxes[:, None], gt_bboxes[None]
        least, most = torch.minimum(queries, targets), torch.maximum(queries, targets)
        overlap = (least[..., 2:] - most[..., :2]).clamp(min=0).prod(-1)
        hull = (most[..., 2:] - least[..., :2]).clamp(min=0).prod(-1)
        union = _area(queries) + _area(targets) - overlap
        epsilon = DIALECT.giou_epsilon
        return ((hull - union) / (hull + epsilon) - overlap / (union + epsilon)) * self.weight


def _area(boxes: Tensor) -> Tensor:  # [..., 4] xyxy -> [...]
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


class ModifedMatcher(nn.Module):
    """detrex's matcher with exchangeable costs (the name is spelled as there), for its BaseCriterion.

    ``matcher(pred_logits [B, Q, C], pred_bboxes [B, Q, 4], gt_labels_list, gt_bboxes_list)`` returns for each image a
    pair of CPU int64 tensors (queries, targets). The costs are computed with the matching, not by the objects given,
    with the weights and numbers that these have at the call.

    Args:
        cost_class: a FocalLossCost, the default with weight 2, or a CrossEntropyCost, with the limit of "ce_cost".
        cost_bbox: an L1Cost, the default with weight 5.
        cost_giou: a GIoUCost, the default with weight 2.
        mode: as of :class:`HungarianMatcher`; "stable" needs no `eps` of FocalLossCost.

    Raises:
        TypeError: a cost is of another class, whose values the matching cannot compute.
    """

    def __init__(
        self,
        cost_class: nn.Module | None = None,
        cost_bbox: nn.Module | None = None,
        cost_giou: nn.Module | None = None,
        *,
        mode: Mode = "stable",
    ) -> None:
        super().__init__()
        check_mode("ModifedMatcher", mode)
        self.cost_class = FocalLossCost(weight=2.0) if cost_class is None else cost_class
        self.cost_bbox = L1Cost(weight=5.0) if cost_bbox is None else cost_bbox
        self.cost_giou = GIoUCost(weight=2.0) if cost_giou is None else cost_giou
        self.mode = mode
        self._matcher = matcher.HungarianMatcher(**policy_of(mode))
        self._configure()

    def _configure(self) -> None:
        """What the costs say now: their weights may follow a schedule."""
        _check_cost("cost_class", self.cost_class, FocalLossCost, CrossEntropyCost)
        _check_cost("cost_bbox", self.cost_bbox, L1Cost)
        _check_cost("cost_giou", self.cost_giou, GIoUCost)
        options: dict[str, Any] = {"dialect": DIALECT, "kind": "softmax"}
        if isinstance(self.cost_class, FocalLossCost):
            dialect = DIALECT._replace(class_epsilon=self.cost_class.eps)
            options = {"alpha": self.cost_class.alpha, "gamma": self.cost_class.gamma, "dialect": dialect}
            options["kind"] = policy_of(self.mode)["kind"]
        for name in ("cost_class", "cost_bbox", "cost_giou"):
            options[name] = getattr(self, name).weight
        for name, value in options.items():
            setattr(self._matcher, name, value)

    def forward(
        self,
        pred_logits: Tensor,  # [B, Q, C]
        pred_bboxes: Tensor,  # [B, Q, 4] cxcywh
        gt_labels_list: Sequence[Tensor],  # [n] int64 of each image
        gt_bboxes_list: Sequence[Tensor],  # [n, 4] cxcywh of each image
    ) -> Pairs:
        self._configure()
        listed = zip(gt_labels_list, gt_bboxes_list, strict=True)
        targets = [{"labels": labels, "boxes": boxes} for labels, boxes in listed]
        return self._matcher({"pred_logits": pred_logits, "pred_boxes": pred_bboxes}, targets)

    def report(self) -> ForbiddenPairs | None:
        """Pairs skipped since the last report, as of :class:`detr_fast.HungarianMatcher`. Waits for the device."""
        return self._matcher.report()


def _check_cost(name: str, cost: nn.Module, *classes: type[nn.Module]) -> None:
    if type(cost) not in classes:
        wanted = " or ".join(own.__name__ for own in classes)
        raise TypeError(f"ModifedMatcher: {name} must be a {wanted}, got {type(cost).__name__}")
