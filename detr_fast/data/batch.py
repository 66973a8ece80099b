"""From samples to a batch, and the order of samples: random and resumable for training, each once for evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from detr_fast.data.buckets import alike
from detr_fast.data.transforms import Sample, seeded
from detr_fast.structures import Images, Targets

ShapeOf = Callable[[int, int], tuple[int, int]]  # index and epoch -> (height, width)


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

    def tensors(self) -> list[Tensor]:
        """All that lies on a device; several may share memory."""
        images, targets = self.images, self.targets
        own = [images.pixels, images.padding, targets.labels, targets.boxes, targets.offsets, self.original_sizes]
        return [*own, *(targets.masks or ())]

    def pin_memory(self) -> Batch:
        """What a DataLoader calls that pins; targets pin themselves when they are copied."""
        images = replace(self.images, pixels=self.images.pixels.pin_memory(), padding=self.images.padding.pin_memory())
        return replace(self, images=images, original_sizes=self.original_sizes.pin_memory())


def collate(samples: Sequence[Sample], num_classes: int | None = None, canvas_multiple: int = 1) -> Batch:
    """Pads images to a common canvas and packs targets.

    The canvas is the smallest that holds all images, its height and width rounded up to ``canvas_multiple``.

    Raises:
        ValueError: a target is malformed or a label not below ``num_classes``; the message names the image id.
    """
    pixels, targets = zip(*samples, strict=True)
    image_ids = tuple(int(target["image_id"]) for target in targets)
    return Batch(
        _on_canvas(pixels, canvas_multiple),
        Targets.pack(targets, num_classes, names=[f"id {i}" for i in image_ids]),
        image_ids,
        torch.stack([target["orig_size"] for target in targets]),
    )


def canvas_of(sizes: Sequence[tuple[int, int]], multiple: int = 1) -> tuple[int, int]:
    """(height, width) that all of these fit into, rounded up to a multiple."""
    height, width = (-(-max(sides) // multiple) * multiple for sides in zip(*sizes, strict=True))
    return height, width


def _on_canvas(images: Sequence[Tensor], multiple: int) -> Images:
    sizes = tuple((image.shape[-2], image.shape[-1]) for image in images)
    height, width = canvas_of(sizes, multiple)
    pixels = torch.zeros(len(images), 3, height, width)
    padding = torch.ones(len(images), height, width, dtype=torch.bool)
    for image, kept, place in zip(images, padding, pixels, strict=True):
        place[:, : image.shape[-2], : image.shape[-1]] = image
        kept[: image.shape[-2], : image.shape[-1]] = False
    return Images(pixels, padding, sizes)


class TrainingSampler(Sampler[list[int]]):
    """Batches of indices in a random order that depends on ``(seed, epoch)`` and the images of a step only.

    Step k of an epoch takes the next ``batch_size * world_size * group`` images of that order. It consists of ``group``
    batches of every rank, one after the other, so that all ranks make the same number of batches, and a step has the
    same images however ranks, passes and batches share it. What is left over at the end is dropped, or with
    ``drop_last=False`` filled up from the start of the permutation. Give it to a DataLoader as ``batch_sampler``.

    With ``bucket_images`` and ``shape_of(index, epoch)``, as :meth:`CocoDetection.size_of`, images of like shape share
    a step: every so many images of the permutation are sorted by shape, cut into steps, and the steps shuffled. Still
    every image comes once an epoch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        *,
        group: int = 1,  # batches of each rank that make one step
        bucket_images: int = 0,
        shape_of: ShapeOf | None = None,
    ) -> None:
        _check_ranks("TrainingSampler", batch_size, rank, world_size)
        if group < 1:
            raise ValueError(f"TrainingSampler: group must be at least 1, got {group}")
        if bucket_images < 0 or (bucket_images and shape_of is None):
            raise ValueError(
                f"TrainingSampler: bucket_images must be at least 0, and 0 without shape_of, got {bucket_images}"
            )
        self.step_images = batch_size * world_size * group
        if length < 1 or (drop_last and length < self.step_images):
            passes = f", {group} times," if group > 1 else ""
            raise ValueError(
                f"TrainingSampler: a step takes {batch_size} images{passes} on each of {world_size} processes, "
                f"the data set has only {length}"
            )
        self.length, self.batch_size, self.seed, self.rank, self.world_size = length, batch_size, seed, rank, world_size
        self.drop_last, self.group, self.shape_of = drop_last, group, shape_of
        self.epoch = 0
        self.start_image = 0  # images of all ranks that are left out
        self._own_order = Order(self.step_images, bucket_images)
        self._saved_order: tuple[int, Order] | None = None  # of an epoch that was begun with other settings
        self._saved_window: dict[tuple[int, int], Tensor] = {}  # epoch and first image -> indices

    @property
    def batches(self) -> int:
        """Batches of a whole epoch, on each rank."""
        return self.batches_left(0)

    def batches_left(self, images: int) -> int:
        """Batches of an epoch, on each rank, after so many images of all ranks."""
        left = self.length - images
        return (left // self.step_images if self.drop_last else -(-left // self.step_images)) * self.group

    def set_epoch(self, epoch: int, start_image: int = 0) -> None:
        """Chooses the order; its first ``start_image`` images, of all ranks, are left out, in this epoch."""
        if not 0 <= start_image <= self.length:
            raise ValueError(f"TrainingSampler: start_image must be in [0, {self.length}], got {start_image}")
        self.epoch, self.start_image = epoch, start_image

    def __iter__(self) -> Iterator[list[int]]:
        order, epoch, left = self._order, self.epoch, self.batches_left(self.start_image)
        permutation = torch.randperm(self.length, generator=seeded(self.seed, epoch))
        fill = permutation[torch.arange(self.step_images) % self.length]
        pending = permutation[:0]
        stretches = itertools.chain(self._ordered(permutation, order, epoch, self.start_image), [fill])
        for _ in range(left // self.group):
            while len(pending) < self.step_images:
                pending = torch.cat([pending, next(stretches)])
            step, pending = pending[: self.step_images], pending[self.step_images :]
            for batch in range(self.group):
                start = (batch * self.world_size + self.rank) * self.batch_size
                yield step[start : start + self.batch_size].tolist()

    def __len__(self) -> int:
        return self.batches_left(self.start_image)

    @property
    def _order(self) -> Order:
        saved = self._saved_order
        return saved[1] if saved is not None and saved[0] == self.epoch else self._own_order

    def _ordered(self, permutation: Tensor, order: Order, epoch: int, start: int) -> Iterator[Tensor]:
        """The order from ``start`` on, in stretches: shapes are only looked at when they are needed."""
        window, whole = order.window, self.length // order.chunk * order.chunk
        if window:
            for first in range(start // window * window, whole, window):
                yield self._window(permutation, order, epoch, first)[max(start - first, 0) :]
            start = max(start, whole)
        yield permutation[start:]

    def _window(self, permutation: Tensor, order: Order, epoch: int, first: int) -> Tensor:
        """The images among which like shapes were looked for, in their order."""
        if (saved := self._saved_window.get((epoch, first))) is not None:
            return saved
        assert self.shape_of is not None
        chunk = order.chunk
        indices = permutation[first : min(first + order.window, self.length // chunk * chunk)]
        shapes = np.array([self.shape_of(index, epoch) for index in indices.tolist()])
        chunks = indices[torch.from_numpy(alike(shapes, chunk))].view(-1, chunk)
        return chunks[torch.randperm(len(chunks), generator=seeded(self.seed, epoch, first))].flatten()

    def state_dict(self, images: int) -> dict[str, Any]:
        """The place after ``images`` images, of all ranks, of this epoch.

        The caller says how many were trained on (of the epoch, not since a resume): workers fetch ahead, so the sampler
        cannot know.
        """
        order = self._order
        state = {"epoch": self.epoch, "images": images, "seed": self.seed, "length": self.length}
        state |= {"chunk": order.chunk, "bucket_images": order.bucket_images}
        first = images // order.window * order.window if order.window else images
        if first == images or first >= self.length // order.chunk * order.chunk:
            return state
        # Sizes may be others when it is finished, and then so would its order.
        permutation = torch.randperm(self.length, generator=seeded(self.seed, self.epoch))
        return state | {"window": self._window(permutation, order, self.epoch, first).tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues at a saved place, for the rest of the epoch in the order in which it was begun.

        Batch size, number of processes, ``bucket_images`` and the sizes of images may be others. ``start_image`` is the
        place.

        Raises:
            ValueError: the data set has another length or the order another seed, so that there is no such place.
        """
        for name in ("seed", "length"):
            if state[name] != getattr(self, name):
                raise ValueError(f"TrainingSampler: {name} was {state[name]} when saved, is {getattr(self, name)} now")
        order = Order(state.get("chunk", self.step_images), state.get("bucket_images", 0))
        if order.bucket_images and self.shape_of is None:
            raise ValueError("TrainingSampler: the saved order is by shape, but shape_of is None")
        self._saved_order = (state["epoch"], order)
        self._saved_window = {}
        if "window" in state:
            first = state["images"] // order.window * order.window
            self._saved_window = {(state["epoch"], first): torch.tensor(state["window"])}
        self.set_epoch(state["epoch"], min(state["images"], self.length))


@dataclass(frozen=True)
class Order:
    """How a permutation is sorted by shape."""

    chunk: int  # images that stay together
    bucket_images: int  # among which like shapes are looked for; 0: not at all

    @property
    def window(self) -> int:
        """``bucket_images`` in whole chunks."""
        return max(self.bucket_images // self.chunk, 1) * self.chunk if self.bucket_images else 0


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
