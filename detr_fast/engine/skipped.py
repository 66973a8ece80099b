"""Steps that were left out because their loss or gradient was not finite: counted on the device, named when read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detr_fast.engine.distributed import Processes
from detr_fast.engine.step import PIXELS, PREDICTIONS, StepResult


@dataclass(frozen=True)
class Skipped:
    """What was left out since the last look."""

    count: int
    longest: int  # in a row
    reasons: tuple[str, ...]  # of the first of them, with the images


class SkippedSteps:
    """Counts steps that were left out and keeps what was found in the first few; adding a step waits for nothing."""

    KEPT = 8  # steps that are described between two looks

    def __init__(self, device: torch.device) -> None:
        # Left out since the last look, in a row until now, in a row at most since the last look, in the whole run.
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)
        self.names: tuple[str, ...] = ()
        self.rows = torch.empty(self.KEPT, 0, dtype=torch.float64, device=device)  # [KEPT, step + losses + images]

    def add(self, result: StepResult, step: int) -> None:
        losses = [value.double() for value in result.losses.values()]
        row = torch.cat([torch.stack([torch.full_like(losses[0], step), *losses]), result.flags.double()])
        if self.rows.shape[1] != len(row):
            self.names = tuple(result.losses)
            self.rows = row.new_zeros(self.KEPT, len(row))
        skipped = result.was_skipped.long()
        place = self.counts[0].clamp(max=self.KEPT - 1).view(1)
        kept = self.rows.index_select(0, place)
        is_new = result.was_skipped & (self.counts[0] < self.KEPT)
        self.rows.index_copy_(0, place, torch.where(is_new, row, kept))
        in_a_row = (self.counts[1] + 1) * skipped
        since, _, longest, total = self.counts.unbind()
        self.counts = torch.stack([since + skipped, in_a_row, torch.maximum(longest, in_a_row), total + skipped])

    def read(self, image_ids: Mapping[int, Sequence[int]], processes: Processes) -> Skipped | None:
        """What was left out since the last look, or None. Waits for the device; all processes must call.

        ``image_ids`` are those of each step on this process, in the order of its flags.
        """
        since, in_a_row, longest, total = self.counts.tolist()
        if since == 0:
            return None
        self.counts = torch.tensor([0, in_a_row, 0, total], device=self.counts.device)
        found = [self._found(row, image_ids) for row in self.rows[:since].tolist()]
        by_step = zip(*processes.gather(found), strict=True)
        return Skipped(since, longest, tuple(_reason(parts) for parts in by_step))

    def _found(self, row: list[float], image_ids: Mapping[int, Sequence[int]]) -> _Found:
        step, values, flags = int(row[0]), row[1 : 1 + len(self.names)], row[1 + len(self.names) :]
        ids = image_ids.get(step, ())
        marked = {
            flag: tuple(image for image, mark in zip(ids, flags, strict=False) if int(mark) & flag)
            for flag in (PIXELS, PREDICTIONS)
        }
        bad = {name: value for name, value in zip(self.names, values, strict=True) if not math.isfinite(value)}
        return _Found(step, tuple(ids), marked[PIXELS], marked[PREDICTIONS], bad)

    @property
    def total(self) -> int:
        """Of the whole run. Waits for the device."""
        return int(self.counts[3])

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts.to("cpu", copy=True)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        counts: Tensor = state["counts"]
        self.counts = counts.to(self.counts.device, copy=True)


@dataclass(frozen=True)
class _Found:
    """One step on one process."""

    step: int
    images: tuple[int, ...]
    pixels: tuple[int, ...]  # images whose pixels are not finite
    predictions: tuple[int, ...]  # images whose predictions are not finite
    losses: dict[str, float]  # that are not finite


def _reason(parts: Sequence[_Found]) -> str:
    """The narrowest cause: pixels, else predictions of some images, else a loss or the gradient of all."""
    images = [image for part in parts for image in part.images]
    pixels = [image for part in parts for image in part.pixels]
    predictions = [image for part in parts for image in part.predictions]
    losses = {name: value for part in parts for name, value in part.losses.items()}
    if pixels:
        return f"step {parts[0].step + 1}: pixels of {_named(pixels)} are not finite"
    if 0 < len(predictions) < len(images):
        return f"step {parts[0].step + 1}: predictions of {_named(predictions)} are not finite"
    of_losses = [name for name in losses if name.startswith("loss")] or list(losses)
    listed = ", ".join(f"{name} = {losses[name]}" for name in of_losses)
    return f"step {parts[0].step + 1}, {_named(images)}: {listed}"


def _named(images: Sequence[int]) -> str:
    if not images:
        return "unknown images"
    return f"image id{'s' if len(images) > 1 else ''} {', '.join(map(str, images))}"
