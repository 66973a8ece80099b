"""Finds the images and annotations of a split in the layouts that COCO-format data sets come in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from detr_fast.data.faults import DataFault
from detr_fast.data.remote import AnyPath, Refused, RemotePath, as_path
from detr_fast.data.shards import Shards

ALIASES = {"val": ("valid", "validation"), "valid": ("val",), "validation": ("val",)}
YEARS = ("", "2017", "2014")
INDEX = ".index.json"  # of a split in shards


@dataclass(frozen=True)
class CocoPaths:
    """Where one split lies."""

    images: Path | Shards  # folder that the file names in the annotations are relative to, or what stands for it
    annotations: AnyPath  # JSON file in COCO's detection format


def find_split(
    path: str | AnyPath | None,
    split: str,
    *,
    images: str | Path | None = None,
    annotations: str | Path | None = None,
) -> CocoPaths:
    """Images and annotations of ``split`` under ``path``; the first layout that is there is taken.

    ==========================================  =======================================
    annotations                                 images
    ==========================================  =======================================
    ``annotations/instances_{split}.json``      ``{split}/`` or ``images/{split}/``
    ``annotations/instances_{split}2017.json``  ``{split}2017/`` or ``images/{split}2017/``
    ``annotations/{split}.json``                ``{split}/`` or ``images/{split}/``
    ``{split}/_annotations.coco.json``          ``{split}/``
    ``annotations/instances_{split}.json``      ``{split}.index.json`` and its shards
    ==========================================  =======================================

    ``val`` is also found under the names ``valid`` and ``validation``, 2017 may be 2014. ``images`` and ``annotations``
    name the folder and the file directly; relative paths that do not exist are tried under ``path``. A URL, anything
    that fsspec reaches, holds shards (see ``shard_writer``).

    Raises:
        FileNotFoundError: no layout fits; the message lists what was looked for and what is there.
        DataFault: a URL cannot be reached.
    """
    root = None if path is None else as_path(path)
    if isinstance(root, RemotePath):
        if images is not None or annotations is not None:
            raise ValueError(f"data set: 'images' and 'annotations' go with folders, not with the URL {root}")
        return _find_remote_split(root, split)
    if annotations is not None:
        file = _existing(annotations, root, "annotations")
        folder = file.parent if images is None else _existing(images, root, "images")
        return _checked(folder, file)
    if root is None:
        raise ValueError("find_split: 'path' or 'annotations' must be given, got neither")
    if not root.is_dir():
        raise FileNotFoundError(
            f"data set: {root} must be a folder, {'it is a file' if root.exists() else 'not found'}"
        )
    chosen = None if images is None else _existing(images, root, "images")
    tried: list[CocoPaths] = []
    for candidate in _candidates(root, split):
        found = candidate if chosen is None else CocoPaths(chosen, candidate.annotations)
        if _is_there(found):
            return found
        tried.append(found)
    raise FileNotFoundError(_not_found(root, split, tried))


def find_splits(path: str | AnyPath) -> dict[str, CocoPaths]:
    """Every split under ``path``, named as its files name it: ``train`` first, then validation, test and the rest."""
    root = as_path(path)
    if isinstance(root, RemotePath):
        return _find_remote_splits(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"data set: {root} must be a folder, {'it is a file' if root.exists() else 'not found'}"
        )
    names = {file.parent.name for file in root.glob("*/_annotations.coco.json")}
    names |= {file.name.removesuffix(INDEX) for file in root.glob(f"*{INDEX}")}
    for file in root.glob("annotations/*.json"):
        if match := re.fullmatch(r"instances_(.+)|(train|val|valid|validation|test)", file.stem):
            names.add(match[1] or match[2])
    found: dict[str, CocoPaths] = {}
    for name in sorted(names, key=_rank):
        for candidate in _candidates_of_name(root, name):
            if _is_there(candidate):
                found[name] = candidate
                break
    if not found:
        raise FileNotFoundError(_not_found(root, "train", list(_candidates(root, "train"))))
    return found


def _rank(name: str) -> tuple[int, str]:
    order = ("train", "val", "test")
    return next((i for i, known in enumerate(order) if name.startswith(known)), len(order)), name


def _candidates(root: Path, split: str) -> Iterator[CocoPaths]:
    for name in _names(split):
        yield from _candidates_of_name(root, name)


def _names(split: str) -> list[str]:
    return [name + year for name in (split, *ALIASES.get(split, ())) for year in YEARS]


def _candidates_of_name(root: Path, name: str) -> Iterator[CocoPaths]:
    for file in (f"instances_{name}.json", f"{name}.json"):
        for folder in (root / name, root / "images" / name):
            yield CocoPaths(folder, root / "annotations" / file)
    yield CocoPaths(root / name, root / name / "_annotations.coco.json")
    yield _sharded(root, name)


def _sharded(root: AnyPath, name: str) -> CocoPaths:
    return CocoPaths(Shards(root, name), root / "annotations" / f"instances_{name}.json")


def _is_there(paths: CocoPaths) -> bool:
    images = paths.images.index_file.is_file() if isinstance(paths.images, Shards) else paths.images.is_dir()
    return images and paths.annotations.is_file()


def _find_remote_split(root: RemotePath, split: str) -> CocoPaths:
    names = _names(split)
    for name in _there(root, names):
        return _sharded(root, name)
    raise FileNotFoundError(f"data set: {root} has no shards of split '{split}'; looked for {_indices(names)}")


def _find_remote_splits(root: RemotePath) -> dict[str, CocoPaths]:
    """Servers that list nothing are asked for the usual names."""
    try:
        names = {name.removesuffix(INDEX) for name in root.names() if name.endswith(INDEX)}
    except (FileNotFoundError, DataFault):
        names = set()
    usual = [name for split in ("train", "val", "test") for name in _names(split)]
    names = names or set(_there(root, usual))
    if not names:
        raise FileNotFoundError(f"data set: {root} has no shards; looked for {_indices(usual)}")
    return {name: _sharded(root, name) for name in sorted(names, key=_rank)}


def _there(root: RemotePath, names: Sequence[str]) -> Iterator[str]:
    """Those of the splits that have an index; a refusal counts as none, unless there is no other answer.

    Raises:
        DataFault: the store cannot be reached or has refused, and none was found.
    """
    refusal: Refused | None = None
    found = False
    for name in names:
        try:
            if Shards(root, name).index_file.is_file():
                found = True
                yield name
        except Refused as error:
            refusal = refusal or error
    if refusal is not None and not found:
        raise refusal


def _indices(names: Sequence[str]) -> str:
    return ", ".join(name + INDEX for name in names)


def _existing(given: str | Path, root: Path | None, argument: str) -> Path:
    tries = [Path(given)] if root is None else [Path(given), root / given]
    for path in tries:
        if path.exists():
            return path
    raise FileNotFoundError(f"data set: {argument}={str(given)!r} not found, looked for {', '.join(map(str, tries))}")


def _checked(folder: Path, file: Path) -> CocoPaths:
    if not file.is_file():
        raise FileNotFoundError(f"data set: annotations must be a JSON file, {file} is a folder")
    if not folder.is_dir():
        raise FileNotFoundError(f"data set: images must be a folder, {folder} is a file")
    return CocoPaths(folder, file)


def _not_found(root: Path, split: str, tried: list[CocoPaths]) -> str:
    """Says what is missing: the images of annotations that exist, or annotations altogether."""

    def short(path: AnyPath) -> str:
        return str(path).removeprefix(f"{root}/")

    there = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
    if (root / "annotations").is_dir():
        there += sorted(f"annotations/{entry.name}" for entry in (root / "annotations").iterdir())
    shown = ", ".join(there[:20]) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
    half = [paths for paths in tried if paths.annotations.is_file()]
    if half:
        folders = ", ".join(
            short(paths.images.index_file) if isinstance(paths.images, Shards) else short(paths.images) + "/"
            for paths in half
        )
        wanted = f"has {short(half[0].annotations)} but no folder of its images; looked for {folders}"
    else:
        files = dict.fromkeys(short(paths.annotations) for paths in tried)
        wanted = f"has no annotations of split '{split}'; looked for {', '.join(files)}"
    advice = (
        "Other layouts: give the two paths, as --data.train_images and --data.train_annotations (evaluation_ alike)"
    )
    return f"data set: {root} {wanted}. It contains: {shown or 'nothing'}. {advice}."
