"""Puts images of like shape beside each other, so that batches of neighbours pad little."""

from __future__ import annotations

import numpy as np


def alike(
    shapes: np.ndarray,  # [n, 2] (height, width)
    chunk: int,  # images of a step; n is a multiple of it
) -> np.ndarray:  # [n] int64
    """An order in which every ``chunk`` images from a multiple of it on, and parts of these, have like shapes.

    Halves the images at the side that differs most, in whole chunks, until one is left, then the chunk itself. The same
    shapes give the same order.
    """
    return np.concatenate(_split(np.log(shapes.astype(np.float64)), np.arange(len(shapes)), chunk))


def _split(sides: np.ndarray, places: np.ndarray, unit: int) -> list[np.ndarray]:
    if len(places) <= unit:
        unit = 1
    if len(places) <= unit:
        return [places]
    own = sides[places]
    axis = int((own.max(0) - own.min(0)).argmax())
    places = places[np.argsort(own[:, axis], kind="stable")]
    if len(places) <= 2:
        return [places]
    middle = len(places) // unit // 2 * unit
    return [*_split(sides, places[:middle], unit), *_split(sides, places[middle:], unit)]
