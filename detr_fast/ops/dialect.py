"""Numbers in which the code bases of the DETR family differ."""

from __future__ import annotations

from typing import NamedTuple


class Dialect(NamedTuple):
    """What keeps logarithms and divisions from zero; the defaults are those of facebookresearch/detr.

    GIoU = intersection / U - (hull - union) / H, with U = max(union, giou_floor) + giou_epsilon and H the same of the
    hull: the area of the smallest box around both.
    """

    class_epsilon: float = 1e-8  # inside the logarithms of the class cost of kind "focal"
    giou_floor: float = 0.0
    giou_epsilon: float = 0.0


DETR = Dialect()
