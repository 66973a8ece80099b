"""Moments of an optimizer that every process keeps a part of: saved and read by torch.distributed.checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from detr_fast.engine.errors import CheckpointError
from detr_fast.engine.optimizer import laid_out_like

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


def save_shards(optimizer: ZeroRedundancyOptimizer, model: nn.Module, folder: Path) -> None:
    """Writes this process's part into ``folder``; all processes call."""
    state = {
        f"{moment}.{name}": optimizer.optim.state[parameter][moment]
        for name, parameter in _own(optimizer, model)
        for moment in MOMENTS
        if parameter in optimizer.optim.state
    }
    distributed_checkpoint.save(state, checkpoint_id=folder)


def load_shards(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Reads the part of this process, whatever the number of processes that wrote; all of it if not sharded.

    Raises:
        CheckpointError: the folder is missing, damaged or of another model.
    """
    local: torch.optim.Optimizer = getattr(optimizer, "optim", optimizer)
    try:
        known = distributed_checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
        state: dict[str, Tensor] = {}
        for name, parameter in _own(optimizer, model):
            if f"step.{name}" in known:
                state[f"step.{name}"] = torch.zeros((), device=parameter.device)
                state |= {f"{moment}.{name}": torch.zeros_like(parameter) for moment in MOMENTS[1:]}
        distributed_checkpoint.load(state, checkpoint_id=folder)
    except Exception as error:  # whatever reading a damaged folder raises, in this process or, gathered, in another
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"optimizer state {folder} cannot be read: {reason}") from error
    for name, parameter in _own(optimizer, model):
        if f"step.{name}" in state:
            local.state[parameter] = {moment: state[f"{moment}.{name}"] for moment in MOMENTS}


def check_shards(folder: Path) -> None:
    """Looks whether all files are there at their full lengths, without reading them.

    Raises:
        CheckpointError: something is missing.
    """
    try:
        pieces = distributed_checkpoint.FileSystemReader(folder).read_metadata().storage_data or {}
        ends: dict[str, int] = {}
        for piece in pieces.values():
            ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
        short = [name for name, end in ends.items() if (folder / name).stat().st_size < end]
    except Exception as error:  # whatever reading damaged metadata raises
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"optimizer state {folder} cannot be read: {reason}") from error
    if short:
        raise CheckpointError(f"optimizer state {folder} cannot be read: {short[0]} is cut off")


def part_of_whole(optimizer: ZeroRedundancyOptimizer, state: Mapping[str, Any]) -> None:
    """Takes this process's part of the state dict of an optimizer that was not sharded."""
    numbers = (number for group in state["param_groups"] for number in group["params"])
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    number_of = {id(parameter): number for parameter, number in zip(parameters, numbers, strict=True)}
    for group in optimizer.optim.param_groups:
        for parameter in group["params"]:
            moments = state["state"].get(number_of[id(parameter)])
            if moments is not None:
                optimizer.optim.state[parameter] = {name: laid_out_like(parameter, moments[name]) for name in MOMENTS}


def _own(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    local: torch.optim.Optimizer = getattr(optimizer, "optim", optimizer)
    own = {id(parameter) for group in local.param_groups for parameter in group["params"]}
    return ((name, parameter) for name, parameter in model.named_parameters() if id(parameter) in own)
