"""The settings and the models as ``detr-fast train --help`` prints them."""

from __future__ import annotations

import inspect
import typing
from typing import Any

from detr_fast.engine.config import Config, ModelConfig, settings
from detr_fast.engine.values import as_text, name_of_type


def describe_settings() -> str:
    """The table of all settings."""
    lines, section = [], ""
    for key, (kind, default, meaning) in settings().items():
        if not key.startswith(section + ".") or not section:
            section = key.split(".")[0]
            section_type = typing.get_type_hints(Config)[section]
            lines.append(f"\n{section}: {inspect.getdoc(section_type)}")
        lines.append(_line(key, default, f"{meaning} ({name_of_type(kind)})"))
    return "\n".join(lines).strip()


def describe_models() -> str:
    """Names of all models, and the options of the default one with its defaults."""
    from detr_fast.models import MODELS, options_of_model

    name = ModelConfig().name
    defaults = {key: parameter.default for key, parameter in inspect.signature(MODELS[name]).parameters.items()}
    lines = [f"models: {', '.join(MODELS)}", "", f"options of a model, with the defaults of {name}:"]
    lines += [_line(f"model.{key}", defaults[key], name_of_type(kind)) for key, kind in options_of_model(name).items()]
    return "\n".join(lines)


def _line(key: str, default: Any, meaning: str) -> str:
    left = f"  --{key}={as_text(default)}"
    pad = "  " if len(left) < 44 else "\n" + " " * 46
    return f"{left:<44}{pad}{meaning}"
