"""Losses of RT-DETR and RT-DETRv2: decoder layers and encoder proposals in one set, denoising queries in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr_fast.integrations.layer_losses import at_least_one
from detr_fast.integrations.transformers.detr import Labels, Result, all_classes
from detr_fast.integrations.transformers.sets import (
    ClassLoss,
    Entries,
    Losses,
    Part,
    Pieces,
    in_order,
    is_last_layer,
    losses_of,
    named,
    pack,
    pieces_of,
    predictions_of,
    total_of,
    united,
)
from detr_fast.integrations.transformers.settings import Settings
from detr_fast.structures import Targets

_ENTRIES = (("loss_vfl", 0, True), ("loss_bbox", 1, True), ("loss_giou", 2, True))


class Outputs(NamedTuple):
    """What the model hands to its loss function."""

    logits: Tensor  # [B, Q, C]
    boxes: Tensor  # [B, Q, 4]
    layer_logits: Tensor | None  # [B, L, Q, C]; None: the last layer is all there is to judge
    layer_boxes: Tensor | None
    encoder_logits: Tensor | None  # [B, P, C]
    encoder_boxes: Tensor | None
    denoising: Mapping[str, Any] | None  # dn_positive_idx, dn_num_group, dn_num_split


class LayerSets(NamedTuple):
    """What is to be judged."""

    matched: list[Part]  # decoder layers and the encoder's proposals
    denoising: Part | None  # layers of denoising queries, whose targets are known
    suffixes: tuple[str, ...]  # of all sets, in the published order
    layers: tuple[Tensor, Tensor] | None  # logits and boxes [L, B, Q, ...] without denoising queries


def real_time_object_detection(
    settings: Settings,
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
    **kwargs: object,
) -> Result:
    """RTDetrForObjectDetectionLoss."""
    layers = (outputs_class, outputs_coord) if config.auxiliary_loss else (None, None)
    outputs = Outputs(logits, pred_boxes, *layers, enc_topk_logits, enc_topk_bboxes, denoising_meta_values)
    sets = sets_of(outputs, settings.quirks.result_with_denoising)
    targets = pack(labels, logits.device, logits.shape[-1])
    count = settings.count_of_real_time(targets.offsets)
    row = (config.weight_loss_vfl, config.weight_loss_bbox, config.weight_loss_giou, 0.0, 0.0)
    loss = ClassLoss("varifocal", config.focal_loss_alpha, config.focal_loss_gamma)

    losses = []
    for part in sets.matched:
        query_of_target = matched_queries(settings, part, targets, config)
        losses.append(losses_of(part, query_of_target, targets, count, (row,) * len(part.suffixes), loss))
    if denoising_meta_values is not None and sets.denoising is not None:
        part = sets.denoising
        known = denoising_pairs(part, denoising_meta_values, targets, labels, count)
        losses.append(losses_of(part, *known, (row,) * len(part.suffixes), loss))
    found = weighted_entries(losses, _ENTRIES)
    if len(sets.matched) > 1:
        found = in_order(found, sets.suffixes, [name for name, *_ in _ENTRIES])
    return total_of(losses), found, auxiliary_outputs(outputs, sets)


def sets_of(outputs: Outputs, result_with_denoising: bool, most: int | None = None) -> LayerSets:
    """The package's sets; with `result_with_denoising` the last layer keeps its denoising queries.

    `most` is the number of layers that have more than logits and boxes, where it is less than all.
    """
    splits = None if outputs.denoising is None else outputs.denoising["dn_num_split"]
    logits, boxes = outputs.logits, outputs.boxes
    if splits is not None and not result_with_denoising:
        logits, boxes = logits.split(splits, 1)[1], boxes.split(splits, 1)[1]
    layer_logits, layer_boxes = outputs.layer_logits, outputs.layer_boxes
    if layer_logits is None or layer_boxes is None:
        return LayerSets([Part(logits[None], boxes[None], ("",))], None, ("",), None)
    assert outputs.encoder_logits is not None
    assert outputs.encoder_boxes is not None
    last = is_last_layer(outputs.logits, layer_logits, 1), is_last_layer(outputs.boxes, layer_boxes, 1)
    layers = layer_logits.shape[1] if most is None else min(most, layer_logits.shape[1])
    others = tuple(f"_aux_{layer}" for layer in range(layers - 1))
    encoder = Pieces((outputs.encoder_logits[None],), (outputs.encoder_boxes[None],), (f"_aux_{layers - 1}",))
    suffixes = ("", *others, *encoder.suffixes)
    denoising = None
    if splits is not None:  # before the axes change places: then gradients return in one piece without a copy
        denoising_logits, layer_logits = layer_logits.split(splits, 2)
        denoising_boxes, layer_boxes = layer_boxes.split(splits, 2)
        own = tuple(f"_dn_{layer}" for layer in range(layers))
        denoising = Part(_first(denoising_logits, layers), _first(denoising_boxes, layers), own)
        suffixes = (*suffixes, *own)
    layer_logits, layer_boxes = layer_logits.transpose(0, 1), layer_boxes.transpose(0, 1)
    if splits is not None and result_with_denoising:
        result = Pieces((logits[None],), (boxes[None],), ("",))
        decoder = [Pieces((layer_logits[: layers - 1],), (layer_boxes[: layers - 1],), others), encoder, result]
    else:
        own_logits = pieces_of(layer_logits, logits, layers - 1, last[0])
        decoder = [
            Pieces(own_logits, pieces_of(layer_boxes, boxes, layers - 1, last[1]), (*others, "")),
            encoder,
        ]
    return LayerSets(united(decoder), denoising, suffixes, (layer_logits, layer_boxes))


def _first(values: Tensor, layers: int) -> Tensor:  # [B, L, ...] -> [layers, B, ...]
    """The first layers; no slice of all, whose gradient would be a copy."""
    return (values if values.shape[1] == layers else values[:, :layers]).transpose(0, 1)


def matched_queries(settings: Settings, part: Part, targets: Targets, config: Any) -> Tensor:  # [N, T] int32
    costs = (config.matcher_class_cost, config.matcher_bbox_cost, config.matcher_giou_cost)
    if config.use_focal_loss:
        matcher = settings.matchers.get(costs, settings.focal_kind, config.matcher_alpha, config.matcher_gamma)
        return matcher(predictions_of(part), targets)
    return settings.matchers.get(costs, "softmax", 0.25, 2.0)(predictions_of(all_classes(part)), targets)


def denoising_pairs(
    part: Part,
    meta: Mapping[str, Any],
    targets: Targets,
    labels: Labels,
    count: Tensor | None,
) -> tuple[Tensor, Targets, Tensor | None]:
    """Query of each target in each group ``[N, T * groups]`` int32, those targets, and their number over processes."""
    groups = meta["dn_num_group"]
    counts = [len(x["class_labels"]) for x in labels]
    # Image, group, target: a third of the time of Targets.repeated, which has no list to go by.
    own_labels = [x for own in targets.labels.split(counts) for x in (own,) * groups]
    own_boxes = [x for own in targets.boxes.split(counts) for x in (own,) * groups]
    most = targets.max_count * groups
    repeated = Targets(torch.cat(own_labels), torch.cat(own_boxes), targets.offsets * groups, most)
    query_of_target = torch.cat(list(meta["dn_positive_idx"])).to(torch.int32).expand(len(part.suffixes), -1)
    return query_of_target, repeated, None if count is None else at_least_one(count, targets.offsets) * groups


def weighted_entries(losses: Sequence[Losses], entries: Entries) -> dict[str, Tensor]:
    """The published numbers of all sets are multiplied by their weights."""
    if len(losses) == 1:
        return named(losses[0].values * losses[0].weight, losses[0].suffixes, entries)
    values = torch.cat([own.values for own in losses]) * torch.cat([own.weight for own in losses])
    return named(values, tuple(suffix for own in losses for suffix in own.suffixes), entries)


def auxiliary_outputs(outputs: Outputs, sets: LayerSets) -> list[dict[str, Tensor]] | None:
    """All layers but the last, and the encoder's proposals."""
    if sets.layers is None:
        return None
    assert outputs.encoder_logits is not None
    assert outputs.encoder_boxes is not None
    logits, boxes = sets.layers
    layers = [*zip(logits[:-1], boxes[:-1], strict=True), (outputs.encoder_logits, outputs.encoder_boxes)]
    return [{"logits": x, "pred_boxes": y} for x, y in layers]
