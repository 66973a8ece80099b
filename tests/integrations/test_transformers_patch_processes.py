"""Two processes under accelerate: the normaliser of the package, and the right one."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from integrations.definitions.transformers_models import build
from integrations.test_transformers_patch_models import OTHERWISE, batch_of
from torch import Tensor

from detr_fast.integrations.patching import patch

COUNTS = ((2, 0, 3), (1, 0, 0))  # of each process: 3 targets in the mean
NAMES = ("detr", "deformable_detr", "rt_detr")
MODES = ("stable", "compat")

pytestmark = pytest.mark.skipif(
    not dist.is_available() or importlib.util.find_spec("accelerate") is None, reason="needs accelerate"
)


def losses_of(model: Any, name: str, rank: int) -> dict[str, Tensor]:
    pixels, labels = batch_of(name, COUNTS[rank])
    torch.manual_seed(1)  # dropout and denoising
    outputs = model(pixel_values=pixels, labels=labels)
    return {"total": outputs.loss.detach()} | {key: value.detach() for key, value in outputs.loss_dict.items()}


def run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    models = {name: build(name) for name in NAMES}
    found = {}
    with patch("transformers"):
        for name, model in models.items():
            found["alone", name] = losses_of(model, name, rank)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=len(COUNTS))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(COUNTS))}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # of no use any more
    from accelerate import PartialState

    assert PartialState(cpu=True).num_processes == len(COUNTS)
    for name, model in models.items():
        found["package", name] = losses_of(model, name, rank)
        for mode in MODES:
            with patch("transformers", mode=mode):
                found[mode, name] = losses_of(model, name, rank)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_normalisers_of_two_processes(tmp_path: Path) -> None:
    multiprocessing.start_processes(run, (tmp_path,), nprocs=len(COUNTS), start_method="fork")
    mean = sum(map(sum, COUNTS)) / len(COUNTS)
    for rank, counts in enumerate(COUNTS):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name in NAMES:
            alone, package, stable = (found[way, name] for way in ("alone", "package", "stable"))
            for key, value in package.items():
                torch.testing.assert_close(found["compat", name][key], value, rtol=1e-5, atol=1e-6, msg=key)
            boxes = [key for key in stable if key.startswith(("loss_bbox", "loss_giou"))]
            assert boxes
            for key in boxes:
                torch.testing.assert_close(stable[key], alone[key] * sum(counts) / mean, rtol=1e-5, atol=1e-6, msg=key)
                if key in OTHERWISE.get(name, ()):
                    continue
                # The package divides the mean by the number of processes again, or takes this process's own count.
                factor = mean / sum(counts) if name == "rt_detr" else len(COUNTS)
                torch.testing.assert_close(package[key], stable[key] * factor, rtol=1e-5, atol=1e-6, msg=key)
