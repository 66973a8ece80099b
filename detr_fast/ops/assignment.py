"""Minimum-cost assignment of targets to queries, for every image and decoder layer at once."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from detr_fast import _C  # noqa: F401  registers the ops


def cost_limit(dtype: torch.dtype) -> float:
    """A cost of this magnitude is a forbidden pair; sums of smaller ones never overflow."""
    return 2.0**1000 if dtype == torch.float64 else 2.0**100


class Assignment(NamedTuple):
    """An assignment with the prices that prove it optimal."""

    query_of_target: Tensor  # [L, T * groups] int32, -1 = unmatched
    target_price: Tensor  # [L, T * groups], not positive in an image with more targets than queries
    query_price: Tensor  # [L, B, Q], not positive in the other images


def assign(
    cost: Tensor,  # [L, T, Q] float32 or float64
    offsets: Tensor,  # [B + 1] int32
    max_count: int | None = None,
    groups: int = 1,
) -> Tensor:
    """For each layer and image, the assignment of least total cost: query_of_target ``[L, T * groups]`` int32.

    Row t of ``cost[l]`` is target t against the Q queries of its own image; image b owns rows ``offsets[b]`` to
    ``offsets[b + 1]``, rows past ``offsets[B]`` get -1. Every image matches min(its targets, Q) pairs, no query twice.
    With more targets than queries the targets whose absence costs least get -1.

    A cost that is NaN, infinite or of magnitude 2^100 (float64: 2^1000) and more is a forbidden pair. As many targets
    as possible are matched through other pairs, at least cost among those; the rest get -1.

    Equal optima are resolved the same way on every device and in every batch: the lowest query among a target's equal
    minima, then the lowest target, as `csrc/cpu/assignment.h` defines. With all costs equal, target t gets query t.
    Rounding errors of float32 may choose between totals that differ by less than 4 T eps max|cost|.

    With `groups`, an image's queries are that many groups of equal size, and its targets are assigned to each of them
    as if it were alone: the result's rows in the order image, group, target, as those of :meth:`Targets.repeated`,
    queries in ``[0, Q)``. Rows past ``offsets[B] * groups`` get -1.

    `max_count` is the most targets of one image, or any upper bound, as :class:`Targets` knows it on the host: a CUDA
    device gets its memory by it without reading the offsets back. None is always right; a number that is too small
    leaves images unmatched there. One launch, whatever the number of layers and groups; prices and ties have the CPU's
    bits.

    Raises:
        RuntimeError: a tensor has another shape, type or device, or `groups` does not divide Q; on the CPU also if
            offsets are no segments of the rows or `max_count` is too small.

    Source: Jonker and Volgenant, Computing 38 (1987); Crouse, IEEE TAES 52(4), 2016; groups: Chen et al., "Group DETR",
    ICCV 2023.
    """
    return _assign(cost, offsets, max_count, groups, prices=False).query_of_target


def assign_with_prices(cost: Tensor, offsets: Tensor, max_count: int | None = None, groups: int = 1) -> Assignment:
    """As :func:`assign`, with the dual prices u (targets) and v (queries) as a certificate of optimality.

    For every pair ``u[t] + v[q] <= cost[t, q]`` up to rounding, with equality where matched, and all prices of an image
    sum to its total cost. Unmatched targets and queries have price 0. In an image where forbidden pairs keep a target
    from being matched, the equalities and the sum still hold, the inequality need not. All this of each group.
    """
    return _assign(cost, offsets, max_count, groups, prices=True)


def _assign(cost: Tensor, offsets: Tensor, max_count: int | None, groups: int, *, prices: bool) -> Assignment:
    most = -1 if max_count is None else max_count
    return Assignment(*torch.ops.detr_fast.assign.default(cost, offsets, most, groups, prices))


def batch_linear_assignment(cost: Tensor) -> Tensor:  # [N, rows, columns] -> [N, rows] int64
    """Column of each row in the assignment of least cost, -1 = unmatched, for a batch of equal shapes.

    The name, shapes and types of torch-linear-assignment's function; ties and forbidden pairs as in :func:`assign`.
    Half types are solved in float32, integers in float64.
    """
    if cost.dim() != 3:
        raise RuntimeError(f"batch_linear_assignment: cost must be [N, rows, columns], got {cost.dim()}-d")
    count, rows, columns = cost.shape
    if cost.dtype not in (torch.float32, torch.float64):
        cost = cost.to(torch.float32 if cost.is_floating_point() else torch.float64)
    if count * rows >= 2**31:
        raise RuntimeError(f"batch_linear_assignment: N * rows must be below 2^31, got {count} * {rows}")
    offsets = torch.arange(0, count + 1, device=cost.device, dtype=torch.int32) * rows
    flat = cost.reshape(1, count * rows, columns)
    return assign(flat, offsets, rows).reshape(count, rows).to(torch.int64)


def assign_reference(cost: Tensor, offsets: Tensor, groups: int = 1) -> Tensor:
    """The definition of :func:`assign`: shortest augmenting paths in float64, one target after the other."""
    layers, targets, queries = cost.shape
    result = torch.full((layers, targets * groups), -1, dtype=torch.int32)
    width, bounds = queries // groups, offsets.tolist()
    for layer in range(layers):
        for start, end in itertools.pairwise(bounds):
            block = cost[layer, start:end].double().cpu()
            block = torch.where(block.abs() < cost_limit(cost.dtype), block, torch.inf)
            for group in range(groups):
                found = _solve(block[:, group * width : (group + 1) * width])
                row = start * groups + group * (end - start)
                result[layer, row : row + end - start] = found.where(found < 0, found + group * width)
    return result.to(cost.device)


def _solve(cost: Tensor) -> Tensor:
    """One image ``[targets, queries]``; every target may also stay out, at a cost above all sums."""
    targets, queries = cost.shape
    finite = cost[cost.isfinite()]
    staying_out = 2.0 * max(targets, queries) * (float(finite.abs().max()) if finite.numel() else 0.0) + 1.0
    wide = torch.cat([cost, torch.full((targets, targets), torch.inf, dtype=cost.dtype)], 1)
    wide[:, queries:].fill_diagonal_(staying_out)
    columns = queries + targets
    row_price, column_price = torch.zeros(targets, dtype=cost.dtype), torch.zeros(columns, dtype=cost.dtype)
    row_of_column = [-1] * columns
    for root in range(targets):
        distance = torch.full((columns,), torch.inf, dtype=cost.dtype)
        parent, done = [-1] * columns, torch.zeros(columns, dtype=torch.bool)
        row, column, reached = root, -1, 0.0
        while row >= 0:  # grows the tree of shortest paths until it meets a free column
            path = reached + wide[row] - row_price[row] - column_price
            for j in torch.nonzero((path < distance) & ~done).flatten().tolist():
                distance[j], parent[j] = path[j], column
            column = int(torch.where(done, torch.inf, distance).argmin())
            reached = float(distance[column])
            done[column] = True
            row = row_of_column[column]
        row_price[root] += reached
        for j in torch.nonzero(done).flatten().tolist():
            if row_of_column[j] >= 0:
                row_price[row_of_column[j]] += reached - distance[j]
            column_price[j] -= reached - distance[j]
        while column >= 0:  # flips the matching along the path
            row_of_column[column] = root if parent[column] < 0 else row_of_column[parent[column]]
            column = parent[column]
    query_of_target = torch.full((targets,), -1, dtype=torch.int32)
    for query in range(queries):
        if row_of_column[query] >= 0:
            query_of_target[row_of_column[query]] = query
    return query_of_target


@torch.library.register_fake("detr_fast::assign")
def _(cost: Tensor, offsets: Tensor, max_count: int, groups: int, prices: bool) -> tuple[Tensor, Tensor, Tensor]:
    layers, targets, queries = cost.shape
    priced = layers if prices else 0
    return (
        cost.new_empty((layers, targets * groups), dtype=torch.int32),
        cost.new_empty((priced, targets * groups)),
        cost.new_empty((priced, offsets.shape[0] - 1, queries)),
    )
