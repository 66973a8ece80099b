"""The shims beside the packages they stand for: results, types, errors."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch

from detr_fast.integrations.solvers import (
    assignment_to_indices,
    batch_linear_assignment,
    lapjv,
    linear_sum_assignment,
)

MODES = ["stable", "compat"]
SHAPES = [(1, 1), (5, 5), (4, 9), (9, 4), (30, 30), (60, 7)]


@pytest.fixture
def lap() -> ModuleType:
    return pytest.importorskip("lap", reason="needs lapx")


@pytest.fixture
def package() -> ModuleType:
    return pytest.importorskip("torch_linear_assignment", reason="needs torch-linear-assignment")


def raised_by(function: Any, *arguments: object, **options: object) -> BaseException:
    with pytest.raises(Exception) as caught:
        function(*arguments, **options)
    return caught.value


# ---- SciPy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_sum_assignment_is_that_of_scipy(shape: tuple[int, int], maximize: bool) -> None:
    cost = np.random.default_rng(0).random(shape)  # no ties
    for given in (cost, torch.from_numpy(cost), cost.tolist()):
        for ours, theirs in zip(
            linear_sum_assignment(given, maximize=maximize),
            scipy.optimize.linear_sum_assignment(given, maximize=maximize),
            strict=True,
        ):
            assert ours.dtype == theirs.dtype
            assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros(3),
        np.array([[np.nan, 1.0]]),
        np.array([[-np.inf, 1.0]]),
        np.array([[np.inf, np.inf], [1.0, 2.0]]),
        torch.zeros(2, 2, requires_grad=True),
        [[1.0, 2.0], [3.0]],
    ],
    ids=["1-d", "NaN", "-inf", "infeasible", "requires grad", "ragged"],
)
def test_linear_sum_assignment_raises_what_scipy_raises(bad: object) -> None:
    ours, theirs = raised_by(linear_sum_assignment, bad), raised_by(scipy.optimize.linear_sum_assignment, bad)
    assert type(ours) is type(theirs)
    assert str(ours).split(",")[0] == str(theirs).split(",")[0]


# ---- lap -------------------------------------------------------------------------------------------------------------


def assert_as_lap(lap: ModuleType, cost: np.ndarray, **options: Any) -> None:
    """In both modes; the costs must have one optimum."""
    theirs = lap.lapjv(cost, **options)
    for mode in MODES:
        ours = lapjv(cost, **options, mode=mode)  # type: ignore[arg-type]
        assert [type(x) for x in ours] == [type(x) for x in theirs]
        for mine, other in zip(ours[-2:], theirs[-2:], strict=True):
            assert mine.dtype == other.dtype
            assert mine.tolist() == other.tolist(), (cost.shape, options)
        if len(ours) == 3:
            assert ours[0] == pytest.approx(theirs[0], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_lapjv(lap: ModuleType, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    for low, high in ((0, 1), (-1, 1), (-200, -100), (0, 1e5)):
        cost = random.uniform(low, high, shape)
        assert_as_lap(lap, cost, extend_cost=True)
        assert_as_lap(lap, cost, extend_cost=True, return_cost=False)
        for share in (0.01, 0.1, 0.5, 0.9):
            limit = float(np.quantile(cost, share)) + 1e-9
            assert_as_lap(lap, cost, cost_limit=limit)
            assert_as_lap(lap, cost, cost_limit=limit, extend_cost=True, return_cost=False)
        if shape[0] == shape[1]:
            assert_as_lap(lap, cost)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "int64", "uint8", "bool"])
def test_lapjv_of_every_type(lap: ModuleType, dtype: str) -> None:
    cost = (np.random.default_rng(0).permutation(48).reshape(6, 8) ** 2 % 211).astype(dtype)
    theirs = lap.lapjv(cost, extend_cost=True)[0]
    assert lapjv(cost, extend_cost=True)[0] == theirs
    assert lapjv(np.asfortranarray(cost), True)[0] == theirs
    assert lapjv(cost.tolist(), True, np.inf, True)[0] == theirs


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("limit", [np.inf, 1.0])
def test_lapjv_of_nothing(lap: ModuleType, shape: tuple[int, int], limit: float) -> None:
    assert_as_lap(lap, np.zeros(shape), extend_cost=True, cost_limit=limit)


def test_lapjv_with_forbidden_pairs(lap: ModuleType) -> None:
    random = np.random.default_rng(2)
    feasible = 0
    for number in range(100):
        shape = ((6, 6), (5, 8), (8, 5))[number % 3]
        cost = random.random(shape)
        cost[random.random(shape) < 0.4] = np.inf
        assert_as_lap(lap, cost, cost_limit=0.7)
        try:
            scipy.optimize.linear_sum_assignment(cost)
        except ValueError:
            continue
        feasible += 1
        assert_as_lap(lap, cost, extend_cost=True)
    assert feasible > 20


def test_lapjv_where_forbidden_pairs_leave_no_assignment(lap: ModuleType) -> None:
    cost = np.array([[4.0, np.inf, 3.0], [2.0, np.inf, 5.0], [3.0, np.inf, 2.0]])
    total, x, y = lapjv(cost)
    assert (total, x.tolist(), y.tolist()) == (4.0, [-1, 0, 2], [1, -1, 2])
    total, x, y = lapjv(cost, mode="compat")
    assert (total, x.tolist(), y.tolist()) == (np.inf, [1, 0, 2], [1, 0, 2])
    for given in (cost, np.full((2, 3), np.inf), np.full((3, 2), np.inf)):
        theirs = lap.lapjv(given, extend_cost=True)
        ours = lapjv(given, extend_cost=True, mode="compat")
        assert ours[0] == theirs[0] == np.inf
        assert [(x >= 0).sum() for x in ours[1:]] == [(x >= 0).sum() for x in theirs[1:]]
        assert [sorted(x[x >= 0].tolist()) for x in ours[1:]] == [list(range(min(given.shape)))] * 2 or given is cost


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("limit", [np.inf, 1.0])
def test_lapjv_with_entries_that_are_no_numbers(bad: float, limit: float) -> None:
    cost = np.array([[0.5, bad], [0.1, 0.4]])
    assert [x.tolist() for x in lapjv(cost, cost_limit=limit, return_cost=False)] == [[0, 1], [0, 1]]
    with pytest.raises(ValueError, match="lapjv: cost must not be NaN or -infinity"):
        lapjv(cost, cost_limit=limit, mode="compat")


@pytest.mark.parametrize("limit", [50.0, 1e6, 1e20, 1e300])
def test_a_limit_that_nothing_reaches_changes_nothing(limit: float) -> None:
    """Differences of 1e-9 would be lost beside 1e20."""
    cost = 1 + 1e-9 * np.random.default_rng(0).random((8, 8))
    for ours, without in zip(lapjv(cost, cost_limit=limit), lapjv(cost), strict=True):
        assert np.array_equal(ours, without)


def test_pairs_at_the_limit_are_left_out(lap: ModuleType) -> None:
    """Where lap may do either, at the same price."""
    random = np.random.default_rng(4)
    at_limit = 0
    for _ in range(100):
        cost = random.integers(0, 6, (5, 7)).astype(float)
        prices = []
        for solve in (lapjv, lap.lapjv):
            total, x, y = solve(cost, cost_limit=3)
            prices.append(total + 1.5 * ((x < 0).sum() + (y < 0).sum()))
            chosen = cost[x >= 0, x[x >= 0]]
            at_limit += solve is lap.lapjv and 3 in chosen
            assert chosen.max(initial=0) < 3 or solve is lap.lapjv
        assert prices[0] == prices[1]
    assert at_limit > 0


def test_lapjv_raises_what_lap_raises(lap: ModuleType) -> None:
    square, wide = np.zeros((2, 2)), np.zeros((2, 3))
    for arguments in [
        (wide,),
        (np.zeros(3),),
        (np.zeros((1, 2, 2)),),
        (np.array(1.0),),
        (square, False, np.nan),
        (wide, True, -np.inf),
    ]:
        assert type(raised_by(lapjv, *arguments)) is type(raised_by(lap.lapjv, *arguments)) is ValueError
    with pytest.raises(ValueError, match=r"square without extend_cost or a finite cost_limit, got \[2, 3\]"):
        lapjv(wide)
    with pytest.raises(ValueError, match="lapjv: mode must be 'stable' or 'compat', got 'fast'"):
        lapjv(square, mode="fast")  # type: ignore[arg-type]


# ---- torch-linear-assignment -----------------------------------------------------------------------------------------


def batch(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.rand(6, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_linear_assignment_is_scipy_in_a_loop(shape: tuple[int, int], mode: Any) -> None:
    cost = batch(shape)
    assignment = batch_linear_assignment(cost.requires_grad_(), mode=mode)
    assert (assignment.dtype, assignment.shape) == (torch.int64, cost.shape[:2])
    workers, tasks = assignment_to_indices(assignment)
    for problem, *found in zip(cost.detach().numpy(), workers.numpy(), tasks.numpy(), strict=True):
        for ours, theirs in zip(found, scipy.optimize.linear_sum_assignment(problem), strict=True):
            assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_batch_linear_assignment_is_that_of_the_package(package: ModuleType, mode: Any) -> None:
    for shape in (*SHAPES, (0, 3), (3, 0)):
        cost = batch(shape)
        for given in (cost, cost.double(), cost[:0]):
            ours, theirs = batch_linear_assignment(given, mode=mode), package.batch_linear_assignment(given)
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
            pairs = zip(assignment_to_indices(ours), package.assignment_to_indices(theirs), strict=True)
            assert all(mine.dtype == other.dtype and torch.equal(mine, other) for mine, other in pairs)
    for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool):
        cost = (batch((7, 9), 3) * 200).to(dtype)
        both = batch_linear_assignment(cost, mode=mode), package.batch_linear_assignment(cost)
        totals = [cost.double().gather(2, x[..., None]).sum() for x in both]
        assert totals[0] == totals[1]


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        (torch.nan, "matrix contains invalid numeric entries"),
        (-torch.inf, "matrix contains invalid numeric entries"),
        (torch.inf, "cost matrix is infeasible"),
    ],
)
def test_entries_that_are_no_numbers(entry: float, fault: str) -> None:
    cost = batch((4, 6))
    cost[3, 1] = entry
    with pytest.raises(ValueError, match=f"batch_linear_assignment: {fault}, first in problem 3"):
        batch_linear_assignment(cost, mode="compat")
    assignment = batch_linear_assignment(cost)
    assert assignment[3, 1] == -1
    assert (assignment >= 0).sum() == 6 * 4 - 1
    workers = [0, 2, 3]
    best = scipy.optimize.linear_sum_assignment(cost[3, workers])
    assert assignment[3, workers].tolist() == best[1].tolist()


def test_errors_are_those_of_the_package(package: ModuleType) -> None:
    spoilt = [batch((4, 6)) for _ in range(3)]
    for cost, entry in zip(spoilt, (torch.nan, -torch.inf, torch.inf), strict=True):
        cost[2, 0] = entry
    for cost in (*spoilt, batch((4, 6))[0], batch((4, 6)).to(torch.complex64)):
        ours = raised_by(batch_linear_assignment, cost, mode="compat")
        theirs = raised_by(package.batch_linear_assignment, cost)
        assert type(ours) is type(theirs)
        assert not str(theirs).startswith(("matrix", "cost")) or str(theirs) in str(ours)
    uneven = torch.tensor([[0, 1, -1], [2, -1, -1]])
    assert type(raised_by(assignment_to_indices, uneven)) is type(raised_by(package.assignment_to_indices, uneven))


def test_large_finite_costs_in_compat() -> None:
    """Masks of 1e38 are numbers to SciPy, forbidden pairs to the solver in float32."""
    cost = batch((4, 4))
    cost[1, 2] = 3e38
    rows, columns = scipy.optimize.linear_sum_assignment(cost[1])
    assert batch_linear_assignment(cost, mode="compat")[1, rows].tolist() == columns.tolist()
    assert (batch_linear_assignment(cost)[1] >= 0).sum() == 3


def test_assignment_to_indices() -> None:
    workers, tasks = assignment_to_indices(torch.tensor([[2, -1, 0], [-1, 1, 0]], dtype=torch.int32))
    assert (workers.tolist(), tasks.tolist()) == ([[0, 2], [1, 2]], [[2, 0], [1, 0]])
    assert (workers.dtype, tasks.dtype) == (torch.int64, torch.int32)
    assert [x.shape for x in assignment_to_indices(torch.full((2, 3), -1))] == [(2, 0), (2, 0)]
    assert [x.shape for x in assignment_to_indices(torch.zeros(0, 3))] == [(0, 0), (0, 0)]
    with pytest.raises(ValueError, match="as many pairs as the first, 2, got 1 in problem 1"):
        assignment_to_indices(torch.tensor([[0, 1], [0, -1]]))
    with pytest.raises(ValueError, match=r"assignment must be \[B, W\], got \[3\]"):
        assignment_to_indices(torch.zeros(3))
