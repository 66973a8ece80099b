"""AdamW in the two groups of the DETR paper, and the learning rate as a pure function of step and epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from detr_fast.engine.config import OptimizerConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over ``model.parameter_groups``; every group has a ``name`` and its own rate as ``initial_lr``."""
    groups = model.parameter_groups(config.learning_rate, config.backbone_learning_rate)  # type: ignore[operator]
    of_backbone = {id(parameter) for name, parameter in model.named_parameters() if "backbone" in name}
    for group in groups:
        group["initial_lr"] = group["lr"]
        group["name"] = "backbone" if id(group["params"][0]) in of_backbone else "transformer"
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def learning_rate_factor(config: ScheduleConfig, step: int, epoch: int) -> float:
    """Factor of both groups' rates: ``drop_factor`` once per ``drop_epoch`` epochs, after a linear warm-up.

    A function of its arguments alone, so that a run continued with other settings follows them.
    """
    factor = config.drop_factor ** (epoch // config.drop_epoch) if config.drop_epoch else 1.0
    if step < config.warmup_steps:
        factor *= (step + 1) / config.warmup_steps
    return factor


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores moments and step counts; rates and decay stay those of the settings."""
    kept = [{k: group[k] for k in ("initial_lr", "weight_decay")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)
