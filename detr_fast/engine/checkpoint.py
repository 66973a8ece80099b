"""Checkpoints of a run: plain tensors, numbers, strings, lists and dictionaries, written atomically.

A file is either complete or not there: it is written under another name, flushed to the disk and renamed.
"""

from __future__ import annotations

import argparse
import os
import pickle
import random
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detr_fast.engine.errors import CheckpointError, ForeignCheckpointError

FORMAT = 1


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Replaces a file by ``content``, so that a crash at any time leaves the old or the new file, never a part.

    Raises:
        OSError: the folder is missing, read-only or full; the old file is untouched.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    _replace(path, lambda file: file.write(data))


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Writes ``state`` (loadable with ``weights_only=True``) atomically."""
    _replace(Path(path), lambda file: torch.save({"format": FORMAT, **state}, file))


def _replace(path: Path, write: Callable[[Any], Any]) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_mask_of_permissions())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _mask_of_permissions() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_folder(folder: Path) -> None:
    """Makes the renaming itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint that :func:`save_checkpoint` wrote, tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, of a newer version or another program's; the message says which.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        # Published checkpoints hold the arguments of their training script; they must be told from damaged files.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"checkpoint {path} is damaged or not a checkpoint: {reason}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ForeignCheckpointError(f"checkpoint {path} was not written by detr_fast: it holds no run to continue")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {state['format']}, this version reads up to {FORMAT}: update detr_fast"
        )
    return state


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
