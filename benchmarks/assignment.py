"""Assignment: many cost matrices at once against loops over SciPy and lapx, and single ones through NumPy.

Also against torch-linear-assignment where that is installed, which on the CPU is a loop over SciPy; on CUDA also in the
case that it publishes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.harness import Bar, Benchmark, DisagreementError, Faster, Options, with_graph
from benchmarks.scenes import costs
from detr_fast import numpy as detr_fast_numpy
from detr_fast.ops.assignment import assign
from detr_fast.structures import offsets_of

PROBLEMS = 96
SIZES = ((100, 20), (300, 60), (900, 100), (900, 300))  # queries, targets
NUMPY_SIZES = ((100, 7), (100, 20), (300, 60), (900, 100))
KINDS = ("trained", "mid", "init")
BARS: tuple[Bar, ...] = (Faster("scipy", 8), Faster("lapjvr", 3))
PUBLISHED = (208, 300, 100)  # problems, queries, targets of torch-linear-assignment's own table
PUBLISHED_BARS: tuple[Bar, ...] = (Faster("torch-linear-assignment", 10), Faster("scipy", 1000))
NUMPY_BARS: tuple[Bar, ...] = (Faster("scipy", 3),)


def benchmarks(options: Options) -> Iterator[Benchmark]:
    if options.device.type == "cuda":
        problems, queries, targets = PUBLISHED
        uniform = torch.rand(problems, targets, queries, generator=torch.Generator().manual_seed(0))
        yield batch(uniform, "uniform", options, PUBLISHED_BARS)
    problems = 8 if options.quick else PROBLEMS
    for queries, targets in SIZES[:2] if options.quick else SIZES:
        for kind in KINDS:
            yield batch(costs(kind, problems, queries, targets), kind, options)  # type: ignore[arg-type]
    if options.device.type == "cuda":
        return
    for queries, targets in NUMPY_SIZES[:2] if options.quick else NUMPY_SIZES:
        for kind in (*KINDS, "uniform"):
            for dtype in (np.float64, np.float32):
                yield single(kind, queries, targets, np.dtype(dtype))


def batch(cost: Tensor, kind: str, options: Options, bars: tuple[Bar, ...] = BARS) -> Benchmark:
    """Many problems of one size. Others get the matrices in memory already, as their loops would read them."""
    problems, targets, queries = cost.shape
    on_device = cost.to(options.device)
    flat = on_device.reshape(1, problems * targets, queries)
    offsets = offsets_of([targets] * problems, options.device)
    by_target = cost.numpy()  # [N, T, Q]
    by_query = [np.ascontiguousarray(matrix.T) for matrix in by_target]  # [Q, T], as DETR's matchers make it
    providers: dict[str, Callable[[], object]] = with_graph(lambda: assign(flat, offsets, targets), options.device)
    if importlib.util.find_spec("torch_linear_assignment"):
        from torch_linear_assignment import batch_linear_assignment

        providers["torch-linear-assignment"] = lambda: batch_linear_assignment(on_device)
    providers["scipy"] = lambda: [linear_sum_assignment(matrix) for matrix in by_query]
    if importlib.util.find_spec("lap"):
        import lap

        lapjvr = partial(lap.lapjvr, extend_cost=True, return_cost=False)
        lapjvr_batch = partial(lap.lapjvr_batch, extend_cost=True, return_cost=False, n_threads=1)
        providers["lapjvr"] = lambda: [lapjvr(matrix) for matrix in by_query]
        providers["lapjvr_batch"] = lambda: lapjvr_batch(by_target)
    return Benchmark(
        case=f"assign, {problems} problems, {kind}",
        axis="queries x targets",
        value=f"{queries}x{targets}",
        providers=providers,
        check=partial(_check_batch, by_target),
        bars=bars,
    )


def single(kind: str, queries: int, targets: int, dtype: np.dtype) -> Benchmark:
    """One matrix [queries, targets] for each call, as SciPy is called elsewhere."""
    if kind == "uniform":
        cost = np.random.default_rng(0).random((queries, targets)).astype(dtype)
    else:
        cost = np.ascontiguousarray(costs(kind, 1, queries, targets)[0].numpy().T.astype(dtype))  # type: ignore[arg-type]
    solvers: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
        "detr_fast": detr_fast_numpy.linear_sum_assignment,
        "scipy": linear_sum_assignment,
    }
    return Benchmark(
        case=f"numpy.linear_sum_assignment, {kind}, {dtype}",
        axis="rows x columns",
        value=f"{queries}x{targets}",
        providers={name: partial(solver, cost) for name, solver in solvers.items()},
        check=partial(_check_single, cost),
        bars=NUMPY_BARS,
    )


def _check_single(cost: np.ndarray, provider: str, result: tuple[np.ndarray, np.ndarray]) -> None:
    rows, columns = result
    require_optimal(provider, cost.T, columns, rows)


def _check_batch(cost: np.ndarray, provider: str, result: Any) -> None:
    problems, targets, _ = cost.shape
    if isinstance(result, Tensor):
        pairs = [(np.arange(targets), query) for query in result.cpu().numpy().reshape(problems, targets)]
    elif provider == "lapjvr_batch":
        pairs = list(zip(*result, strict=True))
    else:
        pairs = [(target, query) for query, target in result]
    for matrix, (target, query) in zip(cost, pairs, strict=True):
        require_optimal(provider, matrix, target, query)


def require_optimal(
    provider: str,
    cost: np.ndarray,  # [T, Q]
    targets: np.ndarray,
    queries: np.ndarray,
) -> None:
    """All of the smaller side matched once, at a total within float32's rounding of SciPy's in float64."""
    count = min(cost.shape)
    if not len(set(targets.tolist())) == len(set(queries.tolist())) == len(targets) == count:
        raise DisagreementError(f"{provider}: not {count} targets with a query each")
    exact = cost.astype(np.float64)
    least = exact[linear_sum_assignment(exact)].sum()
    found = exact[targets, queries].sum()
    tolerance = 4 * count * torch.finfo(torch.float32).eps * np.abs(exact).max()
    if not found - least <= tolerance:
        raise DisagreementError(
            f"{provider}: total cost {found}, {found - least:.3g} above the optimum of {cost.shape}"
        )
