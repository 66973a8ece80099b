"""AdamW in the two groups of the DETR paper, and the learning rate as a pure function of step and epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from detr_fast.engine.config import OptimizerConfig, ScheduleConfig


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    images: int = 1,  # of one step, on all processes
    *,
    capturable: bool = False,  # by a CUDA graph, which needs rates that lie on the device
    sharded: bool = False,  # moments of a part of the parameters on each process
) -> torch.optim.Optimizer:
    """Fused AdamW over ``model.parameter_groups``; every group has a ``name`` and its own rate as ``initial_lr``.

    With ``config.reference_batch`` rates are scaled by ``images`` over it. Source of the rule: Goyal et al., "Accurate,
    large minibatch SGD", 2017, section 2.1.
    """
    groups = model.parameter_groups(config.learning_rate, config.backbone_learning_rate)  # type: ignore[operator]
    of_backbone = {id(parameter) for name, parameter in model.named_parameters() if "backbone" in name}
    scale = images / config.reference_batch if config.reference_batch else 1.0
    for group in groups:
        parameter = group["params"][0]
        group["initial_lr"] = group["lr"] * scale
        group["lr"] = torch.tensor(group["initial_lr"], device=parameter.device) if capturable else group["initial_lr"]
        group["name"] = "backbone" if id(parameter) in of_backbone else "transformer"
    options: dict[str, Any] = {"weight_decay": config.weight_decay, "fused": True, "capturable": capturable}
    if sharded:
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=config.learning_rate, **options)
    return torch.optim.AdamW(groups, lr=config.learning_rate, **options)


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
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores moments and step counts; rates, decay and how it computes stay those of the settings."""
    kept = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)
    for parameter, moments in optimizer.state.items():
        optimizer.state[parameter] = {name: laid_out_like(parameter, value) for name, value in moments.items()}


def laid_out_like(parameter: Tensor, moment: Tensor) -> Tensor:
    """A copy on the parameter's device and in its order in memory, which the fused kernel takes for granted."""
    if moment.dim() == 0:  # the step count
        return moment.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=moment.dtype, requires_grad=False).copy_(moment)
