"""Places of the installed rfdetr that compute with this package while a patch is active."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from detr_fast import matcher as core
from detr_fast.integrations.further_cost import report_of
from detr_fast.integrations.mode import Mode
from detr_fast.integrations.patching import Replacement, require_version
from detr_fast.integrations.rfdetr.criterion import criterion_losses, unsupported
from detr_fast.integrations.rfdetr.matcher import (
    check_groups,
    core_matcher,
    following,
    pairs_of_layers,
)
from detr_fast.matcher import Pairs, pairs_of
from detr_fast.ops.assignment import assign
from detr_fast.structures import offsets_of


def assign_many_bucketed(cost_matrices: list[Tensor], sizes: list[int], group_detr: int) -> list[Pairs]:
    """Drop-in for ``rfdetr.models._assignment.assign_many_bucketed``: the assignment of costs that are there already.

    `cost_matrices` are ``[Q, sum(sizes)]`` of each layer, all on one device. Returns for each layer and image a pair of
    CPU int64 tensors ``(queries, targets)``, group after group. Layers of one shape are solved in one call.

    Raises:
        ValueError: `group_detr` does not divide the number of queries.
    """
    layers_of_queries: dict[int, list[int]] = {}
    for layer, cost in enumerate(cost_matrices):
        check_groups(len(cost), group_detr)
        layers_of_queries.setdefault(len(cost), []).append(layer)
    results: list[Pairs] = [[] for _ in cost_matrices]
    for layers in layers_of_queries.values():
        found = _assign([cost_matrices[layer] for layer in layers], sizes, group_detr)
        for layer, pairs in zip(layers, found, strict=True):
            results[layer] = pairs
    return results


def _assign(cost_matrices: list[Tensor], sizes: list[int], groups: int) -> list[Pairs]:  # of one shape
    cost = torch.stack(cost_matrices).mT  # [L, T, Q]
    cost = cost.float() if cost.dtype != torch.float64 else cost
    offsets = offsets_of(sizes)
    found = assign(cost, offsets.to(cost.device), max(sizes, default=0), groups)
    return [pairs_of(row, offsets, groups) for row in found.cpu()]


def check_version() -> None:
    """Raises an ImportError unless the installed rfdetr is one whose places are known."""
    from importlib.metadata import version

    require_version("rfdetr", version("rfdetr"), ("1.11",))


def replacements(mode: Mode) -> Sequence[Replacement]:
    """What ``detr_fast.patch("rfdetr", mode)`` replaces in rfdetr 1.11.

    - ``SetCriterion.forward``: all layers and groups are matched in one call and their losses computed in another,
      without waiting for a device. Left to RF-DETR: subclasses, mask and keypoint losses, varifocal and
      position-supervised losses, padded targets, matchers of other classes or with hooks.
    - ``HungarianMatcher.forward`` and ``_match_many``: costs and assignment of all layers and groups in one call, masks
      among them. Left to RF-DETR: keypoints and padded targets.
    - ``_assignment.assign_many_bucketed`` and ``HungarianMatcher._assign_compact_cost_matrix``: the assignment of what
      is left to it.

    Numbers and differences are those of :class:`HungarianMatcher` and :class:`SetCriterion` here, by `mode`. Other
    devices than the CPU and CUDA are left to RF-DETR. Pairs without a finite cost are logged once a matcher, as there,
    if the matcher is called itself; after a criterion they stand in ``patch(...).report()``.
    """
    from rfdetr.models import _assignment
    from rfdetr.models.criterion import SetCriterion
    from rfdetr.models.matcher import HungarianMatcher

    places = _Places(mode, HungarianMatcher, SetCriterion)
    report = places.report

    def match_many(
        self: Any, outputs_list: list[Any], targets: list[Any], group_detr: int = 1, target_side_safety: object = None
    ) -> list[Pairs] | None:
        return places.match_many(self, outputs_list, targets, group_detr, target_side_safety)

    def match(
        self: Any, outputs: Any, targets: list[Any], group_detr: int = 1, target_side_safety: object = None
    ) -> Pairs:
        return places.match(self, outputs, targets, group_detr, target_side_safety)

    def losses(self: Any, outputs: Any, targets: list[Any], num_boxes: Tensor | float | None = None) -> Any:
        return places.losses(self, outputs, targets, num_boxes)

    def assign_one(cost_matrix: Tensor, sizes: list[int], group_detr: int) -> Pairs:
        return assign_many_bucketed([cost_matrix], sizes, group_detr)[0]

    return (
        Replacement(_assignment, "assign_many_bucketed", assign_many_bucketed),
        Replacement(HungarianMatcher, "_assign_compact_cost_matrix", staticmethod(assign_one)),
        Replacement(HungarianMatcher, "_match_many", match_many, report),
        Replacement(HungarianMatcher, "forward", match, report),
        Replacement(SetCriterion, "forward", losses, report),
    )


class _Places:
    """What the replacements need: RF-DETR's own functions, and what computes for each of its matchers."""

    def __init__(self, mode: Mode, matcher_class: Any, criterion_class: Any) -> None:
        self.mode, self.matcher_class, self.criterion_class = mode, matcher_class, criterion_class
        self.original_match_many = matcher_class._match_many
        self.original_match, self.original_losses = matcher_class.forward, criterion_class.forward
        self.computes: WeakKeyDictionary[Any, core.HungarianMatcher] = WeakKeyDictionary()

    def matcher_for(self, matcher: Any) -> core.HungarianMatcher:
        if matcher not in self.computes:
            self.computes[matcher] = core_matcher(matcher, self.mode)
        return following(self.computes[matcher], matcher)

    def report(self) -> str | None:
        found = [report_of(known) for known in self.computes.values()]
        return "; ".join(str(part) for part in found if part is not None) or None

    def match_many(
        self, matcher: Any, outputs: list[Any], targets: list[Any], groups: int, safety: object
    ) -> list[Pairs] | None:
        one_shape = len({tuple(layer["pred_logits"].shape) for layer in outputs}) == 1
        if len(outputs) < 2 or not one_shape or not all(_is_known(layer, targets) for layer in outputs):
            return self.original_match_many(matcher, outputs, targets, groups, safety)
        with torch.no_grad():
            return self._logged(matcher, pairs_of_layers(matcher, self.matcher_for(matcher), outputs, targets, groups))

    def match(self, matcher: Any, outputs: Any, targets: list[Any], groups: int, safety: object) -> Pairs:
        if not _is_known(outputs, targets):
            return self.original_match(matcher, outputs, targets, groups, safety)
        with torch.no_grad():
            known = self.matcher_for(matcher)
            return self._logged(matcher, pairs_of_layers(matcher, known, [outputs], targets, groups))[0]

    def _logged(self, matcher: Any, pairs: list[Pairs]) -> list[Pairs]:
        if not matcher._warned_non_finite_costs:
            found = report_of(self.computes[matcher])
            if found is not None:
                matcher._warned_non_finite_costs = True
                logging.getLogger(__name__).warning("HungarianMatcher: %s; further ones are not logged", found)
        return pairs

    def losses(
        self, criterion: Any, outputs: Mapping[str, Any], targets: list[Any], num_boxes: Tensor | float | None
    ) -> dict[str, Tensor]:
        matcher = criterion.matcher
        is_own = type(criterion) is self.criterion_class and type(matcher) is self.matcher_class
        has_hooks = is_own and (matcher._forward_pre_hooks or matcher._forward_hooks)
        is_known = is_own and not has_hooks and unsupported(criterion) is None and _is_known(outputs, targets)
        if not is_known or any("masks" in target for target in targets):
            return self.original_losses(criterion, outputs, targets, num_boxes)
        return criterion_losses(criterion, self.matcher_for(matcher).match_groups, outputs, targets, num_boxes)


def _is_known(outputs: Mapping[str, Any], targets: list[Mapping[str, Tensor]]) -> bool:
    """Whether a batch is computed here."""
    on_device = outputs["pred_logits"].device.type in ("cpu", "cuda")
    has_keypoints = "pred_keypoints" in outputs and any("keypoints" in target for target in targets)
    return on_device and bool(targets) and not has_keypoints and not any("valid" in target for target in targets)
