"""Images inside tar files (shards): an index says where each picture lies, and reading one is one read of its bytes.

The tar files are those of WebDataset, so that its library reads them too; nothing here needs it. They are written by
``shard_writer``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from detr_fast.data.faults import DataFault
from detr_fast.data.remote import AnyPath, read_range, size_of

VERSION = 1  # of the index


@dataclass(frozen=True)
class ShardIndex:
    """What ``{split}.index.json`` says.

    ``{"version": 1, "shards": {name: bytes}, "images": {file name: [number of the shard, offset, bytes]}}``
    """

    shards: tuple[str, ...]
    sizes: tuple[int, ...]  # of the shards, in bytes
    # Arrays, which all workers share: a look-up in a dictionary counts references to its strings and so copies their
    # pages, 3.8 MB a worker for COCO.
    names: np.ndarray  # [images] bytes, sorted: the file names
    places: np.ndarray  # [images, 3] int64: shard, offset and size of the picture

    @classmethod
    def read(cls, file: AnyPath) -> ShardIndex:
        """
        Raises:
            DataFault: the file is missing, damaged or of a newer version.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if (version := int(content["version"])) > VERSION:
                raise DataFault(f"{file}: has version {version}, this program reads up to {VERSION}: update detr_fast")
            shards, images = content["shards"], content["images"]
            places = np.array(list(images.values()), dtype=np.int64).reshape(-1, 3)
            if len(places) != len(images) or (places < 0).any() or (places[:, 0] >= len(shards)).any():
                raise ValueError("a place of an image is none")
            sizes = tuple(int(size) for size in shards.values())
            names = np.array([_encoded(name) for name in images], dtype=np.bytes_)
            order = np.argsort(names)
            return cls(tuple(shards), sizes, names[order], places[order])
        except FileNotFoundError:
            raise DataFault(f"{file}: file not found") from None
        except DataFault:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataFault(f"{file}: is no index of shards ({type(error).__name__}: {error})") from error

    @property
    def file_names(self) -> Iterator[str]:
        return (name.decode("utf-8", "surrogatepass") for name in self.names.tolist())

    def place(self, file_name: str) -> tuple[str, int, int] | None:
        """Shard, offset and size of a picture; None of one that is not there."""
        wanted = _encoded(file_name)
        if len(wanted) > self.names.itemsize:
            return None
        row = int(self.names.searchsorted(wanted))
        if row == len(self.names) or self.names[row] != wanted:
            return None
        shard, offset, size = self.places[row].tolist()
        return self.shards[shard], offset, size


def _encoded(name: str) -> bytes:
    """Names that are not UTF-8 on the disk have surrogates."""
    return name.encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Shards:
    """The images of one split, in the place of a folder: ``shards / file_name`` is an image file."""

    root: AnyPath
    split: str

    def __str__(self) -> str:
        return f"{self.root}/{self.split}-*.tar"

    def __truediv__(self, file_name: str) -> ShardedImage:
        return ShardedImage(self, file_name)

    @property
    def index_file(self) -> AnyPath:
        return self.root / f"{self.split}.index.json"

    @cached_property
    def index(self) -> ShardIndex:
        """Read when it is first needed, then kept, also by copies in other processes."""
        return ShardIndex.read(self.index_file)

    @property
    def file_names(self) -> Iterable[str]:
        return self.index.file_names

    def check(
        self,
        file_names: Iterable[str],  # that the annotations list
        annotations: object,  # what to call their file
    ) -> None:
        """Finds without reading any image what would stop a run later.

        Raises:
            DataFault: an image is not in the index, or a shard is missing or has another size than when it was written.
        """
        known = set(self.index.file_names)
        if absent := [name for name in file_names if name not in known]:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise DataFault(
                f"{self.index_file}: does not fit {annotations}: has no image '{absent[0]}'{more}; "
                "run detr-fast shard again"
            )

        def check_size(name: str, wanted: int) -> None:
            if (fault := _fault_of_shard(self.root / name, wanted)) is not None:
                raise DataFault(f"{self.root / name}: {fault}")

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(check_size, self.index.shards, self.index.sizes))


@dataclass(frozen=True)
class ShardedImage:
    """One picture in a shard; what a path is to a file of its own."""

    shards: Shards
    file_name: str

    def __str__(self) -> str:
        return f"{self.file_name} in {self.parent}"

    @property
    def parent(self) -> AnyPath:
        """The shard; the index where that does not know the image."""
        place = self._place()
        return self.shards.index_file if place is None else place[0]

    def size(self) -> int:
        """In bytes."""
        return self._known_place()[2]

    def read_bytes(self) -> bytes:
        """
        Raises:
            FileNotFoundError: the index does not know the image.
            OSError: the shard is missing or truncated.
            DataFault: the shard cannot be reached.
        """
        shard, offset, size = self._known_place()
        try:
            content = read_range(shard, offset, size)
        except FileNotFoundError:
            raise OSError("the shard is missing") from None
        except DataFault:  # some servers refuse what lies beyond the end
            if (fault := _fault_of_shard(shard, offset + size, at_least=True)) is None:
                raise
            raise OSError(fault) from None
        if len(content) > size:
            raise OSError(f"the server sent {len(content)} bytes instead of the {size} asked for: it must serve ranges")
        if len(content) < size:
            raise OSError(_fault_of_shard(shard, offset + size, at_least=True) or "the shard was not read to the end")
        return content

    def _known_place(self) -> tuple[AnyPath, int, int]:
        if (place := self._place()) is None:
            raise FileNotFoundError(f"{self.shards.index_file} has no image '{self.file_name}'")
        return place

    def _place(self) -> tuple[AnyPath, int, int] | None:
        """Shard, offset and size."""
        place = self.shards.index.place(self.file_name)
        return None if place is None else (self.shards.root / place[0], *place[1:])


def _fault_of_shard(shard: AnyPath, wanted: int, at_least: bool = False) -> str | None:
    """What is wrong with its size; servers that do not tell a size are believed."""
    try:
        size = size_of(shard)
    except FileNotFoundError:
        return "the shard is missing"
    if size is None or size == wanted or (at_least and size > wanted):
        return None
    if size < wanted:
        return f"the shard is truncated: {size} bytes of {'at least ' * at_least}{wanted}"
    return f"the shard has {size} bytes, its index says {wanted}: run detr-fast shard again"
