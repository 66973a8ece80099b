"""FGL and DDF of all sets of a batch that predict distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from detr_fast.boxes import box_cxcywh_to_xyxy, paired_giou
from detr_fast.integrations.dfine.matcher import sized
from detr_fast.integrations.edge_distributions import (
    Bins,
    Pairs,
    Teacher,
    balance_of,
    bins_of,
    edge_losses,
    rows_of_pairs,
)
from detr_fast.integrations.rtdetr.stacks import Layer, PairedBoxes

LOCAL = ("loss_fgl", "loss_ddf")


class LocalOptions(NamedTuple):
    """How local losses are computed."""

    reg_max: int
    reg_scale: Tensor | float
    up: Tensor
    are_shared: bool  # all sets have the same pairs
    keeps_position: bool  # FGL's targets of the first set are used by position, whatever the pairs of others


@dataclass
class Column:
    """Losses under one name, one for each suffix."""

    suffixes: list[str] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)  # [K] each


@dataclass
class Local:
    """What the local losses of a batch are, and the balance of DDF, which denoising takes from the decoder."""

    fine_grained: Column = field(default_factory=Column)
    distilled: Column = field(default_factory=Column)
    balance: Tensor | None = None  # [1]

    @classmethod
    def of(
        cls,
        layers: Sequence[tuple[str, Layer]],
        pairs: PairedBoxes,
        num_boxes: Tensor,
        options: LocalOptions,
        balance: Tensor | None = None,  # [1]; None: each set's own
    ) -> Local:
        """Of sets in the order of `pairs`; those without ``pred_corners`` have no local loss."""
        at = [index for index, (_, layer) in enumerate(layers) if "pred_corners" in layer]
        points = layers[at[0]][1]["ref_points"].detach()
        has_other_teacher = {index: _has_other_teacher(layers[index][1]) for index in at}
        at.sort(key=lambda index: has_other_teacher[index])  # those that learn from another come last
        students = sum(has_other_teacher.values())
        suffixes, chosen = zip(*(layers[index] for index in at), strict=True)
        corners = torch.stack([layer["pred_corners"] for layer in chosen])
        _, images, queries, _ = corners.shape
        pairs = _compacted(pairs, images * queries) if options.are_shared else pairs
        kept = slice(1) if options.are_shared else at
        slot, is_pair = pairs.slot[kept], pairs.is_pair[kept]
        bins = _bins(points, pairs.goals, slot, is_pair, options)
        own = Pairs(slot, is_pair, _ious(pairs, at), bins)
        teacher = None
        if students:
            teacher = Teacher(
                _common([layer["teacher_corners"].detach() for layer in chosen[-students:]]),
                _common([layer["teacher_logits"].detach() for layer in chosen[-students:]]),
                len(chosen) - students,
                students,
            )
        fine_grained, distilled = edge_losses(corners, own, num_boxes, teacher, balance)

        themselves = [suffix for suffix, layer in zip(suffixes, chosen, strict=True) if "teacher_corners" in layer]
        themselves = themselves[: len(themselves) - students]
        zeros = distilled.new_zeros(len(themselves))
        return cls(
            Column(list(suffixes), [fine_grained]),
            Column([*themselves, *suffixes[len(suffixes) - students :]], [zeros, distilled]),
            balance_of(is_pair[-1:], images * queries),
        )

    def joined(self, other: Local) -> Local:
        for column, more in ((self.fine_grained, other.fine_grained), (self.distilled, other.distilled)):
            column.suffixes += more.suffixes
            column.losses += more.losses
        return self


def _compacted(pairs: PairedBoxes, most: int) -> PairedBoxes:
    """At most that many rows, with all pairs among them; the sets have the same ones, of different queries."""
    rows = rows_of_pairs(pairs.is_pair[:1], most)
    return PairedBoxes(pairs.boxes[:, rows], pairs.goals[rows], pairs.is_pair[:, rows], pairs.slot[:, rows])


@torch.no_grad()
def _ious(pairs: PairedBoxes, at: Sequence[int]) -> Tensor:  # [K, R]
    boxes = torch.stack([pairs.boxes[index] for index in at])
    iou, _, _ = paired_giou(box_cxcywh_to_xyxy(sized(boxes)), box_cxcywh_to_xyxy(pairs.goals))
    return iou


def _has_other_teacher(layer: Layer) -> bool:
    return "teacher_corners" in layer and not _are_same(layer["pred_corners"], layer["teacher_corners"])


def _bins(points: Tensor, goals: Tensor, slot: Tensor, is_pair: Tensor, options: LocalOptions) -> Bins:
    """The bins of each row's target as seen from the reference points ``[B, Q, 4]`` of the first set."""
    flat = points.flatten(0, 1)
    scale = (options.reg_max, options.reg_scale, options.up)
    if not options.keeps_position:
        return bins_of(flat[slot], goals, *scale)
    first = bins_of(flat[slot[:1]], goals, *scale)
    order = slot.where(is_pair, len(flat)).argsort(dim=1, stable=True)  # rows of pairs, by image and query
    return first.rearranged(torch.empty_like(order).scatter_(1, order, order[:1].expand_as(order)))


def _common(tensors: Sequence[Tensor]) -> Tensor:
    """``[1, ...]`` if all are the same piece of memory, otherwise one row each."""
    if all(_are_same(tensor, tensors[0]) for tensor in tensors):
        return tensors[0][None]
    return torch.stack(list(tensors))


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same piece of memory."""
    if one is other or torch.compiler.is_compiling():
        return one is other
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )
