"""One forward and backward of the criterion for a profiler, and the fewest bytes that it can move.

``ncu --metrics dram__bytes_read.sum,dram__bytes_write.sum python -m benchmarks.traffic``
"""

from __future__ import annotations

import torch

from benchmarks.criterion import LABELS, LAYERS, packed_loss
from benchmarks.scenes import coco_like_counts, scene

IMAGES, QUERIES = 32, 100


def floor_bytes() -> int:
    """float32: logits read twice, for the cost and for the loss, and their gradient written once; boxes likewise."""
    numbers = LAYERS * IMAGES * QUERIES * (LABELS + 1 + 4)
    return 3 * 4 * numbers


def main() -> None:
    made = scene("mid", coco_like_counts(IMAGES), QUERIES, LAYERS, LABELS).to(torch.device("cuda"))
    logits, boxes = made.predictions.logits.requires_grad_(), made.predictions.boxes.requires_grad_()
    loss = packed_loss(logits, boxes, made)
    torch.autograd.grad(loss(), (logits, boxes))
    torch.cuda.synchronize()
    print(f"floor: {floor_bytes() / 1e6:.1f} MB for forward and backward")


if __name__ == "__main__":
    main()
