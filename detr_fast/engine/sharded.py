"""Moments of an optimizer that every process keeps a part of: saved and read by torch.distributed.checkpoint."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.optim import ZeroRedundancyOptimizer

from detr_fast.engine.checkpoint import cause
from detr_fast.engine.distributed import Processes
from detr_fast.engine.errors import CheckpointError
from detr_fast.engine.optimizer import laid_out_like

Item = TypeVar("Item")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


def save_shards(
    optimizer: ZeroRedundancyOptimizer, model: nn.Module, folder: Path, processes: Processes
) -> dict[str, int]:
    """Writes this process's part into ``folder``; returns the check sums of all files. All processes call.

    Raises:
        CheckpointError: it cannot be written, on any process; nothing is left in ``folder`` then.
    """
    state = {
        f"{moment}.{name}": optimizer.optim.state[parameter][moment]
        for name, parameter in _own(optimizer, model)
        for moment in MOMENTS
        if parameter in optimizer.optim.state
    }
    failure: CheckpointError | None = None
    sums: dict[str, int] = {}
    try:
        distributed_checkpoint.save(state, checkpoint_id=folder)
    except CheckpointException as error:  # no Exception; gathered, so that every process has it
        failure = CheckpointError(f"optimizer state {folder} cannot be written: {_reason(error)}")
    else:
        try:
            sums = {file.name: _sum_of(file) for file in _share(sorted(folder.iterdir()), processes)}
        except OSError as error:
            failure = CheckpointError(f"optimizer state {folder} cannot be read: {_reason(error)}")
    found = processes.gather((sums, failure))
    failures = [failure for _, failure in found if failure is not None]
    if failures:
        if processes.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        raise failures[0]
    return {name: value for sums, _ in found for name, value in sums.items()}


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
    except (Exception, CheckpointException) as error:  # whatever a damaged folder raises; the latter is no Exception
        raise CheckpointError(f"optimizer state {folder} cannot be read: {_reason(error)}") from error
    for name, parameter in _own(optimizer, model):
        if f"step.{name}" in state:
            local.state[parameter] = {moment: state[f"{moment}.{name}"] for moment in MOMENTS}


def check_shards(folder: Path, sums: Mapping[str, int], processes: Processes) -> None:
    """Looks whether the files are as they were written, each process at its part of them.

    ``sums`` are what :func:`save_shards` returned; of a checkpoint without them only the lengths are looked at.

    Raises:
        CheckpointError: something is missing or damaged in this process's part.
    """
    try:
        for name in _share(sorted(sums), processes):
            if _sum_of(folder / name) != sums[name]:
                raise CheckpointError(
                    f"optimizer state {folder} cannot be read: {name} has another check sum than when it was written"
                )
        if not sums:
            _check_lengths(folder)
    except OSError as error:
        missing = Path(error.filename or folder).name
        raise CheckpointError(f"optimizer state {folder} cannot be read: {missing}: {_reason(error)}") from error


def _check_lengths(folder: Path) -> None:
    try:
        pieces = distributed_checkpoint.FileSystemReader(folder).read_metadata().storage_data or {}
        ends: dict[str, int] = {}
        for piece in pieces.values():
            ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
        short = [name for name, end in ends.items() if (folder / name).stat().st_size < end]
    except Exception as error:  # whatever reading damaged metadata raises
        raise CheckpointError(f"optimizer state {folder} cannot be read: {_reason(error)}") from error
    if short:
        raise CheckpointError(f"optimizer state {folder} cannot be read: {short[0]} is cut off")


def _share(items: Sequence[Item], processes: Processes) -> Sequence[Item]:
    """What this process reads, so that each file is read once."""
    return items[processes.rank :: processes.count]


def _sum_of(file: Path) -> int:
    """CRC-32, as in the zip files that the other checkpoints are."""
    found = 0
    with file.open("rb") as opened:
        while piece := opened.read(1 << 20):
            found = zlib.crc32(piece, found)
    return found


def _reason(error: BaseException) -> str:
    """One line; of what was gathered from several processes the first."""
    if isinstance(error, CheckpointException):
        error = next((failure for failure, _ in error.failures.values()), error)
    return cause(error)[:300]


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
