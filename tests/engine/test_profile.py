"""The table of a profile, from a trace written by hand and from one of a CPU run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detr_fast.engine import profile
from detr_fast.engine.checkpoint import load_checkpoint
from detr_fast.engine.config import Config
from detr_fast.engine.profile import parts_of, table
from detr_fast.engine.resume import settings_of_run
from detr_fast.engine.train import train


def event(name: str, kind: str, start: float, duration: float, correlation: int | None = None) -> dict[str, Any]:
    arguments = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "name": name, "cat": kind, "ts": start, "dur": duration, "args": arguments}


def test_launches_and_waits_belong_to_the_part_in_whose_time_they_lie() -> None:
    parts = parts_of(
        [
            event("forward", "user_annotation", 0, 100),
            event("backbone", "user_annotation", 10, 50),
            event("backward", "user_annotation", 100, 80),
            event("cudaLaunchKernel", "cuda_runtime", 20, 1, 1),
            event("cudaLaunchKernel", "cuda_runtime", 70, 1, 2),
            event("cudaStreamSynchronize", "cuda_runtime", 75, 5),
            event("cudaLaunchKernel", "cuda_runtime", 120, 1, 3),
            event("cudaLaunchKernel", "cuda_runtime", 500, 1, 4),  # outside of all parts
            event("aten::conv2d", "cpu_op", 15, 20),
            event("conv", "kernel", 300, 1000, 1),
            event("gemm", "kernel", 1300, 100, 2),
            event("gemm", "kernel", 1400, 10, 3),
            event("gemm", "kernel", 1400, 7, 4),
            {"ph": "i", "name": "forward", "ts": 0},
        ]
    )
    forward, backbone, backward = parts["forward"], parts["backbone"], parts["backward"]
    assert (forward.host_us, forward.device_us, forward.launches, forward.synchronisations) == (100, 1100, 2, 1)
    assert (backbone.host_us, backbone.device_us, backbone.launches, backbone.operators) == (50, 1000, 1, 1)
    assert (backward.device_us, backward.launches, backward.synchronisations) == (10, 1, 0)
    lines = table(parts, steps=2).splitlines()
    assert lines[2].split() == ["forward", "0.05", "0.55", "1.0", "0.5", "0.5"]
    assert lines[3].startswith("  backbone")


def test_a_profiled_run_writes_a_trace_and_a_table(settings: Callable[..., Config]) -> None:
    config = settings("run", {"train.profile_steps": 2, "train.epochs": 2, "evaluate.every": 0})
    folder: Path = train(config) / "profile"
    rows = {line.split()[0]: line.split()[1:] for line in (folder / "table.txt").read_text().splitlines()}
    assert set(rows) == {"part", "data", "forward", "backbone", "transformer", "loss", "backward", "optimizer"}
    assert all(float(rows[name][-1]) > 0 for name in ("backbone", "transformer", "loss", "backward", "optimizer"))
    assert float(rows["backbone"][0]) + float(rows["transformer"][0]) < float(rows["forward"][0])
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]


def test_a_profile_is_of_this_start_only(settings: Callable[..., Config]) -> None:
    folder = train(settings("run", {"train.profile_steps": 2, "train.epochs": 2, "evaluate.every": 0}))
    assert settings_of_run(folder / "last.pth").train.profile_steps == 0
    assert load_checkpoint(folder / "last.pth")["config"]["train"]["profile_steps"] == 0
    shutil.rmtree(folder / "profile")
    (folder / "config.json").unlink()
    train(settings_of_run(folder / "last.pth").with_overrides({"train.epochs": 4}), resume=folder)
    assert not (folder / "profile").exists()


@pytest.mark.parametrize(("steps", "epochs"), [(4, 2), (40, 2)])
def test_a_run_that_ends_early_is_divided_by_the_steps_that_were_recorded(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, steps: int, epochs: int
) -> None:
    """Eight steps, of which five pass before anything is recorded."""
    divided_by = []
    monkeypatch.setattr(profile, "table", lambda parts, count: divided_by.append(count) or "")
    train(settings("run", {"train.profile_steps": steps, "train.epochs": epochs, "evaluate.every": 0}))
    assert divided_by == [3]


@pytest.mark.parametrize(("batch_size", "epochs", "steps"), [(4, 1, 2), (8, 5, 5)])
def test_a_run_that_ends_before_the_profile_begins_says_so(
    settings: Callable[..., Config], capsys: pytest.CaptureFixture[str], batch_size: int, epochs: int, steps: int
) -> None:
    changes = {"train.profile_steps": 2, "train.epochs": epochs, "evaluate.every": 0, "train.batch_size": batch_size}
    folder = train(settings("run", changes))
    said = f"profile    none: the run ended after {steps} steps, the first 5 are not profiled"
    assert said in capsys.readouterr().out.splitlines()
    assert not (folder / "profile").exists()
