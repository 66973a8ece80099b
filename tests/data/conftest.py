"""A small data set in COCO's format, written to order."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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
