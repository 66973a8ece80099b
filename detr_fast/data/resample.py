"""Pillow's bilinear resize for a whole batch in PyTorch operators, equal to the bit, on any device.

Pillow resizes 8-bit images in whole numbers: columns first, then rows, each pass a sum of bytes times weights of 22
fractional bits, rounded to a byte. The weights are made here in NumPy, from sizes alone, so that workers can make them;
the sums follow in operators whose number depends on the taps, not on the images.
Source: Resample.c of Pillow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

FRACTION_BITS = 22  # of a weight; 255 times the weights of a sum then fits 32 bits
CHANNELS = 3


@dataclass(frozen=True)
class Taps:
    """What every element of one side is a weighted sum of: so many elements of another side from `starts` on."""

    starts: np.ndarray  # [n] int32; starts + taps <= the other side's length
    weights: np.ndarray  # [taps, n] int32, 22 fractional bits

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def end(self) -> int:
        """One past the last element that is read."""
        return int(self.starts.max()) + len(self.weights)

    def part(self, first: int, length: int, mirrored: bool) -> Taps:
        """Only the elements from `first` on, in reverse order if `mirrored`."""
        chosen = slice(first, first + length)
        starts, weights = self.starts[chosen], self.weights[:, chosen]
        return Taps(starts[::-1], weights[:, ::-1]) if mirrored else Taps(starts, weights)

    def reading(self, first: int, length: int, mirrored: bool) -> Taps:
        """The same sums over a part of a longer side: the `length` elements from `first` on, mirrored or not."""
        if not mirrored:
            return Taps(self.starts + np.int32(first), self.weights)
        return Taps(np.int32(first + length - len(self.weights)) - self.starts, self.weights[::-1])


@lru_cache(maxsize=256)
def bilinear_taps(source: int, length: int) -> Taps:
    """From a side of `source` elements to one of `length`, antialiased, as Pillow computes it in double precision."""
    scale = source / length
    support = max(scale, 1.0)
    centers = (np.arange(length) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    stop = np.minimum((centers + support + 0.5).astype(np.int64), source)
    most = int((stop - first).max())
    positions = first + np.arange(most)[:, None]  # [taps, n]
    shares = np.maximum(1 - np.abs((positions - centers + 0.5) * (1 / support)), 0)
    shares[positions >= stop] = 0
    total = np.zeros(length)
    for row in shares:  # in Pillow's order, as the sum's last bit may depend on it
        total += row
    weights = (shares / total * (1 << FRACTION_BITS) + 0.5).astype(np.int32)
    most = int(np.flatnonzero(weights.any(1))[-1]) + 1
    # Taps without weight at the end of the side would lie outside of it: they move to the front.
    excess = np.maximum(first + most - source, 0)
    weights = np.take_along_axis(weights, (np.arange(most)[:, None] - excess) % most, 0)
    return Taps((first - excess).astype(np.int32), weights)


@dataclass(frozen=True)
class Stretch:
    """One resize of several images, each from its place among the pixels of a common source to a common canvas.

    Places past an image's own size are filled with whatever comes handy.
    """

    lines: Tensor  # [n, R] int32, first pixel of every line of the source that is read
    column_starts: Tensor  # [n, W] int32, in pixels from there
    column_weights: Tensor  # [column taps, n, W] int32
    row_starts: Tensor  # [n, H] int32, in lines
    row_weights: Tensor  # [row taps, n, H] int32


def stretched(
    source: Tensor,  # [pixels, 3] uint8, as many pixels longer than what is read as there are column taps
    stretch: Stretch,
) -> Tensor:  # [n, H, W, 3] uint8
    """Columns, then rows, with Pillow's rounding after each."""
    taps, count, width = stretch.column_weights.shape
    lines = stretch.lines.shape[1]
    places = (stretch.lines[:, :, None] + stretch.column_starts[:, None]).view(-1)
    # A weight for every byte: loops over three bytes at a time are slow on a CPU.
    weights = stretch.column_weights[..., None].expand(-1, -1, -1, CHANNELS).reshape(taps, count, 1, width * CHANNELS)
    wide = _sums(source, places, weights, (count, lines, width * CHANNELS))
    first_lines = torch.arange(0, count * lines, lines, dtype=torch.int32, device=source.device)
    rows = (stretch.row_starts + first_lines[:, None]).view(-1)
    height = stretch.row_starts.shape[1]
    weights = stretch.row_weights.reshape(-1, count * height, 1)
    tall = _sums(wide.view(count * lines, -1), rows, weights, (count * height, width * CHANNELS))
    return tall.view(count, height, width, CHANNELS)


def _sums(
    source: Tensor,  # [elements, bytes] uint8
    places: Tensor,  # [n] int32, of the first tap
    weights: Tensor,  # [taps, ...] int32, broadcast to the shape
    shape: tuple[int, ...],
) -> Tensor:  # uint8
    sums = torch.full(shape, 1 << (FRACTION_BITS - 1), dtype=torch.int32, device=source.device)
    for tap, weight in enumerate(weights):
        sums.addcmul_(source[tap:].index_select(0, places).view(shape), weight)
    # Neither below 0 nor, as weights of one sum exceed 1 by less than taps / 2^23, above 255.
    return sums.bitwise_right_shift_(FRACTION_BITS).to(torch.uint8)


def levels(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:  # [3 * 256 + 1] float32
    """What every byte of each channel is after normalisation, and at the end 0, which padding is.

    Looked up instead of computed, because GPUs divide by multiplying with the reciprocal.
    """
    values = torch.arange(256, dtype=torch.float32).div_(255).expand(CHANNELS, -1)
    values = (values - torch.tensor(mean)[:, None]).div_(torch.tensor(std)[:, None])
    return torch.cat([values.flatten(), torch.zeros(1)])


def normalised(
    canvas: Tensor,  # [B, H, W, 3] uint8
    padding: Tensor,  # [B, H, W] bool
    values: Tensor,  # [3 * 256 + 1] float32, see levels
) -> Tensor:  # [B, 3, H, W] float32
    count, height, width, _ = canvas.shape
    channels = torch.arange(0, CHANNELS * 256, 256, dtype=torch.int32, device=canvas.device).view(-1, 1, 1)
    places = canvas.permute(0, 3, 1, 2).contiguous() + channels
    places = places.masked_fill_(padding[:, None], CHANNELS * 256)
    return values.index_select(0, places.view(-1)).view(count, CHANNELS, height, width)


def padding_of(
    sizes: Tensor,  # [B, 2] int32 (height, width)
    canvas: tuple[int, int],
) -> Tensor:  # [B, height, width] bool, True = padding
    height, width = canvas
    below = torch.arange(height, dtype=torch.int32, device=sizes.device) >= sizes[:, :1]
    right = torch.arange(width, dtype=torch.int32, device=sizes.device) >= sizes[:, 1:]
    return below[:, :, None] | right[:, None]
