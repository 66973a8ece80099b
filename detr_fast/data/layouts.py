"""Finds the images and annotations of a split in the folder layouts that COCO-format data sets come in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ALIASES = {"val": ("valid", "validation"), "valid": ("val",), "validation": ("val",)}
YEARS = ("", "2017", "2014")


@dataclass(frozen=True)
class CocoPaths:
    """Where one split lies."""

    images: Path  # folder that the file names in the annotations are relative to
    annotations: Path  # JSON file in COCO's detection format


def find_split(
    path: str | Path | None,
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
    ==========================================  =======================================

    ``val`` is also found under the names ``valid`` and ``validation``, 2017 may be 2014. ``images`` and ``annotations``
    name the folder and the file directly; relative paths that do not exist are tried under ``path``.

    Raises:
        FileNotFoundError: no layout fits; the message lists what was looked for and what is there.
    """
    if annotations is not None:
        file = _existing(annotations, path, "annotations")
        folder = file.parent if images is None else _existing(images, path, "images")
        return _checked(CocoPaths(folder, file))
    if path is None:
        raise ValueError("find_split: 'path' or 'annotations' must be given, got neither")
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(
            f"data set: {root} must be a folder, {'it is a file' if root.exists() else 'not found'}"
        )
    chosen = None if images is None else _existing(images, path, "images")
    tried: list[CocoPaths] = []
    for candidate in _candidates(root, split):
        found = candidate if chosen is None else CocoPaths(chosen, candidate.annotations)
        if found.annotations.is_file() and found.images.is_dir():
            return found
        tried.append(found)
    raise FileNotFoundError(_not_found(root, split, tried))


def find_splits(path: str | Path) -> dict[str, CocoPaths]:
    """Every split under ``path``, named as its files name it: ``train`` first, then validation, test and the rest."""
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(
            f"data set: {root} must be a folder, {'it is a file' if root.exists() else 'not found'}"
        )
    names = {file.parent.name for file in root.glob("*/_annotations.coco.json")}
    for file in root.glob("annotations/*.json"):
        if match := re.fullmatch(r"instances_(.+)|(train|val|valid|validation|test)", file.stem):
            names.add(match[1] or match[2])
    found: dict[str, CocoPaths] = {}
    for name in sorted(names, key=_rank):
        for candidate in _candidates_of_name(root, name):
            if candidate.annotations.is_file() and candidate.images.is_dir():
                found[name] = candidate
                break
    if not found:
        raise FileNotFoundError(_not_found(root, "train", list(_candidates(root, "train"))))
    return found


def _rank(name: str) -> tuple[int, str]:
    order = ("train", "val", "test")
    return next((i for i, known in enumerate(order) if name.startswith(known)), len(order)), name


def _candidates(root: Path, split: str) -> Iterator[CocoPaths]:
    for name in (split, *ALIASES.get(split, ())):
        for year in YEARS:
            yield from _candidates_of_name(root, name + year)


def _candidates_of_name(root: Path, name: str) -> Iterator[CocoPaths]:
    for file in (f"instances_{name}.json", f"{name}.json"):
        for folder in (root / name, root / "images" / name):
            yield CocoPaths(folder, root / "annotations" / file)
    yield CocoPaths(root / name, root / name / "_annotations.coco.json")


def _existing(given: str | Path, root: str | Path | None, argument: str) -> Path:
    tries = [Path(given)] if root is None else [Path(given), Path(root) / given]
    for path in tries:
        if path.exists():
            return path
    raise FileNotFoundError(f"data set: {argument}={str(given)!r} not found, looked for {', '.join(map(str, tries))}")


def _checked(paths: CocoPaths) -> CocoPaths:
    if not paths.annotations.is_file():
        raise FileNotFoundError(f"data set: annotations must be a JSON file, {paths.annotations} is a folder")
    if not paths.images.is_dir():
        raise FileNotFoundError(f"data set: images must be a folder, {paths.images} is a file")
    return paths


def _not_found(root: Path, split: str, tried: list[CocoPaths]) -> str:
    """Says what is missing: the images of annotations that exist, or annotations altogether."""
    there = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
    if (root / "annotations").is_dir():
        there += sorted(f"annotations/{entry.name}" for entry in (root / "annotations").iterdir())
    shown = ", ".join(there[:20]) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
    half = [paths for paths in tried if paths.annotations.is_file()]
    if half:
        folders = ", ".join(str(paths.images.relative_to(root)) + "/" for paths in half)
        wanted = f"has {half[0].annotations.relative_to(root)} but no folder of its images; looked for {folders}"
    else:
        files = dict.fromkeys(str(paths.annotations.relative_to(root)) for paths in tried)
        wanted = f"has no annotations of split '{split}'; looked for {', '.join(files)}"
    return f"data set: {root} {wanted}. It contains: {shown or 'nothing'}. Other layouts: give the two paths directly."
