"""The CUDA kernels of set_loss, emulated, beside those of the CPU. Definitions and gradients: tests/ops."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from ops.problems import predictions_and_targets
from torch import Tensor

KINDS = ["softmax", "focal", "varifocal", "mal", "ia_bce"]
COST_OF = {"softmax": "softmax"}  # the others are matched by focal cost
TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def arguments_of(kind: str, dtype: torch.dtype = torch.float32, capacity: int = 0, **options) -> list:
    logits, boxes, labels, target_boxes, offsets = predictions_and_targets(dtype=dtype, **options)
    match = torch.ops.detr_fast.match.default(
        logits, boxes, labels, target_boxes, offsets, None, -1, 1, 1.0, 5.0, 2.0, COST_OF.get(kind, "focal"), 0.25, 2.0
    )
    if capacity:  # rows past the last offset may hold anything
        match = torch.cat([match, torch.full((len(match), capacity), 3, dtype=torch.int32)], 1)
        labels = torch.cat([labels, torch.full((capacity,), 10**6)])
        target_boxes = torch.cat([target_boxes, torch.full((capacity, 4), torch.nan)])
    class_weight = torch.linspace(0.5, 1.5, logits.shape[-1]) if kind == "softmax" else None
    weight = torch.rand(len(logits), 5, generator=torch.Generator().manual_seed(3))
    return [logits, boxes, match, labels, target_boxes, offsets, None, class_weight, weight, kind, 0.25, 2.0]


def run(library: str, arguments: list) -> list[Tensor]:
    """Losses, total, gradients and scaled gradients."""
    ops = getattr(torch.ops, library)
    losses, total, *gradients = ops.set_loss.default(*arguments)
    incoming = torch.linspace(-1, 1, losses.numel(), dtype=losses.dtype).view_as(losses)
    types = (arguments[0].dtype, arguments[1].dtype)
    scaled = ops.set_loss_backward.default(incoming, total, arguments[8], *gradients, *types)
    return [losses, total, *gradients, *scaled]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    # The kinds differ in arithmetic only, which does not know what type it was read from.
    [
        *(pytest.param("softmax", dtype, marks=pytest.mark.slow) for dtype in TYPES[1:]),
        ("softmax", TYPES[0]),
        *((kind, torch.float32) for kind in KINDS[1:]),
    ],
)
def test_results_are_those_of_the_cpu(emulator: ModuleType, kind: str, dtype: torch.dtype) -> None:
    """Up to the order in which sums over queries are taken, in double: all else has the same rounding."""
    shapes = (
        (100, 92, (3, 0, 17)),
        (70, 9, (1,) * 140),
        (64, 16, (60,)),
        (130, 3, (2, 1)),
        (7, 5, (0, 0)),
        (20, 33, (20, 33)),
    )
    for queries, classes, counts in shapes:
        options = {"counts": counts, "layers": 2, "queries": queries, "classes": classes}
        for capacity in (0, 5) if (kind, dtype) == ("softmax", torch.float32) else (5,):
            arguments = arguments_of(kind, dtype, capacity, **options)
            ours, theirs = run("detr_fast_emulated", arguments), run("detr_fast", arguments)
            for mine, other in zip(ours, theirs, strict=True):
                eps = torch.finfo(mine.dtype).eps
                scale = float(other.abs().max()) if other.numel() else 0.0
                torch.testing.assert_close(mine, other, rtol=4 * eps, atol=2 * eps * scale)


def test_a_query_out_of_range_counts_as_unmatched(emulator: ModuleType) -> None:
    arguments = arguments_of("softmax")
    reference = arguments.copy()
    reference[2] = arguments[2].clone()
    reference[2][1, 4] = -1
    expected = run("detr_fast_emulated", reference)
    for query in (30, 2**31 - 1, -7):
        arguments[2] = reference[2].clone()
        arguments[2][1, 4] = query
        assert all(torch.equal(a, b) for a, b in zip(run("detr_fast_emulated", arguments), expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", [-1, 11, 10**12])
def test_a_label_out_of_range_makes_the_class_loss_nan(emulator: ModuleType, kind: str, label: int) -> None:
    arguments = arguments_of(kind, layers=1)
    arguments[3] = arguments[3].clone()
    arguments[3][4] = label
    losses, total, *_ = torch.ops.detr_fast_emulated.set_loss.default(*arguments)
    assert losses[0, 0].isnan()
    assert total.isnan()
    assert losses[0, 1:].isfinite().all()


def test_no_layers(emulator: ModuleType) -> None:
    arguments = arguments_of("softmax", layers=1)
    for position in (0, 1, 2, 8):
        arguments[position] = arguments[position][:0]
    losses, total, *_ = torch.ops.detr_fast_emulated.set_loss.default(*arguments)
    assert losses.shape == (0, 5)
    assert total == 0


def test_offsets_that_are_none_harm_nothing(emulator: ModuleType) -> None:
    arguments = arguments_of("softmax")
    for offsets in ([0, 3, 3, 10, 10**9], [0, 9, 2, 10, 15], [-5, 3, 3, 10, 15]):
        arguments[5] = torch.tensor(offsets, dtype=torch.int32)
        assert run("detr_fast_emulated", arguments)[0].shape == (3, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_gives_the_same_bits(emulator: ModuleType, kind: str) -> None:
    arguments = arguments_of(kind, counts=(4, 0, 9), queries=70)
    results = []
    for seed in range(6):  # blocks finish in another order each time
        emulator.use_schedule(seed)
        results.append(run("detr_fast_emulated", arguments))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_an_image_does_not_depend_on_its_neighbours(emulator: ModuleType) -> None:
    arguments = arguments_of("focal", counts=(4, 9), queries=70)
    together = torch.ops.detr_fast_emulated.set_loss.default(*arguments)
    alone = arguments.copy()
    alone[0], alone[1], alone[5] = arguments[0][:, :1], arguments[1][:, :1], arguments[5][:2]
    alone[6] = torch.tensor(13.0)
    gradients = torch.ops.detr_fast_emulated.set_loss.default(*alone)[2:]
    assert all(torch.equal(a[:, :1], b) for a, b in zip(together[2:], gradients, strict=True))


def test_launches(emulator: ModuleType) -> None:
    arguments = arguments_of("softmax", layers=6)
    before = emulator.counts()
    losses, total, *gradients = torch.ops.detr_fast_emulated.set_loss.default(*arguments)
    between = emulator.counts()
    torch.ops.detr_fast_emulated.set_loss_backward.default(
        losses, total, arguments[8], *gradients, torch.float16, torch.float32
    )
    after = emulator.counts()
    assert (between[0] - before[0], between[1] - before[1]) == (1, 1)
    assert (after[0] - between[0], after[1] - between[1]) == (1, 0)
