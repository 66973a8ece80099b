"""Losses of LW-DETR and of RF-DETR's detection: groups of queries, IoU-aware class loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from detr_fast.integrations.transformers.detr import (
    ENTRIES_AND_ERROR,
    NAMES,
    Labels,
    Result,
    costs_of,
    decoder_layers,
    layer_weights,
    with_error,
)
from detr_fast.integrations.transformers.sets import (
    ClassLoss,
    Losses,
    Part,
    Pieces,
    in_order,
    losses_of,
    named,
    pack,
    total_of,
    united,
)
from detr_fast.integrations.transformers.settings import Settings
from detr_fast.structures import Predictions, Targets


def grouped_object_detection(
    settings: Settings,
    logits: Tensor,  # [B, Q, C], queries of all groups
    labels: Labels,
    device: object,
    pred_boxes: Tensor,  # [B, Q, 4]
    config: Any,
    outputs_class: Tensor | None = None,  # [L, B, Q, C]
    outputs_coord: Tensor | None = None,  # [L, B, Q, 4]
    enc_outputs_class: Tensor | None = None,  # [B, P, C]
    enc_outputs_coord: Tensor | None = None,  # [B, P, 4]
    **kwargs: object,
) -> Result:
    """LwDetrForObjectDetectionLoss."""
    decoder, auxiliary = decoder_layers(config, logits, pred_boxes, outputs_class, outputs_coord)
    assert enc_outputs_class is not None
    assert enc_outputs_coord is not None
    encoder = Pieces((enc_outputs_class[None],), (enc_outputs_coord[None],), ("_enc",))
    targets = pack(labels, logits.device, logits.shape[-1])
    groups = config.group_detr
    if not settings.is_compat and logits.shape[1] <= config.num_queries:
        groups = 1  # evaluation has the queries of one group
    row = layer_weights(config.class_loss_coefficient, config)
    losses, found = [], {}
    for part in united([decoder, encoder]):
        weights = tuple(_weight_of(suffix, row, config) for suffix in part.suffixes)
        losses.append(_grouped_losses(settings, part, targets, groups, weights, config))
        found.update(named(with_error(losses[-1], part, targets), part.suffixes, ENTRIES_AND_ERROR))
    if len(losses) > 1:
        found = in_order(found, ("", *decoder.suffixes[:-1], "_enc"), NAMES)
    return total_of(losses), found, auxiliary


def _weight_of(suffix: str, row: tuple[float, ...], config: Any) -> tuple[float, ...]:
    if suffix in ("", "_enc") or int(suffix[1:]) < config.decoder_layers - 1:
        return row
    return (0.0,) * len(row)


def _grouped_losses(
    settings: Settings, part: Part, targets: Targets, groups: int, weights: tuple[tuple[float, ...], ...], config: Any
) -> Losses:
    matcher = settings.matchers.get(costs_of(config), settings.focal_kind, 0.25, 2.0)
    matched = part.logits.shape[2] // groups * groups  # the package leaves the rest out
    predictions = Predictions(part.logits[:, :, :matched], part.boxes[:, :, :matched])
    query_of_target = matcher.match_groups(predictions, targets, groups)
    count = settings.count_over_processes(targets.offsets)
    num_boxes = None if count is None else count * groups
    loss = ClassLoss("ia_bce", config.focal_alpha, 2.0)
    return losses_of(part, query_of_target, targets.repeated(groups), num_boxes, weights, loss)
