"""One training step, from batches on the device to new weights. Nothing is read back from a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from detr_fast.criterion import SetCriterion
from detr_fast.data.batch import Batch
from detr_fast.engine.norm_statistics import NormStatistics
from detr_fast.structures import Predictions

# What is found of an image: its pixels, or what the model says of it, are not finite.
PIXELS, PREDICTIONS = 1, 2


@dataclass(frozen=True)
class StepResult:
    """What a step has found, on the device."""

    losses: dict[str, Tensor]  # "loss", the entries of the criterion and "gradient_norm", each [] float32
    was_skipped: Tensor  # [] bool, the gradient was not finite and nothing was changed
    flags: Tensor  # [images of this process] uint8, sums of PIXELS and PREDICTIONS


class TrainingStep:
    """Forward, losses, backward, clipping and update of the joint batch of all micro-batches and processes.

    ``step([batch, ...])`` takes batches on the model's device. Losses and gradients are those of one large batch: box
    losses are divided by the targets, class losses by the weights of all of it, which the processes exchange while the
    model computes (norms that learn take their statistics from each micro-batch of each process alone). A step with
    pixels, predictions, a loss or a gradient that is not finite on any process changes no weight, statistic, moment or
    step count on any; ``was_skipped`` tells, on the device.

    Args:
        model: returns Predictions for Images; or DistributedDataParallel around such a model.
        criterion: its ``weighted_loss`` is differentiated.
        optimizer: a fused AdamW, or ZeroRedundancyOptimizer around one; it clips and skips in its own kernel.
        clip_norm: largest norm of the gradient, 0: any.
        precision: float32, or a half type for autocast; heads, costs and losses stay in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: SetCriterion,
        optimizer: torch.optim.Optimizer,
        clip_norm: float = 0.1,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        self.clip_norm, self.precision = clip_norm, precision
        device = next(model.parameters()).device
        self.rehearses = torch.zeros((), device=device)  # [] 1: compute everything, but change nothing
        self._statistics = NormStatistics(model)
        self._one, self._nan = torch.ones((), device=device), torch.full((), torch.nan, device=device)

    def __call__(self, batches: Sequence[Batch]) -> StepResult:
        joint = JointNormalisers(self.criterion, batches, self._queries())
        self.optimizer.zero_grad(set_to_none=True)
        self._statistics.keep()
        parts = []
        for number, batch in enumerate(batches, start=1):
            is_last = number == len(batches)
            with contextlib.nullcontext() if is_last else self._without_exchange():
                parts.append(self._backward(batch, joint))
        with record_function("optimizer"):
            norm, was_skipped = self._update()
        losses = _merged([losses for losses, _ in parts], [len(batch) for batch in batches])
        return StepResult({**losses, "gradient_norm": norm}, was_skipped, torch.cat([flags for _, flags in parts]))

    def _queries(self) -> int:
        model: Any = getattr(self.model, "module", self.model)
        return int(model.num_queries)

    def _without_exchange(self) -> contextlib.AbstractContextManager[Any]:
        """Gradients of all but the last micro-batch stay with their process."""
        no_sync = getattr(self.model, "no_sync", None)
        return contextlib.nullcontext() if no_sync is None else no_sync()

    def _backward(self, batch: Batch, joint: JointNormalisers) -> tuple[dict[str, Tensor], Tensor]:
        device = batch.images.pixels.device.type
        # Without the cache each weight is cast where it is used, once a pass, which a CUDA graph can repeat.
        autocast = torch.autocast(device, self.precision, self.precision != torch.float32, cache_enabled=False)
        with record_function("forward"), autocast:
            predictions = self.model(batch.images)
        with record_function("loss"):
            total, losses = self.criterion.weighted_loss(predictions, batch.targets, joint.wait())
        flags = _flags(batch.images.pixels, predictions)
        with record_function("backward"):
            # What is not finite spoils the gradient, and through it the step, of every process.
            is_finite = total.isfinite() & (flags == 0).all()
            total.backward(torch.where(is_finite, self._one, self._nan).to(total.dtype))
        return {"loss": total.detach(), **losses}, flags

    def _update(self) -> tuple[Tensor, Tensor]:
        """Clips and steps in the optimizer's kernel; the gradient's norm and whether nothing was changed, ``[]``."""
        groups = self.optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        was_skipped = ~norm.isfinite()
        fused: Any = getattr(self.optimizer, "optim", self.optimizer)
        fused.found_inf = torch.maximum(was_skipped.float(), self.rehearses)
        # Divides the gradients by it: what clip_grad_norm_ does, without a pass of its own over them.
        fused.grad_scale = ((norm + 1e-6) / self.clip_norm).clamp(min=1) if self.clip_norm > 0 else None
        self.optimizer.step()
        self._statistics.restore(fused.found_inf > 0)
        return norm, was_skipped


class JointNormalisers:
    """Normalisers of the losses over all micro-batches and processes; their exchange runs while the model computes."""

    def __init__(self, criterion: SetCriterion, batches: Sequence[Batch], num_queries: int) -> None:
        self._joint: Tensor | None = None
        self._work: dist.Work | None = None
        self._processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if len(batches) == 1 and self._processes == 1:
            return
        own = [criterion.normalisers(batch.targets, num_queries) for batch in batches]
        self._sums = torch.stack(own).sum(0)
        if self._processes > 1:
            self._work = dist.all_reduce(self._sums, async_op=True)

    def wait(self) -> Tensor | None:
        """``joint`` of ``SetCriterion.weighted_loss``; None where a batch is the whole of it."""
        if self._joint is None and hasattr(self, "_sums"):
            if self._work is not None:
                self._work.wait()
            # Gradients are averaged over processes, hence the division.
            self._joint = torch.stack([self._sums[0].clamp(min=1), self._sums[1]]) / self._processes
        return self._joint


def _merged(parts: Sequence[dict[str, Tensor]], images: Sequence[int]) -> dict[str, Tensor]:
    """Losses of the joint batch: sums, as their normalisers are joint; what has none is a mean over images."""
    if len(parts) == 1:
        return parts[0]
    merged = {}
    for name in parts[0]:
        values = torch.stack([part[name] for part in parts])
        shares = [1.0 if name.startswith("loss") else count / sum(images) for count in images]
        merged[name] = sum((value * share for value, share in zip(values, shares, strict=True)), values.new_zeros(()))
    return merged


def _flags(pixels: Tensor, predictions: Predictions) -> Tensor:  # [B] uint8
    """Which images are not finite. Sums, because they are one pass each and keep NaN and infinity."""
    with torch.no_grad():
        of_pixels = ~pixels.sum((1, 2, 3), dtype=torch.float32).isfinite()
        of_predictions = ~(predictions.logits.sum((0, 2, 3)) + predictions.boxes.sum((0, 2, 3))).isfinite()
        return PIXELS * of_pixels.to(torch.uint8) + PREDICTIONS * of_predictions.to(torch.uint8)
