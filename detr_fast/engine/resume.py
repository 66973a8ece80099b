"""Which checkpoint a run continues from, with which settings, in which folder."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from detr_fast.engine.checkpoint import LAST, PREVIOUS, load_checkpoint
from detr_fast.engine.config import Config
from detr_fast.engine.distributed import Processes
from detr_fast.engine.errors import CheckpointError, ConfigError
from detr_fast.engine.sharded import check_shards


def find_checkpoint(path: str | Path) -> Path:
    """``last.pth`` of a run's folder, or the file itself; ``latest`` is that of the newest folder in ``runs``.

    Where there is no ``last.pth`` but a ``previous.pth``, that one.
    """
    if path == "latest":
        files = [file for name in (LAST, PREVIOUS) for file in Path("runs").glob(f"*/{name}")]
        if not files:
            raise CheckpointError(f"no run to continue: there is no runs/*/{LAST} here; give its folder")
        path = max(files, key=lambda file: file.stat().st_mtime).parent
    path = Path(path)
    there = [path / name for name in (LAST, PREVIOUS) if (path / name).exists()]
    found = (there or [path / LAST])[0] if path.is_dir() else path
    if not found.is_file():
        raise CheckpointError(f"checkpoint {found} does not exist")
    return found


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def load_whole(path: Path, processes: Processes | None = None) -> dict[str, Any]:
    """What a checkpoint holds, after a look at the optimizer's shards that it refers to.

    With ``processes`` all of them call, and each looks at its part of the shards.

    Raises:
        CheckpointError: it or they cannot be used, on any process.
    """
    processes = processes or Processes()
    state: dict[str, Any] = {}
    failure: CheckpointError | None = None
    try:
        state = load_checkpoint(path)
        optimizer = state.get("optimizer", {})
        if "shards" in optimizer:
            check_shards(path.parent / optimizer["shards"], optimizer.get("sums", {}), processes)
    except CheckpointError as error:
        failure = error
    failures = [found for found in processes.gather(failure) if found is not None]
    if failures:
        raise failures[0]
    return state


def newest_whole(folder: Path) -> tuple[Path | None, str | None]:
    """The newest checkpoint of a run that can be read, and why it is not ``last.pth``; for runs nobody watches.

    Raises:
        CheckpointError: there are checkpoints, but none that can be read.
    """
    failure: CheckpointError | None = None
    for path in (folder / LAST, folder / PREVIOUS):
        if path.exists():
            try:
                load_whole(path)
                return path, None if failure is None else str(failure)
            except CheckpointError as error:
                failure = failure or error
    if failure is not None:
        raise failure
    return None, None


def load_to_continue(path: Path, processes: Processes | None = None) -> dict[str, Any]:
    """What a checkpoint holds; with ``processes`` all of them call.

    Raises:
        CheckpointError: it cannot be used; if the one before it can, the message offers that.
    """
    try:
        return load_whole(path, processes)
    except CheckpointError as error:
        previous = path.with_name(PREVIOUS)
        if path.name != LAST or not previous.exists():
            raise
        try:
            place = load_whole(previous, processes)["place"]
        except CheckpointError:
            raise error from None
        raise CheckpointError(
            f"{error}; the one before it is whole, at step {place['step']}: --resume {previous}"
        ) from error


def settings_of_run(checkpoint: Path) -> Config:
    """The settings a checkpoint was trained with, as ``config.json`` beside it says them, or itself."""
    file = checkpoint.parent / "config.json"
    return Config.load(file) if file.exists() else Config.from_dict(load_checkpoint(checkpoint)["config"])


def choose_folder(config: Config, checkpoint: Path | None) -> Path:
    """The folder of the run; a new run does not overwrite an old one."""
    if checkpoint is not None:
        folder = Path(config.train.output or checkpoint.parent).absolute()
        if folder.resolve() != checkpoint.parent.resolve() and _holds_run(folder):
            raise ConfigError(
                f"train.output: {folder} holds another run than {checkpoint}, which is to be continued; "
                "choose another folder, or none to continue where it is"
            )
        return folder
    if not config.train.output:
        return Path("runs", f"{config.model.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}").absolute()
    folder = Path(config.train.output).absolute()
    if _holds_run(folder):
        raise ConfigError(
            f"train.output: {folder} holds a run already; continue it with --resume {folder} or choose another"
        )
    return folder
