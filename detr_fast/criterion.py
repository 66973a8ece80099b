"""The set criterion: matching and losses of all decoder layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from detr_fast.captured import CapturedCriterion
from detr_fast.diagnostics import MatchingDiagnostics, diagnose
from detr_fast.losses import mask_losses
from detr_fast.matcher import HungarianMatcher, check_batch_size, check_class_options, queries_of
from detr_fast.ops.dialect import DETR, Dialect
from detr_fast.ops.set_loss import TERMS, LossKind, set_loss, weighted_set_loss
from detr_fast.structures import Predictions, Targets, without_masks

# Entries of a layer's losses under the names of facebookresearch/detr: name, term of set_loss, differentiable.
_ENTRIES = {
    "labels": (("loss_ce", "class", True), ("class_error", "class_error", False)),
    "cardinality": (("cardinality_error", "cardinality_error", False),),
    "boxes": (("loss_bbox", "bbox", True), ("loss_giou", "giou", True)),
    "masks": (),
}

_MASK_ENTRIES = ("loss_mask", "loss_dice")

_MOST_WEIGHTS = 1024  # sets of weights that are kept, a hundred bytes each

_ORIGINAL_METHODS = ("get_loss", "_get_src_permutation_idx", "_get_tgt_permutation_idx")


class SetCriterion(nn.Module):
    """Matches predictions with targets and computes the set losses; drop-in for facebookresearch/detr's.

    ``criterion(outputs, targets)`` takes the dictionary and list of dictionaries of facebookresearch/detr, or
    :class:`Predictions` and :class:`Targets`, and returns the same dictionary of unweighted 0-d tensors for both:
    ``loss_ce``, ``class_error``, ``cardinality_error``, ``loss_bbox``, ``loss_giou`` (``loss_mask``, ``loss_dice``) of
    the last layer, and all but class_error and masks with the suffixes ``_0`` to ``_{L-2}`` of the others. All layers
    are matched in one call and their losses and gradients computed in another; nothing is read back from a device.

    Box losses are divided by the mean number of targets over all ranks, at least 1; ``loss_ce`` of kind softmax by the
    sum of its weights on this rank. :meth:`weighted_sum` is what to differentiate. :meth:`weighted_loss` computes both
    in three launches and one for the gradient, :meth:`capture` makes a CUDA graph of it.

    Args:
        num_classes: without "no object".
        matcher: a :class:`HungarianMatcher`, or anything that returns facebookresearch/detr's pairs.
        weight_dict: weights of the entries, for :meth:`weighted_sum` and :meth:`weighted_loss`.
        eos_coef: weight of "no object" in ``loss_ce``; the buffer `empty_weight` [num_classes + 1] may be changed.
        losses: of "labels", "cardinality", "boxes", "masks".
        kind: "softmax", or with logits of `num_classes` "focal", "varifocal", "mal" or "ia_bce", see
            :func:`detr_fast.ops.set_loss`; None: the matcher's, as for `alpha`, `gamma` and `dialect`.

    Raises:
        ValueError: an unknown loss, a misspelt name in `weight_dict`, wrong number of logits, malformed targets or
            pairs (with the image).
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
        kind: LossKind | None = None,
        alpha: float | None = None,
        gamma: float | None = None,
        dialect: Dialect | None = None,
    ) -> None:
        super().__init__()
        unknown = [name for name in losses if name not in _ENTRIES]
        if unknown:
            raise ValueError(f"SetCriterion: losses must be of {', '.join(_ENTRIES)}, got {unknown[0]!r}")
        _check_weights(weight_dict, losses)
        self.num_classes, self.matcher, self.weight_dict = num_classes, matcher, weight_dict
        self.eos_coef, self.losses = eos_coef, list(losses)
        inherited: LossKind = getattr(matcher, "kind", "softmax")
        self.kind: LossKind = kind or inherited
        self.alpha: float = getattr(matcher, "alpha", 0.25) if alpha is None else alpha
        self.gamma: float = getattr(matcher, "gamma", 2.0) if gamma is None else gamma
        self.dialect: Dialect = getattr(matcher, "dialect", DETR) if dialect is None else dialect
        check_class_options("SetCriterion", self.kind, get_args(LossKind), self.alpha, self.gamma)
        self.empty_weight: Tensor
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = eos_coef
        self.register_buffer("empty_weight", empty_weight)
        self._weight_tensors: dict[tuple[Any, ...], Tensor] = {}
        self.latest: _Matched | None = None  # the batch that diagnostics() is about, detached

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"latest": None}  # a copy or a file needs no batch

    def forward(
        self,
        outputs: Predictions | Mapping[str, Any],
        targets: Targets | Sequence[Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        matched = self._matched(outputs, targets)
        losses = self._named(set_loss(*matched.arguments(), *self._loss_options(matched.num_boxes)))
        return losses | self._mask_losses(matched)

    def weighted_loss(
        self,
        outputs: Predictions | Mapping[str, Any],
        targets: Targets | Sequence[Mapping[str, Tensor]],
        joint: Tensor | None = None,  # [2] float32, normalisers of a larger batch; see normalisers()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum to differentiate, ``[]``, and all entries, detached, for the log.

        As ``losses = criterion(outputs, targets)`` and ``criterion.weighted_sum(losses)``, but the sum and its gradient
        are computed with the losses, with weights rounded to float32: on a CUDA device three launches for matching and
        losses (without masks) and one for the gradient, of all layers. Entries without a weight take no part.

        With `joint`, losses are divided by those normalisers instead of this batch's own: then the sums over the parts
        of a batch are the losses of the whole batch, and so are the gradients.

        Raises:
            ValueError: as a call of the criterion; or `weight_dict` names none of its losses, or masks with `joint`.
        """
        if joint is not None and "masks" in self.losses:
            raise ValueError("SetCriterion.weighted_loss: joint must be None for losses with 'masks', got a tensor")
        matched = self._matched(outputs, targets, reduces=joint is None)
        layers = len(matched.predictions.logits)
        positions = {name: position for name, position, _ in self._entries(layers)}
        if not any(name in self.weight_dict for name in (*positions, *_MASK_ENTRIES)):
            raise ValueError(f"SetCriterion: weight_dict names none of the losses {', '.join(positions)}")
        device = matched.predictions.logits.device
        weight = self._weights_of(positions, layers * len(TERMS), device, torch.float32)
        weight = weight.view(layers, len(TERMS))
        share = None if joint is None else self._share(matched, joint)
        values = weighted_set_loss(
            *matched.arguments(),
            weight if share is None else weight * share,
            *self._loss_options(matched.num_boxes),
        )
        found = values.losses.detach()
        flat = (found if share is None else found * share).flatten().unbind()
        losses = {name: flat[position] for name, position in positions.items()}
        total = values.total
        masks = self._mask_losses(matched)
        for name, value in masks.items():
            if self.weight_dict.get(name, 0.0) != 0:
                total = total + self.weight_dict[name] * value
            losses[name] = value.detach()
        return total, losses

    def capture(
        self, example: Predictions | Mapping[str, Any], capacity: int, max_count: int | None = None
    ) -> CapturedCriterion:
        """:meth:`weighted_loss` as a CUDA graph, for predictions of the shape of `example`.

        Takes up to `capacity` targets in all and `max_count` (default: `capacity`) in one image; a tight bound saves
        shared memory. Weights are those of now. With several processes all of them capture together, over NCCL. See
        :class:`CapturedCriterion`.

        Raises:
            ValueError: masks, a matcher of another class, one that looks at the device (``invalid="raise"``), or
                processes that are not connected by NCCL.
        """
        predictions = example if isinstance(example, Predictions) else Predictions.from_dict(example)
        on_device = predictions.logits.device.type != "cpu"
        if "masks" in self.losses:
            raise ValueError("SetCriterion.capture: losses must not have 'masks', whose shapes follow the targets")
        if not isinstance(self.matcher, HungarianMatcher):
            raise ValueError(f"SetCriterion.capture: matcher must be a HungarianMatcher, got {type(self.matcher)}")
        if on_device and self.matcher.invalid == "raise":
            raise ValueError("SetCriterion.capture: the matcher's invalid must be 'skip' or None, got 'raise'")
        if on_device and dist.is_available() and dist.is_initialized() and dist.get_backend() != "nccl":
            raise ValueError(f"SetCriterion.capture: the processes' backend must be nccl, got {dist.get_backend()}")
        return CapturedCriterion(self, predictions, capacity, max_count)

    def structured(
        self, outputs: Predictions | Mapping[str, Any], targets: Targets | Sequence[Mapping[str, Tensor]]
    ) -> tuple[Predictions, Targets]:
        """Both forms of the arguments as structures; their sizes and the values of listed targets are checked."""
        predictions = outputs if isinstance(outputs, Predictions) else Predictions.from_dict(outputs)
        self._check_classes(predictions)
        targets = targets if "masks" in self.losses else without_masks(targets)
        packed = targets if isinstance(targets, Targets) else Targets.pack(targets, self.num_classes)
        check_batch_size("SetCriterion", predictions.logits.shape[1], len(packed))
        return predictions, packed

    def options(self) -> tuple[Any, ...]:
        """All numbers and names that matching and losses depend on, beside the buffers: what a capture fixes."""
        matcher = self.matcher
        costs = [getattr(matcher, f"cost_{name}", None) for name in ("class", "bbox", "giou")]
        kinds = [(part.kind, part.alpha, part.gamma, part.dialect) for part in (self, matcher) if hasattr(part, "kind")]
        invalid = getattr(matcher, "invalid", None)
        return dict(self.weight_dict), tuple(self.losses), *costs, *kinds, invalid

    def normalisers(self, targets: Targets, num_queries: int) -> Tensor:
        """What the losses of a batch are divided by, ``[2]`` float32 on its device: targets, weights of all classes.

        The first of box and focal losses (there at least 1), the second of the class loss of kind softmax: the sum of
        `empty_weight` over all queries, each with the class that it is to have. Sums of these over the parts of a batch
        are `joint` of :meth:`weighted_loss`; over ranks whose gradients are averaged, divided by their number. Where an
        image has more targets than queries, the second is exact if all labels weigh the same.
        """
        counts = targets.offsets.diff()
        matched = counts.clamp(max=num_queries).sum()
        labels = targets.labels.clamp(0, self.num_classes)
        is_there = torch.arange(len(labels), device=labels.device) < targets.offsets[-1]
        weight = self.empty_weight.float()
        of_labels = (weight[labels] * is_there).sum() * (matched / counts.sum().clamp(min=1))
        of_no_object = weight[-1] * (len(targets) * num_queries - matched)
        return torch.stack([counts.sum().float(), of_labels + of_no_object])

    def _share(self, matched: _Matched, joint: Tensor) -> Tensor:  # [terms]
        """This batch's part of the joint normalisers, which turns its own losses into its part of the joint ones."""
        own = self.normalisers(matched.targets, matched.predictions.logits.shape[2])
        boxes = own[0].clamp(min=1) / joint[0]
        classes = own[1] / joint[1] if self.kind == "softmax" else boxes
        one = torch.ones_like(boxes)
        return torch.stack([{"class": classes, "bbox": boxes, "giou": boxes}.get(term, one) for term in TERMS])

    def _matched(
        self,
        outputs: Predictions | Mapping[str, Any],
        targets: Targets | Sequence[Mapping[str, Tensor]],
        reduces: bool = True,
    ) -> _Matched:
        predictions, packed = self.structured(outputs, targets)
        packed = packed.to(predictions.logits.device)
        query_of_target = self._match(predictions, packed, outputs, targets)
        if not torch.compiler.is_compiling():
            detached = Predictions(predictions.logits.detach(), predictions.boxes.detach())
            self.latest = _Matched(detached, replace(packed, masks=None), query_of_target, None)
        else:
            self.latest = None
        return _Matched(predictions, packed, query_of_target, mean_box_count(packed.offsets) if reduces else None)

    def _loss_options(self, num_boxes: Tensor | None) -> tuple[Any, ...]:
        class_weight = self.empty_weight.float() if self.kind == "softmax" else None
        return num_boxes, class_weight, self.kind, self.alpha, self.gamma, self.dialect

    def _mask_losses(self, matched: _Matched) -> dict[str, Tensor]:
        if "masks" not in self.losses:
            return {}
        masks, targets = matched.predictions.masks, matched.targets
        if masks is None:
            raise ValueError("SetCriterion: losses has 'masks', but outputs has no 'pred_masks'")
        num_boxes = targets.offsets[-1].float() if matched.num_boxes is None else matched.num_boxes
        pair = mask_losses(masks, matched.query_of_target[-1], targets, num_boxes.clamp(min=1))
        return dict(zip(_MASK_ENTRIES, pair, strict=True))

    def _check_classes(self, predictions: Predictions) -> None:
        if predictions.logits.dim() != 4:
            shape = list(predictions.logits.shape)
            raise ValueError(f"SetCriterion: logits must be [L, B, Q, C] (pred_logits: [B, Q, C]), got {shape}")
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

    def _entries(self, layers: int) -> Iterator[tuple[str, int, bool]]:
        """Published names, last layer first; position in the flat losses ``[L * terms]``; whether it has a gradient."""
        for layer in (layers - 1, *range(layers - 1)):
            suffix = "" if layer == layers - 1 else f"_{layer}"
            for name in self.losses:
                for entry, term, has_gradient in _ENTRIES[name]:
                    if entry == "class_error" and suffix:
                        continue
                    yield entry + suffix, layer * len(TERMS) + TERMS.index(term), has_gradient

    def _named(self, values: Tensor) -> dict[str, Tensor]:
        """``[L, terms]`` under the published names."""
        entries = list(self._entries(len(values)))
        if torch.compiler.is_compiling():  # which makes one launch of them
            flat = values.flatten().unbind()
            return {name: flat[at].clone() if keeps else flat[at].detach().clone() for name, at, keeps in entries}
        tensors = _Entries.apply(values, [at for _, at, _ in entries], [keeps for _, _, keeps in entries])
        return {name: tensor for (name, _, _), tensor in zip(entries, tensors, strict=True)}

    def weighted_sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Sum of the entries that `weight_dict` names, times their weights: ``[]``."""
        names = [name for name in losses if name in self.weight_dict]
        values = [losses[name] for name in names]
        if not names:
            raise ValueError(f"SetCriterion: weight_dict names none of the losses {', '.join(losses)}")
        positions = {name: position for position, name in enumerate(names)}
        weights = self._weights_of(positions, len(names), values[0].device, values[0].dtype)
        return (torch.stack(values) * weights).sum()

    def _weights_of(
        self, positions: Mapping[str, int], count: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:  # [count]
        """Weights at the positions of the entries that have one, 0 elsewhere; kept for the next call."""
        weights = [0.0] * count
        for name, position in positions.items():
            weights[position] = self.weight_dict.get(name, 0.0)
        key = (*weights, device, dtype)
        if key in self._weight_tensors:
            return self._weight_tensors[key]
        if torch.compiler.is_compiling():
            return torch.tensor(weights, dtype=dtype, device=device)
        with torch.inference_mode(False):  # the tensor is kept for steps that do differentiate
            # Waits once, so that any stream may use it. A Parameter, because torch.compile takes its shape as fixed.
            values = torch.tensor(weights, dtype=dtype).to(device)
            tensor = nn.Parameter(values, requires_grad=False)
        if isinstance(values, FakeTensor):  # of somebody who only wants to know shapes
            return tensor
        # Graphs may read it, so it is kept; but weights of a schedule must not pile up for ever.
        latest = list(self._weight_tensors.items())[1 - _MOST_WEIGHTS :]
        self._weight_tensors = {**dict(latest), key: tensor}
        return tensor

    def diagnostics(self) -> MatchingDiagnostics | None:
        """How the latest batch was matched, computed now from what the criterion keeps of it; waits for no device.

        None before the first batch, after compiled code, or with a matcher of another class.
        """
        if self.latest is None or not isinstance(self.matcher, HungarianMatcher):
            return None
        predictions, targets, query_of_target, _ = self.latest
        return diagnose(self.matcher, predictions, targets, query_of_target)

    def matcher_report(self) -> str | None:
        """What the matcher skipped since the last report, or None. Waits for the device."""
        forbidden = self.matcher.report() if isinstance(self.matcher, HungarianMatcher) else None
        return None if forbidden is None else str(forbidden)


class _Matched(NamedTuple):
    """Predictions and targets of a batch, and which belong together."""

    predictions: Predictions
    targets: Targets
    query_of_target: Tensor  # [L, T] int32
    num_boxes: Tensor | None  # of mean_box_count

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        predictions, targets = self.predictions, self.targets
        pairs = (predictions.logits, predictions.boxes, self.query_of_target)
        return (*pairs, targets.labels, targets.boxes, targets.offsets)


def _check_weights(weight_dict: Mapping[str, float], losses: Sequence[str]) -> None:
    """A misspelt name would leave its loss without a weight; names that are like none are the caller's own losses."""
    known = {
        name: [entry for entry, _, is_loss in entries if is_loss] + list(_MASK_ENTRIES) * (name == "masks")
        for name, entries in _ENTRIES.items()
    }
    names = [entry for entries in known.values() for entry in entries]
    missing = [entry for name in losses for entry in known[name] if entry not in weight_dict]
    for key in weight_dict:
        near = get_close_matches(key, missing, 1, 0.85)
        if near and not any(key == name or key.startswith(f"{name}_") for name in names):
            raise ValueError(f"SetCriterion: weight_dict must have {near[0]!r}, got {key!r}")


class _Entries(torch.autograd.Function):
    """Numbers of a tensor as tensors of their own, without a copy of each: callers multiply them in place."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, positions: list[int], keeps_gradient: list[bool]) -> tuple[Tensor, ...]:
        flat = values.flatten().unbind()
        entries = tuple(flat[position].data for position in positions)  # data: no view of one another
        ctx.mark_non_differentiable(*(x for x, keeps in zip(entries, keeps_gradient, strict=True) if not keeps))
        ctx.set_materialize_grads(False)
        ctx.positions, ctx.shape = positions, values.shape
        return entries

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        known = {at: x for at, x in zip(ctx.positions, gradients, strict=True) if x is not None}
        if not known:
            return None, None, None
        zero = torch.zeros_like(next(iter(known.values())))
        flat = [known.get(position, zero) for position in range(ctx.shape.numel())]
        return torch.stack(flat).view(ctx.shape), None, None


def mean_box_count(offsets: Tensor) -> Tensor | None:
    """Targets of all ranks divided by the number of ranks, ``[]`` float32 on the device; None if there is one rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    count = offsets[-1].to(torch.float32)
    dist.all_reduce(count)
    return count / dist.get_world_size()
