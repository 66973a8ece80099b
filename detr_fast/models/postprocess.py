"""From a model's outputs to scores, labels and boxes in pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detr_fast.boxes import box_cxcywh_to_xyxy
from detr_fast.structures import Predictions


@torch.no_grad()
def postprocess_detections(
    outputs: Predictions | Mapping[str, Any],
    target_sizes: Tensor,  # [B, 2] height and width of each image
) -> list[dict[str, Tensor]]:
    """Every query's best class that is not "no object": ``scores [Q]``, ``labels [Q]``, ``boxes [Q, 4]`` of each image.

    Boxes are xyxy in the units of ``target_sizes``, not clipped. Nothing is sorted, suppressed or left out.
    """
    logits, boxes, sizes = _inputs(outputs, target_sizes)
    scores, labels = logits.softmax(-1)[..., :-1].max(-1)
    boxes = box_cxcywh_to_xyxy(boxes) * sizes
    return [{"scores": s, "labels": label, "boxes": b} for s, label, b in zip(scores, labels, boxes, strict=True)]


@torch.no_grad()
def postprocess_top_scores(
    outputs: Predictions | Mapping[str, Any],
    target_sizes: Tensor,  # [B, 2] height and width of each image
    count: int = 100,
) -> list[dict[str, Tensor]]:
    """The ``count`` best pairs of query and class of models with independent (sigmoid) classes, best first."""
    logits, boxes, sizes = _inputs(outputs, target_sizes)
    num_classes = logits.shape[-1]
    scores, pairs = logits.sigmoid().flatten(1).topk(min(count, logits[0].numel()), 1)
    queries = (pairs // num_classes)[..., None].expand(-1, -1, 4)
    boxes = (box_cxcywh_to_xyxy(boxes) * sizes).gather(1, queries)
    return [
        {"scores": s, "labels": label, "boxes": b}
        for s, label, b in zip(scores, pairs % num_classes, boxes, strict=True)
    ]


def _inputs(outputs: Predictions | Mapping[str, Any], target_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[B, Q, C]``, boxes ``[B, Q, 4]`` and (width, height, width, height) ``[B, 1, 4]``, in float32."""
    if isinstance(outputs, Predictions):
        logits, boxes = outputs.logits[-1], outputs.boxes[-1]
    else:
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    if target_sizes.shape != (len(logits), 2):
        raise ValueError(
            f"target_sizes must be [{len(logits)}, 2] (height, width), one row an image, got {list(target_sizes.shape)}"
        )
    sizes = target_sizes.to(boxes.device).flip(1).repeat(1, 2)[:, None].float()
    return logits.float(), boxes.float(), sizes
