"""Matcher and criteria of D-FINE, DEIM and DEIMv2: all decoder layers in one matching, and their losses together.

With names and signatures of Peterande/D-FINE and Intellindust-AI-Lab/DEIM.
"""

from detr_fast.integrations.dfine.criterion import DEIMCriterion, DFINECriterion
from detr_fast.integrations.dfine.matcher import HungarianMatcher

__all__ = ["DEIMCriterion", "DFINECriterion", "HungarianMatcher"]
