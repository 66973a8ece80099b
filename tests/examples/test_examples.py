"""The examples of the documentation run, and do what they say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parent.parent.parent / "docs" / "examples"


def example(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_trainer_of_transformers_learns_with_the_patch(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    # In a process of its own: the patch is for a whole process.
    arguments = ["--steps", "40", "--images", "64", "--output", str(tmp_path)]
    command = [sys.executable, str(FOLDER / "finetune_transformers.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(x) for x in done.stdout.strip().splitlines()[-1].strip("[]").split(",")]
    assert len(losses) == 10
    assert losses[-1] < 0.9 * losses[0]


def test_criterion_in_a_graph_learns() -> None:
    losses = example("criterion_in_a_graph").main(steps=20, device="cpu")  # there without the graph
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.gpu
def test_criterion_in_a_graph_learns_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    losses = example("criterion_in_a_graph").main(steps=10)
    assert losses == pytest.approx(example("criterion_in_a_graph").main(steps=10, device="cpu"), rel=1e-3)


def test_numpy_users_get_pairs_without_pytorch() -> None:
    done = subprocess.run([sys.executable, str(FOLDER / "numpy_users.py")], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["[(0, 1), (2, 0)]", "PyTorch was imported: False"], done.stderr


def test_compiled_criterion_is_one_graph() -> None:
    losses, graphs = example("compiled_criterion").main()
    assert graphs == 1
    assert all(0 < loss < 100 for loss in losses)
