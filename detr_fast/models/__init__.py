"""Models by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any, get_type_hints

from torch import nn

from detr_fast.models import detr, panoptic

MODELS: dict[str, Callable[..., nn.Module]] = {
    "detr_resnet50": detr.detr_resnet50,
    "detr_resnet50_dc5": detr.detr_resnet50_dc5,
    "detr_resnet101": detr.detr_resnet101,
    "detr_resnet101_dc5": detr.detr_resnet101_dc5,
    "detr_resnet50_panoptic": panoptic.detr_resnet50_panoptic,
    "detr_resnet50_dc5_panoptic": panoptic.detr_resnet50_dc5_panoptic,
    "detr_resnet101_panoptic": panoptic.detr_resnet101_panoptic,
    "detr_small": detr.detr_small,
    "detr_small_panoptic": panoptic.detr_small_panoptic,
    "detr_tiny": detr.detr_tiny,
}


def build_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A model with random weights; ``options`` are the keyword arguments of its builder.

    Raises:
        ValueError: the name is unknown.
        TypeError: the builder has no such option.
    """
    if name not in MODELS:
        near = get_close_matches(name, MODELS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}{hint}")
    return MODELS[name](num_classes, **options)


def options_of_model(name: str) -> dict[str, Any]:
    """Names and types of the keyword arguments of a model's builder."""
    builder = MODELS[name]
    function = builder.func if isinstance(builder, partial) else builder
    types = get_type_hints(function)
    options = {}
    for parameter in inspect.signature(builder).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            options[parameter.name] = types[parameter.name]
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:  # options that are passed on to `detr`
            options |= options_of_model("detr_resnet50")
    return options
