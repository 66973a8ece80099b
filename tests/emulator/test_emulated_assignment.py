"""The CUDA assignment kernels, emulated: equal to the CPU kernels in assignment and prices, bit for bit."""

from __future__ import annotations

import itertools
from types import ModuleType

import numpy as np
import pytest
import torch
from ops.problems import cost_matrices
from torch import Tensor

from benchmarks.scenes import costs
from detr_fast.structures import offsets_of

TYPES = [torch.float32, torch.float64]


def both(
    cost: Tensor, offsets: Tensor, max_count: int = -1, groups: int = 1
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    on_cpu = torch.ops.detr_fast.assign.default(cost, offsets, -1, groups, True)
    return torch.ops.detr_fast_emulated.assign.default(cost, offsets, max_count, groups, True), on_cpu


def assert_equal(cost: Tensor, offsets: Tensor, max_count: int = -1, groups: int = 1) -> None:
    emulated, on_cpu = both(cost, offsets, max_count, groups)
    for name, ours, theirs in zip(("query_of_target", "target_price", "query_price"), emulated, on_cpu, strict=True):
        assert torch.equal(ours, theirs), f"{name} of {list(cost.shape)}"


def problem(cost: np.ndarray, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(cost)[None].to(dtype), offsets_of([len(cost)])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("seed", [pytest.param(11, marks=pytest.mark.slow), 12])
def test_spread_tied_duplicate_and_hard_costs(emulator: ModuleType, dtype: torch.dtype, seed: int) -> None:
    emulator.use_schedule(seed)
    for cost in cost_matrices(seed, 36):
        assert_equal(*problem(cost, dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_forbidden_pairs(emulator: ModuleType, dtype: torch.dtype, share: float) -> None:
    random = np.random.default_rng(int(share * 10))
    too_large = 2.0**100 if dtype == torch.float32 else 2.0**1000
    for number in range(40):
        targets, queries = int(random.integers(1, 60)), int(random.integers(1, 60))
        cost = random.random((targets, queries)) - 0.5
        if number % 2:
            cost = np.round(cost * 4)
        forbidden = random.random((targets, queries)) < share
        cost[forbidden] = random.choice([np.nan, np.inf, -np.inf, too_large], forbidden.sum())
        assert_equal(*problem(cost, dtype))


@pytest.mark.parametrize("kind", ["trained", "mid", "init", "identical", "duplicates"])
@pytest.mark.parametrize(
    ("queries", "targets"),
    [(100, 7), (100, 33), (100, 65), pytest.param(100, 100, marks=pytest.mark.slow), (300, 140)],
)
def test_costs_of_detectors(emulator: ModuleType, kind: str, queries: int, targets: int) -> None:
    """One search for each number of slots that a lane holds: 1, 2, 4, 4 and 8."""
    cost = costs(kind, 1, queries, targets, seed=targets)  # type: ignore[arg-type]
    assert_equal(cost, offsets_of([targets]), targets)


def test_from_1_to_300_targets(emulator: ModuleType) -> None:
    """Registers up to 256 rows, then the whole block."""
    counts = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 160, 255, 256, 257, 300]
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(1, sum(counts), 310, generator=generator)
    cost[:, ::3] = cost[:, ::3].round(decimals=1)
    assert_equal(cost, offsets_of(counts), 300)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("groups", "width", "counts"), [(3, 40, [7, 0, 40, 1]), (2, 280, [260]), (13, 9, [2, 15])])
def test_groups(emulator: ModuleType, groups: int, width: int, counts: list[int], dtype: torch.dtype) -> None:
    """Searched by a warp and by the block, more targets than a group has queries, spare rows, forbidden pairs."""
    generator = torch.Generator().manual_seed(width)
    cost = torch.rand(1, sum(counts) + 2, groups * width, generator=generator).round(decimals=2).to(dtype)
    assert_equal(cost, offsets_of(counts), max(counts), groups)
    cost[torch.rand(cost.shape, generator=generator) < 0.3] = torch.nan
    assert_equal(cost, offsets_of(counts), -1, groups)


@pytest.mark.parametrize("limit", [100, 24, 2])
def test_little_shared_memory(emulator: ModuleType, limit: int) -> None:
    """In KiB: costs stay in global memory, then the search as well."""
    generator = torch.Generator().manual_seed(limit)
    counts = [5, 40, 0, 130]
    cost = torch.rand(1, sum(counts), 141, generator=generator).round(decimals=2)
    emulator.use_shared_memory_limit(limit * 1024)
    try:
        assert_equal(cost, offsets_of(counts), max(counts))
        assert_equal(cost.double(), offsets_of(counts), max(counts))
        cost[cost > 0.4] = torch.nan
        assert_equal(cost, offsets_of(counts))
        assert_equal(cost, offsets_of(counts), max(counts), groups=3)
    finally:
        emulator.use_shared_memory_limit(1 << 20)


@pytest.mark.parametrize("dtype", TYPES)
def test_more_targets_than_queries(emulator: ModuleType, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    counts = [50, 3, 0, 90, 400]
    cost = torch.randn(2, sum(counts), 37, generator=generator).round(decimals=1).to(dtype)
    assert_equal(cost, offsets_of(counts))
    cost[0, :60, 5] = torch.nan
    cost[1, 30:70] = torch.inf
    assert_equal(cost, offsets_of(counts))


@pytest.mark.slow
def test_many_queries_and_many_targets(emulator: ModuleType) -> None:
    generator = torch.Generator().manual_seed(4)
    assert_equal(torch.rand(1, 20, 70_000, generator=generator), offsets_of([20]))  # columns do not fit shared memory
    assert_equal(torch.rand(1, 4096, 30, generator=generator), offsets_of([4096]))
    assert_equal(torch.rand(1, 1500, 1600, generator=generator), offsets_of([1500]))


def test_many_images(emulator: ModuleType) -> None:
    """Images are taken in the order of their targets; more than a block has threads, as they come."""
    generator = torch.Generator().manual_seed(5)
    for images in (2, 256, 300):
        counts = torch.randint(0, 5, (images,), generator=generator).tolist()
        cost = torch.rand(2, sum(counts), 6, generator=generator).round(decimals=1)
        assert_equal(cost, offsets_of(counts), max(counts))


def test_rows_past_the_last_offset_are_unmatched(emulator: ModuleType) -> None:
    cost = torch.rand(2, 10, 6)
    assert_equal(cost, offsets_of([2, 3]), 10)
    assert_equal(cost, offsets_of([0, 0]), 10)
    assert_equal(cost[:, :0], offsets_of([0, 0]), 0)
    assert_equal(cost[..., :0], offsets_of([4, 6]))
    assert_equal(cost, offsets_of([]))


def test_every_schedule_gives_the_same_bits(emulator: ModuleType) -> None:
    cost = costs("init", 3, 60, 40).reshape(1, -1, 60)
    results = []
    for seed in range(8):
        emulator.use_schedule(seed)
        results.append(both(cost, offsets_of([40, 40, 40]))[0])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_max_count_that_is_too_small_harms_nothing(emulator: ModuleType) -> None:
    """The largest image is left unmatched; a device cannot raise an error."""
    cost = torch.rand(1, 310, 400)
    emulator.use_shared_memory_limit(4 * 1024)
    try:
        found = torch.ops.detr_fast_emulated.assign.default(cost, offsets_of([10, 300]), 10, 1, False)[0]
    finally:
        emulator.use_shared_memory_limit(1 << 20)
    expected = torch.ops.detr_fast.assign.default(cost, offsets_of([10, 300]), -1, 1, False)[0]
    assert torch.equal(found[:, :10], expected[:, :10])
    assert (found[:, 10:] == -1).all()


def test_one_launch(emulator: ModuleType) -> None:
    before = emulator.counts()[0]
    for groups in (1, 3):
        torch.ops.detr_fast_emulated.assign.default(torch.rand(6, 40, 30), offsets_of([10, 30]), 30, groups, False)
    assert emulator.counts()[0] == before + 2


@pytest.mark.parametrize(("queries", "targets"), [(200, 102), (300, 102), (900, 99)])
def test_shared_memory_just_below_what_needs_no_leave(emulator: ModuleType, queries: int, targets: int) -> None:
    """What the kernel declares counts too."""
    assert_equal(torch.rand(1, targets, queries), offsets_of([targets]), targets)


def test_any_upper_bound_will_do(emulator: ModuleType) -> None:
    cost = torch.rand(2, 40, 30)
    for most in (30, 40, 10**8):  # memory follows the targets that there are
        assert_equal(cost, offsets_of([10, 30]), most)


def test_offsets_that_are_none_harm_nothing(emulator: ModuleType) -> None:
    """They cannot be refused without waiting for the device; no kernel leaves its arrays."""
    cost = torch.rand(2, 40, 30)
    for offsets, groups in itertools.product(([0, 10, 10**9], [0, 30, 5], [-7, 20, 40]), (1, 3)):
        found = torch.ops.detr_fast_emulated.assign.default(
            cost, torch.tensor(offsets, dtype=torch.int32), -1, groups, True
        )
        assert ((found[0] >= -1) & (found[0] < 30)).all()
