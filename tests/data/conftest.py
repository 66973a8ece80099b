"""Small data sets in COCO's format, written to order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from detr_fast.data import remote
from detr_fast.data.layouts import CocoPaths

WriteSplit = Callable[..., CocoPaths]
CATEGORIES = ({"id": 3, "name": "cat"}, {"id": 7, "name": "dog"})


def write(
    root: Path,
    annotations: Sequence[Any] = (),
    sizes: Sequence[tuple[int, int]] = ((40, 30), (50, 60)),  # (width, height) of images 1, 2, ...
    categories: Sequence[Any] = CATEGORIES,
    split: str = "train",
    more_images: Sequence[Any] = (),
) -> CocoPaths:
    folder = root / split
    folder.mkdir(parents=True)
    images = []
    for index, (width, height) in enumerate(sizes, start=1):
        ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype(np.uint8)
        Image.fromarray(ramp).save(folder / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": width, "height": height})
    content = {"images": [*images, *more_images], "annotations": list(annotations), "categories": list(categories)}
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return CocoPaths(folder, file)


@pytest.fixture
def write_split(tmp_path: Path) -> WriteSplit:
    def at(*args: Any, **options: Any) -> CocoPaths:
        return write(tmp_path / "set", *args, **options)

    return at


def annotation(identity: int, image: int, bbox: Sequence[float], category: int = 3, **more: Any) -> dict[str, Any]:
    return {"id": identity, "image_id": image, "category_id": category, "bbox": list(bbox), **more}


@pytest.fixture
def entry() -> Callable[..., dict[str, Any]]:
    """An annotation: ``entry(id, image_id, bbox, category=3, **more)``."""
    return annotation


@pytest.fixture
def source(write_split: Any, entry: Any) -> CocoPaths:
    """Five images; the fourth has no objects, the last a crowd."""
    boxes = [entry(i + 1, image, [1, 2, 9, 8], 3 + 4 * (i % 2)) for i, image in enumerate([1, 1, 2, 3, 5])]
    sizes = [(40, 30), (50, 60), (20, 20), (64, 48), (31, 17)]
    return write_split([*boxes, entry(9, 5, [0, 0, 30, 16], iscrowd=1)], sizes)


@pytest.fixture
def memory() -> Iterator[str]:
    """A place of fsspec that is no folder."""
    yield "memory://bucket/set"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
