"""Terms of mmdetection's matching cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Cost:
    """A term of the cost; called as mmdetection's, ``cost(pred_instances, gt_instances, img_meta)``: ``[Q, T]``."""

    weight: float

    def __call__(self, pred_instances: Any, gt_instances: Any, img_meta: Mapping[str, Any] | None = None) -> Tensor:
        from detr_fast.integrations.mmdetection.assigner import HungarianAssigner

        return HungarianAssigner(self, mode="compat").cost(pred_instances, gt_instances, img_meta).mT

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"


class ClassificationCost(Cost):
    """-softmax(scores)[label]."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight


class FocalLossCost(Cost):
    """alpha (1-p)^gamma (-log(p + eps)) - (1-alpha) p^gamma (-log(1-p + eps)), p = sigmoid(scores)[label]."""

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2,
        eps: float = 1e-12,
        binary_input: bool = False,
        weight: float = 1.0,
    ) -> None:
        if binary_input:
            raise ValueError(
                "FocalLossCost: binary_input must be False, got True: costs of masks are not computed here"
            )
        self.alpha, self.gamma, self.eps, self.binary_input, self.weight = alpha, gamma, eps, binary_input, weight


class BBoxL1Cost(Cost):
    """L1 distance of boxes divided by the image's size, of corners ("xyxy") or of center and size ("xywh")."""

    def __init__(self, box_format: str = "xyxy", weight: float = 1.0) -> None:
        if box_format not in ("xyxy", "xywh"):
            raise ValueError(f"BBoxL1Cost: box_format must be 'xyxy' or 'xywh', got {box_format!r}")
        self.box_format, self.weight = box_format, weight


class IoUCost(Cost):
    """-GIoU, whose areas are at least 1e-6 square pixels."""

    def __init__(self, iou_mode: str = "giou", weight: float = 1.0) -> None:
        if iou_mode != "giou":
            raise ValueError(f"IoUCost: iou_mode must be 'giou', got {iou_mode!r}")
        self.iou_mode, self.weight = iou_mode, weight


COSTS: dict[str, type[Cost]] = {
    cost.__name__: cost for cost in (ClassificationCost, FocalLossCost, BBoxL1Cost, IoUCost)
}


def build_cost(cost: Mapping[str, Any] | Cost) -> Cost:
    if not isinstance(cost, Mapping):
        if not isinstance(cost, Cost):
            raise ValueError(f"HungarianAssigner: match_costs must be of {', '.join(COSTS)}, got {type(cost).__name__}")
        return cost
    options = dict(cost)
    kind = options.pop("type", None)
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", kind)
    name = name.rpartition(".")[2] if isinstance(name, str) else name
    if name not in COSTS:
        raise ValueError(f"HungarianAssigner: type of a cost must be of {', '.join(COSTS)}, got {name!r}")
    return COSTS[name](**options)
