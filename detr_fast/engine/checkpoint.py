"""Checkpoints of a run: plain tensors, numbers, strings, lists and dictionaries, written atomically."""

from __future__ import annotations

import random
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detr_fast.engine.errors import CheckpointError, ForeignCheckpointError
from detr_fast.files import replace_file
from detr_fast.models.checkpoint import read_tensors

FORMAT = 2
LAST, PREVIOUS, BEST = "last.pth", "previous.pth", "best.pth"  # in the folder of a run


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Writes ``state`` (loadable with ``weights_only=True``) atomically.

    Raises:
        CheckpointError: the disk is full, read-only or broken; what was there before is untouched.
    """
    try:
        replace_file(path, lambda file: torch.save({"format": FORMAT, **state}, file))
    except (OSError, RuntimeError) as error:  # PyTorch's writer hides the first behind the second
        kept = "; the one before it is whole" if Path(path).exists() else ""
        raise CheckpointError(f"checkpoint {path} cannot be written: {cause(error)}{kept}") from error


def cause(error: BaseException | None) -> str:
    """The operating system's reason if there is one in the chain of exceptions, else the last line of the first."""
    link = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def keep_previous(folder: Path) -> None:
    """Lets ``previous.pth`` be what ``last.pth`` is now, before that is replaced.

    Raises:
        CheckpointError: it cannot be written; both are untouched.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    if not last.exists():
        return
    link = folder / f".{PREVIOUS}.part"
    try:
        link.unlink(missing_ok=True)
        try:
            link.hardlink_to(last)
        except OSError:  # not every file system has links
            with last.open("rb") as content:
                replace_file(previous, lambda file: shutil.copyfileobj(content, file))
        else:
            link.replace(previous)
    except OSError as error:
        raise CheckpointError(f"checkpoint {previous} cannot be written: {cause(error)}; {last} is whole") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint that :func:`save_checkpoint` wrote, tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, of a newer version or another program's; the message says which.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        _check_sums(path)
        state = read_tensors(path)
    except (ValueError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"checkpoint {path} is damaged or not a checkpoint: {reason}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ForeignCheckpointError(f"checkpoint {path} was not written by detr_fast: it holds no run to continue")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {state['format']}, this version reads up to {FORMAT}: update detr_fast"
        )
    return state


def _check_sums(path: Path) -> None:
    """PyTorch reads tensors without looking at the check sums that it wrote: a flipped bit would be trained on."""
    if not zipfile.is_zipfile(path):
        return  # the format of PyTorch 1.5 and before, which has none
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} has another check sum than when it was written")


def random_state() -> dict[str, Any]:
    """States of all random number generators of this process."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 (libraries draw from it)
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of :func:`random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
