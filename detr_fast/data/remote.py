"""Files anywhere that fsspec reaches (s3://, gs://, http://, ...), read and written by a few methods of a path.

No file system is kept here: fsspec makes one for each process, so that workers may be forked at any time.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import fsspec.core

from detr_fast.data.faults import DataFault

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PAUSES = (0.5, 2.0)  # seconds before another attempt: a run of days must not end with one lost connection
LASTING = (ImportError, NotImplementedError, ValueError)  # errors that waiting does not cure
REFUSALS, ABSENCES = (401, 403), (404, 410)  # HTTP's

Result = TypeVar("Result")


class Refused(DataFault):
    """The store does not say what is there. To those who may not list them, many refuse also what is not there."""


@dataclass(frozen=True)
class RemotePath:
    """A URL with those methods of ``pathlib.Path`` that data sets need.

    Raises:
        FileNotFoundError: what is read is not there.
        Refused: it is there or not, and the store tells neither.
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

    def is_at(self, other: RemotePath) -> bool:
        """Whether both are the same place, however they are spelled."""
        return self._place() == other._place()

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

    def _place(self) -> tuple[object, ...]:
        """Of stores with one host each, that is an option."""
        return self._ask(lambda files, path: (type(files), files.storage_options.get("host"), posixpath.normpath(path)))

    def _ask(self, what: Callable[[AbstractFileSystem, str], Result]) -> Result:
        for pause in (*PAUSES, None):
            try:
                return what(*fsspec.core.url_to_fs(self.url))
            except Exception as error:  # each file system has its own
                if _is_absence(error):
                    raise
                cause = error
                if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
                    cause = error.__cause__
                message = f"{self.url}: cannot be reached ({_reason(cause)})"
                if isinstance(cause, PermissionError) or _status(cause) in REFUSALS:
                    raise Refused(message) from error
                if pause is None or isinstance(cause, LASTING):
                    raise DataFault(message) from error
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")


def _is_absence(error: Exception) -> bool:
    """fsspec's http:// says "not found" of whatever fails, and what it was as the cause."""
    if not isinstance(error, FileNotFoundError):
        return False
    cause = error.__cause__
    return cause is None or isinstance(cause, (FileNotFoundError, LookupError)) or _status(cause) in ABSENCES


def _status(error: BaseException) -> int | None:
    """HTTP's status, where an error of aiohttp, Azure, Google, requests or botocore keeps it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = (getattr(place, name, None) for place in (error, response) for name in ("status", "status_code", "code"))
    return next((status for status in found if isinstance(status, int)), None)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


AnyPath = Path | RemotePath


def as_path(path: str | Path | RemotePath) -> AnyPath:
    """A path on this machine or a URL; ``file://`` is a path."""
    if isinstance(path, str) and "://" in path:
        scheme, _, rest = path.partition("://")
        return Path(rest) if scheme in ("file", "local") else RemotePath(path.rstrip("/"))
    return Path(path) if isinstance(path, str) else path


def is_same_place(one: AnyPath, other: AnyPath) -> bool:
    """However they are spelled; links are followed."""
    if isinstance(one, RemotePath) or isinstance(other, RemotePath):
        return isinstance(one, RemotePath) and isinstance(other, RemotePath) and one.is_at(other)
    return one.samefile(other) if one.exists() and other.exists() else one.resolve() == other.resolve()


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
