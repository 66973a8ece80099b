"""Assignment solvers by the names and signatures of the packages that others call: SciPy, lap / lapx and
torch-linear-assignment.

Change the import, nothing else::

    from detr_fast.integrations.solvers import linear_sum_assignment    # from scipy.optimize
    from detr_fast.integrations.solvers import lapjv                    # from lap
    from detr_fast.integrations.solvers import assignment_to_indices, batch_linear_assignment

Totals are those of the packages; equal optima may be resolved to other pairs, here the same on every machine.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detr_fast import ops
from detr_fast.integrations.mode import Mode, check_mode
from detr_fast.numpy import linear_sum_assignment

__all__ = ["assignment_to_indices", "batch_linear_assignment", "lapjv", "linear_sum_assignment"]

Indices = npt.NDArray[np.int32]


def lapjv(
    cost: npt.ArrayLike,  # [N, M]
    extend_cost: bool = False,
    cost_limit: float = np.inf,
    return_cost: bool = True,
    *,
    mode: Mode = "stable",
) -> tuple[float, Indices, Indices] | tuple[Indices, Indices]:
    """``lap.lapjv``: the total, column of each row ``x [N]`` and row of each column ``y [M]``, int32, -1 = none.

    A matrix that is not square needs `extend_cost` or a `cost_limit`; its larger side then keeps lines without a
    partner. With a finite `cost_limit` a row and a column may stay without a partner for that price, half of it each:
    pairs that cost as much or more are left out (at just that cost lap may do either). It is solved on the N x M
    matrix, which lap extends to (N + M) x (N + M). The total is that of the pairs, summed in float64. Any real type and
    sequences are taken and solved in float64.

    Entries that are no numbers:

    - +infinity is a forbidden pair. Where rows find no other, "stable" leaves as few of them out as possible, with -1;
      "compat" completes the assignment with such pairs, and the total is infinite, as in lap. With a finite limit they
      are left out in both.
    - NaN and -infinity: forbidden pairs in "stable"; a ValueError in "compat", where lap's results are undefined.

    Raises:
        ValueError: `cost` is not 2-d, or not square without `extend_cost` or a limit; `cost_limit` is NaN or -infinity.

    Source: Jonker and Volgenant, Computing 38 (1987); interface of lap 0.5 and lapx 0.11.
    """
    check_mode("lapjv", mode)
    given = np.asarray(cost, np.float64, order="C")
    _check_lapjv(given.shape, cost_limit, extend_cost)
    if mode == "compat" and not (given > -np.inf).all():
        raise ValueError("lapjv: cost must not be NaN or -infinity")
    x = _within_limit(given, cost_limit) if cost_limit < np.inf else _columns(given)
    if mode == "compat" and cost_limit == np.inf:
        _complete(x, given.shape[1])
    rows = np.flatnonzero(x >= 0)
    y = np.full(given.shape[1], -1, np.int32)
    y[x[rows]] = rows
    return (float(given[rows, x[rows]].sum()), x, y) if return_cost else (x, y)


def _check_lapjv(shape: tuple[int, ...], cost_limit: float, extend_cost: bool) -> None:
    if len(shape) != 2:
        raise ValueError(f"lapjv: cost must be a matrix (2-dimensional array), got {len(shape)}-d")
    if not cost_limit > -np.inf:
        raise ValueError(f"lapjv: cost_limit must be finite or positive infinity, got {cost_limit}")
    if shape[0] != shape[1] and not extend_cost and cost_limit == np.inf:
        raise ValueError(f"lapjv: cost must be square without extend_cost or a finite cost_limit, got {list(shape)}")


def _columns(cost: npt.NDArray[np.float64]) -> Indices:
    """Column of each row, as many pairs of finite cost as there can be at least cost; -1 for the other rows."""
    try:
        rows, columns = linear_sum_assignment(cost)
    except ValueError:  # forbidden pairs, NaN
        offsets = torch.tensor([0, len(cost)], dtype=torch.int32)
        found: Indices = ops.assign(torch.tensor(cost)[None], offsets)[0].numpy()
        return found
    x = np.full(len(cost), -1, np.int32)
    x[rows] = columns
    return x


def _within_limit(cost: npt.NDArray[np.float64], limit: float) -> Indices:
    """Column of each row where a pair is worth what it saves: cost - limit, if that is negative."""
    possible = np.isfinite(cost)
    largest = np.abs(cost, where=possible, out=np.zeros_like(cost)).max(initial=0)
    if limit > 2 * min(cost.shape) * largest:  # another pair is always worth it, and cost - limit would be rounded
        return _columns(cost)
    saving = np.minimum(cost - limit, 0, where=possible, out=np.zeros_like(cost))
    x = _columns(saving)
    rows = np.flatnonzero(x >= 0)
    x[rows[saving[rows, x[rows]] == 0]] = -1
    return x


def _complete(x: Indices, columns: int) -> None:
    """Gives rows without a column the columns without a row, in their order."""
    rows = np.flatnonzero(x < 0)
    free = np.setdiff1d(np.arange(columns), x)
    count = min(len(rows), len(free))
    x[rows[:count]] = free[:count]


def batch_linear_assignment(
    cost: Tensor,  # [B, W, T]
    *,
    mode: Mode = "stable",
) -> Tensor:
    """torch-linear-assignment's: the task of each worker at least total cost, ``[B, W]`` int64, -1 = none.

    On the CPU and on CUDA, where the package falls back to SciPy or compiles a kernel for every shape; here nothing is
    compiled, and with mode "stable" nothing is read back from the device. Other types than float32 and float64 are
    converted.

    - "stable": entries that are NaN, infinite or of magnitude 2^100 (float64: 2^1000) and more are forbidden pairs, and
      as few workers or tasks as possible stay out for them. float32 and halves are solved in float32, integers exactly
      in float64.
    - "compat": the errors of the package, for which a device is waited for. As there, types other than float32 and
      float64 are rounded to float32; then, as SciPy does, everything is solved in float64.

    Raises:
        ValueError: `cost` is not 3-d; with "compat" also, naming the first such problem: "matrix contains invalid
            numeric entries" for NaN and -infinity, "cost matrix is infeasible" where +infinity leaves no assignment.
        TypeError: `cost` is complex.

    Source: interface of torch-linear-assignment 0.1.0.
    """
    check_mode("batch_linear_assignment", mode)
    if cost.dim() != 3:
        raise ValueError(f"batch_linear_assignment: cost must be 3-dimensional, [B, W, T], got {list(cost.shape)}")
    if cost.is_complex():
        raise TypeError(f"batch_linear_assignment: cost must be of a real type, got {cost.dtype}")
    if mode == "stable":
        return ops.batch_linear_assignment(cost.detach())
    if cost.dtype not in (torch.float32, torch.float64):
        cost = cost.to(torch.float32)
    cost = cost.detach().to(torch.float64)
    _refuse("matrix contains invalid numeric entries", ~(cost > -torch.inf).flatten(1).all(1))
    assignment = ops.batch_linear_assignment(cost)
    _refuse("cost matrix is infeasible", (assignment >= 0).sum(1) < min(cost.shape[1:]))
    return assignment


def _refuse(fault: str, has_fault: Tensor) -> None:  # [B] bool
    if has_fault.any():
        raise ValueError(f"batch_linear_assignment: {fault}, first in problem {int(has_fault.int().argmax())}")


def assignment_to_indices(
    assignment: Tensor,  # [B, W], -1 = none
) -> tuple[Tensor, Tensor]:
    """torch-linear-assignment's: workers ``[B, K]`` int64, ascending, and their tasks ``[B, K]``, as SciPy's pairs.

    K is read from the values, so a device is waited for.

    Raises:
        ValueError: `assignment` is not 2-d, or its problems have different numbers of pairs.
    """
    if assignment.dim() != 2:
        raise ValueError(f"assignment_to_indices: assignment must be [B, W], got {list(assignment.shape)}")
    if len(assignment) == 0:
        none = torch.zeros(0, 0, dtype=torch.int64, device=assignment.device)
        return none, none
    matched = assignment >= 0
    counts = matched.sum(1).tolist()
    for problem, count in enumerate(counts):
        if count != counts[0]:
            raise ValueError(
                f"assignment_to_indices: every problem must have as many pairs as the first, {counts[0]}, got {count} "
                f"in problem {problem}"
            )
    shape = (len(assignment), counts[0])
    return matched.nonzero()[:, 1].reshape(shape), assignment[matched].reshape(shape)
