"""A batch as workers decode it: bytes of image files and what is to be computed from them, in one piece of memory.

Nothing is padded before the device: a photograph travels as 1 MB instead of the 10 MB of its resized floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from detr_fast.data.batch import Batch, canvas_of
from detr_fast.data.resample import CHANNELS, Stretch, Taps, levels, normalised, padding_of, stretched
from detr_fast.data.sketch import RawImage
from detr_fast.data.transforms import Target
from detr_fast.structures import Images, Targets

Shape = tuple[int, ...]


@dataclass(frozen=True)
class RawBatch:
    """Encloses targets, resampling tables and pixels; :meth:`finished` makes a :class:`Batch` of it on its device."""

    memory: Tensor  # [bytes] uint8
    parts: tuple[tuple[Shape, torch.dtype], ...]  # what lies in it, in order; at its end the pixels of all files
    sizes: tuple[tuple[int, int], ...]  # (height, width) of each finished image
    canvas: tuple[int, int]  # height and width
    max_count: int  # most targets of one image
    image_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    def pin_memory(self) -> RawBatch:
        return replace(self, memory=self.memory.pin_memory())

    def to(self, device: torch.device | str) -> RawBatch:
        """In one copy, asynchronous from pinned memory."""
        return replace(self, memory=self.memory.to(device, non_blocking=True))

    def finished(self) -> Batch:
        """Resamples and normalises: the same bits as the transforms on Pillow images, without synchronisation.

        The number of operators depends on the number of resizes of one image and on their taps, not on the images.
        """
        labels, original_sizes, boxes, values, offsets, sizes, *tables, source = self._unpacked()
        canvas = source
        for first in range(0, len(tables), 5):
            canvas = stretched(source, Stretch(*tables[first : first + 5]))
            if first + 5 < len(tables):
                source = torch.cat([canvas.view(-1, CHANNELS), source])
        padding = padding_of(sizes, self.canvas)
        images = Images(normalised(canvas, padding, values), padding, self.sizes)
        return Batch(images, Targets(labels, boxes, offsets, self.max_count), self.image_ids, original_sizes)

    def _unpacked(self) -> list[Tensor]:
        """Views of the memory: its parts, then the pixels ``[n, 3]``."""
        sizes = [_bytes(part) for part in self.parts]
        *pieces, pixels = self.memory.split([*sizes, len(self.memory) - sum(sizes)])
        views = [piece.view(kind).view(shape) for piece, (shape, kind) in zip(pieces, self.parts, strict=True)]
        return [*views, pixels.view(-1, CHANNELS)]


def collate_raw(
    samples: Sequence[tuple[RawImage, Target]], num_classes: int | None = None, canvas_multiple: int = 1
) -> RawBatch:
    """Packs a batch; see :func:`collate` for the arguments.

    Raises:
        ValueError: a target is malformed, a label not below ``num_classes``, or there are masks; the message names the
            image id.
    """
    images, targets = zip(*samples, strict=True)
    image_ids = tuple(int(target["image_id"]) for target in targets)
    for identity, target in zip(image_ids, targets, strict=True):
        if "masks" in target:
            raise ValueError(
                f"collate_raw: targets must have no masks, image id {identity} has: transform it in workers"
            )
    packed = Targets.pack(targets, num_classes, names=[f"id {i}" for i in image_ids])
    sizes = tuple((image.sketch.height, image.sketch.width) for image in images)
    canvas = canvas_of(sizes, canvas_multiple)
    tables, slack = _tables(images, canvas)
    original_sizes = torch.stack([target["orig_size"] for target in targets])
    # The widest types first, so that every part is aligned.
    parts = [packed.labels, original_sizes, packed.boxes, _levels_of(images), packed.offsets]
    parts += [torch.tensor(sizes, dtype=torch.int32), *map(torch.from_numpy, tables)]
    pieces = [part.numpy() for part in parts] + [image.pixels for image in images]
    memory = _joined([*pieces, np.zeros(slack * CHANNELS, np.uint8)])
    described = tuple((tuple(part.shape), part.dtype) for part in parts)
    return RawBatch(memory, described, sizes, canvas, packed.max_count, image_ids)


def _levels_of(images: Sequence[RawImage]) -> Tensor:
    found = {(image.sketch.mean, image.sketch.std) for image in images}
    mean, std = found.pop()
    if found or not mean:
        raise ValueError("collate_raw: all images must have been normalised, with the same mean and std")
    return levels(mean, std)


def _bytes(part: tuple[Shape, torch.dtype]) -> int:
    shape, kind = part
    return torch.Size(shape).numel() * kind.itemsize


def _joined(pieces: Sequence[np.ndarray]) -> Tensor:  # [bytes] uint8
    memory = torch.empty(sum(piece.nbytes for piece in pieces), dtype=torch.uint8)
    place, start = memory.numpy(), 0
    for piece in pieces:
        place[start : start + piece.nbytes] = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        start += piece.nbytes
    return memory


def _tables(images: Sequence[RawImage], canvas: tuple[int, int]) -> tuple[list[np.ndarray], int]:
    """Five arrays for each resize in turn, see :class:`Stretch`, and by how many pixels the source must be longer.

    The last resize is that of every image, an earlier one only of the images that have so many. Each resize puts its
    canvas before the source of the next one.
    """
    plans = [_Plan(tuple(i.sketch.columns.taps()), tuple(i.sketch.rows.taps()), i.pixels.shape[1]) for i in images]
    offsets = np.cumsum([0, *(image.pixels.shape[0] * image.pixels.shape[1] for image in images)])
    depth = max(len(plan) for plan in plans)
    tables: list[np.ndarray] = []
    shift, slack, shape = 0, 0, (0, 0)
    for left in range(depth, 0, -1):  # resizes that are left to do
        chosen = [index for index, plan in enumerate(plans) if len(plan) >= left]
        sources, place = [], 0
        for index in chosen:
            if len(plans[index]) == left:
                sources.append((int(offsets[index]) + shift, plans[index].width))
            else:
                sources.append((place * shape[0] * shape[1], shape[1]))
                place += 1
        steps = [(plans[index].columns[-left], plans[index].rows[-left]) for index in chosen]
        own = (max(len(rows) for _, rows in steps), max(len(columns) for columns, _ in steps))
        shape = canvas if left == 1 else own
        tables += _stretch(steps, sources, shape)
        slack = max(slack, len(tables[-3]))
        shift += len(chosen) * shape[0] * shape[1]
    return tables, slack


@dataclass(frozen=True)
class _Plan:
    """The resizes of one image."""

    columns: tuple[Taps, ...]
    rows: tuple[Taps, ...]
    width: int  # of the file

    def __len__(self) -> int:
        return len(self.columns)


def _stretch(
    steps: Sequence[tuple[Taps, Taps]],  # columns and rows of each image
    sources: Sequence[tuple[int, int]],  # its first pixel and the pixels of a line
    shape: tuple[int, int],
) -> list[np.ndarray]:
    count, (height, width) = len(steps), shape
    column_taps = max(len(columns.weights) for columns, _ in steps)
    row_taps = max(len(rows.weights) for _, rows in steps)
    first_lines = [int(rows.starts.min()) for _, rows in steps]
    line_count = row_taps + max(
        int(rows.starts.max()) - first for (_, rows), first in zip(steps, first_lines, strict=True)
    )
    lines = np.zeros((count, line_count), np.int32)
    column_starts, row_starts = np.zeros((count, width), np.int32), np.zeros((count, height), np.int32)
    column_weights = np.zeros((column_taps, count, width), np.int32)
    row_weights = np.zeros((row_taps, count, height), np.int32)
    for image, ((columns, rows), (base, stride), first) in enumerate(zip(steps, sources, first_lines, strict=True)):
        lines[image] = base + np.minimum(first + np.arange(line_count), rows.end - 1) * stride
        column_starts[image, : len(columns)] = columns.starts
        column_weights[: len(columns.weights), image, : len(columns)] = columns.weights
        row_starts[image, : len(rows)] = rows.starts - first
        row_weights[: len(rows.weights), image, : len(rows)] = rows.weights
    return [lines, column_starts, column_weights, row_starts, row_weights]
