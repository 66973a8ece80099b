"""Matchers and criteria of detrex and of its projects DINO and Group DETR.

In a project's configuration, put this module in place of the published one::

    from detr_fast.integrations.detrex import DINOCriterion, HungarianMatcher

    model.criterion = L(DINOCriterion)(num_classes=80, matcher=L(HungarianMatcher)(cost_class=2.0, ...), ...)
"""

from detr_fast.integrations.detrex.criterion import DINOCriterion, GroupSetCriterion, SetCriterion, TwoStageCriterion
from detr_fast.integrations.detrex.matcher import (
    CrossEntropyCost,
    FocalLossCost,
    GIoUCost,
    GroupHungarianMatcher,
    HungarianMatcher,
    L1Cost,
    ModifedMatcher,
)

__all__ = [
    "CrossEntropyCost",
    "DINOCriterion",
    "FocalLossCost",
    "GIoUCost",
    "GroupHungarianMatcher",
    "GroupSetCriterion",
    "HungarianMatcher",
    "L1Cost",
    "ModifedMatcher",
    "SetCriterion",
    "TwoStageCriterion",
]
