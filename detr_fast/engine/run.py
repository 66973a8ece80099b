"""A run: model, optimizer, data and place in training, saved to and restored from checkpoints."""

from __future__ import annotations

import gc
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from detr_fast.criterion import SetCriterion
from detr_fast.data.coco import Categories, CocoDetection
from detr_fast.engine.average import AveragedModel
from detr_fast.engine.checkpoint import (
    BEST,
    LAST,
    PREVIOUS,
    keep_previous,
    random_state,
    save_checkpoint,
    set_random_state,
)
from detr_fast.engine.config import Config, changed_settings
from detr_fast.engine.distributed import Processes
from detr_fast.engine.errors import CheckpointError
from detr_fast.engine.graphed import GraphedSteps
from detr_fast.engine.loaders import TrainingLoader
from detr_fast.engine.log import Log, LossSums
from detr_fast.engine.optimizer import load_optimizer
from detr_fast.engine.sharded import load_shards, part_of_whole, save_shards
from detr_fast.engine.skipped import SkippedSteps
from detr_fast.engine.step import TrainingStep


@dataclass
class Place:
    """Where training stands: everything before it is done."""

    step: int = 0  # steps of the whole run
    epoch: int = 0
    images: int = 0  # of this epoch, on all processes
    best_ap: float = -1.0
    best_epoch: int = -1
    stale: int = 0  # evaluations since the best one
    seconds: float = 0.0  # of this epoch, before the last interruption


@dataclass
class Run:
    """All that the loop works with."""

    config: Config
    processes: Processes
    folder: Path
    model: nn.Module
    average: AveragedModel | None
    criterion: SetCriterion
    optimizer: torch.optim.Optimizer
    step: TrainingStep | GraphedSteps
    loader: TrainingLoader
    evaluation: CocoDetection | None
    categories: Categories
    log: Log
    precision: torch.dtype
    sums: LossSums
    skipped: SkippedSteps
    place: Place = field(default_factory=Place)
    last_good: Path | None = None  # checkpoint that a failed run can continue from
    saved_step: int = -1  # of last.pth, where this start has written it
    shards: tuple[str, str] = ("", "")  # folders of optimizer states of previous.pth and last.pth; empty: none

    @property
    def device(self) -> torch.device:
        return self.processes.device

    @property
    def evaluated(self) -> nn.Module:
        """The model whose weights are evaluated and kept as the best: the average, where there is one."""
        return self.model if self.average is None else self.average.model

    @property
    def images_of_step(self) -> int:
        """Of all processes."""
        return images_of_step(self.config, self.processes)

    def leave(self) -> None:
        """Lets go of DistributedDataParallel while the process group still stands.

        Otherwise its reducer is the group's last owner and joins the group's thread while holding the interpreter's
        lock, for which that thread may be waiting: the process would never end.
        """
        del self.step
        if self.processes.count > 1:
            gc.collect()

    def share_buffers(self) -> None:
        """The main process's statistics of batch norm on every process, so that all evaluate what is saved."""
        if self.processes.count > 1:
            for model in dict.fromkeys((self.model, self.evaluated)):
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)

    def save(self) -> None:
        """Writes ``last.pth``: everything needed to continue bit for bit. Called by all processes.

        What was ``last.pth`` stays as ``previous.pth`` if it is of an earlier step, or there is none yet.

        Raises:
            CheckpointError: it cannot be written, on any process; what was there is whole.
        """
        own = random_state(), self.sums.state_dict(), self.skipped.state_dict()
        random, sums, skipped = zip(*self.processes.gather(own), strict=True)
        optimizer = self._save_optimizer()
        failure: CheckpointError | None = None
        keeps = False
        if self.processes.is_main:
            state = self._state(self.model) | {
                "optimizer": optimizer,
                "sampler": self.loader.sampler.state_dict(self.place.images),
                "random": list(random),
                "sums": list(sums),
                "skipped": list(skipped),
            }
            if self.average is not None:
                state["average"] = self.average.model.state_dict()
            if isinstance(self.step, GraphedSteps):
                state["graphs"] = self.step.state_dict()
            is_other = self.place.step != self.saved_step or not (self.folder / PREVIOUS).exists()
            keeps = is_other and self.last_good == self.folder / LAST  # a damaged one must not replace the whole one
            try:
                if keeps:
                    keep_previous(self.folder)
                save_checkpoint(self.folder / LAST, state)
            except CheckpointError as error:
                failure = error
        # No process ends, and so stops the others, before the file is complete.
        failure, keeps = self.processes.broadcast((failure, keeps))
        if failure is not None:
            raise failure
        self.last_good, self.saved_step = self.folder / LAST, self.place.step
        self.shards = (self.shards[1] if keeps else self.shards[0], optimizer.get("shards", ""))
        self._forget_shards()

    def save_best(self) -> None:
        """Writes ``best.pth``: weights without the state of training."""
        if self.processes.is_main:
            save_checkpoint(self.folder / BEST, self._state(self.evaluated))

    def _state(self, model: nn.Module) -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "num_classes": self.categories.num_classes,
            "categories": self.categories.to_dict(),
            "config": self.config.to_dict(),
            "place": vars(self.place).copy(),
        }

    def _save_optimizer(self) -> dict[str, Any]:
        """The optimizer's state, or where its parts lie."""
        if not isinstance(self.optimizer, ZeroRedundancyOptimizer):
            return self.optimizer.state_dict()
        name = f"optimizer-{self.place.step}-{self.place.epoch}"
        while name in self.shards:  # a checkpoint needs them
            name += "-again"
        return {"shards": name, "sums": save_shards(self.optimizer, self.model, self.folder / name, self.processes)}

    def _forget_shards(self) -> None:
        """Removes all but those of ``last.pth`` and ``previous.pth``, also what an earlier start has left behind."""
        if self.processes.is_main:
            for folder in self.folder.glob("optimizer-*"):
                if folder.name not in self.shards:
                    shutil.rmtree(folder, ignore_errors=True)

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Continues where ``save`` left off.

        Raises:
            CheckpointError: it holds no state of training, or is of another model or data set.
        """
        if "optimizer" not in state:
            raise CheckpointError(
                f"checkpoint {path} holds weights only and cannot be continued; a new run starts from it with "
                f"--model.weights={path}"
            )
        self._check_order(state, path)
        place = dict(state["place"])
        place.pop("batch", None)  # of format 1
        self.place = Place(**place)
        try:
            self.model.load_state_dict(state["model"])
            if self.average is not None:
                self.average.model.load_state_dict(state.get("average", state["model"]))
            self._restore_optimizer(state["optimizer"], path)
            self.loader.sampler.load_state_dict(state["sampler"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = self._changed(state, "model.") or " ".join(str(error).split())[:500]
            raise _misfit(path, reason) from error
        self.place.images = self.loader.sampler.start_image
        # Of another number of processes each takes up the sums of one, and the rest starts anew.
        self.sums.load_state_dict(_merged(state["sums"], self.processes))
        if "skipped" in state:
            self.skipped.load_state_dict(state["skipped"][0])
        if "graphs" in state and isinstance(self.step, GraphedSteps):
            self.step.load_state_dict(state["graphs"])
        states = state["random"]
        if len(states) == self.processes.count:
            set_random_state(states[self.processes.rank])
        self.last_good = path.absolute()

    def _check_order(self, state: dict[str, Any], path: Path) -> None:
        """A place in an epoch is one of the same images in the same order."""
        sampler, saved = self.loader.sampler, state["sampler"]
        if saved["seed"] != sampler.seed:
            raise _misfit(path, self._changed(state, "train.seed") or "train.seed is another")
        data = self._changed(state, "data.path", "data.train_") or "data.path"
        if Categories.from_dict(state["categories"]) != self.categories:
            raise _misfit(path, f"{data}: it was trained on other categories than the data set has")
        if saved["length"] != sampler.length:
            counts = f"{saved['length']} images, the data set has {sampler.length}"
            raise _misfit(path, f"{data}: it was trained on {counts}")

    def _changed(self, state: dict[str, Any], *starts: str) -> str:
        """Settings with such names whose values are others than those that were saved, with both."""
        changed = changed_settings(Config.from_dict(state["config"]), self.config)
        concerned = {key: values for key, values in changed.items() if key.startswith(starts)}
        return ", ".join(f"{key} was {was} when it was saved, is {now} now" for key, (was, now) in concerned.items())

    def _restore_optimizer(self, state: dict[str, Any], path: Path) -> None:
        """Whether it was sharded then or is now, over however many processes."""
        if "shards" in state:
            load_shards(self.optimizer, self.model, path.parent / state["shards"])
            if path.parent.resolve() == self.folder.resolve():
                self.shards = ("", state["shards"]) if path.name == LAST else (state["shards"], "")
        elif isinstance(self.optimizer, ZeroRedundancyOptimizer):
            part_of_whole(self.optimizer, state)
        else:
            load_optimizer(self.optimizer, state)


def _misfit(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} does not fit these settings: {reason}; continue it with what it was saved with, or start a "
        "new run"
    )


def _merged(sums: list[dict[str, Any]], processes: Processes) -> dict[str, Any]:
    """The sums that this process continues; with another number of processes the main one takes those of all."""
    if len(sums) == processes.count:
        return sums[processes.rank]
    known = [each["sums"] for each in sums if each["names"]]
    total = torch.stack(known).sum(0) if known else sums[0]["sums"]
    return {"names": sums[0]["names"], "sums": total if processes.is_main else torch.zeros_like(total)}


def images_of_step(config: Config, processes: Processes) -> int:
    """Images that one step takes, on all processes."""
    return config.train.batch_size * config.train.accumulate * processes.count
