"""Runs under torchrun that are killed, told to stop, or told so twice, as Slurm does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engine.launch import train_recorded
from engine.test_train import assert_same_run

from detr_fast.engine.checkpoint import load_checkpoint
from detr_fast.engine.config import Config

pytestmark = pytest.mark.slow
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
Settings = Callable[..., Config]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def test_a_killed_process_is_started_again_and_the_run_equals_an_undisturbed_one(
    arguments: list[str], settings: Settings, tmp_path: Path
) -> None:
    changes = {"train.batch_size": 1, "train.checkpoint_steps": 3, "train.epochs": 3}
    reference = train_recorded(settings("reference", changes), 2)
    folder, marker = tmp_path / "run", tmp_path / "killed"
    script = [str(Path(__file__).with_name("killed_once.py")), str(marker), "7"]
    own = [f"--{name}={value}" for name, value in changes.items()]
    command = [*LAUNCHER, "--max-restarts=2", *script, "train", *arguments, *own]
    command += ["--resume", "auto", f"--train.output={folder}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert marker.exists()
    assert "Traceback" not in done.stderr
    assert "continuing" in done.stdout
    assert_same_run(reference.folder, folder)


def descendants(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [found for child in map(int, children) for found in (child, *descendants(child))]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("number", "reached"), [(signal.SIGTERM, "torchrun"), (signal.SIGINT, "torchrun"), (signal.SIGTERM, "all")]
)
def test_a_signal_saves_and_the_run_equals_an_undisturbed_one(
    arguments: list[str], settings: Settings, tmp_path: Path, number: int, reached: str, workers: int
) -> None:
    """A terminal signals torchrun, which hands it on; Slurm signals all processes, so that they get it twice."""
    changes = {"train.epochs": 12, "data.workers": workers, "train.log_steps": 1, "evaluate.every": 0}
    folder = tmp_path / "run"
    own = [f"--{name}={value}" for name, value in changes.items()]
    command = [*LAUNCHER, "-m", "detr_fast", "train", *arguments, *own, "--resume=auto", f"--train.output={folder}"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 90
        while not ((folder / "log.jsonl").exists() and (folder / "log.jsonl").read_text().count("\n") >= 3):
            assert process.poll() is None, "training ended by itself"
            assert time.monotonic() < until, "training did not start"
            time.sleep(0.02)
        for each in [process.pid, *(descendants(process.pid) if reached == "all" else [])]:
            os.kill(each, number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode not in (0, -signal.SIGKILL), errors
    assert "is killed by signal" not in errors
    assert f"detr-fast: {signal.Signals(number).name}: saved" in errors, errors
    assert 0 < load_checkpoint(folder / "last.pth")["place"]["step"] < 24
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=120)
    assert_same_run(train_recorded(settings("reference", changes), 2).folder, folder)
