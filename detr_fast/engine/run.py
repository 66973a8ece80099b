"""A run: model, optimizer, data and place in training, built from settings, saved to and restored from checkpoints."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detr_fast.criterion import SetCriterion
from detr_fast.data.coco import Categories, CocoDetection
from detr_fast.engine.checkpoint import (
    random_state,
    save_checkpoint,
    seed_everything,
    set_random_state,
)
from detr_fast.engine.config import Config
from detr_fast.engine.distributed import Processes
from detr_fast.engine.errors import CheckpointError, ConfigError
from detr_fast.engine.loaders import TrainingLoader, evaluation_dataset, training_dataset
from detr_fast.engine.log import Log, LossSums
from detr_fast.engine.optimizer import build_optimizer, load_optimizer
from detr_fast.layers.backbone import FrozenBatchNorm2d
from detr_fast.matcher import HungarianMatcher
from detr_fast.models import build_model
from detr_fast.models.checkpoint import ClassesDiffer, load_backbone, load_weights

LAST = "last.pth"
BEST = "best.pth"
MOST_LAYERS = 64  # of a decoder


@dataclass
class Place:
    """Where training stands: everything before it is done."""

    step: int = 0  # steps of the whole run
    epoch: int = 0
    batch: int = 0  # batches of this epoch
    best_ap: float = -1.0
    best_epoch: int = -1
    seconds: float = 0.0  # of this epoch, before the last interruption


@dataclass
class Run:
    """All that the loop works with."""

    config: Config
    processes: Processes
    folder: Path
    model: nn.Module
    parallel: nn.Module  # the model, or DistributedDataParallel around it
    criterion: SetCriterion
    optimizer: torch.optim.AdamW
    loader: TrainingLoader
    evaluation: CocoDetection | None
    categories: Categories
    log: Log
    precision: torch.dtype
    sums: LossSums
    place: Place = field(default_factory=Place)
    last_good: Path | None = None  # checkpoint that a failed run can continue from

    @property
    def device(self) -> torch.device:
        return self.processes.device

    def leave(self) -> None:
        """Lets go of DistributedDataParallel while the process group still stands.

        Otherwise its reducer is the group's last owner and joins the group's thread while holding the interpreter's
        lock, for which that thread may be waiting: the process would never end.
        """
        self.parallel = self.model
        if self.processes.count > 1:
            gc.collect()

    def share_buffers(self) -> None:
        """The main process's statistics of batch norm on every process, so that all evaluate what is saved."""
        if self.processes.count > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def save(self) -> None:
        """Writes ``last.pth``: everything needed to continue bit for bit. Called by all processes."""
        states = self.processes.gather((random_state(), self.sums.state_dict()))
        if self.processes.is_main:
            state = self._weights() | {
                "optimizer": self.optimizer.state_dict(),
                "sampler": self.loader.sampler.state_dict(self.place.batch),
                "random": [random for random, _ in states],
                "sums": [sums for _, sums in states],
            }
            save_checkpoint(self.folder / LAST, state)
        self.processes.gather(None)  # no process ends, and so stops the others, before the file is complete
        self.last_good = self.folder / LAST

    def save_best(self) -> None:
        """Writes ``best.pth``: weights without the state of training."""
        if self.processes.is_main:
            save_checkpoint(self.folder / BEST, self._weights())

    def _weights(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "num_classes": self.categories.num_classes,
            "categories": self.categories.to_dict(),
            "config": self.config.to_dict(),
            "place": vars(self.place).copy(),
        }

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
        if Categories.from_dict(state["categories"]) != self.categories:
            raise CheckpointError(
                f"checkpoint {path} was trained on other categories than those of {self.config.data.path}"
            )
        self.place = Place(**state["place"])
        try:
            self.model.load_state_dict(state["model"])
            load_optimizer(self.optimizer, state["optimizer"])
            self.loader.sampler.load_state_dict(state["sampler"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"checkpoint {path} does not fit these settings: {reason[:500]}") from error
        self.place.batch = self.loader.sampler.start_batch
        # Of another number of processes each takes up the sums of one.
        self.sums.load_state_dict(state["sums"][self.processes.rank % len(state["sums"])])
        states = state["random"]
        if len(states) == self.processes.count:
            set_random_state(states[self.processes.rank])
        self.last_good = path


def build_run(config: Config, processes: Processes, folder: Path, *, resumed: bool = False) -> Run:
    """Builds everything from settings; the weights are random, or those that ``model.weights`` names.

    A ``resumed`` run reads no files of weights: :meth:`Run.restore` brings its own. ``folder`` need not exist yet.

    Raises:
        ConfigError, DataFault, OSError, ValueError: something given cannot be used.
    """
    train_set = training_dataset(config)
    categories = train_set.categories
    evaluation = evaluation_dataset(config.data, categories) if config.evaluate.every else None
    seed_everything(config.train.seed)
    model = build_model(config.model.name, categories.num_classes, **config.model.options)
    if hasattr(model, "detr"):
        raise ConfigError(
            f"training has no mask losses: model.name must be a detection model, got {config.model.name!r}"
        )
    if not resumed:
        _start_from_files(model, config)
    model.to(processes.device).train()
    parallel = distribute(model, processes)
    # From here on only dropout draws, and every process its own.
    seed_everything(config.train.seed + processes.rank)
    return Run(
        config,
        processes,
        folder,
        model,
        parallel,
        build_criterion(config, categories.num_classes).to(processes.device),
        build_optimizer(model, config.optimizer),
        TrainingLoader(train_set, config, processes),
        evaluation,
        categories,
        Log(folder, active=processes.is_main, tensorboard=config.train.tensorboard),
        choose_precision(config.train.precision, processes.device),
        LossSums(processes.device),
    )


def _start_from_files(model: nn.Module, config: Config) -> None:
    if config.model.backbone_weights:
        load_backbone(model, config.model.backbone_weights)
    if config.model.weights:
        try:
            load_weights(model, config.model.weights, new_classes=config.model.new_classes)
        except ClassesDiffer as error:
            raise ConfigError(
                f"model.weights: {config.model.weights} tells {error.found} classes apart, the data set has "
                f"{error.expected}: start with a new class layer, --model.new_classes=true"
            ) from error


def learns_from_nothing(config: Config, model: nn.Module) -> bool:
    """Whether a published backbone, whose norms and first layers never change, starts from random weights."""
    has_constant_norms = any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    return has_constant_norms and not config.model.weights and not config.model.backbone_weights


def build_criterion(config: Config, num_classes: int) -> SetCriterion:
    """The paper's matcher and losses with the coefficients of the settings."""
    matcher = HungarianMatcher(config.matcher.cost_class, config.matcher.cost_bbox, config.matcher.cost_giou)
    own = {"loss_ce": config.loss.ce, "loss_bbox": config.loss.bbox, "loss_giou": config.loss.giou}
    # Every decoder layer counts the same; names of layers that a model does not have are never asked for.
    earlier = {f"{name}_{layer}": weight for name, weight in own.items() for layer in range(MOST_LAYERS)}
    losses = ["labels", "boxes", "cardinality"]
    return SetCriterion(num_classes, matcher, own | earlier, config.loss.eos_coef, losses)


def distribute(model: nn.Module, processes: Processes) -> nn.Module:
    """The model under DistributedDataParallel, where there are several processes."""
    if processes.count == 1:
        return model
    devices = [processes.device] if processes.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 on a GPU that computes it, else float32."""
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32
