"""D-FINE's and DEIM's criteria."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.integrations.dfine.local_losses import LOCAL, Local, LocalOptions
from detr_fast.integrations.dfine.matcher import sized
from detr_fast.integrations.layer_losses import Entry, LayerLosses, ListedTargets, box_count
from detr_fast.integrations.mode import Mode
from detr_fast.integrations.rtdetr.set_losses import ClassLoss, SetLosses
from detr_fast.integrations.rtdetr.stacks import Layer, Matched, PairedBoxes, Stack, denoised, numbered, stacks_of
from detr_fast.ops.matching_union import unite
from detr_fast.ops.set_loss import TERMS
from detr_fast.structures import Predictions, Targets


class Sets(NamedTuple):
    """Sets that are matched or told their pairs; their order is that of the published code."""

    layers: list[tuple[str, Layer]]
    stacks: list[Stack]  # neighbours of one shape; their boxes are slices of `sizes`
    boxes: Tensor  # [S, B, Q, 4]
    sizes: Tensor  # [S, B, Q, 4], no width or height negative

    @classmethod
    def of(cls, layers: list[tuple[str, Layer]], name: str) -> Sets:
        shapes = [list(layer["pred_boxes"].shape) for _, layer in layers]
        for (suffix, _), shape in zip(layers, shapes, strict=True):
            if shape != shapes[0]:
                raise ValueError(f"{name}: pred_boxes of set {suffix!r} must be {shapes[0]} as others, got {shape}")
        boxes = torch.stack([layer["pred_boxes"] for _, layer in layers])
        sizes, start, stacks = sized(boxes), 0, []
        for stack in stacks_of(layers):
            end = start + len(stack.suffixes)
            stacks.append(Stack(stack.suffixes, Predictions(stack.predictions.logits, sizes[start:end])))
            start = end
        return cls(layers, stacks, boxes, sizes)


class DFINECriterion(SetLosses):
    """Criterion of D-FINE: ``criterion(outputs, targets, **anything)`` is a dictionary of weighted losses.

    Keys ``loss_vfl`` or ``loss_focal``, ``loss_bbox``, ``loss_giou``, ``loss_fgl``, ``loss_ddf``, each times its weight
    and with NaN replaced by 0, with the suffixes ``_aux_i``, ``_pre``, ``_enc_i``, ``_dn_i`` and ``_dn_pre``: 68 for a
    decoder of 6 layers. Entries without a weight are left out.

    Box and local losses of all sets use the union of their matchings (each query keeps the target that most sets gave
    it), divided by the number of its pairs; class losses and denoising their own. All sets are matched in one call,
    their class losses and gradients computed in a second, box losses in a third, denoising in a fourth, and the
    distributions of all layers together; nothing is read back from a device.

    Where several targets are equally frequent at a query, the published order is left to an unstable sort; here the
    query keeps the lowest target. `targets` may also be :class:`Targets`, whose values are not checked. A `matcher` of
    this module is used for all sets at once, any other is called set by set. ``share_matched_indices`` has no effect,
    as in the published code. FGL's targets are computed once, from the last layer's reference points. ``loss_ddf`` of a
    layer that is its own teacher is 0, found by its memory: equal values elsewhere in memory have a loss of rounding
    errors.

    Modes (see also the matcher's):

    - a class-agnostic encoder is matched with the original labels in "compat", as published, so that a label above 0 is
      an error (on a device, where looking would wait, such a target matches no proposal); with label 0 for every
      target, as the loss has it, in "stable";
    - with `boxes_weight_format` "giou", GIoU may be negative: published ("compat"), such pairs are then driven apart,
      and MAL's power of it is NaN; "stable" gives them weight and quality 0;
    - with ``use_uni_set=False`` (DEIM) published targets of FGL are those of other pairs where layers are matched
      differently, as they are kept by position; "stable" has each pair's own.

    Raises:
        ValueError: an unknown loss, format or mode; wrong number of classes; sets of different shapes; malformed
            targets, with the image.
    """

    others = ("boxes", "local")

    def __init__(
        self,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        losses: Sequence[str],
        alpha: float = 0.2,
        gamma: float = 2.0,
        num_classes: int = 80,
        reg_max: int = 32,
        boxes_weight_format: Literal["iou", "giou"] | None = None,
        share_matched_indices: bool = False,
        *,
        mode: Mode = "stable",
    ) -> None:
        shared = (boxes_weight_format, share_matched_indices, mode)
        super().__init__(matcher, weight_dict, losses, alpha, gamma, num_classes, *shared)
        self.reg_max, self.use_uni_set = reg_max, True
        self._named_columns = [LayerLosses([Entry(name, name)], weight_dict, [name]) for name in LOCAL]

    def forward(self, outputs: Layer, targets: ListedTargets, **kwargs: Any) -> dict[str, Tensor]:
        if "aux_outputs" not in outputs:
            raise ValueError(f"{type(self).__name__}: outputs must have 'aux_outputs', got {sorted(outputs)}")
        packed = self._packed(outputs, targets)
        num_boxes = box_count(packed.offsets)
        sets = self._sets(outputs)
        own = self._own_pairs(sets, outputs, packed, num_boxes, **kwargs)
        together = self._together(sets, packed, own, num_boxes)
        pairs = PairedBoxes.of(together)
        values = torch.cat([self._values(matched) for matched in own])
        if "boxes" in self.losses:
            values = self._with_boxes_of(together, sets, values) if self.use_uni_set else values
            values = with_negative_sizes(values, pairs, together.num_boxes)
        local = self._local(sets.layers, outputs, pairs, together.num_boxes)
        suffixes = [suffix for suffix, _ in sets.layers]
        if "dn_outputs" in outputs:
            denoised_values, denoised_local, denoised_suffixes = self._denoised(outputs, packed, num_boxes, local)
            values, suffixes = torch.cat([values, denoised_values]), suffixes + denoised_suffixes
            local = local.joined(denoised_local)
        return self._named(values.nan_to_num(nan=0.0), suffixes) | self._named_local(local)

    def _sets(self, outputs: Layer) -> Sets:
        layers = numbered("_aux_{}", outputs["aux_outputs"], first=outputs)
        layers += [("_pre", outputs["pre_outputs"])] if "pre_outputs" in outputs else []
        layers += numbered("_enc_{}", outputs.get("enc_aux_outputs", ()))
        return Sets.of(layers, type(self).__name__)

    def _own_pairs(
        self, sets: Sets, outputs: Layer, packed: Targets, num_boxes: Tensor, **options: Any
    ) -> list[Matched]:
        """Each stack with the pairs of its own sets; without a gradient of boxes if their losses are elsewhere."""
        found: list[Matched] = []
        raw = sets.boxes.split([len(stack.suffixes) for stack in sets.stacks])
        for stack, boxes in zip(sets.stacks, raw, strict=True):
            is_encoder = stack.suffixes[0].startswith("_enc")
            is_agnostic = is_encoder and outputs["enc_meta"]["class_agnostic"]
            self._check_classes(stack.predictions, is_agnostic)
            seen = wanted = packed
            if is_agnostic:
                wanted = replace(packed, labels=torch.zeros_like(packed.labels))
                seen = self._seen_by_encoder(packed, wanted)
            predictions = stack.predictions
            query_of_target = self._match(Predictions(predictions.logits, boxes), seen, **self._matching(options))
            if self.use_uni_set:
                predictions = Predictions(predictions.logits, predictions.boxes.detach())
            found.append(Matched(predictions, wanted, query_of_target, num_boxes))
        return found

    def _matching(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What the matcher is told beside predictions and targets."""
        return {}

    def _together(self, sets: Sets, packed: Targets, own: Sequence[Matched], num_boxes: Tensor) -> Matched:
        """Boxes of all sets with the pairs that box and local losses use; rows in the order target, set."""
        query_of_target = torch.cat([matched.query_of_target for matched in own])
        predictions = Predictions(sets.boxes.detach(), sets.boxes)
        if not self.use_uni_set:
            return Matched(predictions, packed, query_of_target, num_boxes)
        count, _, queries, _ = sets.boxes.shape
        united = unite(query_of_target, packed.offsets, queries)
        repeated = Targets(
            torch.zeros_like(packed.labels).repeat_interleave(count),
            packed.boxes.repeat_interleave(count, 0),
            packed.offsets * count,
            packed.max_count * count,
        )
        rows = united.T.reshape(1, -1).expand(count, -1).contiguous()
        return Matched(predictions, repeated, rows, box_count((united >= 0).sum().reshape(1)))

    def _with_boxes_of(self, together: Matched, sets: Sets, values: Tensor) -> Tensor:
        """Box losses of the pairs of all sets together, in the place of those of each set's own."""
        logits = sets.sizes.new_zeros((*sets.sizes.shape[:3], 1))
        matched = together._replace(predictions=Predictions(logits, sets.sizes))
        boxes = self._set_loss(matched, ClassLoss("", "focal", 0.25, 2.0))
        giou = boxes[:, 2:3]
        if self.boxes_weight_format is not None:
            giou = self._weighted_giou(PairedBoxes.of(matched), matched.num_boxes)[:, None]
        return torch.cat([values[:, :1], boxes[:, 1:2], giou, values[:, 3:]], 1)

    def _local(
        self,
        layers: list[tuple[str, Layer]],
        outputs: Layer,
        pairs: PairedBoxes,
        num_boxes: Tensor,
        decoder: Local | None = None,
    ) -> Local:
        if "local" not in self.losses or "pred_corners" not in layers[0][1]:
            return Local()
        are_shared = self.use_uni_set or layers[0][0].startswith("_dn")
        keeps_position = self.mode == "compat" and not are_shared
        options = LocalOptions(self.reg_max, outputs["reg_scale"], outputs["up"], are_shared, keeps_position)
        return Local.of(layers, pairs, num_boxes, options, None if decoder is None else decoder.balance)

    def _named_local(self, local: Local) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for names, column in zip(self._named_columns, (local.fine_grained, local.distilled), strict=True):
            if column.suffixes:
                named |= names(torch.cat(column.losses)[:, None].nan_to_num(nan=0.0), column.suffixes)
        return named

    def _denoised(
        self, outputs: Layer, packed: Targets, num_boxes: Tensor, local: Local
    ) -> tuple[Tensor, Local, list[str]]:
        name = type(self).__name__
        layers = numbered("_dn_{}", outputs["dn_outputs"])
        layers += [("_dn_pre", outputs["dn_pre_outputs"])] if "dn_pre_outputs" in outputs else []
        sets = Sets.of(layers, name)
        raw = denoised(Predictions(sets.boxes, sets.boxes), outputs["dn_meta"], packed, num_boxes, name)
        rows, start = [], 0
        for stack in sets.stacks:
            self._check_classes(stack.predictions)
            end = start + len(stack.suffixes)
            own = raw._replace(predictions=stack.predictions, query_of_target=raw.query_of_target[start:end])
            rows.append(self._values(own))
            start = end
        pairs = PairedBoxes.of(raw)
        values = with_negative_sizes(torch.cat(rows), pairs, raw.num_boxes)
        return values, self._local(layers, outputs, pairs, raw.num_boxes, local), [suffix for suffix, _ in layers]


def with_negative_sizes(values: Tensor, pairs: PairedBoxes, num_boxes: Tensor) -> Tensor:  # [S, 5 + ...]
    """Adds to the distance what negative widths and heights were below 0."""
    # relu, unlike clamp, has no gradient at 0, where that of the size counted as 0 is 1 already.
    excess = (-pairs.boxes[..., 2:]).relu().sum(-1).where(pairs.is_pair, 0).sum(1) / num_boxes
    at = TERMS.index("bbox")
    return values + F.pad(excess[:, None], (at, values.shape[1] - at - 1))


class DEIMCriterion(DFINECriterion):
    """Criterion of DEIM and DEIMv2: D-FINE's with loss ``mal`` (key ``loss_mal``), and `use_uni_set`.

    `mal_alpha` weighs the negatives of MAL, 1 if None. Without `use_uni_set` box and local losses use each set's own
    pairs. ``criterion(outputs, targets, epoch=0)`` passes `epoch` to the matcher. ``loss_ddf`` of a layer that is its
    own teacher is 0 as in D-FINE; the published code of DEIM has no entry for it. See :class:`DFINECriterion`.
    """

    class_losses = ("focal", "vfl", "mal")

    def __init__(
        self,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        losses: Sequence[str],
        alpha: float = 0.2,
        gamma: float = 2.0,
        num_classes: int = 80,
        reg_max: int = 32,
        boxes_weight_format: Literal["iou", "giou"] | None = None,
        share_matched_indices: bool = False,
        mal_alpha: float | None = None,
        use_uni_set: bool = True,
        *,
        mode: Mode = "stable",
    ) -> None:
        self.mal_alpha = mal_alpha
        shared = (reg_max, boxes_weight_format, share_matched_indices)
        super().__init__(matcher, weight_dict, losses, alpha, gamma, num_classes, *shared, mode=mode)
        self.use_uni_set = use_uni_set

    def forward(self, outputs: Layer, targets: ListedTargets, epoch: int = 0, **kwargs: Any) -> dict[str, Tensor]:
        return super().forward(outputs, targets, epoch=epoch, **kwargs)

    def _class_loss(self, loss: str) -> ClassLoss:
        if loss == "mal":
            return ClassLoss("loss_mal", "mal", 1.0 if self.mal_alpha is None else self.mal_alpha, self.gamma)
        return super()._class_loss(loss)

    def _matching(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"epoch": options.get("epoch", 0)}
