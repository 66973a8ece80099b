"""Training from shards is training from the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch

from detr_fast.data.layouts import find_split
from detr_fast.data.shard_writer import write_shards
from detr_fast.engine.checkpoint import load_checkpoint
from detr_fast.engine.config import Config
from detr_fast.engine.train import train


@pytest.mark.parametrize(("place", "workers"), [pytest.param("folder", 2, marks=pytest.mark.slow), ("memory", 0)])
def test_weights_are_the_same_to_the_last_bit(
    shapes: Path, tmp_path: Path, settings: Callable[..., Config], place: str, workers: int
) -> None:
    root = "memory://shapes" if place == "memory" else str(tmp_path / "shards")
    for split in ("train", "val"):
        write_shards(find_split(shapes, split), root, split, images_per_shard=3)
    options = {"train.epochs": 1, "data.workers": workers}
    runs = [
        train(settings(name, {**options, "data.path": path}))
        for name, path in (("plain", str(shapes)), ("sharded", root))
    ]
    plain, sharded = (load_checkpoint(run / "last.pth")["model"] for run in runs)
    assert plain.keys() == sharded.keys()
    assert all(torch.equal(plain[name], sharded[name]) for name in plain)
    assert (runs[0] / "evaluation.json").read_text() == (runs[1] / "evaluation.json").read_text()
    fsspec.filesystem("memory").store.clear()
