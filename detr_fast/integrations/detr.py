"""HungarianMatcher and SetCriterion of facebookresearch/detr, ``models/matcher.py`` and ``models/detr.py``.

    from detr_fast.integrations.detr import SetCriterion, build_matcher

:class:`detr_fast.HungarianMatcher` and :class:`detr_fast.SetCriterion` are drop-ins already; here they say how they
deal with input that has no finite cost.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from torch import nn

from detr_fast import criterion, matcher
from detr_fast.integrations.mode import Mode, check_mode, check_same_mode


class HungarianMatcher(matcher.HungarianMatcher):
    """Matcher of facebookresearch/detr; see :class:`detr_fast.HungarianMatcher`.

    Args:
        mode: what a pair without a finite cost leads to: NaN or infinite predictions, boxes of negative size, or two
            boxes without area, whose GIoU is 0 / 0. "stable": it is not matched, the rest is matched at least cost, and
            ``report()`` tells. "compat": an error, as of the published assertions and SciPy, for which it waits for the
            device; also for a single infinite cost, which SciPy accepts. Numbers are the same in both.
    """

    def __init__(
        self, cost_class: float = 1, cost_bbox: float = 1, cost_giou: float = 1, *, mode: Mode = "stable"
    ) -> None:
        check_mode("HungarianMatcher", mode)
        super().__init__(cost_class, cost_bbox, cost_giou, invalid="raise" if mode == "compat" else "skip")
        self.mode = mode


class SetCriterion(criterion.SetCriterion):
    """Criterion of facebookresearch/detr, with its entries and state dict; see :class:`detr_fast.SetCriterion`.

    Args:
        mode: that of the matcher, whose docstring says what differs; the losses have the published numbers in both.

    Raises:
        ValueError: `mode` is not that of a matcher that has one.
    """

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        eos_coef: float,
        losses: Sequence[str],
        *,
        mode: Mode = "stable",
    ) -> None:
        check_mode("SetCriterion", mode)
        check_same_mode("SetCriterion", mode, matcher)
        super().__init__(num_classes, matcher, weight_dict, eos_coef, losses, kind="softmax")
        self.mode = mode


def build_matcher(args: Namespace, *, mode: Mode = "stable") -> HungarianMatcher:
    """The matcher of the published command line: ``set_cost_class``, ``set_cost_bbox`` and ``set_cost_giou``."""
    return HungarianMatcher(args.set_cost_class, args.set_cost_bbox, args.set_cost_giou, mode=mode)
