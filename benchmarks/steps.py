"""Training steps to time: ours as the engine builds it, the paper's, and transformers'; all from the same weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.model import LABELS, twins
from benchmarks.reference import reference_model
from benchmarks.reference_step import (
    ReferenceCriterion,
    ReferenceStep,
    dictionaries,
    reference_optimizer,
    weighted_sum,
)
from detr_fast.data.batch import Batch
from detr_fast.engine.build import build_criterion, distribute
from detr_fast.engine.config import Config, OptimizerConfig, SpeedConfig
from detr_fast.engine.distributed import Processes
from detr_fast.engine.graphed import GraphedSteps
from detr_fast.engine.optimizer import build_optimizer
from detr_fast.engine.speed import apply_speed, arithmetic
from detr_fast.engine.step import TrainingStep
from detr_fast.models import build_model

Run = Callable[[], "Tensor | float"]  # takes a step and returns its loss


class Lazy:
    """A step that is set up when it is called for the first time: what is not timed costs neither time nor memory."""

    def __init__(self, build: Callable[[], Run]) -> None:
        self._build = build
        self._run: Run | None = None

    def __call__(self) -> Tensor | float:
        if self._run is None:
            self._run = self._build()
        return self._run()


@dataclass(frozen=True)
class Start:
    """Where all steps start from: a model by name, its weights and a batch on the host."""

    name: str
    labels: int
    batch: Batch
    device: torch.device
    options: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    theirs: Any = None  # transformers' model with these weights

    @classmethod
    def random(cls, name: str, labels: int, batch: Batch, device: torch.device, **options: Any) -> Start:
        torch.manual_seed(0)
        return cls(name, labels, batch, device, options, build_model(name, labels, **options).state_dict())

    @classmethod
    def of_twins(cls, batch: Batch, device: torch.device, dropout: float) -> Start:
        """DETR-R50. What a residual block adds is small, as in a trained network: else maps grow with every block."""
        ours, theirs = twins(dropout)
        last = re.compile(r"(layer\d\.\d\.bn3|layer\.2\.normalization)\.weight$")
        for name, value in [*ours.state_dict().items(), *theirs.state_dict().items()]:
            if last.search(name):
                value.fill_(0.2)
        return cls("detr_resnet50", LABELS, batch, device, {"dropout": dropout}, ours.state_dict(), theirs)

    @cached_property
    def loss(self) -> float:
        """Of the first step, without dropout, as the paper's code computes it in float32."""
        model = reference_model(self.name, self.labels, **{**self.options, "dropout": 0.0})
        model.load_state_dict(self.state)
        criterion = ReferenceCriterion(self.labels).to(self.device)
        batch = self.batch.to(self.device)
        with torch.no_grad(), arithmetic(tf32=False, deterministic=False):
            outputs = model.to(self.device).train()(batch.images.pixels, batch.images.padding)
            return float(weighted_sum(criterion(outputs, dictionaries(batch))))

    def waiting(self) -> Batch:
        """The batch as a DataLoader that pins hands it over."""
        return self.batch.pin_memory() if self.device.type == "cuda" else self.batch


class UnfusedStep(TrainingStep):
    """Clipping and AdamW as PyTorch's own functions, one after the other."""

    def _update(self) -> tuple[Tensor, Tensor]:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return norm, ~norm.isfinite()


def our_step(
    start: Start,
    precision: torch.dtype = torch.float32,
    speed: SpeedConfig | None = None,
    fused: bool = True,
) -> Lazy:
    """As the engine builds it; `fused` False: with :class:`UnfusedStep`."""
    speed = speed or SpeedConfig()

    def build() -> Run:
        model = our_model(start, speed)
        criterion = build_criterion(Config(), start.labels).to(start.device)
        if fused:
            on_device = speed.graph and start.device.type == "cuda"
            optimizer = build_optimizer(model, OptimizerConfig(), capturable=on_device)
            single = TrainingStep(model, criterion, optimizer, precision=precision)
        else:
            single = UnfusedStep(model, criterion, reference_optimizer(model), precision=precision)
        step = GraphedSteps(single, start.batch.targets.max_count) if speed.graph else single
        batch = start.waiting()

        def run() -> Tensor:
            with arithmetic(speed.tf32, deterministic=False):
                return step([batch.to(start.device)]).losses["loss"]

        return run

    return Lazy(build)


def parallel_step(start: Start, joined: Processes) -> Run:
    """Ours as one of several processes; returns this process's part of the joint loss, whose mean over all it is."""
    model = our_model(start, SpeedConfig())
    parallel = distribute(model, joined, Config())
    criterion = build_criterion(Config(), start.labels)
    step = TrainingStep(parallel, criterion, build_optimizer(model, OptimizerConfig()))
    return lambda: step([start.batch]).losses["loss"]


def our_model(start: Start, speed: SpeedConfig) -> nn.Module:
    model = build_model(start.name, start.labels, **start.options)
    model.load_state_dict(start.state)
    model.to(start.device).train()
    apply_speed(model, speed)
    return model


def eager_step(start: Start) -> Lazy:
    """The paper's, whose loader pins nothing."""

    def build() -> Run:
        model = reference_model(start.name, start.labels, **start.options)
        model.load_state_dict(start.state)
        model.to(start.device)
        criterion = ReferenceCriterion(start.labels).to(start.device)
        step = ReferenceStep(model, criterion, reference_optimizer(model))
        targets = dictionaries(start.batch)

        def run() -> float:
            with arithmetic(tf32=True, deterministic=False):
                return step(start.batch, targets)

        return run

    return Lazy(build)


def their_step(
    start: Start, precision: torch.dtype = torch.float32, attention: str = "eager", compiles: bool = False
) -> Lazy:
    """transformers' model and loss, which waits for the device where it matches."""

    def build() -> Run:
        model = copy.deepcopy(start.theirs)
        model.to(start.device).train()
        for part in (model.model.encoder, model.model.decoder):
            part.config._attn_implementation = attention  # its setter refuses the backbone, which has no attention
        optimizer = reference_optimizer(model)
        called = torch.compile(model) if compiles else model
        batch = start.waiting()
        bounds = list(pairwise(batch.targets.offsets.tolist()))

        def run() -> Tensor:
            moved = batch.to(start.device)
            boxes, classes = moved.targets.boxes, moved.targets.labels
            labels = [{"class_labels": classes[a:b], "boxes": boxes[a:b]} for a, b in bounds]
            with arithmetic(tf32=True, deterministic=False):
                optimizer.zero_grad()
                with torch.autocast(start.device.type, precision, enabled=precision != torch.float32):
                    present = (~moved.images.padding).long()
                    loss = called(pixel_values=moved.images.pixels, pixel_mask=present, labels=labels).loss
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
            return loss.detach()

        return run

    return Lazy(build)
