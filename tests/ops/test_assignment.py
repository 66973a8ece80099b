"""assign: optimal by certificate and by SciPy, deterministic, sound with forbidden pairs."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
import scipy.optimize
import torch
from problems import cost_matrices
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from detr_fast import _C
from detr_fast.ops.assignment import assign, assign_reference, assign_with_prices, batch_linear_assignment
from detr_fast.structures import offsets_of

TYPES = [torch.float32, torch.float64]


def solve(cost: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return assign(torch.from_numpy(cost)[None].to(dtype), offsets_of([len(cost)]))[0].numpy()


def total(cost: np.ndarray, query_of_target: np.ndarray) -> float:
    matched = query_of_target >= 0
    return float(cost.astype(np.float64)[np.arange(len(cost))[matched], query_of_target[matched]].sum())


def rounding_of(cost: np.ndarray, dtype: torch.dtype) -> float:
    """Sums of as many numbers as there are targets, each rounded a few times."""
    return 4 * max(cost.shape) * torch.finfo(dtype).eps * float(np.abs(cost).max(initial=0.0))


def assert_one_to_one(query_of_target: np.ndarray, queries: int) -> None:
    matched = query_of_target[query_of_target >= 0]
    assert len(matched) == min(len(query_of_target), queries)
    assert len(set(matched.tolist())) == len(matched)
    assert (matched < queries).all()


def problems_of(backend: str) -> int:
    return 36 if backend == "cuda" else 150  # the emulator is slow


@pytest.mark.parametrize("dtype", TYPES)
def test_total_cost_is_that_of_scipy(dtype: torch.dtype, backend: str) -> None:
    for cost in cost_matrices(0, problems_of(backend)):
        query_of_target = solve(cost, dtype)
        assert_one_to_one(query_of_target, cost.shape[1])
        best = cost.astype(np.float64)[scipy.optimize.linear_sum_assignment(cost)].sum()
        assert total(cost, query_of_target) <= best + rounding_of(cost, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_prices_certify_the_optimum(dtype: torch.dtype, backend: str) -> None:
    costs = cost_matrices(1, problems_of(backend)) + [
        np.random.default_rng(2).random(shape, np.float32) for shape in ((300, 300), (90, 700))
    ]
    for cost in costs:
        result = assign_with_prices(torch.from_numpy(cost)[None].to(dtype), offsets_of([len(cost)]))
        query_of_target = result.query_of_target[0].numpy()
        row, column = result.target_price[0].double().numpy(), result.query_price[0, 0].double().numpy()
        slack = cost.astype(np.float64) - row[:, None] - column[None]
        limit = rounding_of(cost, dtype)
        assert slack.min(initial=0.0) >= -limit
        matched = query_of_target >= 0
        assert np.abs(slack[np.arange(len(cost))[matched], query_of_target[matched]]).max(initial=0.0) <= limit
        assert abs(row.sum() + column.sum() - total(cost, query_of_target)) <= limit * max(1, len(cost))
        assert column.max(initial=0.0) <= 0 or len(cost) > cost.shape[1]
        assert (row[~matched] == 0).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_forbidden_pairs_are_avoided_and_the_rest_is_optimal(dtype: torch.dtype, share: float, backend: str) -> None:
    random = np.random.default_rng(int(share * 10))
    for number in range(150):
        targets, queries = int(random.integers(1, 12)), int(random.integers(1, 12))
        cost = random.random((targets, queries)).astype(np.float32)
        if number % 2:
            cost = np.round(cost * 4)
        forbidden = random.random((targets, queries)) < share
        if number % 5 == 0:
            forbidden[random.integers(targets)] = True
            forbidden[:, random.integers(queries)] = True
        given = cost.astype(np.float64)
        too_large = 2.0**100 if dtype == torch.float32 else 2.0**1000
        given[forbidden] = random.choice([np.nan, np.inf, -np.inf, too_large], forbidden.sum())
        query_of_target = solve(given, dtype)

        substitute = np.where(forbidden, 1000.0, cost.astype(np.float64))
        rows, columns = scipy.optimize.linear_sum_assignment(substitute)
        kept = ~forbidden[rows, columns]
        matched = query_of_target >= 0
        assert matched.sum() == kept.sum()
        assert not forbidden[np.arange(targets)[matched], query_of_target[matched]].any()
        assert len(set(query_of_target[matched].tolist())) == matched.sum()
        assert total(cost, query_of_target) <= cost[rows[kept], columns[kept]].astype(float).sum() + rounding_of(
            cost, dtype
        )


def test_prices_with_forbidden_pairs_are_tight_and_sum_to_the_cost() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        cost = torch.from_numpy(random.random((1, 9, 9)))
        forbidden = torch.from_numpy(random.random((1, 9, 9)) < 0.75)
        cost[forbidden] = torch.nan
        result = assign_with_prices(cost, offsets_of([9]))
        matched = result.query_of_target[0] >= 0
        assert (result.target_price[0][~matched] == 0).all()
        chosen = cost[0][matched, result.query_of_target[0][matched].long()]
        assert abs(result.target_price.sum() + result.query_price.sum() - chosen.sum()) < 1e-12
        tight = result.target_price[0][matched] + result.query_price[0, 0][result.query_of_target[0][matched].long()]
        assert (tight - chosen).abs().max() < 1e-12 if len(chosen) else True


def ragged_batch() -> tuple[Tensor, Tensor]:
    counts = [7, 0, 20, 1, 33, 12]
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, sum(counts), 25, generator=generator).round(decimals=1), offsets_of(counts)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("spare", [0, 3])
def test_groups_are_assigned_as_if_alone(dtype: torch.dtype, spare: int, backend: str) -> None:
    groups, width = 5, 5  # images with fewer and with more targets than a group has queries
    cost, offsets = ragged_batch()
    cost = cost.to(dtype)
    cost[torch.rand(cost.shape, generator=torch.Generator().manual_seed(4)) < 0.2] = torch.nan
    cost = torch.nn.functional.pad(cost, (0, 0, 0, spare))
    found = assign_with_prices(cost, offsets, groups=groups)
    assert torch.equal(assign(cost, offsets, 33, groups), found.query_of_target)
    assert found.query_of_target.shape == (4, cost.shape[1] * groups)
    for group in range(groups):
        own = slice(group * width, (group + 1) * width)
        alone = assign_with_prices(cost[..., own].contiguous(), offsets)
        assert torch.equal(found.query_price[..., own], alone.query_price)
        for start, end in itertools.pairwise(offsets.tolist()):
            rows = slice(start * groups + group * (end - start), start * groups + (group + 1) * (end - start))
            queries = alone.query_of_target[:, start:end]
            queries = queries.where(queries < 0, queries + group * width)
            assert torch.equal(found.query_of_target[:, rows], queries)
            assert torch.equal(found.target_price[:, rows], alone.target_price[:, start:end])
    assert (found.query_of_target[:, int(offsets[-1]) * groups :] == -1).all()


def test_groups_are_the_definition() -> None:
    cost = torch.randn(2, 12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    offsets = offsets_of([7, 0, 5])
    for groups in (1, 2, 4, 5):
        assert torch.equal(assign(cost, offsets, groups=groups), assign_reference(cost, offsets, groups))


def test_groups_are_limited() -> None:
    with pytest.raises(RuntimeError, match="assign: groups must divide the 0 queries, got 2"):
        assign(torch.rand(1, 4, 0), offsets_of([4]), groups=2)
    with pytest.raises(RuntimeError, match=r"targets of all groups, got 4 targets and 1000000000 groups"):
        torch.ops.detr_fast.assign(torch.empty(0, 4, 10**9), offsets_of([4]), -1, 10**9, False)


def test_groups_must_divide_the_queries() -> None:
    for groups in (0, -1, 3, 21):
        with pytest.raises(RuntimeError, match=f"assign: groups must divide the 20 queries, got {groups}"):
            assign(torch.rand(1, 4, 20), offsets_of([4]), groups=groups)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", TYPES)
def test_every_instruction_set_and_thread_count_gives_the_same_bits(dtype: torch.dtype) -> None:
    cost, offsets = ragged_batch()
    cost = cost.repeat(1, 1, 12)  # work for several threads
    cost += torch.randn(cost.shape, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    best = _C.instruction_set()
    results = []
    for name in ("portable", "avx2", "avx512"):
        for threads in (1, 2):
            if not _C.use_instruction_set(name):
                continue
            torch.set_num_threads(threads)
            results.append(assign_with_prices(cost.to(dtype), offsets))
    _C.use_instruction_set(best)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_problem_does_not_depend_on_its_batch(backend: str) -> None:
    cost, offsets = ragged_batch()
    together = assign(cost, offsets)
    for layer in range(len(cost)):
        for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            alone = assign(cost[layer : layer + 1, start:end], offsets_of([end - start]))
            assert torch.equal(together[layer : layer + 1, start:end], alone)


def test_definition_has_the_same_total() -> None:
    cost, offsets = ragged_batch()
    cost[0, 3, 5] = torch.nan
    fast, definition = assign(cost, offsets), assign_reference(cost, offsets)
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        for layer in range(len(cost)):
            block = cost[layer, start:end].numpy()
            ours, theirs = fast[layer, start:end].numpy(), definition[layer, start:end].numpy()
            assert (ours >= 0).sum() == (theirs >= 0).sum()
            assert abs(total(block, ours) - total(block, theirs)) <= rounding_of(np.nan_to_num(block), torch.float32)


@pytest.mark.parametrize("shape", [(5, 9), (9, 9), (9, 5)])
def test_complete_ties_match_in_order(shape: tuple[int, int], backend: str) -> None:
    expected = np.arange(shape[0])
    expected[shape[1] :] = -1
    assert solve(np.zeros(shape, np.float32), torch.float32).tolist() == expected.tolist()


def test_equal_minima_take_the_lowest_query(backend: str) -> None:
    cost = np.ones((2, 40), np.float32)
    cost[0, [17, 33]] = 0
    cost[1, [3, 39]] = 0
    assert solve(cost, torch.float32).tolist() == [17, 3]


def test_rows_past_the_last_offset_are_unmatched() -> None:
    cost = torch.rand(2, 10, 6)
    query_of_target = assign(cost, offsets_of([2, 3]))
    assert (query_of_target[:, 5:] == -1).all()
    assert torch.equal(query_of_target[:, :5], assign(cost[:, :5], offsets_of([2, 3])))


def test_large_problems() -> None:
    cost = np.random.default_rng(0).random((700, 3900), np.float32)
    best = cost.astype(np.float64)[scipy.optimize.linear_sum_assignment(cost)].sum()
    assert total(cost, solve(cost, torch.float32)) <= best + rounding_of(cost, torch.float32)


def test_adding_a_constant_to_a_target_changes_nothing() -> None:
    cost = np.random.default_rng(5).integers(0, 50, (20, 30)).astype(np.float32)
    shifted = cost + np.arange(20, dtype=np.float32)[:, None]
    assert solve(cost, torch.float32).tolist() == solve(shifted, torch.float32).tolist()


def test_batch_linear_assignment_is_torch_linear_assignments_form() -> None:
    cost = torch.randint(0, 9, (5, 4, 6), generator=torch.Generator().manual_seed(0))
    result = batch_linear_assignment(cost)
    assert result.dtype == torch.int64
    assert result.shape == (5, 4)
    for problem, columns in zip(cost.numpy(), result.numpy(), strict=True):
        rows, best = scipy.optimize.linear_sum_assignment(problem)
        assert problem[np.arange(4), columns].sum() == problem[rows, best].sum()
    assert (batch_linear_assignment(cost.mT) >= 0).sum(1).tolist() == [4] * 5
    assert batch_linear_assignment(cost[:0]).shape == (0, 4)


@pytest.mark.parametrize(("groups", "prices"), [(1, False), (1, True), (5, True)])
def test_opcheck(groups: int, prices: bool) -> None:
    cost, offsets = ragged_batch()
    torch.library.opcheck(torch.ops.detr_fast.assign.default, (cost, offsets, -1, groups, prices))


def test_compiles_whole_and_not_again_when_targets_change() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(assign, backend=counter, fullgraph=True, dynamic=True)
    for counts in ([3, 4], [5, 2], [9, 20]):
        cost = torch.rand(2, sum(counts), 11)
        assert torch.equal(compiled(cost, offsets_of(counts)), assign(cost, offsets_of(counts)))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("cost", "offsets", "message"),
    [
        (torch.zeros(3, 4), offsets_of([3]), r"assign: cost must be \[L, T, Q\], got \[3, 4\]"),
        (torch.zeros(1, 3, 4, dtype=torch.int32), offsets_of([3]), "assign: cost must be float"),
        (torch.zeros(1, 3, 4), torch.tensor([0, 3]), "assign: offsets must be int32, got Long"),
        (torch.zeros(1, 3, 4), offsets_of([4]), "assign: offsets must not exceed the number of targets 3, got 4"),
        (
            torch.zeros(1, 3, 4),
            torch.tensor([0, 2, 1], dtype=torch.int32),
            "must not decrease, got 2 then 1 at image 1",
        ),
        (torch.zeros(1, 3, 4), torch.tensor([1, 3], dtype=torch.int32), "assign: offsets must start with 0, got 1"),
    ],
)
def test_errors_name_the_argument(cost: Tensor, offsets: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        assign(cost, offsets)


def test_max_count_is_checked() -> None:
    cost, offsets = ragged_batch()
    assert torch.equal(assign(cost, offsets, 33), assign(cost, offsets))
    with pytest.raises(RuntimeError, match="max_count must be at least 33, the targets of image 4, got 32"):
        assign(cost, offsets, 32)


def test_many_problems_and_many_rows() -> None:
    assert (batch_linear_assignment(torch.zeros(70_000, 1, 2)) == 0).all()
    assert (batch_linear_assignment(torch.zeros(1, 20_000, 2)) >= 0).sum() == 2


def test_other_threads_run_meanwhile() -> None:
    cost = torch.rand(40, 300, 300) * 1e-3 + torch.rand(40, 300, 1)
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    assign(cost, offsets_of([300]))
    end = time.perf_counter()
    done.set()
    thread.join()
    assert any(start < t < end for t in ticks), "the interpreter was blocked"


def test_batch_linear_assignment_compiles_whole() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(batch_linear_assignment, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((3, 5, 9), (4, 6, 6), (2, 9, 5)):
        cost = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(compiled(cost), batch_linear_assignment(cost))
