"""A generated data set in COCO's format: coloured circles, rectangles and triangles on a noisy ground.

Small enough to learn in minutes on a CPU, so that everything runs without a download. Objects overlap; masks and boxes
are those of the visible part, taken from the drawn pixels.
"""

from __future__ import annotations

import colorsys
import functools
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

NAMES = ("circle", "rectangle", "triangle")  # category ids 1, 2, 3
EXTENT = (0.16, 0.46)  # diameter of an object, as a share of the image's side: 20 to 59 pixels of 128
MIN_VISIBLE = 0.6  # share of an object that later ones may not go below
SHADOW = 6  # width of its soft edge in pixels
ATTEMPTS = 8  # to place an object, before it is given up
DRAWING = 1  # number of this way of drawing: another number, other pictures

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Picture:
    """A picture and what is on it, in drawing order."""

    pixels: NDArray[np.uint8]  # [size, size, 3]
    labels: tuple[int, ...]  # category ids
    masks: tuple[Bools, ...]  # [size, size] each, the visible part


def write_shapes(
    folder: str | Path,
    counts: Mapping[str, int] | None = None,
    image_size: int = 128,
    seed: int = 0,
    max_objects: int = 6,
    extent: tuple[float, float] = EXTENT,
) -> Path:
    """Writes ``{split}/*.jpg`` and ``annotations/instances_{split}.json`` for every split in ``counts``.

    ``counts`` is the number of images of each split, by default 2,000 for ``train`` and 200 for ``val``; ``extent`` are
    the smallest and largest diameter of an object, as shares of the image's side. A picture depends on these, the seed,
    its split and its number only. The folder appears complete or not at all; if it already holds this data set, nothing
    is done.

    Raises:
        FileExistsError: the folder holds something else.
    """
    counts = {"train": 2000, "val": 200} if counts is None else dict(counts)
    if image_size < 32 or max_objects < 0 or not counts or min(counts.values()) < 1:
        raise ValueError(
            "write_shapes: image_size must be at least 32, max_objects at least 0 and every count at least 1, "
            f"got image_size={image_size}, max_objects={max_objects}, counts={counts}"
        )
    folder = Path(folder)
    arguments = {
        "counts": counts,
        "image_size": image_size,
        "seed": seed,
        "max_objects": max_objects,
        "extent": list(extent),
    }
    if _is_written(folder, arguments):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    partial.chmod(0o755)
    try:
        for number, split in enumerate(counts):
            _write_split(partial, split, arguments, number)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            if not _is_written(folder, arguments):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def draw(
    generator: np.random.Generator,
    size: int = 128,
    max_objects: int = 6,
    extent: tuple[float, float] = EXTENT,
) -> Picture:
    """One picture with 0 to ``max_objects`` objects, of a diameter between ``extent`` times its side."""
    canvas = _ground(generator, size)
    labels: list[int] = []
    masks: list[Bools] = []
    full: list[int] = []  # pixels of each object as if nothing hid it
    for _ in range(int(generator.integers(0, max_objects + 1))):
        for _ in range(ATTEMPTS):
            label = int(generator.integers(1, len(NAMES) + 1))
            distance = _distance(label, generator, size, extent)
            inside = distance <= 0
            left = [mask & ~inside for mask in masks]
            if all(mask.sum() >= MIN_VISIBLE * count for mask, count in zip(left, full, strict=True)):
                _paint(canvas, distance, generator)
                masks = [*left, inside]
                labels.append(label)
                full.append(int(inside.sum()))
                break
    canvas += 4 * generator.standard_normal(canvas.shape, np.float32)
    return Picture(canvas.clip(0, 255).astype(np.uint8), tuple(labels), tuple(masks))


def _ground(generator: np.random.Generator, size: int) -> Floats:  # [size, size, 3], 0 to 255
    """A soft pattern between two muted colours."""
    first, second = (_colour(generator, saturation=(0.1, 0.35), value=(0.35, 0.85)) for _ in range(2))
    cells = generator.integers(0, 256, (6, 6), dtype=np.uint8)
    pattern = np.asarray(Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)) / 255
    return first + (second - first) * pattern[..., None].astype(np.float32)


def _distance(
    label: int, generator: np.random.Generator, size: int, extent: tuple[float, float]
) -> Floats:  # [size, size]
    """Signed distance in pixels from the outline of a new object, negative inside."""
    radius = generator.uniform(*extent) * size / 2
    x, y = generator.uniform(radius, size - radius, 2)
    turn = generator.uniform(0, 2 * np.pi)
    centres = np.arange(size, dtype=np.float32) + 0.5  # of pixels
    columns, rows = (centres - x)[None].astype(np.float32), (centres - y)[:, None].astype(np.float32)
    if label == 1:
        return np.hypot(columns, rows) - radius
    if label == 2:
        diagonal = generator.uniform(0.45, 1.1)  # angle of the diagonal, so the sides' ratio
        corners = turn + np.array([diagonal, np.pi - diagonal, np.pi + diagonal, -diagonal])
    else:
        corners = turn + np.array([0, 2 / 3, 4 / 3]) * np.pi + generator.uniform(-0.25, 0.25, 3)
    following = np.roll(corners, -1)
    normal = (corners + following) / 2 + np.pi * (following < corners)
    apothem = radius * np.cos((corners - normal + np.pi) % (2 * np.pi) - np.pi)
    sides = (
        np.cos(a) * columns + (np.sin(a) * rows - d) for a, d in zip(normal.tolist(), apothem.tolist(), strict=True)
    )
    return functools.reduce(np.maximum, sides)


def _paint(canvas: Floats, distance: Floats, generator: np.random.Generator) -> None:
    """Draws an object with a soft shadow, shaded from one side, with a darker rim and smooth edges."""
    size = len(distance)
    turn = generator.uniform(0, 2 * np.pi)
    colour = _colour(generator, saturation=(0.6, 1.0), value=(0.65, 1.0))
    near = distance < SHADOW + 2
    rows, columns = (slice(*(np.flatnonzero(near.any(axis))[[0, -1]] + (0, 1))) for axis in (1, 0))
    canvas, distance = canvas[rows, columns], distance[rows, columns]
    shadow = np.roll(distance, (2, 2), (0, 1))
    canvas *= 1 - 0.3 * (0.5 - shadow / SHADOW).clip(0, 1)[..., None]
    across = np.linspace(-1, 1, size, dtype=np.float32)
    light = 1 + 0.25 * (np.cos(turn) * across[None, columns] + np.sin(turn) * across[rows, None])
    light *= 1 - 0.3 * (distance + 2.5).clip(0, 1)
    cover = (0.5 - distance).clip(0, 1)[..., None]
    canvas += (colour * light[..., None] - canvas) * cover


def _colour(
    generator: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]
) -> Floats:  # [3], 0 to 255
    hue = generator.uniform()
    return (
        np.array(colorsys.hsv_to_rgb(hue, generator.uniform(*saturation), generator.uniform(*value)), np.float32) * 255
    )


def _write_split(folder: Path, split: str, arguments: Mapping[str, Any], number: int) -> None:
    size = arguments["image_size"]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / split).mkdir()
    for index in range(arguments["counts"][split]):
        generator = np.random.default_rng([DRAWING, arguments["seed"], number, index])
        picture = draw(generator, size, arguments["max_objects"], arguments["extent"])
        file = f"{index:06d}.jpg"
        Image.fromarray(picture.pixels).save(folder / split / file, quality=92, subsampling=0)
        images.append({"id": index + 1, "file_name": file, "width": size, "height": size})
        for label, mask in zip(picture.labels, picture.masks, strict=True):
            entry = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": label, "iscrowd": 0}
            annotations.append({**entry, **_geometry(mask)})
    content = {
        "info": _info(arguments),
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES, start=1)],
    }
    (folder / "annotations").mkdir(exist_ok=True)
    _file_of(folder, split).write_text(json.dumps(content))


def _geometry(mask: Bools) -> dict[str, Any]:
    """Box (x, y, width, height), area and run-length code of a mask."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    x, y = int(columns[0]), int(rows[0])
    code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(mask.sum()),
        "segmentation": {"size": list(mask.shape), "counts": code["counts"].decode("ascii")},
    }


def _file_of(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"instances_{split}.json"


def _info(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": "shapes, generated by detr_fast", "drawing": DRAWING, **arguments}


def _is_written(folder: Path, arguments: Mapping[str, Any]) -> bool:
    """True if the folder holds exactly this data set; an error if it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    for split in arguments["counts"]:
        file = _file_of(folder, split)
        if not file.is_file() or json.loads(file.read_text()).get("info") != _info(arguments):
            raise FileExistsError(f"write_shapes: {folder} exists and holds something else than this data set")
    return True
