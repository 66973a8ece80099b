"""Set loss of matched predictions with its gradient, all terms and decoder layers in one pass."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops.dialect import DETR, Dialect
from detr_fast.ops.matching_cost import giou_of_boxes, iou_of_boxes

LossKind = Literal["softmax", "focal", "focal_stable", "varifocal", "mal", "ia_bce"]

TERMS = ("class", "bbox", "giou", "cardinality_error", "class_error")


class WeightedLoss(NamedTuple):
    """What :func:`weighted_set_loss` returns."""

    total: Tensor  # [] sum of weight times loss over layers and terms
    losses: Tensor  # [L, 5]


def set_loss(
    logits: Tensor,  # [L, B, Q, C]
    boxes: Tensor,  # [L, B, Q, 4] cxcywh
    query_of_target: Tensor,  # [L, T] int32, -1 = unmatched
    labels: Tensor,  # [T] int64
    target_boxes: Tensor,  # [T, 4] float32 cxcywh
    offsets: Tensor,  # [B + 1] int32
    num_boxes: Tensor | None = None,  # [] float32, normaliser of box and sigmoid losses; None: offsets[B]
    class_weight: Tensor | None = None,  # [C] float32, softmax only; the last class is "no object"
    kind: LossKind = "softmax",
    alpha: float = 0.25,
    gamma: float = 2.0,
    dialect: Dialect = DETR,
) -> Tensor:
    """Losses ``[L, 5]`` of each layer, in the order of :data:`TERMS`. At least 1 is used for `num_boxes`.

    - class, softmax: sum of w[y] (-log softmax(logits)[y]) over all queries, divided by the sum of w[y]; y is the label
      of the query's target, or the last class where it has none; w is `class_weight`, or 1;
    - class, focal and focal_stable: sigmoid focal loss summed over queries and classes, divided by `num_boxes`;
    - class, varifocal, mal and ia_bce: the same sum, divided by `num_boxes`, with p = sigmoid(x) and the IoU u of a
      matched pair's boxes: alpha p^gamma softplus(x) of a negative example (ia_bce: alpha is 1), and of a positive one
      w (g softplus(-x) + (1 - g) softplus(x)), where varifocal has g = w = u, mal g = u^gamma and w = 1, and ia_bce
      g = max(p^alpha u^(1-alpha), 0.01) and w = 1. u, g, w and, but for ia_bce, p^gamma count as constants;
    - bbox: sum of |box - target|_1 over matched pairs, divided by `num_boxes`;
    - giou: sum of 1 - GIoU over matched pairs, divided by `num_boxes`;
    - cardinality_error: mean over images of |queries whose largest logit is not the last - targets|; no gradient;
    - class_error: percentage of matched pairs whose largest logit is not the label, 100 without pairs; no gradient.

    Differentiable once, in logits and boxes; the gradient is computed with the losses, backward only scales it. Types
    and `dialect` as in :func:`matching_cost`; gradients return in the inputs' types.

    On a CUDA device nothing is read back: a query out of range counts as unmatched, a matched target's label out of
    range makes the class loss NaN. One launch, whatever the number of layers.

    Raises:
        RuntimeError: a tensor has another shape, type or device; on the CPU also a query or label out of range, with
            its image.

    Source: Carion et al., ECCV 2020, section 3.1 and appendix A.2; Lin et al., ICCV 2017 (focal); Zhang et al.,
    CVPR 2021 (varifocal, as in RT-DETR); Huang et al., "DEIM", CVPR 2025 (mal); Chen et al., "LW-DETR", 2024 (ia_bce).
    """
    arguments = (logits, boxes, query_of_target, labels, target_boxes, offsets, num_boxes, class_weight)
    guards = (dialect.giou_floor, dialect.giou_epsilon)
    return torch.ops.detr_fast.set_loss.default(*arguments, None, kind, alpha, gamma, *guards)[0]


def weighted_set_loss(
    logits: Tensor,  # [L, B, Q, C]
    boxes: Tensor,  # [L, B, Q, 4] cxcywh
    query_of_target: Tensor,  # [L, T] int32, -1 = unmatched
    labels: Tensor,  # [T] int64
    target_boxes: Tensor,  # [T, 4] float32 cxcywh
    offsets: Tensor,  # [B + 1] int32
    loss_weight: Tensor,  # [L, 5] float32, in the order of TERMS
    num_boxes: Tensor | None = None,
    class_weight: Tensor | None = None,
    kind: LossKind = "softmax",
    alpha: float = 0.25,
    gamma: float = 2.0,
    dialect: Dialect = DETR,
) -> WeightedLoss:
    """As :func:`set_loss`, with the weighted sum of all losses to differentiate: one launch forward, one backward.

    Terms of weight 0 take no part, even if they are NaN. Weights of the two errors change the sum, not the gradient.
    Differentiable in logits and boxes only, not in the weights. Errors as of :func:`set_loss`.
    """
    arguments = (logits, boxes, query_of_target, labels, target_boxes, offsets, num_boxes, class_weight, loss_weight)
    guards = (dialect.giou_floor, dialect.giou_epsilon)
    losses, total, *_ = torch.ops.detr_fast.set_loss.default(*arguments, kind, alpha, gamma, *guards)
    return WeightedLoss(total, losses)


def set_loss_reference(
    logits: Tensor,
    boxes: Tensor,
    query_of_target: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    offsets: Tensor,
    num_boxes: Tensor | None = None,
    class_weight: Tensor | None = None,
    kind: LossKind = "softmax",
    alpha: float = 0.25,
    gamma: float = 2.0,
    dialect: Dialect = DETR,
) -> Tensor:
    """The definition of :func:`set_loss`, differentiated by autograd."""
    num_boxes = (offsets[-1].float() if num_boxes is None else num_boxes).clamp(min=1)
    exact = torch.float64 in (logits.dtype, boxes.dtype)
    dtype = torch.float64 if exact else torch.float32
    logits, boxes, target_boxes = logits.to(dtype), boxes.to(dtype), target_boxes.to(dtype)
    counts = offsets.diff().long()
    image_of_target = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    matches = query_of_target[:, : len(image_of_target)].long()
    rows = []
    for layer in range(logits.shape[0]):
        target = torch.nonzero(matches[layer] >= 0).flatten()
        where = (image_of_target[target], matches[layer][target])
        label = labels[target]
        box, goal = boxes[layer][where], target_boxes[target]
        quality = iou_of_boxes(box.detach(), goal, dialect)[0]
        with torch.no_grad():
            found = logits[layer].argmax(-1)
            cardinality = ((found != logits.shape[-1] - 1).sum(1) - counts).abs().to(dtype).mean()
            error = 100 - 100 * (found[where] == label).to(dtype).mean() if len(target) else box.new_tensor(100.0)
        rows.append(
            torch.stack(
                [
                    _class_loss(logits[layer], where, label, quality, num_boxes, class_weight, kind, alpha, gamma),
                    (box - goal).abs().sum() / num_boxes,
                    (1 - giou_of_boxes(box, goal, dialect)).sum() / num_boxes,
                    cardinality,
                    error,
                ]
            )
        )
    return torch.stack(rows)


def _class_loss(
    logits: Tensor,  # [B, Q, C]
    where: tuple[Tensor, Tensor],  # images and queries of the matched pairs
    label: Tensor,
    quality: Tensor,  # IoU of the matched pairs
    num_boxes: Tensor,
    class_weight: Tensor | None,
    kind: LossKind,
    alpha: float,
    gamma: float,
) -> Tensor:
    if kind == "softmax":
        wanted = torch.full(logits.shape[:2], logits.shape[-1] - 1, device=logits.device)
        wanted[where] = label
        weight = None if class_weight is None else class_weight.to(logits.dtype)
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight)
    positive = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    positive[(*where, label)] = True
    p = logits.sigmoid()
    if kind in ("focal", "focal_stable"):
        positives = alpha * (1 - p) ** gamma * F.softplus(-logits)
        negatives = (1 - alpha) * p**gamma * F.softplus(logits)
        return torch.where(positive, positives, negatives).sum() / num_boxes
    iou = torch.zeros_like(logits)
    iou[(*where, label)] = quality
    constant = p.detach()
    if kind == "varifocal":
        goal, factor, negatives = iou, iou, alpha * constant**gamma * F.softplus(logits)
    elif kind == "mal":
        goal, factor, negatives = iou**gamma, torch.ones_like(iou), alpha * constant**gamma * F.softplus(logits)
    else:
        goal, factor = (constant**alpha * iou ** (1 - alpha)).clamp(min=0.01), torch.ones_like(iou)
        negatives = p**gamma * F.softplus(logits)
    positives = factor * (goal * F.softplus(-logits) + (1 - goal) * F.softplus(logits))
    return torch.where(positive, positives, negatives).sum() / num_boxes


@torch.library.register_fake("detr_fast::set_loss")
def _(
    logits: Tensor,
    boxes: Tensor,
    query_of_target: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    offsets: Tensor,
    num_boxes: Tensor | None,
    class_weight: Tensor | None,
    loss_weight: Tensor | None,
    kind: str,
    alpha: float,
    gamma: float,
    giou_floor: float = 0.0,  # PyTorch leaves arguments out that have the default
    giou_epsilon: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if torch.float64 in (logits.dtype, boxes.dtype) else torch.float32
    return (
        logits.new_empty((logits.shape[0], len(TERMS)), dtype=dtype),
        logits.new_empty((), dtype=dtype),
        logits.new_empty(logits.shape, dtype=dtype),
        logits.new_empty((*boxes.shape[:3], 8), dtype=dtype),
    )


@torch.library.register_fake("detr_fast::set_loss_backward")
def _(
    loss_gradient: Tensor | None,
    total_gradient: Tensor | None,
    loss_weight: Tensor | None,
    logits_gradient: Tensor,
    boxes_gradient: Tensor,
    logits_type: torch.dtype,
    boxes_type: torch.dtype,
) -> tuple[Tensor, Tensor]:
    boxes_shape = (*boxes_gradient.shape[:3], 4)
    return (
        logits_gradient.new_empty(logits_gradient.shape, dtype=logits_type),
        boxes_gradient.new_empty(boxes_shape, dtype=boxes_type),
    )


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, _, logits_gradient, boxes_gradient = output
    ctx.mark_non_differentiable(logits_gradient, boxes_gradient)
    ctx.set_materialize_grads(False)
    logits, boxes, *_, loss_weight, _, _, _, _, _ = inputs
    ctx.save_for_backward(loss_weight, logits_gradient, boxes_gradient)
    ctx.types = (logits.dtype, boxes.dtype)


def _scale_gradients(
    ctx: Any, loss_gradient: Tensor | None, total_gradient: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    unused = (None,) * 12
    if loss_gradient is None and total_gradient is None:
        return (None, None, *unused)
    if torch.is_grad_enabled():  # create_graph: the gradient would silently be a constant
        raise RuntimeError("set_loss: second derivatives are not available; use set_loss_reference for them")
    incoming = (loss_gradient, total_gradient)
    scaled = torch.ops.detr_fast.set_loss_backward.default(*incoming, *ctx.saved_tensors, *ctx.types)
    return (*scaled, *unused)


torch.library.register_autograd("detr_fast::set_loss", _scale_gradients, setup_context=_save_gradients)
