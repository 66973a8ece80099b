"""Matching cost of every target with the queries of its own image, in all decoder layers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from detr_fast import _C  # noqa: F401  registers the ops
from detr_fast.ops.dialect import DETR, Dialect

ClassKind = Literal["softmax", "focal", "focal_stable"]

_TERM_BITS, _QUERY_BITS, _TARGET_BITS, _IMAGE_BITS = 5, 20, 14, 16  # as csrc/kernels.h packs the position
_TERMS = ("class", "box", "GIoU", "label", "sum")


@dataclass(frozen=True)
class ForbiddenPairs:
    """What an op's status says: how many pairs were forbidden since it was new, and where the first of them is.

    The first in the order of layer, image, target and query, whatever the order of the calls.
    """

    count: int
    layer: int
    image: int
    target: int  # within its image
    query: int
    terms: tuple[str, ...]  # "class", "box", "GIoU", "label" (out of range) or "sum" (the terms' sum overflows)

    @staticmethod
    def new_status(device: torch.device | str | None = None) -> Tensor:
        """A status for :func:`match` and :func:`matching_cost` to add to, ``[2]`` int64 zeros.

        The first is the number of pairs, the second 2^63 - 1 minus the packed position of the first pair.
        """
        return torch.zeros(2, dtype=torch.int64, device=device)

    @classmethod
    def read(cls, status: Tensor) -> ForbiddenPairs | None:
        """Reads a status ``[2]`` int64 from its device; None if no pair was forbidden."""
        count, order = status.tolist()
        if count == 0:
            return None
        packed = torch.iinfo(torch.int64).max - order
        fields = []
        for bits in (_TERM_BITS, _QUERY_BITS, _TARGET_BITS, _IMAGE_BITS):
            fields.append(packed & (1 << bits) - 1)
            packed >>= bits
        terms, query, target, image = fields
        return cls(count, packed, image, target, query, tuple(n for bit, n in enumerate(_TERMS) if terms >> bit & 1))

    def __str__(self) -> str:
        return (
            f"{self.count} pair(s) without a finite cost; the first in layer {self.layer}, image {self.image}, "
            f"target {self.target}, query {self.query}: {' and '.join(self.terms)} term"
        )


def matching_cost(
    logits: Tensor,  # [L, B, Q, C]
    boxes: Tensor,  # [L, B, Q, 4] cxcywh
    labels: Tensor,  # [T] int64
    target_boxes: Tensor,  # [T, 4] float32 cxcywh
    offsets: Tensor,  # [B + 1] int32
    class_weight: float = 1.0,
    box_weight: float = 1.0,
    giou_weight: float = 1.0,
    kind: ClassKind = "softmax",
    alpha: float = 0.25,
    gamma: float = 2.0,
    *,
    status: Tensor | None = None,  # [2] int64
    max_count: int | None = None,
    dialect: Dialect = DETR,
) -> Tensor:
    """Cost ``[L, T, Q]`` of matching each target with each query of its own image.

    cost = box_weight |box - target|_1 + class_weight class_cost - giou_weight GIoU, with p of the target's label:

    - softmax: class_cost = -softmax(logits)[label], over all C classes;
    - focal: alpha (1-p)^gamma (-log(p + e)) - (1-alpha) p^gamma (-log(1-p + e)), p = sigmoid(logit);
    - focal_stable: the same with log-sigmoids and no epsilon, finite and exact for every logit.

    Logits and boxes may be float16, bfloat16, float32 or float64; everything is computed and returned in float32, or in
    float64 if one of them is. Rows past ``offsets[B]`` are 0. `dialect` has the epsilon e and the guards of GIoU, which
    without any is NaN for two boxes without area, and always for boxes of negative width or height. A label outside
    ``[0, C)`` (softmax: ``[0, C - 1)``, the last class being "no object") makes its row NaN. Pairs whose cost is NaN,
    infinite or at least 2^100 (float64: 2^1000) are forbidden to the assignment: their number is added to a `status`
    made by :meth:`ForbiddenPairs.new_status`, which also keeps the position of the first, for
    :meth:`ForbiddenPairs.read`. `max_count` as for :func:`assign`.

    On a CUDA device nothing is read back, offsets are not checked, and the bits are those of the CPU (float32).

    Raises:
        RuntimeError: a tensor has another shape or type, or `kind` is unknown.

    Source: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 3.1;
    Zhu et al., "Deformable DETR", ICLR 2021 (focal).
    """
    arguments = (logits, boxes, labels, target_boxes, offsets)
    options = (class_weight, box_weight, giou_weight, kind, alpha, gamma, *dialect)
    return torch.ops.detr_fast.matching_cost.default(
        *arguments, status, -1 if max_count is None else max_count, *options
    )


def matching_cost_reference(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    offsets: Tensor,
    class_weight: float = 1.0,
    box_weight: float = 1.0,
    giou_weight: float = 1.0,
    kind: ClassKind = "softmax",
    alpha: float = 0.25,
    gamma: float = 2.0,
    dialect: Dialect = DETR,
) -> Tensor:
    """The definition of :func:`matching_cost`."""
    exact = torch.float64 in (logits.dtype, boxes.dtype)
    dtype = torch.float64 if exact else torch.float32
    logits, boxes, target_boxes = logits.to(dtype), boxes.to(dtype), target_boxes.to(dtype)
    cost = logits.new_zeros((logits.shape[0], labels.shape[0], logits.shape[2]))
    bounds = offsets.tolist()
    for image, (start, end) in enumerate(itertools.pairwise(bounds)):
        label = labels[start:end]
        known = (label >= 0) & (label < logits.shape[-1] - (kind == "softmax"))
        x = logits[:, image][..., label.where(known, 0)]  # [L, Q, t]
        if kind == "softmax":
            class_cost = -logits[:, image].softmax(-1)[..., label.where(known, 0)]
        else:
            class_cost = _focal_cost(x, alpha, gamma, None if kind == "focal_stable" else dialect.class_epsilon)
        class_cost = class_cost.where(known, torch.nan)
        box, goal = boxes[:, image, :, None], target_boxes[start:end]  # [L, Q, 1, 4], [t, 4]
        distance = (box - goal).abs().sum(-1)
        block = box_weight * distance + class_weight * class_cost - giou_weight * giou_of_boxes(box, goal, dialect)
        cost[:, start:end] = block.mT
    return cost


def _focal_cost(x: Tensor, alpha: float, gamma: float, epsilon: float | None) -> Tensor:
    p = x.sigmoid()
    if epsilon is None:
        minus_log_p, minus_log_q = torch.nn.functional.softplus(-x), torch.nn.functional.softplus(x)
    else:
        minus_log_p, minus_log_q = -(p + epsilon).log(), -(1 - p + epsilon).log()
    return alpha * (1 - p) ** gamma * minus_log_p - (1 - alpha) * p**gamma * minus_log_q


def giou_of_boxes(box: Tensor, goal: Tensor, dialect: Dialect = DETR) -> Tensor:
    """GIoU of cxcywh boxes with broadcasting; NaN where it is undefined."""
    iou, union, hull = iou_of_boxes(box, goal, dialect)
    giou = iou - (hull - union) / _guarded(hull, dialect)
    valid = (box[..., 2:] >= 0).all(-1) & (goal[..., 2:] >= 0).all(-1)
    return giou.where(valid, torch.nan)


def iou_of_boxes(box: Tensor, goal: Tensor, dialect: Dialect = DETR) -> tuple[Tensor, Tensor, Tensor]:
    """IoU of cxcywh boxes with broadcasting, the area of their union and that of their hull."""
    low, high = torch.maximum(_low(box), _low(goal)), torch.minimum(_high(box), _high(goal))
    overlap = (high - low).clamp(min=0).prod(-1)
    union = (_high(box) - _low(box)).prod(-1) + (_high(goal) - _low(goal)).prod(-1) - overlap
    hull = (torch.maximum(_high(box), _high(goal)) - torch.minimum(_low(box), _low(goal))).prod(-1)
    return overlap / _guarded(union, dialect), union, hull


def _guarded(area: Tensor, dialect: Dialect) -> Tensor:
    return area.clamp(min=dialect.giou_floor) + dialect.giou_epsilon


def _low(box: Tensor) -> Tensor:
    return box[..., :2] - box[..., 2:] / 2


def _high(box: Tensor) -> Tensor:
    return box[..., :2] + box[..., 2:] / 2


@torch.library.register_fake("detr_fast::matching_cost")
def _(logits: Tensor, boxes: Tensor, labels: Tensor, *others: object) -> Tensor:
    dtype = torch.float64 if torch.float64 in (logits.dtype, boxes.dtype) else torch.float32
    return logits.new_empty((logits.shape[0], labels.shape[0], logits.shape[2]), dtype=dtype)
