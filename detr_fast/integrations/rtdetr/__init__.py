"""Matchers and criteria of RT-DETR and RT-DETRv2 (lyuwenyu/RT-DETR): all decoder layers in one matching and one loss.

With names and signatures of that repository, where the two versions share none but ``HungarianMatcher``.
"""

from detr_fast.integrations.rtdetr.criterion import RTDETRCriterionv2, SetCriterion
from detr_fast.integrations.rtdetr.matcher import HungarianMatcher, HungarianMatcherv2

__all__ = ["HungarianMatcher", "HungarianMatcherv2", "RTDETRCriterionv2", "SetCriterion"]
