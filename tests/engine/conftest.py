"""A generated data set of a few small images, and settings of the smallest model on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_fast.data.shapes import write_shapes
from detr_fast.engine.config import Config
from detr_fast.engine.train import train

SMALLEST = {
    "model.name": "detr_tiny",
    "model.num_queries": 8,
    "model.hidden_dim": 32,
    "model.nheads": 2,
    "model.enc_layers": 1,
    "model.dec_layers": 2,
    "model.dim_feedforward": 32,
    "model.dropout": 0.1,
    "data.scales": (48, 64),
    "data.evaluation_size": 64,
    "data.workers": 0,
    "train.log_steps": 2,
    "train.tensorboard": False,
    "train.device": "cpu",
    "train.epochs": 2,
    "evaluate.batch_size": 5,
}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 training and 5 validation images of 64 pixels."""
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", {"train": 8, "val": 5}, 64, seed=1)


def smallest(data: Path, output: Path, overrides: Mapping[str, Any]) -> Config:
    own = {"data.path": str(data), "train.output": str(output)}
    return Config().with_overrides({**SMALLEST, **own, **overrides})


@pytest.fixture
def settings(shapes: Path, tmp_path: Path) -> Callable[..., Config]:
    """``settings("run", {"train.epochs": 1})``: the smallest model, written to ``tmp_path / "run"``."""
    return lambda name, overrides={}: smallest(shapes, tmp_path / name, overrides)


@pytest.fixture(scope="session")
def straight(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two epochs; no test changes it."""
    torch.set_num_threads(1)
    return train(smallest(shapes, tmp_path_factory.mktemp("runs") / "straight", {}))


@pytest.fixture
def arguments(shapes: Path) -> list[str]:
    """The same settings as words of a command line."""

    def text(value: object) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return [str(shapes), *(f"--{key}={text(value)}" for key, value in SMALLEST.items())]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums of a step must not depend on how many threads a machine has."""
    torch.set_num_threads(1)
