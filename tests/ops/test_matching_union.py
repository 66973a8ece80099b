"""unite: the definition's result and the loop's pairs on every backend, whatever the sets, images and queries."""

from __future__ import annotations

import pytest
import torch
from problems import matchings
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from benchmarks.matching_union import pairs_of_union, unite_by_loop
from detr_fast import _C
from detr_fast.matcher import pairs_of
from detr_fast.ops.matching_union import unite, unite_reference
from detr_fast.structures import offsets_of


def assert_as_defined(query_of_target: Tensor, offsets: Tensor, queries: int) -> Tensor:
    united = unite(query_of_target, offsets, queries)
    assert united.dtype == torch.int32
    assert torch.equal(united, unite_reference(query_of_target, offsets, queries))
    return united


def column(*queries_of_sets: list[int]) -> Tensor:
    return torch.tensor(queries_of_sets, dtype=torch.int32)


@pytest.mark.parametrize("agreement", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("sets", "queries"), [(1, 20), (2, 9), (7, 40), (8, 300), (40, 70), (3, 1000)])
def test_definition_and_loop(sets: int, queries: int, agreement: float, backend: str) -> None:
    for seed, counts in enumerate([(3, 0, 7, 5), (9,), (0, 0, 1), (1, 2, 3, 4, 5, 6, 7, 8, 9)]):
        query_of_target, offsets = matchings(sets, counts, queries, agreement, seed)
        united = assert_as_defined(query_of_target, offsets, queries)
        loop = unite_by_loop([pairs_of(row, offsets) for row in query_of_target])
        expected = [sorted(zip(q.tolist(), t.tolist(), strict=True)) for q, t in loop]
        assert pairs_of_union(united, offsets) == expected


@pytest.mark.parametrize("queries", [1, 3, 30, 5000])
def test_any_entries_at_all(queries: int, backend: str) -> None:
    """No matchings: a set may give a query several targets."""
    generator = torch.Generator().manual_seed(queries)
    for sets, counts in ((5, (4, 0, 6)), (1, (9,)), (30, (2, 20)), (3, (300, 1))):
        entries = torch.randint(-1, min(queries, 12), (sets, sum(counts) + 2), generator=generator, dtype=torch.int32)
        assert_as_defined(entries, offsets_of(counts), queries)


def test_the_pair_of_most_sets_wins_and_stands_in_the_first_of_them(backend: str) -> None:
    given = column([5, 2, 0], [1, 5, 0], [2, 5, 3], [2, 5, 4])
    # Query 5: target 1 three times, target 0 once. Query 2: target 0 twice, target 1 once. All others: one target.
    expected = column([-1, -1, 0], [1, 5, -1], [2, -1, 3], [-1, -1, 4])
    assert torch.equal(unite(given, offsets_of([3]), 6), expected)


def test_equal_counts_take_the_lower_target(backend: str) -> None:
    assert torch.equal(
        unite(column([7, 3, -1], [-1, 7, 3], [-1, -1, 7]), offsets_of([3]), 8),
        column([7, 3, -1], [-1, -1, -1], [-1, -1, -1]),
    )


def test_images_do_not_meet(backend: str) -> None:
    """The same queries in two images; the second has the higher counts."""
    given = column([4, 4, 2], [1, 4, 2], [1, 4, 2])
    assert torch.equal(unite(given, offsets_of([1, 2]), 5), column([4, 4, 2], [1, -1, -1], [-1, -1, -1]))


def test_one_matching_is_its_own_union(backend: str) -> None:
    query_of_target, offsets = matchings(1, (4, 9, 0, 30), 50, 0.0, 3)
    assert torch.equal(unite(query_of_target, offsets, 50), query_of_target)


def test_the_order_of_the_sets_only_says_where_a_pair_stands(backend: str) -> None:
    query_of_target, offsets = matchings(7, (20, 5), 25, 0.4, 5)
    pairs = pairs_of_union(unite(query_of_target, offsets, 25), offsets)
    assert pairs_of_union(unite(query_of_target.flip(0), offsets, 25), offsets) == pairs
    queries = [query for query, _ in pairs[0]]
    assert len(set(queries)) == len(queries)


@pytest.mark.parametrize(
    ("shape", "counts", "queries"),
    [
        ((0, 4), [4], 9),
        ((3, 0), [0, 0], 9),
        ((3, 0), [], 9),
        ((3, 4), [], 9),
        ((3, 4), [0, 0], 9),
        ((3, 4), [4], 0),
        ((0, 0), [], 0),
    ],
)
def test_nothing_to_unite(shape: tuple[int, int], counts: list[int], queries: int, backend: str) -> None:
    none = torch.full(shape, -1, dtype=torch.int32)
    assert torch.equal(unite(none, offsets_of(counts), queries), none)


def test_all_unmatched_and_rows_past_the_last_offset(backend: str) -> None:
    query_of_target, offsets = matchings(4, (3, 5, 8), 20, 0.5, 1)
    none = torch.full_like(query_of_target, -1)
    assert torch.equal(unite(none, offsets, 20), none)
    query_of_target[:, 8:] = 1000  # whatever is there
    united = unite(query_of_target, offsets[:3], 20)
    assert (united[:, 8:] == -1).all()
    assert torch.equal(united[:, :8], unite(query_of_target[:, :8], offsets[:3], 20))


def test_strided_inputs(backend: str) -> None:
    query_of_target, offsets = matchings(6, (3, 5, 8), 20, 0.5, 2)
    strided = query_of_target.t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(unite(strided, offsets, 20), unite(query_of_target, offsets, 20))
    doubled = offsets.repeat_interleave(2)[::2]
    assert torch.equal(unite(query_of_target[::2], doubled, 20), unite(query_of_target[::2].clone(), offsets, 20))


@pytest.mark.usefixtures("restored_threads")
def test_every_instruction_set_and_thread_count_gives_the_same_bits() -> None:
    query_of_target, offsets = matchings(7, tuple(range(60)), 900, 0.5, 0)
    expected = unite_reference(query_of_target, offsets, 900)
    best = _C.instruction_set()
    for name in ("portable", "avx2", "avx512"):
        for threads in (1, 2):
            if _C.use_instruction_set(name):
                torch.set_num_threads(threads)
                assert torch.equal(unite(query_of_target, offsets, 900), expected)
    _C.use_instruction_set(best)


def test_opcheck() -> None:
    query_of_target, offsets = matchings(4, (3, 0, 8), 20, 0.5, 1)
    torch.library.opcheck(torch.ops.detr_fast.unite.default, (query_of_target, offsets, 20))


def test_compiles_whole_and_not_again_when_targets_change() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(unite, backend=counter, fullgraph=True, dynamic=True)
    for seed, counts in enumerate(((3, 4), (5, 2), (9, 20))):
        query_of_target, offsets = matchings(3, counts, 30, 0.5, seed)
        assert torch.equal(compiled(query_of_target, offsets, 30), unite(query_of_target, offsets, 30))
    assert counter.frame_count == 1


@pytest.mark.parametrize("query", [-2, 5, 2**31 - 1, -(2**31)])
def test_queries_out_of_range_are_refused_and_named(query: int) -> None:
    given = torch.zeros(3, 7, dtype=torch.int32)
    given[1, 5] = query
    with pytest.raises(
        RuntimeError, match=rf"query_of_target must be in \[-1, 5\), got {query} in set 1, target 1 of image 2"
    ):
        unite(given, offsets_of([4, 0, 3]), 5)
    assert torch.equal(
        unite_reference(given, offsets_of([4, 0, 3]), 5), unite(given.where(given == 0, -1), offsets_of([4, 0, 3]), 5)
    )


GOOD = torch.zeros(2, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("query_of_target", "offsets", "queries", "message"),
    [
        (GOOD[0], offsets_of([3]), 4, r"unite: query_of_target must be \[S, T\], got \[3\]"),
        (GOOD.long(), offsets_of([3]), 4, "unite: query_of_target must be int32, got Long"),
        (GOOD, torch.tensor([0, 3]), 4, "unite: offsets must be int32, got Long"),
        (GOOD, offsets_of([3])[:0], 4, r"unite: offsets must be \[B \+ 1\] with at least one entry, got \[0\]"),
        (GOOD, offsets_of([3]), -1, "unite: num_queries must not be negative, got -1"),
        (GOOD, offsets_of([4]), 4, "unite: offsets must not exceed the number of targets 3, got 4"),
        (GOOD, torch.tensor([0, 2, 1], dtype=torch.int32), 4, "must not decrease, got 2 then 1 at image 1"),
        (GOOD, torch.tensor([1, 3], dtype=torch.int32), 4, "unite: offsets must start with 0, got 1"),
        (GOOD[:1, :1].expand(70_000, 70_000), offsets_of([3]), 4, "at most 2.31 - 2 sets and entries"),
    ],
)
def test_errors_name_the_argument(query_of_target: Tensor, offsets: Tensor, queries: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        unite(query_of_target, offsets, queries)
