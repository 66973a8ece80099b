"""What the criteria of RT-DETR, D-FINE and DEIM have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detr_fast import matcher as core
from detr_fast.integrations.layer_losses import Entry, LayerLosses, ListedTargets, answers_of
from detr_fast.integrations.mode import Mode, check_mode
from detr_fast.integrations.rtdetr.stacks import Layer, Matched, PairedBoxes
from detr_fast.matcher import Pairs, check_batch_size, queries_of
from detr_fast.ops.set_loss import TERMS, set_loss
from detr_fast.structures import Predictions, Targets


class ClassLoss(NamedTuple):
    """How a class loss is computed by :func:`set_loss`."""

    entry: str
    kind: Any
    alpha: float
    gamma: float
    factor: float = 1.0


class SetLosses(nn.Module):
    """What the criteria have in common: matching and losses of stacks, and their names.

    Not a class of the published code.
    """

    __share__, __inject__ = ("num_classes",), ("matcher",)  # read by the code bases' YAML registry

    class_losses: tuple[str, ...] = ("focal", "vfl")
    others: tuple[str, ...] = ("boxes",)

    def __init__(
        self,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        losses: Sequence[str],
        alpha: float,
        gamma: float,
        num_classes: int,
        boxes_weight_format: str | None,
        share_matched_indices: bool,
        mode: Mode,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_mode(name, mode)
        allowed = (*self.class_losses, *self.others)
        unknown = [loss for loss in losses if loss not in allowed]
        if unknown:
            raise ValueError(f"{name}: losses must be of {', '.join(allowed)}, got {unknown[0]!r}")
        if boxes_weight_format not in (None, "iou", "giou"):
            raise ValueError(f"{name}: boxes_weight_format must be 'iou', 'giou' or None, got {boxes_weight_format!r}")
        self.matcher, self.weight_dict, self.losses = matcher, weight_dict, list(losses)
        self.alpha, self.gamma, self.num_classes = alpha, gamma, num_classes
        self.boxes_weight_format, self.share_matched_indices = boxes_weight_format, share_matched_indices
        self.mode = mode
        self._class_losses = [self._class_loss(loss) for loss in self.losses if loss in self.class_losses]
        extra = [loss.entry for loss in self._class_losses[1:]]
        self._named = LayerLosses(self._entries(), weight_dict, (*TERMS, *extra))

    def _class_loss(self, loss: str) -> ClassLoss:
        if loss == "labels":
            return ClassLoss("loss_ce", "softmax", 0.25, 2.0)
        if loss == "vfl":
            return ClassLoss("loss_vfl", "varifocal", self.alpha, self.gamma)
        if loss == "bce" or self.alpha < 0:  # half of each side's, without a weight
            return ClassLoss(f"loss_{loss}", "focal", 0.5, 0.0 if loss == "bce" else self.gamma, 2.0)
        return ClassLoss("loss_focal", "focal", self.alpha, self.gamma)

    def _entries(self) -> list[Entry]:
        entries = [Entry(loss.entry, loss.entry) for loss in self._class_losses[1:]]
        entries += [Entry(loss.entry, "class") for loss in self._class_losses[:1]]
        if "boxes" in self.losses:
            entries += [Entry("loss_bbox", "bbox"), Entry("loss_giou", "giou")]
        if "labels" in self.losses:
            entries.append(Entry("class_error", "class_error", ("",), has_gradient=False))
        if "cardinality" in self.losses:
            entries.append(Entry("cardinality_error", "cardinality_error", has_gradient=False))
        return entries

    def matcher_report(self) -> str | None:
        """What the matcher skipped since the last report, or None. Waits for the device.

        Layer 0 is the last one, then come the auxiliary ones, and the encoder where it has their shape.
        """
        forbidden = self.matcher.report() if isinstance(self.matcher, core.HungarianMatcher) else None
        return None if forbidden is None else str(forbidden)

    def _packed(self, outputs: Layer, targets: ListedTargets) -> Targets:
        """Values of listed targets are checked where that costs no waiting, whatever the matcher skips."""
        logits = outputs["pred_logits"]
        check_batch_size(type(self).__name__, len(logits), len(targets))
        packed = targets if isinstance(targets, Targets) else Targets.pack(targets, self.num_classes)
        return packed.to(logits.device)

    def _check_classes(self, predictions: Predictions, is_agnostic: bool = False) -> None:
        softmax = any(loss.kind == "softmax" for loss in self._class_losses)
        expected = 1 if is_agnostic else self.num_classes + softmax
        if predictions.logits.shape[-1] != expected:
            raise ValueError(
                f"{type(self).__name__}: pred_logits must have {expected} classes (num_classes={self.num_classes}, "
                f"losses={self.losses}), got {predictions.logits.shape[-1]}"
            )

    def _match(self, predictions: Predictions, targets: Targets, **options: Any) -> Tensor:  # [L, T] int32
        if isinstance(self.matcher, core.HungarianMatcher):
            return self.matcher(predictions, targets, **options)
        found = []
        for answer in answers_of(self.matcher, predictions, targets, **options):
            pairs: Pairs = answer["indices"] if isinstance(answer, Mapping) else answer
            found.append(queries_of(pairs, targets, predictions.logits.shape[2]))
        return torch.stack(found)

    def _seen_by_encoder(self, packed: Targets, zero: Targets) -> Targets:
        """What a class-agnostic encoder is matched with: label 0 for all, in compat the labels as they are.

        In compat a label above 0 is an error on the CPU, as in the published code. On a device, where looking would
        wait, the matcher finds it out of range: such a target has no proposal, and is in the matcher's report.
        """
        if self.mode == "stable" or zero is packed:
            return zero
        if packed.labels.device.type == "cpu":
            packed.check_values(1)
        return packed

    def _values(self, matched: Matched) -> Tensor:  # [L, 5 + further class losses]
        """The five of set_loss, the first class loss in its place, and the other class losses."""
        choices = self._class_losses or [ClassLoss("", "focal", 0.25, 2.0)]
        columns = [self._set_loss(matched, choice) for choice in choices]
        values = torch.cat([columns[0], *(column[:, :1] for column in columns[1:])], 1) if columns[1:] else columns[0]
        return values if self.boxes_weight_format is None else self._weighted(values, matched, choices)

    def _set_loss(self, matched: Matched, choice: ClassLoss) -> Tensor:  # [L, 5]
        predictions, targets, query_of_target, num_boxes = matched
        values = set_loss(
            predictions.logits,
            predictions.boxes,
            query_of_target,
            targets.labels,
            targets.boxes,
            targets.offsets,
            num_boxes,
            self._class_weight() if choice.kind == "softmax" else None,
            choice.kind,
            choice.alpha,
            choice.gamma,
        )
        if choice.factor == 1:
            return values
        return torch.cat([choice.factor * values[:, :1], values[:, 1:]], 1)

    def _class_weight(self) -> Tensor | None:
        return None

    def _weighted(self, values: Tensor, matched: Matched, choices: Sequence[ClassLoss]) -> Tensor:
        """With `boxes_weight_format`: GIoU losses weighted by the pair's quality, which is VFL's target, too."""
        pairs = PairedBoxes.of(matched)
        columns = list(values.unbind(1))
        columns[TERMS.index("giou")] = self._weighted_giou(pairs, matched.num_boxes)
        for number, choice in enumerate(choices):
            if choice.kind in ("varifocal", "mal") and self.boxes_weight_format == "giou":
                at = number and len(TERMS) + number - 1
                columns[at] = columns[at] + self._retargeted(matched, pairs, choice)
        return torch.stack(columns, 1)

    def _weighted_giou(self, pairs: PairedBoxes, num_boxes: Tensor) -> Tensor:  # [L]
        iou, giou = pairs.overlaps()
        return (self._quality(iou, giou) * (1 - giou)).sum(1) / num_boxes

    def _quality(self, iou: Tensor, giou: Tensor) -> Tensor:  # [L, T]
        quality = (giou if self.boxes_weight_format == "giou" else iou).detach()
        return quality.clamp(min=0) if self.mode == "stable" else quality

    def _retargeted(self, matched: Matched, pairs: PairedBoxes, choice: ClassLoss) -> Tensor:  # [L]
        """What a class loss grows by where its target is GIoU instead of IoU."""
        logits = matched.predictions.logits
        at = pairs.slot * logits.shape[-1] + matched.targets.labels.clamp(0, logits.shape[-1] - 1)
        x = logits.flatten(1).gather(1, at).float()
        iou, giou = (overlap.detach() for overlap in pairs.overlaps())

        def loss(quality: Tensor) -> Tensor:
            if choice.kind == "mal":
                return nn.functional.softplus(x) - quality**choice.gamma * x
            return quality * (nn.functional.softplus(x) - quality * x)

        grown = loss(self._quality(iou, giou)) - loss(iou)
        return grown.where(pairs.is_pair, 0).sum(1) / matched.num_boxes
