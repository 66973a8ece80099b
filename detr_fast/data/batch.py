"""From samples to a batch, and the order of samples: random and resumable for training, each once for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from detr_fast.data.transforms import Sample, seeded
from detr_fast.structures import Images, Targets


@dataclass(frozen=True)
class Batch:
    """Images with their targets."""

    images: Images
    targets: Targets
    image_ids: tuple[int, ...]
    original_sizes: Tensor  # [B, 2] int64 (height, width) of the image files

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device | str) -> Batch:
        """On another device; asynchronous from pinned memory."""
        return Batch(
            self.images.to(device),
            self.targets.to(device),
            self.image_ids,
            self.original_sizes.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """What a DataLoader calls that pins; targets pin themselves when they are copied."""
        images = replace(self.images, pixels=self.images.pixels.pin_memory(), padding=self.images.padding.pin_memory())
        return replace(self, images=images, original_sizes=self.original_sizes.pin_memory())


def collate(samples: Sequence[Sample], num_classes: int | None = None) -> Batch:
    """Pads images to a common canvas and packs targets.

    Raises:
        ValueError: a target is malformed or a label not below ``num_classes``; the message names the image id.
    """
    pixels, targets = zip(*samples, strict=True)
    image_ids = tuple(int(target["image_id"]) for target in targets)
    return Batch(
        Images.batch(pixels),
        Targets.pack(targets, num_classes, names=[f"id {i}" for i in image_ids]),
        image_ids,
        torch.stack([target["orig_size"] for target in targets]),
    )


class TrainingSampler(Sampler[list[int]]):
    """Batches of indices in a random order that depends on ``(seed, epoch)`` only.

    Step k of an epoch takes the next ``batch_size * world_size`` indices of the permutation and each rank its part, so
    all ranks make the same number of steps. What is left over at the end is dropped, or with ``drop_last=False`` filled
    up from the start of the permutation. Give it to a DataLoader as ``batch_sampler``.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, drop_last: bool = True
    ) -> None:
        _check_ranks("TrainingSampler", batch_size, rank, world_size)
        step = batch_size * world_size
        if length < 1 or (drop_last and length < step):
            raise ValueError(
                f"TrainingSampler: a step takes {batch_size} images on each of {world_size} processes, "
                f"the data set has only {length}"
            )
        self.length, self.batch_size, self.seed, self.rank, self.world_size = length, batch_size, seed, rank, world_size
        self.batches = length // step if drop_last else -(-length // step)
        self.epoch = 0
        self.start_batch = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Chooses the order; the first ``start_batch`` batches are left out, in this epoch."""
        if not 0 <= start_batch <= self.batches:
            raise ValueError(f"TrainingSampler: start_batch must be in [0, {self.batches}], got {start_batch}")
        self.epoch, self.start_batch = epoch, start_batch

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.length, generator=seeded(self.seed, self.epoch))
        step = self.batch_size * self.world_size
        for batch in range(self.start_batch, self.batches):
            start = batch * step + self.rank * self.batch_size
            yield order[torch.arange(start, start + self.batch_size) % self.length].tolist()

    def __len__(self) -> int:
        return self.batches - self.start_batch

    def state_dict(self, batch: int) -> dict[str, int]:
        """The place before batch ``batch`` of this epoch.

        The caller says how many batches were trained on (of the epoch, not since a resume): workers fetch ahead, so the
        sampler cannot know.
        """
        images = batch * self.batch_size * self.world_size
        return {"epoch": self.epoch, "images": images, "seed": self.seed, "length": self.length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues at a saved place. With another batch size or number of processes, at the batch it lies in.

        Raises:
            ValueError: the data set has another length or the order another seed, so that there is no such place.
        """
        for name in ("seed", "length"):
            if state[name] != getattr(self, name):
                raise ValueError(f"TrainingSampler: {name} was {state[name]} when saved, is {getattr(self, name)} now")
        batch = state["images"] // (self.batch_size * self.world_size)
        self.set_epoch(state["epoch"], min(batch, self.batches))


class EvaluationSampler(Sampler[list[int]]):
    """Every index exactly once over all ranks, in order; ranks may have different numbers of batches."""

    def __init__(self, length: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        _check_ranks("EvaluationSampler", batch_size, rank, world_size)
        self.indices = range(rank, length, world_size)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield list(self.indices[start : start + self.batch_size])

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)


def _check_ranks(name: str, batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"{name}: batch_size must be at least 1, got {batch_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"{name}: rank must be in [0, {world_size}), got {rank}")
