"""RT-DETR's criteria."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detr_fast.integrations.layer_losses import ListedTargets, box_count, cardinality_error
from detr_fast.integrations.mode import Mode
from detr_fast.integrations.rtdetr.set_losses import SetLosses
from detr_fast.integrations.rtdetr.stacks import Layer, Matched, Stack, denoised, numbered, stacks_of
from detr_fast.ops.set_loss import TERMS
from detr_fast.structures import Predictions, Targets


class RTDETRCriterionv2(SetLosses):
    """Criterion of RT-DETRv2: ``criterion(outputs, targets, **anything)`` is a dictionary of weighted losses.

    Keys ``loss_vfl``, ``loss_focal``, ``loss_bbox``, ``loss_giou``, each times its weight, with the suffixes ``_aux_i``
    of `aux_outputs`, ``_dn_i`` of `dn_aux_outputs` and ``_enc_i`` of `enc_aux_outputs`; entries without a weight are
    left out. Sets of one shape (decoder and encoder, as a rule) are matched in one call and their losses and gradients
    computed in another, denoising in a third; nothing is read back from a device.

    `targets` may also be :class:`Targets`, whose values are not checked. A `matcher` of this module is used for whole
    stacks, any other is called layer by layer.
    Loss ``masks`` is not supported, which needs the random points of its code base.

    Modes (see also the matcher's) differ where the encoder is class-agnostic: "compat" matches it with the original
    labels, as published, so that a label above 0 is an error (on a device, where looking would wait, such a target
    matches no proposal); "stable" with label 0 for every target, as the loss has it. With `boxes_weight_format` "giou",
    GIoU may be negative: published ("compat"), such pairs are then driven apart; "stable" gives them weight and quality
    0. Everything else is equal to rounding.

    Raises:
        ValueError: an unknown loss, format or mode; wrong number of classes; malformed targets, with the image.
    """

    def __init__(
        self,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        losses: Sequence[str],
        alpha: float = 0.2,
        gamma: float = 2.0,
        num_classes: int = 80,
        boxes_weight_format: Literal["iou", "giou"] | None = None,
        share_matched_indices: bool = False,
        *,
        mode: Mode = "stable",
    ) -> None:
        shared = (boxes_weight_format, share_matched_indices, mode)
        super().__init__(matcher, weight_dict, losses, alpha, gamma, num_classes, *shared)

    def forward(self, outputs: Layer, targets: ListedTargets, **kwargs: Any) -> dict[str, Tensor]:
        packed = self._packed(outputs, targets)
        num_boxes = box_count(packed.offsets)
        decoder = numbered("_aux_{}", outputs.get("aux_outputs", ()), first=outputs)
        encoder = numbered("_enc_{}", outputs.get("enc_aux_outputs", ()))
        is_agnostic = bool(encoder) and outputs["enc_meta"]["class_agnostic"]
        is_joint = not (is_agnostic or self.share_matched_indices)
        suffixes, rows = [], []
        for stack in stacks_of([*decoder, *encoder] if is_joint else decoder):
            self._check_classes(stack.predictions)
            query_of_target = self._matched(stack, packed)
            suffixes += stack.suffixes
            rows.append(self._values(Matched(stack.predictions, packed, query_of_target, num_boxes)))
        for stack in () if is_joint else stacks_of(encoder):
            self._check_classes(stack.predictions, is_agnostic)
            zero = replace(packed, labels=torch.zeros_like(packed.labels)) if is_agnostic else packed
            seen = self._seen_by_encoder(packed, zero)
            query_of_target = self._match(stack.predictions, seen)
            suffixes += stack.suffixes
            rows.append(self._values(Matched(stack.predictions, zero, query_of_target, num_boxes)))
        for stack in stacks_of(numbered("_dn_{}", outputs.get("dn_aux_outputs", ()))):
            suffixes += stack.suffixes
            rows.append(self._denoised(stack.predictions, outputs, packed, num_boxes))
        return self._named(torch.cat(rows), suffixes)

    def _matched(self, stack: Stack, packed: Targets) -> Tensor:  # [L, T]
        if not (self.share_matched_indices and "" in stack.suffixes):
            return self._match(stack.predictions, packed)
        first = Predictions(stack.predictions.logits[:1], stack.predictions.boxes[:1])
        return self._match(first, packed).expand(len(stack.suffixes), -1).contiguous()

    def _denoised(self, stack: Predictions, outputs: Layer, packed: Targets, num_boxes: Tensor) -> Tensor:
        self._check_classes(stack)
        values = self._values(denoised(stack, outputs["dn_meta"], packed, num_boxes, type(self).__name__))
        if "cardinality" not in self.losses:
            return values
        error = cardinality_error(stack.logits, packed.offsets)
        at = TERMS.index("cardinality_error")
        return torch.cat([values[:, :at], error[:, None], values[:, at + 1 :]], 1)


class SetCriterion(RTDETRCriterionv2):
    """Criterion of RT-DETR (v1): as :class:`RTDETRCriterionv2`, with encoder proposals as the last of `aux_outputs`.

    Losses ``vfl``, ``focal``, ``bce``, ``labels`` (cross-entropy, key ``loss_ce``, with logits of num_classes + 1
    classes and `eos_coef` for the last), ``boxes``, ``cardinality``; ``class_error`` and ``cardinality_error`` are
    entries if `weight_dict` names them. Loss ``masks``, whose published code lacks its imports, is not supported. The
    two modes differ as those of the matcher.
    """

    class_losses = ("labels", "bce", "focal", "vfl")
    others = ("boxes", "cardinality")

    def __init__(
        self,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        losses: Sequence[str],
        alpha: float = 0.2,
        gamma: float = 2.0,
        eos_coef: float = 1e-4,
        num_classes: int = 80,
        *,
        mode: Mode = "stable",
    ) -> None:
        super().__init__(matcher, weight_dict, losses, alpha, gamma, num_classes, mode=mode)
        self.empty_weight: Tensor
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = eos_coef
        self.register_buffer("empty_weight", empty_weight)

    def _class_weight(self) -> Tensor:
        return self.empty_weight.float()
