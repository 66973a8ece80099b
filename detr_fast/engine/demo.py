"""The demonstration: a small DETR learns to find generated shapes, in minutes on a CPU."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from detr_fast.data.shapes import DESCRIPTION, write_shapes
from detr_fast.engine.config import Config
from detr_fast.engine.errors import ConfigError, Interrupted
from detr_fast.engine.log import duration
from detr_fast.engine.output import make_folder
from detr_fast.engine.report import write_report
from detr_fast.engine.train import train

COUNTS = {"train": 2000, "val": 200}
IMAGE_SIZE = 96
MAX_OBJECTS = 3
EXTENT = (0.3, 0.6)  # diameters of the objects, shares of the side: mostly over 32 pixels, two cells of the features
ENOUGH = 0.5  # AP50 that says the model has learned

SETTINGS = {
    "model.name": "detr_tiny",
    "model.num_queries": 2 * MAX_OBJECTS,  # every query is matched, and so learns, often
    "data.scales": (IMAGE_SIZE,),
    "data.crop": False,
    "data.evaluation_size": IMAGE_SIZE,
    "data.workers": 1,
    "optimizer.learning_rate": 1e-3,
    "optimizer.backbone_learning_rate": 1e-3,
    "schedule.warmup_steps": 50,
    "schedule.drop_epoch": 10,
    "schedule.drop_factor": 0.2,
    "train.epochs": 14,
    "train.batch_size": 16,
    "train.log_steps": 25,
    "train.seed": 1,
    "train.tensorboard": False,
    "train.precision": "float32",
    "evaluate.batch_size": 50,
}


def _shapes(folder: Path) -> Path:
    """The generated data set; one of an earlier version is replaced."""
    try:
        return write_shapes(folder, COUNTS, IMAGE_SIZE, max_objects=MAX_OBJECTS, extent=EXTENT)
    except (FileExistsError, ValueError):  # ValueError: half of it is damaged
        shutil.rmtree(folder)
        return write_shapes(folder, COUNTS, IMAGE_SIZE, max_objects=MAX_OBJECTS, extent=EXTENT)


def _check_ours(output: Path) -> None:
    """Only what an earlier demonstration wrote may be replaced."""
    shapes, run = output / "shapes", output / "run"
    info = _read(shapes / "annotations" / "instances_train.json").get("info")
    is_ours = {
        shapes: isinstance(info, dict) and info.get("description") == DESCRIPTION,
        run: _read(run / "config.json").get("data", {}).get("path") == str(shapes),
    }
    if any(output.iterdir()) and not shapes.exists():
        raise ConfigError(f"--output: {output} holds something else; choose another folder")
    for folder, ours in is_ours.items():
        if folder.exists() and not ours and not (folder.is_dir() and not any(folder.iterdir())):
            raise ConfigError(f"--output: {folder} is not of an earlier demonstration; choose another folder")


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def demo(output: Path, overrides: Iterable[tuple[str, Any]] = ()) -> int:
    """Trains, evaluates and writes ``report.html``; returns 0 if AP50 on held-out shapes is at least 0.5, else 1.

    ``output`` may hold an earlier demonstration, which is replaced, but nothing else.
    """
    started = time.monotonic()
    output = output.absolute()
    run = output / "run"
    make_folder("--output", output)
    _check_ours(output)
    if run.exists():
        shutil.rmtree(run)
    data = _shapes(output / "shapes")
    print(f"shapes     written in {duration(time.monotonic() - started)}")
    config = Config().with_overrides(
        [*SETTINGS.items(), ("data.path", str(data)), ("train.output", str(run)), *overrides]
    )
    # Steps this small gain nothing from a second thread beside the worker (130 images/s either way on two cores), and
    # with one the result does not depend on the number of cores.
    torch.set_num_threads(1)
    try:
        train(config)
    except Interrupted as stop:
        print("detr-fast: demo interrupted", file=sys.stderr)
        return 128 + stop.signal_number
    report = write_report(run, output / "report.html", title="DETR learns shapes")
    numbers = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["numbers"]
    verdict = "learned" if numbers["AP50"] >= ENOUGH else f"NOT learned, {ENOUGH} expected"
    print(
        f"demo       {duration(time.monotonic() - started)}, AP50 {numbers['AP50']:.3f} ({verdict}), report: {report}"
    )
    return 0 if numbers["AP50"] >= ENOUGH else 1
