"""One training step, from a batch on the host to new weights. Nothing is read back from a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast.data.batch import Batch
from detr_fast.engine.errors import TrainingError
from detr_fast.engine.optimizer import learning_rate_factor, set_learning_rates
from detr_fast.engine.run import Run


def training_step(run: Run, batch: Batch) -> None:
    """Forward, losses, backward, clipping and update.

    Raises:
        TrainingError: on a CPU, where looking is free, a loss or gradient is not finite; the weights are untouched.
            On a GPU it is found by the next :func:`check_finite`.
    """
    place, optimizer = run.place, run.optimizer
    set_learning_rates(optimizer, learning_rate_factor(run.config.schedule, place.step, place.epoch))
    images, targets = batch.images.to(run.device), batch.targets.to(run.device)
    try:
        with torch.autocast(run.device.type, run.precision, enabled=run.precision != torch.float32):
            predictions = run.parallel(images)
        total, losses = run.criterion.weighted_loss(predictions, targets)
    except ValueError as error:
        if not str(error).startswith("HungarianMatcher"):  # which on a CPU looks at every cost
            raise
        raise TrainingError(_failure(run, place.step, batch.image_ids, str(error))) from error
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    norm = clip_gradients(optimizer, run.config.optimizer.clip_norm)
    run.sums.add(total, {**losses, "gradient_norm": norm}, place.step)
    if run.device.type == "cpu":
        check_finite(run, {place.step: batch.image_ids})
    optimizer.step()


def clip_gradients(optimizer: torch.optim.Optimizer, largest: float) -> Tensor:
    """Scales all gradients to a common norm of at most ``largest`` (0: any); returns the norm before."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
    if largest > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm, foreach=True)
    return norm


def check_finite(run: Run, image_ids: dict[int, tuple[int, ...]]) -> None:
    """Raises a TrainingError if any step was not finite; ``image_ids`` are those of each step. Waits for the device."""
    step = run.sums.first_bad_step()
    if step < 0:
        return
    terms = ", ".join(f"{name} = {value}" for name, value in run.sums.read("interval").items() if value - value != 0)
    raise TrainingError(_failure(run, step, image_ids.get(step, ()), f"not finite: {terms}"))


def _failure(run: Run, step: int, image_ids: tuple[int, ...], reason: str) -> str:
    images = ", ".join(map(str, image_ids)) or "unknown"
    good = f"last good checkpoint: {run.last_good}" if run.last_good else "there is no checkpoint yet"
    # Counted from 1, as on the terminal; the log counts from 0.
    return f"step {step + 1} of epoch {run.place.epoch + 1}, image ids {images}: {reason}; {good}"
