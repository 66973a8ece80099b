"""The CUDA kernel of unite, emulated: blocks of an image, schedules, launches, inputs that a device cannot refuse."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from ops.problems import matchings
from torch import Tensor

from detr_fast.ops.matching_union import unite_reference
from detr_fast.structures import offsets_of


def emulated(query_of_target: Tensor, offsets: Tensor, queries: int) -> Tensor:
    return torch.ops.detr_fast_emulated.unite.default(query_of_target, offsets, queries)


@pytest.mark.parametrize("queries", [1, 31, 255, 256, 257, 300, 512, 900, 3900])
def test_blocks_of_an_image(emulator: ModuleType, queries: int) -> None:
    """Each has 256 queries."""
    for seed, counts in enumerate([(5, 0, 40), (300,), (7, 7, 7)]):
        inputs = (*matchings(7, counts, queries, 0.6, seed), queries)
        assert torch.equal(emulated(*inputs), unite_reference(*inputs))


def test_every_schedule_gives_the_same_bits(emulator: ModuleType) -> None:
    inputs = (*matchings(9, (30, 3, 0, 64), 300, 0.5, 0), 300)
    expected = unite_reference(*inputs)
    for seed in range(8):
        emulator.use_schedule(seed)
        assert torch.equal(emulated(*inputs), expected)


def test_many_sets_and_many_images(emulator: ModuleType) -> None:
    for sets, counts in ((200, (9, 2)), (3, (1, 0, 2) * 100)):
        inputs = (*matchings(sets, counts, 12, 0.9, sets), 12)
        assert torch.equal(emulated(*inputs), unite_reference(*inputs))


def test_one_launch_and_no_memset(emulator: ModuleType) -> None:
    inputs = (*matchings(7, (5, 9), 300, 0.5, 0), 300)
    before = emulator.counts()
    emulated(*inputs)
    after = emulator.counts()
    assert (after[0] - before[0], after[1] - before[1]) == (1, 0)
    emulated(inputs[0][:, :0], offsets_of([0, 0]), 300)
    assert emulator.counts()[0] == after[0]


def test_room_for_more_targets(emulator: ModuleType) -> None:
    """Targets of a fixed capacity: what lies past the last offset is no pair, whatever is there."""
    query_of_target, offsets = matchings(7, (5, 0, 9), 300, 0.5, 0)
    wide = torch.randint(-5, 400, (7, 600), dtype=torch.int32)
    wide[:, :14] = query_of_target
    found = emulated(wide, offsets, 300)
    assert torch.equal(found[:, :14], unite_reference(query_of_target, offsets, 300))
    assert (found[:, 14:] == -1).all()


@pytest.mark.parametrize("queries", [5, 300])
def test_queries_out_of_range_are_no_pairs(emulator: ModuleType, queries: int) -> None:
    generator = torch.Generator().manual_seed(queries)
    given = torch.randint(-3, queries + 3, (6, 40), generator=generator, dtype=torch.int32)
    given[0, 3], given[1, 4], given[2, 5] = 2**31 - 1, -(2**31), 511
    inputs = (given, offsets_of([10, 30]), queries)
    assert torch.equal(emulated(*inputs), unite_reference(*inputs))
    kept = unite_reference(*inputs)
    assert ((kept >= -1) & (kept < queries)).all()


@pytest.mark.parametrize("offsets", [[0, 10, 10**9], [0, 30, 5], [-7, 20, 40], [5, 20, 40]])
def test_offsets_that_are_none_harm_nothing(emulator: ModuleType, offsets: list[int]) -> None:
    given = matchings(4, (10, 30), 300, 0.5, 0)[0]
    found = emulated(given, torch.tensor(offsets, dtype=torch.int32), 300)
    assert ((found == -1) | (found == given)).all()
