"""Files anywhere that fsspec reaches (s3://, gs://, http://, ...), read and written by a few methods of a path.

No file system is kept here: fsspec makes one for each process, so that workers may be forked at any time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import fsspec.core

from detr_fast.data.faults import DataFault

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PAUSES = (0.5, 2.0)  # seconds before another attempt: a run of days must not end with one lost connection
LASTING = (ImportError, PermissionError, NotImplementedError, ValueError)  # errors that waiting does not cure

Result = TypeVar("Result")


@dataclass(frozen=True)
class RemotePath:
    """A URL with those methods of ``pathlib.Path`` that data sets need.

    Raises:
        FileNotFoundError: what is read is not there.
        DataFault: it cannot be reached; the message names the URL and the reason.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    def is_file(self) -> bool:
        try:
            return self._ask(lambda files, path: files.info(path))["type"] == "file"
        except FileNotFoundError:
            return False

    def size(self) -> int | None:
        """In bytes; None where the server does not say."""
        return self._ask(lambda files, path: files.info(path)).get("size")

    def read_bytes(self) -> bytes:
        return self._ask(lambda files, path: files.cat_file(path))

    def read_text(self, encoding: str) -> str:
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int, size: int) -> bytes:
        return self._ask(lambda files, path: files.cat_file(path, start=start, end=start + size))

    def names(self) -> list[str]:
        """Of the files and folders in this one; stores without folders have none where nothing is."""
        entries = self._ask(lambda files, path: files.ls(path, detail=False))
        return [entry.rstrip("/").rpartition("/")[2] for entry in entries]

    def upload(self, file: Path) -> None:
        """Object stores show a file when it is complete."""

        def put(files: AbstractFileSystem, path: str) -> None:
            if not files.async_impl:  # object stores have no folders, and s3fs would make a bucket of a slip of the pen
                files.makedirs(files._parent(path), exist_ok=True)
            files.put_file(str(file), path)
            files.invalidate_cache(files._parent(path))

        self._ask(put)

    def remove(self) -> None:
        """Does nothing where there is nothing."""
        if self.is_file():
            self._ask(lambda files, path: files.rm_file(path))

    def _ask(self, what: Callable[[AbstractFileSystem, str], Result]) -> Result:
        for pause in (*PAUSES, None):
            try:
                return what(*fsspec.core.url_to_fs(self.url))
            except Exception as error:  # each file system has its own
                cause = error
                if isinstance(error, FileNotFoundError):
                    if not _is_lost_connection(error.__cause__):
                        raise
                    cause = error.__cause__
                if pause is None or isinstance(cause, LASTING):
                    raise DataFault(f"{self.url}: cannot be reached ({_reason(cause)})") from error
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")


def _is_lost_connection(cause: BaseException | None) -> TypeGuard[OSError]:
    """fsspec's http:// says "not found" of a server that does not answer, and why as the cause."""
    return isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


AnyPath = Path | RemotePath


def as_path(path: str | Path | RemotePath) -> AnyPath:
    """A path on this machine or a URL; ``file://`` is a path."""
    if isinstance(path, str) and "://" in path:
        scheme, _, rest = path.partition("://")
        return Path(rest) if scheme in ("file", "local") else RemotePath(path.rstrip("/"))
    return Path(path) if isinstance(path, str) else path


def size_of(file: AnyPath) -> int | None:
    """In bytes; None where a server does not say."""
    return file.stat().st_size if isinstance(file, Path) else file.size()


def read_range(file: AnyPath, start: int, size: int) -> bytes:
    """Fewer bytes than ``size`` where the file ends before."""
    if isinstance(file, RemotePath):
        return file.read_range(start, size)
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(size)
