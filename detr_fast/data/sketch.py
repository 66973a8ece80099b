"""A stand-in for an image: passes through the transforms, remembers what they did, and has no pixels.

The transforms stay the one definition of what is done to an image; a sketch tells its final size without the file, and
what to compute from the file's pixels elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image

from detr_fast.data.resample import Taps, bilinear_taps


@dataclass(frozen=True)
class Part:
    """So many elements of a side from `first` on, in reverse order if `mirrored`."""

    first: int
    length: int
    mirrored: bool = False

    def cut(self, first: int, length: int) -> Part:
        skipped = self.length - first - length if self.mirrored else first
        return Part(self.first + skipped, length, self.mirrored)


@dataclass(frozen=True)
class Side:
    """One side of an image: its resizes so far, each as what it saw and made, and what is left of the last."""

    left: Part
    resizes: tuple[tuple[Part, int], ...] = ()

    def resize(self, length: int) -> Side:
        return Side(Part(0, length), (*self.resizes, (self.left, length)))

    def taps(self) -> Iterator[Taps]:
        """Of each resize, for what is used of its result. The first reads the file's side, the others the one before.

        Without any resize, those of one to the same length, which changes nothing.
        """
        resizes = self.resizes or ((self.left, self.left.length),)
        used = [seen for seen, _ in self.resizes[1:]] + [self.left if self.resizes else Part(0, self.left.length)]
        for index, ((seen, length), part) in enumerate(zip(resizes, used, strict=True)):
            taps = bilinear_taps(seen.length, length).part(part.first, part.length, part.mirrored)
            yield taps if index else taps.reading(seen.first, seen.length, seen.mirrored)


@dataclass(frozen=True)
class Sketch:
    """Has the size of an image, and of its methods those that the transforms use."""

    columns: Side
    rows: Side
    mean: tuple[float, ...] = ()  # of the normalisation, the last step; empty before it
    std: tuple[float, ...] = ()

    @classmethod
    def of_size(cls, width: int, height: int) -> Sketch:
        return cls(Side(Part(0, width)), Side(Part(0, height)))

    @property
    def width(self) -> int:
        return self.columns.left.length

    @property
    def height(self) -> int:
        return self.rows.left.length

    def resize(
        self,
        size: tuple[int, int],  # (width, height)
        resample: Image.Resampling,
    ) -> Sketch:
        if resample != Image.Resampling.BILINEAR:
            raise ValueError(f"Sketch.resize: resample must be BILINEAR, got {resample!r}")
        if size[1] != self.height and rows_come_first((self.width, self.height), size):
            half = replace(self, columns=self.columns.resize(self.width), rows=self.rows.resize(size[1]))
            return replace(half, columns=half.columns.resize(size[0]), rows=half.rows.resize(size[1]))
        return replace(self, columns=self.columns.resize(size[0]), rows=self.rows.resize(size[1]))

    def crop(
        self,
        box: tuple[int, int, int, int],  # (left, top, right, bottom)
    ) -> Sketch:
        left, top, right, bottom = box
        if not (0 <= left < right <= self.width and 0 <= top < bottom <= self.height):
            raise ValueError(f"Sketch.crop: box must lie in the {self.width}x{self.height} image, got {box}")
        columns = replace(self.columns, left=self.columns.left.cut(left, right - left))
        rows = replace(self.rows, left=self.rows.left.cut(top, bottom - top))
        return replace(self, columns=columns, rows=rows)

    def transpose(self, method: Image.Transpose) -> Sketch:
        if method != Image.Transpose.FLIP_LEFT_RIGHT:
            raise ValueError(f"Sketch.transpose: method must be FLIP_LEFT_RIGHT, got {method!r}")
        left = replace(self.columns.left, mirrored=not self.columns.left.mirrored)
        return replace(self, columns=replace(self.columns, left=left))

    def normalise(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Sketch:
        return replace(self, mean=mean, std=std)


@dataclass(frozen=True)
class RawImage:
    """The pixels of an image file and what is still to be done to them."""

    pixels: np.ndarray  # [height, width, 3] uint8
    sketch: Sketch


def rows_come_first(
    before: tuple[int, int],  # (width, height)
    after: tuple[int, int],
) -> bool:
    """Whether this version of Pillow resizes rows before columns, which rounds differently.

    Pillow 13 does where the height loses more than twice what the width loses, Pillow 12 where an image is more than
    100 times as high as wide and loses height, older ones never.
    """
    lost = before[1] - after[1]
    if lost <= 0:
        return False
    if _puts_rows_first((10, 30), (14, 10)):
        return lost > 2 * (before[0] - after[0])
    return before[1] > 100 * before[0] and _puts_rows_first((1, 110), (5, 50))


@cache
def _puts_rows_first(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Asks Pillow itself: with these sizes the order shows in the pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (before[1], before[0], 3), dtype=np.uint8)
    image, bilinear = Image.fromarray(noise), Image.Resampling.BILINEAR
    in_order = image.resize((before[0], after[1]), bilinear).resize(after, bilinear)
    return image.resize(after, bilinear).tobytes() == in_order.tobytes()
