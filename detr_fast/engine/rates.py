"""What the loop measures of itself: images a second, time spent waiting for data, memory, the share of valid pixels."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from detr_fast.data.batch import Batch


@dataclass
class _Counts:
    started: float = field(default_factory=time.monotonic)
    waited: float = 0.0  # seconds
    images: int = 0
    valid: int = 0  # pixels inside images
    pixels: int = 0  # of all canvases


class Rates:
    """Counts since the last line of the log and since the epoch's start; nothing of it waits for a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.interval, self.epoch = _Counts(), _Counts()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; how long each was waited for is counted."""
        while True:
            before = time.monotonic()
            with torch.profiler.record_function("data"):
                batch = next(batches, None)
            waited = time.monotonic() - before
            for counts in (self.interval, self.epoch):
                counts.waited += waited
            if batch is None:
                return
            yield batch

    def add(self, batch: Batch, images: int) -> None:
        """A batch of this process, and the images of the same pass on all processes."""
        height, width = batch.images.pixels.shape[-2:]
        for counts in (self.interval, self.epoch):
            counts.images += images
            counts.valid += sum(h * w for h, w in batch.images.sizes)
            counts.pixels += len(batch) * height * width

    def read(self) -> dict[str, float]:
        """Of the interval, which starts anew."""
        found = self._values(self.interval)
        self.interval = _Counts()
        return found

    def of_epoch(self) -> dict[str, float]:
        return self._values(self.epoch)

    def _values(self, counts: _Counts) -> dict[str, float]:
        elapsed = max(time.monotonic() - counts.started, 1e-9)
        return {
            "images_per_second": counts.images / elapsed,
            "data_share": counts.waited / elapsed,
            "valid_pixels": counts.valid / max(counts.pixels, 1),
            "memory_gib": memory_gib(self.device),
        }


def memory_gib(device: torch.device) -> float:
    """The most memory that tensors took on a GPU, or this process in all on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def rates_text(values: dict[str, float]) -> str:
    """``130.2 images/s, 3 % waiting for data, 1.4 GiB``."""
    return (
        f"{values['images_per_second']:.1f} images/s, {values['data_share']:.0%} waiting for data, "
        f"{values['memory_gib']:.2f} GiB"
    )
