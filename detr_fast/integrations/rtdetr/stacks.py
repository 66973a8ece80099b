"""Sets of predictions of one shape, their pairs, and the boxes of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr_fast.boxes import box_cxcywh_to_xyxy, paired_giou
from detr_fast.matcher import check_batch_size
from detr_fast.structures import Predictions, Targets

Layer = Mapping[str, Any]


def numbered(suffix: str, layers: Sequence[Layer], first: Layer | None = None) -> list[tuple[str, Layer]]:
    """Layers with their suffixes; `first` has none."""
    named = [(suffix.format(index), layer) for index, layer in enumerate(layers)]
    return named if first is None else [("", first), *named]


class Stack(NamedTuple):
    """Neighbouring sets of predictions of one shape."""

    suffixes: list[str]
    predictions: Predictions


def stacks_of(layers: Sequence[tuple[str, Layer]]) -> list[Stack]:
    """Sets with their suffixes, put together where neighbours have one shape and type."""

    def form(layer: tuple[str, Layer]) -> tuple[Any, ...]:
        logits, boxes = layer[1]["pred_logits"], layer[1]["pred_boxes"]
        return logits.shape, logits.dtype, boxes.dtype

    stacks = []
    for _, same in groupby(layers, form):
        suffixes, sets = zip(*same, strict=True)
        logits = torch.stack([layer["pred_logits"] for layer in sets])
        boxes = torch.stack([layer["pred_boxes"] for layer in sets])
        stacks.append(Stack(list(suffixes), Predictions(logits, boxes)))
    return stacks


class Matched(NamedTuple):
    """A stack of predictions with its pairs and normaliser."""

    predictions: Predictions
    targets: Targets
    query_of_target: Tensor  # [L, T] int32
    num_boxes: Tensor  # [] float32, at least 1


def denoised(stack: Predictions, meta: Layer, targets: Targets, num_boxes: Tensor, name: str) -> Matched:
    """Denoising queries with the pairs that the model tells; rows in the order image, group, target."""
    groups, positive = meta["dn_num_group"], meta["dn_positive_idx"]
    check_batch_size(f"{name}: dn_meta['dn_positive_idx']", len(targets), len(positive))
    repeated = targets.repeated(groups)
    query = torch.cat([torch.as_tensor(one) for one in positive]).to(targets.offsets.device, torch.int32)
    if len(query) != len(repeated.labels):
        raise ValueError(
            f"{name}: dn_meta['dn_positive_idx'] must have {groups} (dn_num_group) queries for each of "
            f"{len(targets.labels)} targets, got {len(query)}"
        )
    layers = len(stack.logits)
    return Matched(stack, repeated, query.expand(layers, -1).contiguous(), num_boxes * groups)


class PairedBoxes(NamedTuple):
    """Boxes of the rows' pairs, gathered: an unmatched row has some box, and False in `is_pair`."""

    boxes: Tensor  # [L, T, 4] cxcywh, differentiable
    goals: Tensor  # [T, 4] cxcywh
    is_pair: Tensor  # [L, T]
    slot: Tensor  # [L, T] int64, image * Q + query

    @classmethod
    def of(cls, matched: Matched) -> PairedBoxes:
        boxes, goals = matched.predictions.boxes, matched.targets.boxes
        slot, is_pair = slots_of(matched.query_of_target, matched.targets, boxes.shape[2])
        index = slot[..., None].expand(-1, -1, 4)
        return cls(boxes.flatten(1, 2).gather(1, index).to(goals.dtype), goals, is_pair, slot)

    def overlaps(self) -> tuple[Tensor, Tensor]:
        """IoU and GIoU ``[L, T]``; rows that are no pair have 0 in both, and no gradient."""
        boxes = self.boxes.where(self.is_pair[..., None], self.goals)
        iou, _, giou = paired_giou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(self.goals))
        return iou.where(self.is_pair, 0), giou.where(self.is_pair, 0)


def slots_of(query_of_target: Tensor, targets: Targets, queries: int) -> tuple[Tensor, Tensor]:
    """Position ``[L, T]`` int64 of each row's query among all queries of the batch (0 without one), and if it has one.

    Rows past the last offset have no query.
    """
    is_pair = query_of_target >= 0
    return (query_of_target + targets.image_of_row() * queries).where(is_pair, 0), is_pair
