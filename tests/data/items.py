"""All items of a data set and all files of a folder, to be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from detr_fast.data.coco import CocoDetection
from detr_fast.data.layouts import CocoPaths
from detr_fast.data.transforms import train_transform


def items(paths: CocoPaths, workers: int = 0) -> list[Any]:
    data = CocoDetection(paths, train_transform((32, 48), 64), seed=3)
    return list(DataLoader(data, batch_size=None, num_workers=workers))


def assert_same_items(one: list[Any], two: list[Any]) -> None:
    assert len(one) == len(two) > 0
    for (pixels, target), (others, other) in zip(one, two, strict=True):
        assert torch.equal(pixels, others)
        assert target.keys() == other.keys()
        assert all(torch.equal(target[name], other[name]) for name in target)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
