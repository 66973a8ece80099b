"""mmdetection 3: the Hungarian assigner of its DETR heads, and the same for a whole batch and all layers at once.

With mmdetection installed, importing this module registers :class:`HungarianAssigner` in its ``TASK_UTILS`` in place of
its own, so that one line of a config is all there is to do::

    custom_imports = dict(imports=["detr_fast.integrations.mmdetection"])

mmdetection need not be installed: any objects with ``scores``, ``bboxes`` and ``labels`` serve as its ``InstanceData``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from detr_fast.integrations.mmdetection.assigner import AssignResult, HungarianAssigner
from detr_fast.integrations.mmdetection.costs import BBoxL1Cost, ClassificationCost, FocalLossCost, IoUCost

__all__ = ["AssignResult", "BBoxL1Cost", "ClassificationCost", "FocalLossCost", "HungarianAssigner", "IoUCost"]


def _register() -> None:
    """In place of mmdetection's assigner, which has to be there first: it would not replace ours."""
    if find_spec("mmdet") is None:
        return
    try:
        import_module("mmdet.models.task_modules.assigners")
        registry = import_module("mmdet.registry")
    except ImportError:  # without mmcv, for example
        return
    registry.TASK_UTILS.register_module(name="HungarianAssigner", module=HungarianAssigner, force=True)


_register()
