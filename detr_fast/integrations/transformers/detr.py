"""Losses of DETR, Table Transformer and YOLOS (softmax), Conditional, DAB and Deformable DETR (sigmoid), with masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detr_fast.integrations.layer_losses import at_least_one
from detr_fast.integrations.transformers.sets import (
    ClassLoss,
    Losses,
    Part,
    Pieces,
    constant,
    in_order,
    is_last_layer,
    losses_of,
    named,
    objects_found_error,
    pack,
    pieces_of,
    predictions_of,
    united,
)
from detr_fast.integrations.transformers.settings import Settings
from detr_fast.losses import mask_losses
from detr_fast.ops.set_loss import TERMS
from detr_fast.structures import Targets

Result = tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]
Labels = Sequence[dict[str, Tensor]]

NAMES = ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error")
_ENTRIES = tuple((name, column, name != "cardinality_error") for column, name in enumerate(NAMES))
ENTRIES_AND_ERROR = (*_ENTRIES[:3], ("cardinality_error", len(TERMS), False))  # the error in a column of its own


def object_detection(
    settings: Settings,
    logits: Tensor,  # [B, Q, C]
    labels: Labels,
    device: object,
    pred_boxes: Tensor,  # [B, Q, 4]
    config: Any,
    outputs_class: Tensor | None = None,  # [L, B, Q, C]
    outputs_coord: Tensor | None = None,  # [L, B, Q, 4]
    **kwargs: object,
) -> Result:
    """ForObjectDetectionLoss."""
    return _softmax(settings, logits, labels, pred_boxes, None, config, outputs_class, outputs_coord)


def segmentation(
    settings: Settings,
    logits: Tensor,
    labels: Labels,
    device: object,
    pred_boxes: Tensor,
    pred_masks: Tensor,  # [B, Q, height, width] logits
    config: Any,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    **kwargs: object,
) -> Result:
    """ForSegmentationLoss."""
    return _softmax(settings, logits, labels, pred_boxes, pred_masks, config, outputs_class, outputs_coord)


def sigmoid_object_detection(
    settings: Settings,
    logits: Tensor,
    labels: Labels,
    device: object,
    pred_boxes: Tensor,
    config: Any,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    **kwargs: object,
) -> Result:
    """DeformableDetrForObjectDetectionLoss."""
    return _sigmoid(settings, logits, labels, pred_boxes, None, config, outputs_class, outputs_coord)


def sigmoid_segmentation(
    settings: Settings,
    logits: Tensor,
    labels: Labels,
    device: object,
    pred_boxes: Tensor,
    pred_masks: Tensor,
    config: Any,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    **kwargs: object,
) -> Result:
    """DeformableDetrForSegmentationLoss."""
    return _sigmoid(settings, logits, labels, pred_boxes, pred_masks, config, outputs_class, outputs_coord)


def _softmax(
    settings: Settings,
    logits: Tensor,
    labels: Labels,
    pred_boxes: Tensor,
    pred_masks: Tensor | None,
    config: Any,
    outputs_class: Tensor | None,
    outputs_coord: Tensor | None,
) -> Result:
    pieces, auxiliary = decoder_layers(config, logits, pred_boxes, outputs_class, outputs_coord)
    part = united([pieces])[0]
    targets = pack(labels, logits.device, logits.shape[-1] - 1, pred_masks is not None)
    query_of_target = settings.matchers.get(costs_of(config), "softmax", 0.25, 2.0)(predictions_of(part), targets)
    class_weight = constant((*[1.0] * config.num_labels, config.eos_coefficient), logits.device)
    count = settings.count_of_image_loss(targets.offsets)
    loss = ClassLoss("softmax", class_weight=class_weight)
    losses = losses_of(part, query_of_target, targets, count, _weights(config, len(part.suffixes)), loss)
    found = named(losses.values, part.suffixes, _ENTRIES)
    total, found = _with_masks(losses, found, config, pred_masks, query_of_target, targets, count)
    return total, found, auxiliary


def _sigmoid(
    settings: Settings,
    logits: Tensor,
    labels: Labels,
    pred_boxes: Tensor,
    pred_masks: Tensor | None,
    config: Any,
    outputs_class: Tensor | None,
    outputs_coord: Tensor | None,
) -> Result:
    pieces, auxiliary = decoder_layers(config, logits, pred_boxes, outputs_class, outputs_coord)
    part = united([pieces])[0]
    targets = pack(labels, logits.device, logits.shape[-1], pred_masks is not None)
    # compat: with masks the package matches by softmax and trains by sigmoid.
    is_softmax = settings.is_compat and pred_masks is not None
    kind = "softmax" if is_softmax else settings.focal_kind
    predictions = predictions_of(all_classes(part) if is_softmax else part)
    query_of_target = settings.matchers.get(costs_of(config), kind, 0.25, 2.0)(predictions, targets)
    count = settings.count_of_image_loss(targets.offsets)
    loss = ClassLoss("focal", config.focal_alpha, 2.0)
    losses = losses_of(part, query_of_target, targets, count, _weights(config, len(part.suffixes)), loss)
    if settings.quirks.cardinality_of_last_class:
        found = named(losses.values, part.suffixes, _ENTRIES)
    else:
        found = named(with_error(losses, part, targets), part.suffixes, ENTRIES_AND_ERROR)
    total, found = _with_masks(losses, found, config, pred_masks, query_of_target, targets, count)
    return total, found, auxiliary


def decoder_layers(
    config: Any, logits: Tensor, boxes: Tensor, outputs_class: Tensor | None, outputs_coord: Tensor | None
) -> tuple[Pieces, list[dict[str, Tensor]] | None]:
    """The layers to judge, and `auxiliary_outputs`."""
    if not config.auxiliary_loss:
        return Pieces((logits[None],), (boxes[None],), ("",)), None
    assert outputs_class is not None
    assert outputs_coord is not None
    others = len(outputs_class) - 1
    pieces = Pieces(
        pieces_of(outputs_class, logits, others, is_last_layer(logits, outputs_class)),
        pieces_of(outputs_coord, boxes, others, is_last_layer(boxes, outputs_coord)),
        (*(f"_{layer}" for layer in range(others)), ""),
    )
    auxiliary = zip(outputs_class[:-1], outputs_coord[:-1], strict=True)
    return pieces, [{"logits": x, "pred_boxes": y} for x, y in auxiliary]


def costs_of(config: Any) -> tuple[float, float, float]:
    return config.class_cost, config.bbox_cost, config.giou_cost


def all_classes(part: Part) -> Part:
    """With one more class of probability zero: a softmax over all classes, where matching takes the last for none."""
    with torch.no_grad():
        return part._replace(logits=torch.nn.functional.pad(part.logits, (0, 1), value=-1e4))


def with_error(losses: Losses, part: Part, targets: Targets) -> Tensor:  # [N, 6]
    return torch.cat([losses.values, objects_found_error(part.logits, targets.offsets)[:, None]], 1)


def layer_weights(class_weight: float, config: Any) -> tuple[float, ...]:
    return class_weight, config.bbox_loss_coefficient, config.giou_loss_coefficient, 0.0, 0.0


def _weights(config: Any, layers: int) -> tuple[tuple[float, ...], ...]:
    """Layers that the configuration does not know have no weight."""
    row = layer_weights(1.0, config)
    if layers == 1:
        return (row,)
    known = min(config.decoder_layers, layers) - 1
    return (row,) * known + ((0.0,) * 5,) * (layers - 1 - known) + (row,)


def _with_masks(
    losses: Losses,
    found: dict[str, Tensor],
    config: Any,
    pred_masks: Tensor | None,
    query_of_target: Tensor,
    targets: Targets,
    count: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    if pred_masks is None:
        return losses.total, found
    mask, dice = mask_losses(pred_masks, query_of_target[-1], targets, at_least_one(count, targets.offsets))
    total = losses.total + config.mask_loss_coefficient * mask + config.dice_loss_coefficient * dice
    names = (*NAMES, "loss_mask", "loss_dice")
    return total, in_order({**found, "loss_mask": mask, "loss_dice": dice}, ("", *losses.suffixes[:-1]), names)
