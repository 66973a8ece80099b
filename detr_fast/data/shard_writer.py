"""Writes one split of a COCO-format data set as shards: tar files, their index, and COCO's annotation file.

A data set in shards, in a folder or at any URL that fsspec reaches::

    annotations/instances_{split}.json
    {split}-000000.tar ...    for each image KEY.jpg, its file as it is, and KEY.json, its entry and annotations
    {split}.index.json        where each picture lies; written last

``KEY`` is the image's id. A picture and its JSON file stand together, as WebDataset groups them. The same input gives
the same bytes. A conversion that was interrupted goes on: shards that are complete, with the same names, sizes and
annotations, are kept. What others have written is not touched: a shard of ours ends with a seal.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import tarfile
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from tqdm import tqdm

from detr_fast.data.annotations import read_annotations
from detr_fast.data.faults import DataFault, Fault
from detr_fast.data.images import ImageFile, check_image, sound_content
from detr_fast.data.layouts import CocoPaths
from detr_fast.data.remote import AnyPath, as_path, is_same_place, read_range, size_of
from detr_fast.data.shards import VERSION, ShardIndex, Shards
from detr_fast.files import replace_file

SPLIT_NAME = re.compile(r"[\w-]+")
IMAGES_PER_SHARD = 1000  # about 160 MB of COCO
AHEAD = 32  # pictures that are read and checked at a time
BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)  # of a tar file; nobody reads on
SEAL = b"detr_fast "


@dataclass(frozen=True)
class Written:
    """What a split became."""

    split: str
    images: int
    shards: int
    kept: int  # shards that were complete before
    bytes: int  # of all shards
    faults: tuple[Fault, ...]  # why images and annotations were left out

    def __str__(self) -> str:
        size = f"{self.bytes / 2**20:,.1f} MiB"
        parts = [f"{self.images:,} images in {self.shards:,} shards, {size}"]
        counts = {"shards kept": self.kept, "faults left out": len(self.faults)}
        parts += [f"{count:,} {what}" for what, count in counts.items() if count]
        return f"{self.split}: {', '.join(parts)}"


@dataclass(frozen=True)
class Pair:
    """An image and its annotations on their way into a shard."""

    entry: Mapping[str, Any]  # COCO's
    file: ImageFile
    labels: bytes  # the JSON file
    sizes: tuple[int, int]  # of picture and labels, in bytes

    @classmethod
    def of(cls, entry: Mapping[str, Any], file: ImageFile, annotations: Sequence[Any]) -> Pair:
        labels = json.dumps({"image": entry, "annotations": annotations}).encode()
        return cls(entry, file, labels, (_size(file), len(labels)))

    def headers(self) -> tuple[bytes, bytes]:
        key = f"{self.entry['id']:012d}"
        return _header(key + _suffix(self.entry["file_name"]), self.sizes[0]), _header(f"{key}.json", self.sizes[1])

    @property
    def length(self) -> int:
        """In the shard, in bytes."""
        return sum(BLOCK + size + -size % BLOCK for size in self.sizes)

    def picture(self) -> bytes:
        found = sound_content(self.file, (self.entry["width"], self.entry["height"]), self.entry["file_name"])
        if isinstance(found, Fault):
            raise DataFault(f"{self.file}: {found.detail}")
        if len(found) != self.sizes[0]:
            raise DataFault(f"{self.file}: has changed since the conversion began")
        return found


def write_shards(
    source: CocoPaths,
    destination: str | AnyPath,
    split: str,
    *,
    images_per_shard: int = IMAGES_PER_SHARD,
    on_fault: Literal["raise", "skip"] = "raise",
    progress: bool = False,
) -> Written:
    """Writes the split ``source`` to the folder or URL ``destination`` under the name ``split``.

    ``on_fault="raise"``: a missing picture raises before anything is written, a damaged one when its turn comes; the
    shards before it are complete and kept by the next call. ``on_fault="skip"``: all pictures are decoded first, and
    what cannot be used is left out of shards and annotations and counted.

    Raises:
        DataFault: a picture or an annotation cannot be used, a URL not be reached, or a file is in the way that this
            has not written; the message names it.
        ValueError: an argument is none, or the destination is the source.
    """
    check_arguments(source, destination, split, images_per_shard=images_per_shard, on_fault=on_fault)
    root = as_path(destination)
    shards = Shards(root, split)
    content, pairs, faults = _prepare(source, on_fault)
    names = [f"{split}-{number:06d}.tar" for number in range(-(-len(pairs) // images_per_shard))]
    parts = {name: pairs[i * images_per_shard : (i + 1) * images_per_shard] for i, name in enumerate(names)}
    missing = [name for name, part in parts.items() if not _is_complete(root / name, part)]
    earlier = _own_files(shards, set(names) - set(missing), content)
    if isinstance(root, Path):
        (root / "annotations").mkdir(parents=True, exist_ok=True)
    if missing:
        _remove(shards.index_file)  # it would not fit what is written now
    images = sum(len(parts[name]) for name in missing)
    with tqdm(total=images, desc=f"shard {split}", unit=" images", disable=None if progress else True) as bar:
        for name in missing:
            _write(root / name, functools.partial(_write_shard, pairs=parts[name], advance=bar.update))
    _write(_annotations(shards), lambda file: file.write(content))
    for name in earlier:  # more shards than now, which readers of all shards would take for data, and parts
        if name not in names:
            _remove(root / name)
    _write(shards.index_file, lambda file: file.write(_index(parts)))
    size = sum(_length(part) for part in parts.values())
    return Written(split, len(pairs), len(names), len(names) - len(missing), size, tuple(faults))


def check_arguments(
    source: CocoPaths,
    destination: str | AnyPath,
    split: str,
    *,
    images_per_shard: int = IMAGES_PER_SHARD,
    on_fault: str = "raise",
) -> None:
    """What :func:`write_shards` refuses before it reads anything; of several splits before the first is written.

    Raises:
        ValueError: an argument is none, or the destination is the source.
    """
    shards = Shards(as_path(destination), split)
    if images_per_shard < 1:
        raise ValueError(f"write_shards: images_per_shard must be at least 1, got {images_per_shard}")
    if on_fault not in ("raise", "skip"):
        raise ValueError(f"write_shards: on_fault must be 'raise' or 'skip', got {on_fault!r}")
    if not SPLIT_NAME.fullmatch(split):
        raise ValueError(f"write_shards: split must be letters, digits, '_' and '-', got {split!r}")
    is_source = isinstance(source.images, Shards) and is_same_place(source.images.root, shards.root)
    if is_source or is_same_place(source.annotations, _annotations(shards)):
        raise ValueError(f"write_shards: destination must be another place than the source, got {shards.root}")


def _annotations(shards: Shards) -> AnyPath:
    return shards.root / "annotations" / f"instances_{shards.split}.json"


def _prepare(source: CocoPaths, on_fault: str) -> tuple[bytes, list[Pair], list[Fault]]:
    """The annotation file to write, images in the order of their ids, and what is left out."""
    found = read_annotations(source.annotations)
    faults = found.fatal()
    files = {entry["id"]: source.images / entry["file_name"] for entry in found.dataset["images"]}
    images: dict[int, Mapping[str, Any]] = {entry["id"]: entry for entry in found.dataset["images"]}
    with ThreadPoolExecutor() as pool:
        checked = pool.map(_fault if on_fault == "skip" else _missing, files.values(), images.values())
        damaged = {identity: fault for identity, fault in zip(images, checked, strict=True) if fault is not None}
    faults += damaged.values()
    if faults and on_fault == "raise":
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise DataFault(f"{source.annotations}: {faults[0]}{more}")
    labels: dict[int, list[Any]] = {identity: [] for identity in images if identity not in damaged}
    for annotation in found.dataset["annotations"]:
        if annotation["image_id"] in labels:
            labels[annotation["image_id"]].append(annotation)
    pairs = [Pair.of(images[identity], files[identity], labels[identity]) for identity in sorted(labels)]
    if not faults:
        return source.annotations.read_bytes(), pairs, faults
    kept = [entry for identity, entry in images.items() if identity in labels]
    usable = [entry for entry in found.dataset["annotations"] if entry["image_id"] in labels]
    content = json.dumps({**found.dataset, "images": kept, "annotations": usable})
    return content.encode(), pairs, faults


def _fault(file: ImageFile, entry: Mapping[str, Any]) -> Fault | None:
    return check_image(file, (entry["width"], entry["height"]), entry["file_name"])


def _missing(file: ImageFile, entry: Mapping[str, Any]) -> Fault | None:
    try:
        _size(file)
    except FileNotFoundError:
        return Fault("missing file", entry["file_name"], f"file not found in {file.parent}")
    return None


def _size(file: ImageFile) -> int:
    return file.stat().st_size if isinstance(file, Path) else file.size()


def _write_shard(file: IO[bytes], pairs: Sequence[Pair], advance: Callable[[], Any]) -> None:
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(pairs), AHEAD):
            some = pairs[start : start + AHEAD]
            for pair, picture in zip(some, pool.map(Pair.picture, some), strict=True):
                for header, content in zip(pair.headers(), (picture, pair.labels), strict=True):
                    file.write(header + content + bytes(-len(content) % BLOCK))
                advance()
    file.write(END + _seal(pairs))


def _header(name: str, size: int) -> bytes:
    """Of a tar member; owner, mode and time are the same wherever and whenever it is written."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def _suffix(file_name: str) -> str:
    """Readers of WebDataset take it for the type of the picture, and ``.json`` for its annotations."""
    suffix = PurePosixPath(file_name).suffix
    return suffix if re.fullmatch(r"\.[A-Za-z0-9]+", suffix) and suffix.lower() != ".json" else ".image"


def _length(pairs: Sequence[Pair]) -> int:
    return sum(pair.length for pair in pairs) + len(END) + BLOCK


def _seal(pairs: Sequence[Pair]) -> bytes:
    """The last block of a shard says which names, sizes and annotations are in it, so that one read can tell."""
    digest = hashlib.blake2b(digest_size=32)
    for pair in pairs:
        for part in (*pair.headers(), pair.labels):
            digest.update(part)
    return (SEAL + f"{digest.hexdigest()}\n".encode()).ljust(BLOCK, b"\0")


def _is_complete(shard: AnyPath, pairs: Sequence[Pair]) -> bool:
    length = _length(pairs)
    try:
        return size_of(shard) == length and read_range(shard, length - BLOCK, BLOCK) == _seal(pairs)
    except FileNotFoundError:
        return False


def _index(parts: Mapping[str, Sequence[Pair]]) -> bytes:
    images: dict[str, tuple[int, int, int]] = {}
    for number, pairs in enumerate(parts.values()):
        position = 0
        for pair in pairs:
            images.setdefault(pair.entry["file_name"], (number, position + BLOCK, pair.sizes[0]))
            position += pair.length
    shards = {name: _length(pairs) for name, pairs in parts.items()}
    return json.dumps({"version": VERSION, "shards": shards, "images": images}).encode()


def _write(place: AnyPath, write: Callable[[IO[bytes]], Any]) -> None:
    """A file is complete or not there."""
    if isinstance(place, Path):
        replace_file(place, write)
        return
    with tempfile.TemporaryDirectory() as folder:
        replace_file(Path(folder) / "content", write)
        place.upload(Path(folder) / "content")


def _own_files(
    shards: Shards,
    complete: Collection[str],  # names of shards that are known to be ours
    content: bytes,  # of the annotation file to write
) -> list[str]:
    """Shards of an earlier conversion, and parts of one that was killed.

    Raises:
        DataFault: something else has the name of a file of this split.
    """
    root, split = shards.root, shards.split
    try:
        there = [file.name for file in root.iterdir()] if isinstance(root, Path) else root.names()
    except FileNotFoundError:
        there = []
    index = ShardIndex.read(shards.index_file) if shards.index_file.name in there else None
    known = {*complete, *(() if index is None else index.shards)}
    own = [name for name in there if re.fullmatch(rf"{split}-\d{{6,}}\.tar", name)]
    in_the_way = [root / name for name in own if name not in known and not _is_sealed(root / name)]
    file = _annotations(shards)
    if index is None and not own and file.is_file() and file.read_bytes() != content:
        in_the_way.append(file)
    if in_the_way:
        raise DataFault(
            f"{in_the_way[0]}: is in the way, and detr-fast shard has not written it, or not to its end: remove it, or "
            "choose another place"
        )
    return own + [name for name in there if re.fullmatch(rf"\.{split}-\d{{6,}}\.tar\.\w+\.part", name)]


def _is_sealed(shard: AnyPath) -> bool:
    size = size_of(shard)
    return size is not None and size >= BLOCK and read_range(shard, size - BLOCK, BLOCK).startswith(SEAL)


def _remove(place: AnyPath) -> None:
    if isinstance(place, Path):
        place.unlink(missing_ok=True)
    else:
        place.remove()
