"""Which image files a command line means, and names for what is made of them."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def find_pictures(given: Sequence[str]) -> list[Path]:
    """Image files from files, folders (not their subfolders) and patterns, each once and in a fixed order."""
    files: list[Path] = []
    for word in given:
        path = Path(word)
        if path.is_dir():
            matches = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(map(Path, glob.glob(word, recursive=True)))  # noqa: PTH207 (absolute patterns)
        if not matches:
            raise FileNotFoundError(f"no image found: {word}")
        files += matches
    return list(dict.fromkeys(files))


def distinct_names(files: Sequence[Path]) -> dict[Path, str]:
    """A name for each drawn picture; files of the same name in different folders get a number."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for file in files:
        name, number = f"{file.stem}.png", 1
        while name in taken:
            number += 1
            name = f"{file.stem}-{number}.png"
        taken.add(name)
        names[file] = name
    return names
