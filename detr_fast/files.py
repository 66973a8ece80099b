"""Writes files atomically: a file is either complete or not there.

It is written under another name, flushed to the disk and renamed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Replaces a file by ``content``, so that a crash at any time leaves the old or the new file, never a part.

    Raises:
        OSError: the folder is missing, read-only or full; the old file is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    replace_file(path, lambda file: file.write(data))


def replace_file(
    path: str | Path,
    write: Callable[[IO[bytes]], Any],  # is given the open file
) -> None:
    """The same for content that is written piece by piece; an exception of ``write`` leaves the old file."""
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_mask_of_permissions())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def remove_parts(folder: Path) -> None:
    """Removes what processes that were killed while they wrote have left; nothing else may be writing there."""
    for file in folder.glob(".*.????????.part"):  # the eight characters of mkstemp
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of writing to an open file do not say which; this adds it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


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
