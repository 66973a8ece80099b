"""Losses of D-FINE and DEIMv2: RT-DETR's sets with distributions of edges, distilled from the last layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.boxes import box_cxcywh_to_xyxy, paired_giou
from detr_fast.integrations.edge_distributions import Pairs, Teacher, bins_of, edge_losses, rows_at, rows_of_pairs
from detr_fast.integrations.layer_losses import at_least_one
from detr_fast.integrations.rtdetr.stacks import slots_of
from detr_fast.integrations.transformers.detr import Labels, Result
from detr_fast.integrations.transformers.rt_detr import (
    LayerSets,
    Outputs,
    denoising_pairs,
    matched_queries,
    sets_of,
    weighted_entries,
)
from detr_fast.integrations.transformers.sets import (
    ClassLoss,
    Entries,
    Losses,
    Part,
    constant,
    in_order,
    losses_of,
    named,
    pack,
    total_of,
)
from detr_fast.integrations.transformers.settings import Settings
from detr_fast.ops.matching_union import unite
from detr_fast.structures import Targets

_BOX_ENTRIES = (("loss_bbox", 1, True), ("loss_giou", 2, True))
_EDGE_ENTRIES = (("loss_fgl", 0, True), ("loss_ddf", 1, True))


class Edges(NamedTuple):
    """Distributions of the edges of all layers, and the boxes that they are relative to."""

    corners: Tensor  # [L, B, Q, 4 * (bins + 1)]
    points: Tensor  # [L, B, Q, 4]
    teacher_logits: Tensor  # [B, Q, C]


class Matched(NamedTuple):
    """Targets of a set of layers, with their normaliser."""

    query_of_target: Tensor  # [N, T] int32
    targets: Targets
    num_boxes: Tensor | None  # [], None: their own number


class Judged(NamedTuple):
    """A set of layers and what belongs to it."""

    part: Part
    classes: Matched  # each layer's own matching
    boxes: Matched  # DEIMv2: the union of all matchings
    are_shared: bool  # all layers have the same pairs of boxes


def fine_grained_object_detection(settings: Settings, *arguments: Any, **options: Any) -> Result:
    """DFineForObjectDetectionLoss."""
    return _losses(settings, "loss_vfl", *arguments, **options)


def dense_object_detection(settings: Settings, *arguments: Any, **options: Any) -> Result:
    """Deimv2ForObjectDetectionLoss."""
    return _losses(settings, "loss_mal", *arguments, **options)


def _losses(
    settings: Settings,
    name: str,
    logits: Tensor,  # [B, Q, C], with denoising queries before the others
    labels: Labels,
    device: object,
    pred_boxes: Tensor,  # [B, Q, 4]
    config: Any,
    outputs_class: Tensor | None = None,  # [B, L, Q, C]
    outputs_coord: Tensor | None = None,  # [B, L, Q, 4]
    enc_topk_logits: Tensor | None = None,  # [B, P, C]
    enc_topk_bboxes: Tensor | None = None,  # [B, P, 4]
    denoising_meta_values: Mapping[str, Any] | None = None,
    predicted_corners: Tensor | None = None,  # [B, L, Q, 4 * (bins + 1)]
    initial_reference_points: Tensor | None = None,  # [B, L, Q, 4]
    **kwargs: object,
) -> Result:
    has_layers = config.auxiliary_loss
    if name == "loss_vfl" and settings.quirks.auxiliary_needs_denoising:
        has_layers = has_layers and denoising_meta_values is not None
    layers = (outputs_class, outputs_coord) if has_layers else (None, None)
    outputs = Outputs(logits, pred_boxes, *layers, enc_topk_logits, enc_topk_bboxes, denoising_meta_values)
    edges = _edges_of(outputs, predicted_corners, initial_reference_points) if has_layers else []
    most = len(edges[0].corners) if edges else None
    sets = _clamped(sets_of(outputs, _result_with_denoising(settings, name, config), most))
    judged = _judged_sets(settings, sets, labels, config, name, denoising_meta_values)

    losses, found = [], {}
    for one in judged:
        for own, entries in _set_losses(one, config, name):
            losses.append(own)
            found.update(weighted_entries([own], entries))
    total = total_of(losses)
    for one, own_edges in zip(_with_edges(judged, sets, edges), edges, strict=False):
        edge_total, edge_entries = _edge_losses(one, own_edges, config)
        total = total + edge_total
        found.update(edge_entries)
    names = (name, *(x for x, *_ in (*_BOX_ENTRIES, *_EDGE_ENTRIES)))
    return total, in_order(found, sets.suffixes, names), _auxiliary_outputs(outputs, sets, edges)


def _result_with_denoising(settings: Settings, name: str, config: Any) -> bool:
    if name == "loss_vfl":
        return settings.quirks.result_with_denoising
    return settings.is_compat and not config.auxiliary_loss


def _class_loss(name: str, config: Any) -> ClassLoss:
    if name == "loss_vfl":
        return ClassLoss("varifocal", config.focal_loss_alpha, config.focal_loss_gamma)
    return ClassLoss("mal", 1.0 if config.mal_alpha is None else config.mal_alpha, config.focal_loss_gamma)


def _clamped(sets: LayerSets) -> LayerSets:
    """Boxes in [0, 1], as all losses see them."""
    matched = [part._replace(boxes=part.boxes.clamp(0, 1)) for part in sets.matched]
    denoising = sets.denoising
    if denoising is not None:
        denoising = denoising._replace(boxes=denoising.boxes.clamp(0, 1))
    return LayerSets(matched, denoising, sets.suffixes, sets.layers)


def _judged_sets(
    settings: Settings, sets: LayerSets, labels: Labels, config: Any, name: str, meta: Mapping[str, Any] | None
) -> list[Judged]:
    logits = sets.matched[0].logits
    targets = pack(labels, logits.device, logits.shape[-1])
    count = settings.count_of_real_time(targets.offsets)
    matched = [Matched(matched_queries(settings, part, targets, config), targets, count) for part in sets.matched]
    unions = matched
    if name == "loss_mal" and config.use_dense_one_to_one:
        counts = [len(x["class_labels"]) for x in labels]
        unions = _united(settings, matched, sets.matched[0].logits.shape[2], counts)
    is_union = unions is not matched
    judged = [Judged(*one, is_union) for one in zip(sets.matched, matched, unions, strict=True)]
    if meta is not None and sets.denoising is not None:
        known = Matched(*denoising_pairs(sets.denoising, meta, targets, labels, count))
        judged.append(Judged(sets.denoising, known, known, True))
    return judged


def _set_losses(judged: Judged, config: Any, name: str) -> list[tuple[Losses, Entries]]:
    """Class and box losses, of one matching or two, and the entries that each has."""
    class_weight = config.weight_loss_vfl if name == "loss_vfl" else config.weight_loss_mal
    row = (class_weight, config.weight_loss_bbox, config.weight_loss_giou, 0.0, 0.0)
    class_entry = (name, 0, True)
    matchings: list[tuple[Matched, tuple[float, ...], Entries]]
    if judged.classes is judged.boxes:
        matchings = [(judged.classes, row, (class_entry, *_BOX_ENTRIES))]
    else:
        matchings = [
            (judged.classes, (row[0], *(0.0,) * 4), (class_entry,)),
            (judged.boxes, (0.0, *row[1:]), _BOX_ENTRIES),
        ]
    part, loss = judged.part, _class_loss(name, config)
    return [
        (losses_of(part, *matched, (weights,) * len(part.suffixes), loss), entries)
        for matched, weights, entries in matchings
    ]


def _united(settings: Settings, matched: Sequence[Matched], queries: int, counts: Sequence[int]) -> list[Matched]:
    """Every query keeps the target that most layers gave it: one matching for the boxes of all layers."""
    targets = matched[0].targets
    together = torch.cat([x.query_of_target for x in matched])
    sets, total = together.shape
    kept = unite(together, targets.offsets, queries)  # [sets, T]
    own = (start + np.arange(count) for start, count in zip(np.cumsum([0, *counts]), counts, strict=False))
    order = np.concatenate([(np.arange(sets)[:, None] * total + rows).ravel() for rows in own])  # image, set, target
    place = torch.from_numpy(order).to(kept.device, non_blocking=True)
    target = place % max(total, 1)
    repeated = Targets(targets.labels[target], targets.boxes[target], targets.offsets * sets, targets.max_count * sets)
    number = (kept >= 0).sum()
    count = settings.count_of_real_time(number[None])
    count = number.to(torch.float32) if count is None else count
    union = kept.flatten()[place]
    return [Matched(union.expand(len(x.query_of_target), -1), repeated, count) for x in matched]


def _edges_of(outputs: Outputs, corners: Tensor | None, points: Tensor | None) -> list[Edges]:  # [B, L, Q, ...]
    """Of the queries, and of the denoising queries if there are any."""
    assert corners is not None
    assert points is not None
    assert outputs.layer_logits is not None
    logits = outputs.layer_logits[:, -1]
    if outputs.denoising is None:
        return [Edges(corners.transpose(0, 1), points.transpose(0, 1), logits)]
    splits = outputs.denoising["dn_num_split"]
    pieces = zip(corners.split(splits, 2), points.split(splits, 2), logits.split(splits, 1), strict=True)
    denoising, own = (Edges(x.transpose(0, 1), y.transpose(0, 1), teacher) for x, y, teacher in pieces)
    return [own, denoising]


def _with_edges(judged: Sequence[Judged], sets: LayerSets, edges: Sequence[Edges]) -> list[Judged]:
    """Decoder layers but the last, which are the first rows of the first set; then the denoising layers."""
    if sets.layers is None:
        return []
    layers = min(len(edges[0].corners), len(sets.layers[0])) - 1
    part, _, boxes, are_shared = judged[0]
    part = Part(part.logits[:layers], part.boxes[:layers], part.suffixes[:layers])
    boxes = boxes._replace(query_of_target=boxes.query_of_target[:layers])
    return [Judged(part, boxes, boxes, are_shared), judged[-1]]


def _edge_losses(judged: Judged, edges: Edges, config: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The last layer is the teacher of the others; where it is among the sets itself, its distillation is 0."""
    matched, suffixes = judged.boxes, judged.part.suffixes
    layers = len(suffixes)
    corners = edges.corners if layers == len(edges.corners) else edges.corners[:layers]  # a slice's gradient is a copy
    students = min(layers, len(edges.corners) - 1)
    teacher = Teacher(edges.corners[-1:].detach(), edges.teacher_logits[None].detach(), 0, students)
    num_boxes = at_least_one(matched.num_boxes, matched.targets.offsets)
    fine, distilled = edge_losses(corners, _pairs_of(judged, edges.points[:layers], config), num_boxes, teacher)
    weights = constant((config.weight_loss_fgl, config.weight_loss_ddf), fine.device)
    values = torch.stack([fine, F.pad(distilled, (0, layers - students))], 1) * weights
    return values.sum(), named(values, suffixes, _EDGE_ENTRIES)


@torch.no_grad()
def _pairs_of(judged: Judged, points: Tensor, config: Any) -> Pairs:  # points [N, B, Q, 4]
    boxes, matched = judged.part.boxes, judged.boxes
    query_of_target = matched.query_of_target[:1] if judged.are_shared else matched.query_of_target
    _, images, queries, _ = boxes.shape
    slot, is_pair = slots_of(query_of_target, matched.targets, queries)
    goals = matched.targets.boxes
    if judged.are_shared and len(slot):
        rows = rows_of_pairs(is_pair, images * queries)
        slot, is_pair, goals = slot[:, rows], is_pair[:, rows], goals[rows]
    own = box_cxcywh_to_xyxy(rows_at(boxes, slot).float())
    iou, _, _ = paired_giou(own, box_cxcywh_to_xyxy(goals))
    bins = bins_of(rows_at(points, slot), goals, config.max_num_bins, float(config.reg_scale), float(config.up))
    return Pairs(slot, is_pair, iou, bins)


def _auxiliary_outputs(outputs: Outputs, sets: LayerSets, edges: Sequence[Edges]) -> list[dict[str, Tensor]] | None:
    """All layers but the last with their teacher, and the encoder's proposals."""
    if sets.layers is None:
        return None
    assert outputs.encoder_logits is not None
    assert outputs.encoder_boxes is not None
    logits, boxes, own = sets.layers[0], sets.layers[1].clamp(0, 1), edges[0]
    teacher = {"teacher_corners": own.corners[-1], "teacher_logits": own.teacher_logits}
    layers = [
        {"logits": x, "pred_boxes": y, "pred_corners": corners, "ref_points": points, **teacher}
        for x, y, corners, points in zip(logits[:-1], boxes[:-1], own.corners[:-1], own.points[:-1], strict=False)
    ]
    return [*layers, {"logits": outputs.encoder_logits, "pred_boxes": outputs.encoder_boxes.clamp(0, 1)}]
