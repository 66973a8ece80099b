"""Assignments for those who have NumPy and no PyTorch: trackers, evaluation scripts.

python docs/examples/numpy_users.py
"""

from __future__ import annotations

import sys

import numpy as np

from detr_fast.numpy import linear_sum_assignment


def match_boxes(found: np.ndarray, known: np.ndarray, least_iou: float = 0.5) -> list[tuple[int, int]]:
    """Pairs (found, known) of boxes ``[n, 4]`` (x1, y1, x2, y2) of largest total IoU; each at least `least_iou`."""
    low = np.maximum(found[:, None, :2], known[None, :, :2])
    high = np.minimum(found[:, None, 2:], known[None, :, 2:])
    overlap = (high - low).clip(0).prod(-1)
    area_found, area_known = ((boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (found, known))
    iou = overlap / (area_found[:, None] + area_known[None] - overlap)
    rows, columns = linear_sum_assignment(iou, maximize=True)  # SciPy's signature, order and errors
    return [(int(r), int(c)) for r, c in zip(rows, columns, strict=True) if iou[r, c] >= least_iou]


def main() -> list[tuple[int, int]]:
    found = np.array([[0, 0, 10, 10], [20, 20, 30, 30], [21, 21, 31, 31], [50, 50, 60, 60]], float)
    known = np.array([[21, 21, 30, 31], [1, 0, 10, 10], [80, 80, 90, 90]], float)
    return match_boxes(found, known)


if __name__ == "__main__":
    print(main())
    print("PyTorch was imported:", "torch" in sys.modules)
