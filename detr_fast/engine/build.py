"""Builds a run from its settings."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.export import register_dataclass
from torch.nn.parallel import DistributedDataParallel

from detr_fast.criterion import SetCriterion
from detr_fast.engine.average import AveragedModel
from detr_fast.engine.checkpoint import seed_everything
from detr_fast.engine.config import Config
from detr_fast.engine.distributed import Processes
from detr_fast.engine.errors import ConfigError
from detr_fast.engine.graphed import GraphedSteps
from detr_fast.engine.loaders import TrainingLoader, check_same_images, evaluation_dataset, training_dataset
from detr_fast.engine.log import Log, LossSums
from detr_fast.engine.optimizer import build_optimizer
from detr_fast.engine.run import Run, images_of_step
from detr_fast.engine.skipped import SkippedSteps
from detr_fast.engine.speed import apply_speed
from detr_fast.engine.step import TrainingStep
from detr_fast.layers.backbone import FrozenBatchNorm2d
from detr_fast.matcher import HungarianMatcher
from detr_fast.models import build_model
from detr_fast.models.checkpoint import ClassesDiffer, load_backbone, load_weights
from detr_fast.structures import Predictions

MOST_LAYERS = 64  # of a decoder

# DistributedDataParallel looks for tensors in what the model returns. Where it finds none, a static graph exchanges no
# gradients, and says nothing.
register_dataclass(Predictions)


def build_run(config: Config, processes: Processes, folder: Path, *, resumed: bool = False) -> Run:
    """Builds everything from settings; the weights are random, or those that ``model.weights`` names.

    A ``resumed`` run reads no files of weights: :meth:`Run.restore` brings its own. ``folder`` need not exist yet.

    Raises:
        ConfigError, DataFault, OSError, ValueError: something given cannot be used.
    """
    _check_together(config, processes)
    train_set = training_dataset(config)
    categories = train_set.categories
    evaluation = evaluation_dataset(config.data, categories) if config.evaluate.every else None
    for dataset in (train_set, evaluation):
        if dataset is not None:
            check_same_images(dataset, processes)
    seed_everything(config.train.seed)
    model = build_model(config.model.name, categories.num_classes, **config.model.options)
    if hasattr(model, "detr"):
        raise ConfigError(
            f"training has no mask losses: model.name must be a detection model, got {config.model.name!r}"
        )
    if not resumed:
        _start_from_files(model, config)
    model.to(processes.device).train()
    apply_speed(model, config.speed)
    average = AveragedModel(model, config.train.ema_decay) if config.train.ema_decay else None
    optimizer = build_optimizer(
        model,
        config.optimizer,
        images_of_step(config, processes),
        capturable=config.speed.graph and processes.device.type == "cuda",
        sharded=config.distributed.shard_optimizer and processes.count > 1,
    )
    criterion = build_criterion(config, categories.num_classes).to(processes.device)
    precision = choose_precision(config.train.precision, processes.device)
    step = TrainingStep(
        distribute(model, processes, config),
        criterion,
        optimizer,
        config.optimizer.clip_norm,
        precision,
    )
    # From here on only dropout draws, and every process its own.
    seed_everything(config.train.seed + processes.rank)
    return Run(
        config,
        processes,
        folder,
        model,
        average,
        criterion,
        optimizer,
        GraphedSteps(step, train_set.most_objects, config.speed.most_canvases) if config.speed.graph else step,
        TrainingLoader(train_set, config, processes),
        evaluation,
        categories,
        Log(folder, active=processes.is_main, tensorboard=config.train.tensorboard),
        precision,
        LossSums(processes.device),
        SkippedSteps(processes.device),
    )


def _check_together(config: Config, processes: Processes) -> None:
    """Settings that exclude one another."""
    if config.speed.graph and (processes.count > 1 or config.train.accumulate > 1):
        raise ConfigError(
            "speed.graph must be false with several processes or train.accumulate over 1, got true with "
            f"{processes.count} processes and train.accumulate={config.train.accumulate}"
        )


def _start_from_files(model: nn.Module, config: Config) -> None:
    if config.model.backbone_weights:
        try:
            load_backbone(model, config.model.backbone_weights)
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError(f"model.backbone_weights: {error}") from error
    if config.model.weights:
        try:
            load_weights(model, config.model.weights, new_classes=config.model.new_classes)
        except ClassesDiffer as error:
            raise ConfigError(
                f"model.weights: {config.model.weights} tells {error.found} classes apart, the data set has "
                f"{error.expected}: start with a new class layer, --model.new_classes=true"
            ) from error
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError(f"model.weights: {error}") from error


def learns_from_nothing(config: Config, model: nn.Module) -> bool:
    """Whether a published backbone, whose norms and first layers never change, starts from random weights."""
    has_constant_norms = any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    return has_constant_norms and not config.model.weights and not config.model.backbone_weights


def build_criterion(config: Config, num_classes: int) -> SetCriterion:
    """The paper's matcher and losses with the coefficients of the settings."""
    # What is not finite is left out and reported with its image, on every device.
    matcher = HungarianMatcher(
        config.matcher.cost_class, config.matcher.cost_bbox, config.matcher.cost_giou, invalid="skip"
    )
    own = {"loss_ce": config.loss.ce, "loss_bbox": config.loss.bbox, "loss_giou": config.loss.giou}
    # Every decoder layer counts the same; names of layers that a model does not have are never asked for.
    earlier = {f"{name}_{layer}": weight for name, weight in own.items() for layer in range(MOST_LAYERS)}
    losses = ["labels", "boxes", "cardinality"]
    return SetCriterion(num_classes, matcher, own | earlier, config.loss.eos_coef, losses)


def distribute(model: nn.Module, processes: Processes, config: Config) -> nn.Module:
    """The model under DistributedDataParallel, where there are several processes.

    Every parameter takes part in every step, also in one without objects, so that the order of exchanges is fixed.
    """
    if processes.count == 1:
        return model
    with warnings.catch_warnings():
        # PyTorch 2.13 has another name for it, which 2.11 does not know.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        parallel = DistributedDataParallel(
            model,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,  # they are shared before an evaluation
            static_graph=config.train.accumulate == 1,  # which counts exchanges, and so excludes passes without one
        )
    if config.distributed.compress_gradients:
        # The annotations of a function in this file are text, which registering refuses.
        parallel.register_comm_hook(None, lambda state, bucket: compressed_mean(state, bucket))
    return parallel


def compressed_mean(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The mean of a bucket of gradients over all processes, exchanged as bf16; on gloo and NCCL alike."""
    gradients = bucket.buffer()
    sent = gradients.to(torch.bfloat16).div_(dist.get_world_size())
    work = dist.all_reduce(sent, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: gradients.copy_(future.value()[0]))


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 on a GPU that computes it, else float32."""
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32
