"""Runs of one or several processes that record what each of their steps saw and did."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from engine.test_train import read_log
from torch import Tensor, nn

from detr_fast.data.batch import Batch
from detr_fast.engine import train as loop
from detr_fast.engine.build import build_run
from detr_fast.engine.config import Config
from detr_fast.engine.distributed import Processes
from detr_fast.engine.errors import Interrupted
from detr_fast.engine.run import Run
from detr_fast.layers.backbone import FrozenBatchNorm2d

BeforeStep = Callable[[Run, list[Batch]], None]
# Every image makes the same canvas, so that what an image gives does not depend on those beside it.
SAME_CANVAS = {"data.scales": (64,), "data.crop": False, "model.dropout": 0.0, "train.log_steps": 1}


@dataclass
class Step:
    """What one process saw and did in one step."""

    batches: list[Batch]
    gradient: Tensor  # of all parameters, after it was shared
    weights: Tensor  # after the step
    was_skipped: bool

    @property
    def images(self) -> list[int]:
        return [image for batch in self.batches for image in batch.image_ids]


@dataclass
class Recorded:
    """A run of some processes, or its part until it was stopped."""

    folder: Path
    ranks: list[list[Step]]
    weights: list[Tensor]  # of each process, at the end

    @property
    def steps(self) -> list[list[int]]:
        """Image ids of the joint batch of each step, sorted."""
        joint = zip(*self.ranks, strict=True)
        return [sorted(image for step in steps for image in step.images) for steps in joint]

    @property
    def gradients(self) -> list[Tensor]:
        return [step.gradient for step in self.ranks[0]]

    def logged(self, *names: str) -> Tensor:  # [steps, names] float64
        lines = [entry for entry in read_log(self.folder) if entry["kind"] == "step"]
        return torch.tensor([[entry[name] for name in names] for entry in lines], dtype=torch.float64)


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradient_of(model: nn.Module) -> Tensor:
    return flat(p.grad for p in model.parameters() if p.grad is not None).clone()


def train_recorded(
    config: Config,
    count: int,
    *,
    resume: Path | None = None,
    stop_after: int = 0,  # steps after which a signal reaches the first process; 0: never
    stop_by: int = signal.SIGTERM,
    before_step: BeforeStep | None = None,
) -> Recorded:
    """Trains with ``count`` processes, forked, so that what a test has patched holds in them too."""
    folder = Path(config.train.output)
    folder.parent.mkdir(parents=True, exist_ok=True)
    meeting = folder.with_suffix(f".{count}.meeting")
    meeting.unlink(missing_ok=True)

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        if count > 1:
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
        steps, weights = _train(config, resume, stop_after if rank == 0 else 0, stop_by, before_step)
        torch.save({"steps": steps, "weights": weights}, folder.with_suffix(f".{rank}.seen"))
        if count > 1:
            dist.destroy_process_group()

    multiprocessing.start_processes(work, nprocs=count, start_method="fork")
    seen = [torch.load(folder.with_suffix(f".{rank}.seen"), weights_only=False) for rank in range(count)]
    return Recorded(folder, [one["steps"] for one in seen], [one["weights"] for one in seen])


def _train(
    config: Config, resume: Path | None, stop_after: int, stop_by: int, before_step: BeforeStep | None
) -> tuple[list[Step], Tensor]:
    """In a process of its own, where patches harm nobody."""
    steps: list[Step] = []
    runs: list[Run] = []
    original, introduce = loop._step, loop._introduce

    def introduced(run: Run, resumed: Path | None) -> None:
        runs.append(run)
        introduce(run, resumed)

    def recorded(run: Run, batches: list[Batch]) -> None:
        if before_step is not None:
            before_step(run, batches)
        skipped = run.skipped.total
        original(run, batches)
        weights = flat(run.model.parameters()).clone()
        steps.append(Step(batches, gradient_of(run.model), weights, run.skipped.total > skipped))
        if stop_after == len(steps):
            signal.raise_signal(stop_by)

    loop._step, loop._introduce = recorded, introduced
    try:
        loop.train(config, resume)
        assert not stop_after, "training was not stopped"
    except Interrupted:
        pass
    return steps, flat(runs[0].model.parameters())


def constant_norms(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A model in which an image's result does not depend on the others of its batch."""
    from detr_fast.models import build_model

    model = build_model(name, num_classes, **options)
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, child_name, FrozenBatchNorm2d(child.num_features))
    return model


@dataclass
class Exact:
    """The same steps in float64, on one process."""

    gradients: list[Tensor]
    losses: list[dict[str, Tensor]]
    weights: Tensor

    def logged(self, *names: str) -> Tensor:  # [steps, names] float64
        return torch.stack([torch.stack([losses[name].double() for name in names]) for losses in self.losses])


def train_exactly(config: Config, steps: list[Step]) -> Exact:
    run = build_run(config, Processes(), Path(config.train.output))
    run.model.double()
    gradients, losses = [], []
    for step in steps:
        losses.append(run.step([_doubled(batch) for batch in step.batches]).losses)
        gradients.append(gradient_of(run.model))
    return Exact(gradients, losses, flat(run.model.parameters()))


def _doubled(batch: Batch) -> Batch:
    return replace(batch, images=replace(batch.images, pixels=batch.images.pixels.double()))
