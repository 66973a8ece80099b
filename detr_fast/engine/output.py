"""Places that a command writes to, tried before the work whose result goes there."""

from __future__ import annotations

import tempfile
from pathlib import Path

from detr_fast.engine.errors import ConfigError


def make_folder(name: str, folder: Path) -> None:
    """Makes the folder that the setting or argument ``name`` gives, or takes the one that is there.

    Raises:
        ConfigError: it cannot be made, or nothing be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror
        raise ConfigError(f"{name}: cannot write to {folder} ({reason}); choose another folder") from error


def check_file(name: str, file: Path | None) -> None:
    """Whether ``file``, which the argument ``name`` gives, can be written, where it is given.

    Raises:
        ConfigError: its folder does not exist or cannot be written to, or the file is a folder.
    """
    if file is None:
        return
    if not file.parent.is_dir():
        raise ConfigError(f"{name} must be in a folder that exists, got {file}")
    if file.is_dir():
        raise ConfigError(f"{name} must be a file, {file} is a folder")
    make_folder(name, file.parent)
