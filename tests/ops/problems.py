"""Random inputs of the matching and loss ops."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from detr_fast.structures import offsets_of


def predictions_and_targets(
    counts: tuple[int, ...] = (3, 0, 7, 5),
    layers: int = 3,
    queries: int = 30,
    classes: int = 11,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits, boxes, labels, target_boxes, offsets; labels leave the last class free."""
    generator = torch.Generator().manual_seed(seed)
    total, images = sum(counts), len(counts)
    logits = 3 * torch.randn(layers, images, queries, classes, dtype=torch.float64, generator=generator)
    boxes = 0.2 + 0.5 * torch.rand(layers, images, queries, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, max(classes - 1, 1), (total,), generator=generator)
    target_boxes = 0.2 + 0.5 * torch.rand(total, 4, generator=generator)
    return logits.to(dtype), boxes.to(dtype), labels, target_boxes, offsets_of(counts)


def cost_matrices(seed: int, problems: int = 150) -> list[np.ndarray]:
    """Costs ``[targets, queries]`` of many shapes: spread, tied, nearly equal queries, duplicate targets, hard."""
    random = np.random.default_rng(seed)
    costs = []
    for number in range(problems):
        targets, queries = int(random.integers(0, 45)), int(random.integers(1, 60))
        kind = number % 6
        cost = random.random((targets, queries)) * 6 - 3
        if kind == 1:
            cost = np.round(cost)
        elif kind == 2:
            cost = random.random((targets, 1)) + 1e-4 * cost
        elif kind == 3 and targets:
            cost[:] = cost[:1]
        elif kind == 4:
            cost = np.outer(np.arange(targets) + 1.0, np.arange(queries) + 1.0)
        elif kind == 5:
            cost[:] = 0.25
        costs.append(cost.astype(np.float32))
    return costs


def matchings(sets: int, counts: tuple[int, ...], queries: int, agreement: float, seed: int) -> tuple[Tensor, Tensor]:
    """query_of_target ``[sets, T]`` of valid matchings, and offsets.

    Each set keeps a share `agreement` of a common matching. With more targets than queries the rest is -1.
    """
    random = np.random.default_rng(seed)
    columns = [np.zeros((sets, 0), np.int32)]
    for count in counts:
        wide = max(count, queries)
        common = random.permutation(wide)
        own = np.stack([common] * sets)
        for row in own:  # those that differ are shuffled among themselves
            differ = np.flatnonzero(random.random(wide) >= agreement)
            row[differ] = row[random.permutation(differ)]
        columns.append(np.where(own < queries, own, -1)[:, :count])
    return torch.from_numpy(np.concatenate(columns, 1).astype(np.int32)), offsets_of(counts)
