"""RF-DETR (package rfdetr 1.11): drop-in matcher and criterion, and what ``detr_fast.patch("rfdetr")`` replaces.

By hand, the criterion of a model is replaced by ours::

    from detr_fast.integrations.rfdetr import HungarianMatcher, SetCriterion

With a patch, RF-DETR's own classes compute with this package, whatever built them; see :func:`replacements`.
"""

from __future__ import annotations

from detr_fast.integrations.rfdetr.criterion import SetCriterion
from detr_fast.integrations.rfdetr.matcher import HungarianMatcher
from detr_fast.integrations.rfdetr.patches import assign_many_bucketed, check_version, replacements

__all__ = ["HungarianMatcher", "SetCriterion", "assign_many_bucketed", "check_version", "replacements"]
