"""DETR with native matching, set loss and attention for PyTorch.

Submodules and the names below are imported on first use, so that ``detr_fast.numpy`` works without importing PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detr_fast.criterion import SetCriterion
    from detr_fast.engine.predict import Detector
    from detr_fast.integrations.patching import patch
    from detr_fast.matcher import HungarianMatcher
    from detr_fast.models import build_model
    from detr_fast.structures import Images, Predictions, StaticTargets, Targets, Tokens

__all__ = [
    "Detector",
    "HungarianMatcher",
    "Images",
    "Predictions",
    "SetCriterion",
    "StaticTargets",
    "Targets",
    "Tokens",
    "build_model",
    "patch",
]

_MODULE_OF_NAME = {
    "Detector": "detr_fast.engine.predict",
    "HungarianMatcher": "detr_fast.matcher",
    "Images": "detr_fast.structures",
    "Predictions": "detr_fast.structures",
    "SetCriterion": "detr_fast.criterion",
    "StaticTargets": "detr_fast.structures",
    "Targets": "detr_fast.structures",
    "Tokens": "detr_fast.structures",
    "build_model": "detr_fast.models",
    "patch": "detr_fast.integrations.patching",
}

_SUBMODULES = (
    "boxes",
    "captured",
    "criterion",
    "data",
    "diagnostics",
    "engine",
    "integrations",
    "layers",
    "losses",
    "matcher",
    "models",
    "numpy",
    "ops",
    "structures",
)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"detr_fast.{name}")
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module 'detr_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF_NAME, *_SUBMODULES])
