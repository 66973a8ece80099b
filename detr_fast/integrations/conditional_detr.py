"""HungarianMatcher and SetCriterion of Conditional DETR, ``models/matcher.py`` and ``models/conditional_detr.py``.

from detr_fast.integrations.conditional_detr import SetCriterion, build_matcher
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from detr_fast.integrations import deformable_detr
from detr_fast.integrations.deformable_detr import HungarianMatcher, build_matcher
from detr_fast.integrations.mode import Mode

__all__ = ["HungarianMatcher", "SetCriterion", "build_matcher"]


class SetCriterion(deformable_detr.SetCriterion):
    """Criterion of Conditional DETR: :class:`detr_fast.integrations.deformable_detr.SetCriterion`, other order.

    ``focal_alpha`` comes before ``losses``. Its models have no encoder proposals; `mode` is as there.
    """

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        focal_alpha: float,
        losses: Sequence[str],
        *,
        mode: Mode = "stable",
    ) -> None:
        super().__init__(num_classes, matcher, weight_dict, losses, focal_alpha, mode=mode)
