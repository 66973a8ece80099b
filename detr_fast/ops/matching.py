"""Matching cost and assignment in one call, without storing the cost of the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.ops.assignment import assign_reference
from detr_fast.ops.dialect import DETR, Dialect
from detr_fast.ops.matching_cost import ClassKind, matching_cost_reference


def match(
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
    groups: int = 1,
    dialect: Dialect = DETR,
) -> Tensor:
    """query_of_target ``[L, T * groups]`` int32 of least total cost.

    Equal to :func:`assign` on :func:`matching_cost`, bit for bit; their contracts hold for ties, groups, more targets
    than queries, forbidden pairs and their `status`, types and errors. Nothing is differentiated. On a CUDA device two
    launches, whatever the number of layers and groups.
    """
    arguments = (logits, boxes, labels, target_boxes, offsets)
    options = (class_weight, box_weight, giou_weight, kind, alpha, gamma, *dialect)
    most = -1 if max_count is None else max_count
    return torch.ops.detr_fast.match.default(*arguments, status, most, groups, *options)


def match_reference(
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
    groups: int = 1,
    dialect: Dialect = DETR,
) -> Tensor:
    """The definition of :func:`match`."""
    arguments = (logits, boxes, labels, target_boxes, offsets)
    cost = matching_cost_reference(*arguments, class_weight, box_weight, giou_weight, kind, alpha, gamma, dialect)
    return assign_reference(cost, offsets, groups)


@torch.library.register_fake("detr_fast::match")
def _(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    offsets: Tensor,
    status: Tensor | None,
    max_count: int,
    groups: int,
    *options: object,
) -> Tensor:
    return logits.new_empty((logits.shape[0], labels.shape[0] * groups), dtype=torch.int32)
