"""The table of a profile, from a trace written by hand and from one of a CPU run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detr_fast.engine.config import Config
from detr_fast.engine.profile import parts_of, table
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
