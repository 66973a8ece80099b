"""Bipartite matching of queries and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from detr_fast.ops.assignment import assign, cost_limit
from detr_fast.ops.dialect import DETR, Dialect
from detr_fast.ops.matching import match
from detr_fast.ops.matching_cost import ClassKind, ForbiddenPairs, matching_cost
from detr_fast.structures import Predictions, Targets

Pairs = list[tuple[Tensor, Tensor]]

InvalidPolicy = Literal["raise", "skip", "last", "above_largest", "as_one"]


class HungarianMatcher(nn.Module):
    """Matches every target with the query of least total cost; drop-in for facebookresearch/detr's.

    cost = cost_bbox L1 + cost_class class_cost - cost_giou GIoU, see :func:`detr_fast.ops.matching_cost`.

    Called with dictionaries, ``matcher(outputs, targets)`` returns for each image a pair of CPU int64 tensors
    ``(queries, targets)``, queries ascending, min(Q, targets of the image) long. Called with :class:`Predictions` and
    :class:`Targets` it returns query_of_target ``[L, T]`` int32 of all layers on their device, -1 = unmatched, and does
    not wait for a device unless `invalid` is "raise".

    Args:
        kind: "softmax" (DETR), "focal" (Deformable DETR's formula) or "focal_stable", with `alpha` and `gamma`.
        invalid: what a pair without a finite cost (NaN or infinite logits or boxes, boxes without area on both sides,
            on a device also a label out of range; "focal" has a cost for infinite logits) leads to. "raise": a
            ValueError that names its layer, image, target, query and term. "skip": such pairs are not matched, the rest
            is matched at least cost, and :meth:`report` tells how many there were; this is also what
            ``torch.compile(fullgraph=True)`` needs. None: "raise" on the CPU, where looking costs nothing, and "skip"
            on other devices. The others match what several code bases do, and report: "last" takes such pairs when
            there are no others (Hugging Face transformers); "above_largest" gives them the layer's largest cost, plus
            its largest magnitude, plus 1 (RF-DETR); "as_one" makes NaN the cost 1, which may well be the least there
            is, and infinity a very large one (D-FINE, DEIM). A target whose label is out of range is not matched under
            any of them.
        dialect: epsilons of the cost.

    Raises:
        ValueError: all weights are 0, targets are malformed (with the image), or see `invalid`.

    Source: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 3.1.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_bbox: float = 1,
        cost_giou: float = 1,
        *,
        kind: ClassKind = "softmax",
        alpha: float = 0.25,
        gamma: float = 2.0,
        invalid: InvalidPolicy | None = None,
        dialect: Dialect = DETR,
    ) -> None:
        super().__init__()
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("HungarianMatcher: at least one of cost_class, cost_bbox, cost_giou must not be 0")
        check_class_options("HungarianMatcher", kind, get_args(ClassKind), alpha, gamma)
        if invalid is not None and invalid not in get_args(InvalidPolicy):
            known = ", ".join(map(repr, get_args(InvalidPolicy)))
            raise ValueError(f"HungarianMatcher: invalid must be one of {known} or None, got {invalid!r}")
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.kind, self.alpha, self.gamma, self.invalid, self.dialect = kind, alpha, gamma, invalid, dialect
        # Counts of pairs by device. No buffers: DistributedDataParallel would give all ranks those of the first.
        self._statuses: dict[torch.device, Tensor] = {}
        self._status_on(torch.device("cpu"))

    @overload
    def forward(self, outputs: Predictions, targets: Targets) -> Tensor: ...
    @overload
    def forward(self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]) -> Pairs: ...
    @torch.no_grad()
    def forward(
        self,
        outputs: Predictions | Mapping[str, Tensor],
        targets: Targets | Sequence[Mapping[str, Tensor]],
    ) -> Tensor | Pairs:
        if isinstance(outputs, Predictions) != isinstance(targets, Targets):
            raise TypeError(
                "HungarianMatcher: give Predictions with Targets, or a dictionary with a list of dictionaries, "
                f"got {type(outputs).__name__} with {type(targets).__name__}"
            )
        if isinstance(outputs, Predictions) and isinstance(targets, Targets):
            return self.match_groups(outputs, targets, 1)
        predictions = Predictions.of_layer(outputs)  # type: ignore[arg-type]
        # Values that are wrong make pairs impossible, so that "raise" finds them anyway.
        num_labels, trust = self.num_labels(predictions.logits.shape[-1]), self._raises(predictions.logits)
        packed = Targets.pack(targets, num_labels, check_values=not trust)  # type: ignore[arg-type]
        check_batch_size("HungarianMatcher", predictions.logits.shape[1], len(packed))
        packed = packed.to(predictions.logits.device)
        return pairs_of(self.match_groups(predictions, packed, 1)[0], packed.offsets)

    def num_labels(self, classes: int) -> int:
        """Labels that a target may have when there are this many logits: "no object" is none of them."""
        return classes - 1 if self.kind == "softmax" else classes

    def has_label(self, predictions: Predictions, targets: Targets) -> Tensor:  # [T, 1] bool
        """Targets whose label is one of the logits'. The others stay unmatched, whatever `invalid` says."""
        return ((targets.labels >= 0) & (targets.labels < self.num_labels(predictions.logits.shape[-1])))[:, None]

    @torch.no_grad()
    def match_groups(self, predictions: Predictions, targets: Targets, groups: int) -> Tensor:
        """Matches all targets with each of `groups` groups of queries; group g has queries g Q/groups and following.

        Returns query_of_target ``[L, T * groups]`` int32, queries in ``[0, Q)``, of the rows of
        ``targets.repeated(groups)``. One call of the op, as for one group.

        Raises:
            ValueError: the queries cannot be divided into that many groups of equal size, or as ``forward``.

        Source: Chen et al., "Group DETR", ICCV 2023.
        """
        queries = predictions.logits.shape[2]
        if isinstance(groups, float) or groups < 1 or queries % groups:
            raise ValueError(f"HungarianMatcher: groups must divide {queries} queries, got {groups}")
        found = self._match(predictions, targets, groups, self._status_on(predictions.logits.device))
        return self._checked(found, predictions, targets)

    def statuses(self) -> list[Tensor]:
        """The tensors that count pairs for :meth:`report`, of every device; they are never replaced."""
        return list(self._statuses.values())

    def _status_on(self, device: torch.device) -> Tensor:
        if device not in self._statuses:
            with torch.inference_mode(False):  # it is written to by steps that do differentiate, too
                status = ForbiddenPairs.new_status(device)
            if isinstance(status, FakeTensor):  # of somebody who only wants to know shapes
                return status
            self._statuses = {**self._statuses, device: status}  # at once: replicas call from several threads
        return self._statuses[device]

    def _apply(self, fn: Any, recurse: bool = True) -> HungarianMatcher:
        """Makes the status of a new device when the module moves there: compiled code and CUDA graphs cannot."""
        moved = super()._apply(fn, recurse)
        self._status_on(fn(torch.empty(0)).device)
        return moved

    def _match(self, predictions: Predictions, targets: Targets, groups: int, status: Tensor) -> Tensor:
        arguments = (predictions.logits, predictions.boxes, targets.labels, targets.boxes, targets.offsets)
        costs = (self.cost_class, self.cost_bbox, self.cost_giou)
        most = targets.max_count
        options: dict[str, Any] = {"kind": self.kind, "alpha": self.alpha, "gamma": self.gamma, "dialect": self.dialect}
        options |= {"status": status, "max_count": most}
        if self.invalid in (None, "raise", "skip"):
            return match(*arguments, *costs, groups=groups, **options)
        if status.device.type == "cpu" and not torch.compiler.is_compiling():
            # Looking costs nothing here, and mostly there is nothing to replace.
            known = int(status[0])
            found = match(*arguments, *costs, groups=groups, **options)
            if int(status[0]) == known:
                return found
            del options["status"]
        cost = replaced(matching_cost(*arguments, *costs, **options), self.invalid, most)
        return assign(cost.where(self.has_label(predictions, targets), torch.nan), targets.offsets, most, groups)

    def _checked(self, found: Tensor, predictions: Predictions, targets: Targets) -> Tensor:
        if self._raises(found):
            forbidden = self.report()
            if forbidden is not None:
                targets.to("cpu").check_values(self.num_labels(predictions.logits.shape[-1]))
                raise ValueError(f"HungarianMatcher: {forbidden}")
        return found

    def _raises(self, tensor: Tensor) -> bool:
        return self.invalid == "raise" or (self.invalid is None and tensor.device.type == "cpu")

    def report(self) -> ForbiddenPairs | None:
        """Pairs without a finite cost since the last report, with the position of the first; None if there were none.

        Waits for the device.
        """
        found = []
        for status in self._statuses.values():
            forbidden = ForbiddenPairs.read(status)
            if forbidden is not None:
                status.zero_()
                found.append(forbidden)
        return replace(found[0], count=sum(one.count for one in found)) if found else None

    def extra_repr(self) -> str:
        return (
            f"cost_class={self.cost_class}, cost_bbox={self.cost_bbox}, cost_giou={self.cost_giou}, "
            f"kind={self.kind!r}, invalid={self.invalid!r}"
        )


def pairs_of(query_of_target: Tensor, offsets: Tensor, groups: int = 1) -> Pairs:
    """``[T * groups]`` as a list of CPU int64 pairs for each image: queries ascending, and each one's target.

    Targets are counted within the image; with groups each is there as often.
    """
    queries = query_of_target.cpu().numpy().astype(np.int64)
    pairs = []
    for start, end in pairwise(offsets.tolist()):
        own = queries[start * groups : end * groups]
        order = own.argsort(kind="stable")
        matched = own[order]
        if len(own) and matched[0] < 0:
            order, matched = order[matched >= 0], matched[matched >= 0]
        if groups > 1:
            order %= max(end - start, 1)
        pairs.append((torch.from_numpy(matched), torch.from_numpy(order)))
    return pairs


def queries_of(pairs: Sequence[tuple[Tensor, Tensor]], targets: Targets, num_queries: int) -> Tensor:
    """The inverse of :func:`pairs_of`: ``[T]`` int32 on the targets' device.

    Raises:
        ValueError: the pairs are no one-to-one matching of the batch; the message names the image.
    """
    bounds = targets.offsets.tolist()
    if len(pairs) != len(bounds) - 1:
        raise ValueError(f"matcher: must return a pair for each of {len(bounds) - 1} images, got {len(pairs)}")
    query_of_target = torch.full((len(targets.labels),), -1, dtype=torch.int32)
    for image, (start, end) in enumerate(pairwise(bounds)):
        queries, own = (torch.as_tensor(side).cpu().long() for side in pairs[image])
        for name, side, count in (("query", queries, num_queries), ("target", own, end - start)):
            if len(side) and not 0 <= int(side.min()) <= int(side.max()) < count:
                raise ValueError(
                    f"matcher: {name} indices of image {image} must be in [0, {count}), got {side.tolist()}"
                )
            if len(side.unique()) != len(side):
                raise ValueError(f"matcher: image {image} must use no {name} twice, got {side.tolist()}")
        query_of_target[start + own] = queries.to(torch.int32)
    return query_of_target.to(targets.labels.device)


def replaced(cost: Tensor, policy: InvalidPolicy | None, max_count: int) -> Tensor:  # [L, T, Q] -> [L, T, Q]
    """Costs that the assignment would forbid, replaced as `policy` says."""
    if cost.numel() == 0:
        return cost
    most = cost_limit(cost.dtype) / 2
    if policy == "as_one":
        return cost.nan_to_num(nan=1.0).clamp(-most, most)
    is_allowed = cost.abs() < 2 * most
    magnitude = cost.abs().where(is_allowed, 0).amax((1, 2), keepdim=True)
    if policy == "last":  # more than all allowed pairs of an image can cost
        return cost.where(is_allowed, (2 * max(max_count, 1) * magnitude + 1).clamp(max=most))
    largest = cost.where(is_allowed, -magnitude).amax((1, 2), keepdim=True)
    return cost.where(is_allowed, (largest + magnitude + 1).clamp(max=most))


def check_class_options(name: str, kind: str, kinds: Sequence[str], alpha: float, gamma: float) -> None:
    """Options of the class cost and loss, the same in matcher and criterion."""
    if kind not in kinds:
        raise ValueError(f"{name}: kind must be {', '.join(kinds[:-1])} or {kinds[-1]}, got {kind!r}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"{name}: alpha must be in [0, 1], got {alpha}")
    if gamma < 0:
        raise ValueError(f"{name}: gamma must be at least 0, got {gamma}")


def check_batch_size(name: str, images: int, targets: int) -> None:
    if images != targets:
        raise ValueError(f"{name}: targets must have one entry for each of {images} images, got {targets}")
