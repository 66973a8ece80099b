"""The set criterion: matching and losses of all decoder layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detr_fast.losses import mask_losses
from detr_fast.matcher import HungarianMatcher, check_batch_size, check_class_options, queries_of
from detr_fast.ops.matching_cost import ClassKind
from detr_fast.ops.set_loss import TERMS, set_loss
from detr_fast.structures import Predictions, Targets

# Entries of a layer's losses under the names of facebookresearch/detr: name, term of set_loss, differentiable.
_ENTRIES = {
    "labels": (("loss_ce", "class", True), ("class_error", "class_error", False)),
    "cardinality": (("cardinality_error", "cardinality_error", False),),
    "boxes": (("loss_bbox", "bbox", True), ("loss_giou", "giou", True)),
    "masks": (),
}

_ORIGINAL_METHODS = ("get_loss", "_get_src_permutation_idx", "_get_tgt_permutation_idx")


class SetCriterion(nn.Module):
    """Matches predictions with targets and computes the set losses; drop-in for facebookresearch/detr's.

    ``criterion(outputs, targets)`` takes the dictionary and list of dictionaries of facebookresearch/detr, or
    :class:`Predictions` and :class:`Targets`, and returns the same dictionary of unweighted 0-d tensors for both:
    ``loss_ce``, ``class_error``, ``cardinality_error``, ``loss_bbox``, ``loss_giou`` (``loss_mask``, ``loss_dice``) of
    the last layer, and all but class_error and masks with the suffixes ``_0`` to ``_{L-2}`` of the others. All layers
    are matched in one call and their losses and gradients computed in another; nothing is read back from a device.

    Box losses are divided by the mean number of targets over all ranks, at least 1; ``loss_ce`` of kind softmax by the
    sum of its weights on this rank. :meth:`weighted_sum` is what to differentiate.

    Args:
        num_classes: without "no object".
        matcher: a :class:`HungarianMatcher`, or anything that returns facebookresearch/detr's pairs.
        weight_dict: weights of the entries, for :meth:`weighted_sum`.
        eos_coef: weight of "no object" in ``loss_ce``; the buffer `empty_weight` [num_classes + 1] may be changed.
        losses: of "labels", "cardinality", "boxes", "masks".
        kind: "softmax", or "focal" with logits of `num_classes`; None: the matcher's, as for `alpha` and `gamma`.

    Raises:
        ValueError: an unknown loss, wrong number of logits, malformed targets or pairs (with the image).
        TypeError: a subclass defines one of the original's methods for single losses: there are none to replace here.

    Source: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 3.1.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        replaced = sorted(name for name in vars(cls) if name.startswith("loss_") or name in _ORIGINAL_METHODS)
        if replaced:
            raise TypeError(
                f"{cls.__name__}: SetCriterion computes all losses in one call and does not use {replaced[0]}; "
                "override forward and add terms to its result"
            )
        super().__init_subclass__(**options)

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        eos_coef: float,
        losses: Sequence[str],
        *,
        kind: ClassKind | None = None,
        alpha: float | None = None,
        gamma: float | None = None,
    ) -> None:
        super().__init__()
        unknown = [name for name in losses if name not in _ENTRIES]
        if unknown:
            raise ValueError(f"SetCriterion: losses must be of {', '.join(_ENTRIES)}, got {unknown[0]!r}")
        self.num_classes, self.matcher, self.weight_dict = num_classes, matcher, weight_dict
        self.eos_coef, self.losses = eos_coef, list(losses)
        inherited: ClassKind = getattr(matcher, "kind", "softmax")
        self.kind: ClassKind = kind or inherited
        self.alpha: float = getattr(matcher, "alpha", 0.25) if alpha is None else alpha
        self.gamma: float = getattr(matcher, "gamma", 2.0) if gamma is None else gamma
        check_class_options("SetCriterion", self.kind, self.alpha, self.gamma)
        self.empty_weight: Tensor
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = eos_coef
        self.register_buffer("empty_weight", empty_weight)
        self._weights: dict[tuple[Any, ...], Tensor] = {}

    def forward(
        self,
        outputs: Predictions | Mapping[str, Any],
        targets: Targets | Sequence[Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        predictions = outputs if isinstance(outputs, Predictions) else Predictions.from_dict(outputs)
        self._check_classes(predictions)
        check_batch_size("SetCriterion", predictions.logits.shape[1], len(targets))
        packed = targets if isinstance(targets, Targets) else Targets.pack(targets, self.num_classes)
        packed = packed.to(predictions.logits.device)
        query_of_target = self._match(predictions, packed, outputs, targets)
        num_boxes = mean_box_count(packed.offsets)
        values = set_loss(
            predictions.logits,
            predictions.boxes,
            query_of_target,
            packed.labels,
            packed.boxes,
            packed.offsets,
            num_boxes,
            self.empty_weight.float() if self.kind == "softmax" else None,
            self.kind,
            self.alpha,
            self.gamma,
        )
        losses = self._named(values)
        if "masks" in self.losses:
            if predictions.masks is None:
                raise ValueError("SetCriterion: losses has 'masks', but outputs has no 'pred_masks'")
            pair = mask_losses(predictions.masks, query_of_target[-1], packed, num_boxes)
            losses["loss_mask"], losses["loss_dice"] = pair
        return losses

    def _check_classes(self, predictions: Predictions) -> None:
        expected = self.num_classes + (self.kind == "softmax")
        if predictions.logits.shape[-1] != expected:
            raise ValueError(
                f"SetCriterion: logits must have {expected} classes (num_classes={self.num_classes}, "
                f"kind={self.kind!r}), got {predictions.logits.shape[-1]}"
            )

    def _match(self, predictions: Predictions, packed: Targets, outputs: Any, targets: Any) -> Tensor:
        if isinstance(self.matcher, HungarianMatcher):
            return self.matcher(predictions, packed)
        if isinstance(targets, Targets):
            slices = [slice(*pair) for pair in pairwise(packed.offsets.tolist())]
            targets = [{"labels": packed.labels[own], "boxes": packed.boxes[own]} for own in slices]
        if isinstance(outputs, Predictions):
            outputs = outputs.as_dict()
        last = {name: value for name, value in outputs.items() if name != "aux_outputs"}
        with torch.no_grad():
            pairs = [self.matcher(layer, targets) for layer in (*outputs.get("aux_outputs", ()), last)]
        return torch.stack([queries_of(layer, packed, predictions.logits.shape[2]) for layer in pairs])

    def _named(self, values: Tensor) -> dict[str, Tensor]:
        """``[L, terms]`` under the published names, last layer first."""
        count = len(values)
        # Clones, because callers multiply entries in place.
        differentiable = [value.clone() for value in values.flatten().unbind()]
        constant = values.detach().clone().flatten().unbind()
        losses = {}
        for layer in (count - 1, *range(count - 1)):
            suffix = "" if layer == count - 1 else f"_{layer}"
            for name in self.losses:
                for entry, term, has_gradient in _ENTRIES[name]:
                    if entry == "class_error" and suffix:
                        continue
                    index = layer * len(TERMS) + TERMS.index(term)
                    losses[entry + suffix] = (differentiable if has_gradient else constant)[index]
        return losses

    def weighted_sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Sum of the entries that `weight_dict` names, times their weights: ``[]``."""
        names = tuple(name for name in losses if name in self.weight_dict)
        if not names:
            raise ValueError(f"SetCriterion: weight_dict names none of the losses {', '.join(losses)}")
        values = torch.stack([losses[name] for name in names])
        key = (*((name, self.weight_dict[name]) for name in names), values.device, values.dtype)
        if key not in self._weights:
            with torch.inference_mode(False):  # the tensor is kept for steps that do differentiate
                weights = torch.tensor([self.weight_dict[name] for name in names], dtype=values.dtype)
                self._weights = {key: weights.to(values.device)}
        return (values * self._weights[key]).sum()

    def matcher_report(self) -> str | None:
        """What the matcher skipped since the last report, or None. Waits for the device."""
        forbidden = self.matcher.report() if isinstance(self.matcher, HungarianMatcher) else None
        return None if forbidden is None else str(forbidden)


def mean_box_count(offsets: Tensor) -> Tensor:
    """Targets of all ranks divided by the number of ranks, at least 1: ``[]`` float32 on the device."""
    count = offsets[-1].to(torch.float32)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count.clamp(min=1)
