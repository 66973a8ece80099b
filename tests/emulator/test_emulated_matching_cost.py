"""The CUDA kernels of matching_cost and match, emulated: the bits of the CPU kernels. Definitions: tests/ops."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from ops.problems import predictions_and_targets
from torch import Tensor

from benchmarks.scenes import scene
from detr_fast.ops import ForbiddenPairs
from detr_fast.ops.dialect import DETR, Dialect
from detr_fast.structures import Targets, offsets_of

KINDS = ["softmax", "focal", "focal_stable"]
TYPES = [torch.float32, torch.float16, torch.bfloat16]
WEIGHTS = (1.0, 5.0, 2.0)


def run(
    library: str,
    op: str,
    *inputs: Tensor,
    kind: str = "softmax",
    max_count: int = -1,
    groups: int = 1,
    dialect: Dialect = DETR,
) -> tuple[Tensor, Tensor]:
    status = ForbiddenPairs.new_status()
    function = getattr(getattr(torch.ops, library), op).default
    numbers = (max_count, groups) if op == "match" else (max_count,)
    return function(*inputs, status, *numbers, *WEIGHTS, kind, 0.25, 2.0, *dialect), status


def assert_same(
    *inputs: Tensor, kind: str = "softmax", max_count: int = -1, groups: int = 1, dialect: Dialect = DETR
) -> None:
    """Cost, assignment and status are those of the CPU, NaN where it has NaN."""
    options: dict[str, Any] = {"kind": kind, "groups": groups, "dialect": dialect}
    for op in ("matching_cost", "match"):
        ours, our_status = run("detr_fast_emulated", op, *inputs, max_count=max_count, **options)
        theirs, their_status = run("detr_fast", op, *inputs, **options)
        assert torch.equal(our_status, their_status)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_costs_and_assignments_have_the_bits_of_the_cpu(emulator: ModuleType, kind: str, dtype: torch.dtype) -> None:
    for queries, classes, counts in ((100, 92, (3, 0, 17)), (64, 16, (65,)), (130, 3, (2, 1)), (31, 91, (31, 40, 1))):
        inputs = predictions_and_targets(counts, 2, queries, classes, dtype)
        assert_same(*inputs, kind=kind, max_count=max(counts))


@pytest.mark.parametrize(("groups", "width"), [(2, 32), (3, 70), (13, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups(emulator: ModuleType, groups: int, width: int, dtype: torch.dtype) -> None:
    """Minima of 32 queries end with their group; positions of faults are those in the image."""
    logits, boxes, *targets = predictions_and_targets((6, 0, 11), 2, groups * width, 11, dtype)
    assert_same(logits, boxes, *targets, max_count=11, groups=groups)
    logits[1, 2, width + 1] = torch.nan
    boxes[0, 0, -1] = torch.inf
    assert_same(logits, boxes, *targets, groups=groups)


@pytest.mark.parametrize("kind", ["trained", "mid", "init", "identical", "duplicates"])
def test_scenes(emulator: ModuleType, kind: str) -> None:
    made = scene(kind, [12, 0, 40, 3], 100, layers=2)  # type: ignore[arg-type]
    packed = Targets.pack(made.targets)
    targets = (packed.labels, packed.boxes, packed.offsets)
    assert_same(made.predictions.logits, made.predictions.boxes, *targets, max_count=40)


def test_more_classes_than_shared_memory_holds(emulator: ModuleType) -> None:
    for classes in (190, 191, 383, 384, 385, 1204):
        assert_same(*predictions_and_targets((3, 5), 1, 40, classes))


@pytest.mark.parametrize("kind", KINDS)
def test_faults_are_counted_and_named(emulator: ModuleType, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for share in (0.002, 0.3):
        logits, boxes, labels, target_boxes, offsets = predictions_and_targets((6, 0, 9), 3, 70, 11)
        logits[torch.rand(logits.shape, generator=generator) < share] = torch.nan
        logits[torch.rand(logits.shape, generator=generator) < share] = torch.inf
        boxes[torch.rand(boxes.shape, generator=generator) < share] = -0.5
        target_boxes[3, 2:] = 0
        boxes[1, 0, 7, 2:] = 0
        labels[7] = 99
        assert_same(logits, boxes, labels, target_boxes, offsets, kind=kind)


def test_status_keeps_the_first_of_several_calls(emulator: ModuleType) -> None:
    logits, *rest = predictions_and_targets()
    status = ForbiddenPairs.new_status()
    for layer in (1, 2):
        damaged = logits.clone()
        damaged[layer, 2, 4] = torch.nan
        torch.ops.detr_fast_emulated.match.default(damaged, *rest, status, -1, 1, *WEIGHTS, "softmax", 0.25, 2.0)
    found = ForbiddenPairs.read(status)
    assert found is not None
    assert (found.count, found.layer, found.image, found.query) == (14, 1, 2, 4)


def test_capacity_past_the_last_offset(emulator: ModuleType) -> None:
    logits, boxes, labels, target_boxes, offsets = predictions_and_targets()
    spare = (torch.cat([labels, labels[:4]]), torch.cat([target_boxes, torch.full((4, 4), torch.nan)]), offsets)
    assert_same(logits, boxes, *spare)
    assert_same(logits, boxes, *spare[:2], torch.zeros_like(offsets))
    assert_same(logits[:, :0], boxes[:, :0], *spare[:2], offsets_of([]))


@pytest.mark.parametrize("op", ["matching_cost", "match"])
def test_every_schedule_gives_the_same_bits(emulator: ModuleType, op: str) -> None:
    inputs = predictions_and_targets((5, 20), 2, 70, 12)
    inputs[0][0, 0, 3] = torch.nan
    results = []
    for seed in range(5):
        emulator.use_schedule(seed)
        results.append(run("detr_fast_emulated", op, *inputs))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0, equal_nan=True)


def test_launches(emulator: ModuleType) -> None:
    inputs = predictions_and_targets(layers=6)
    for op, groups, launches in (("matching_cost", 1, 1), ("match", 1, 2), ("match", 3, 2)):
        before = emulator.counts()
        run("detr_fast_emulated", op, *inputs, groups=groups)
        after = emulator.counts()
        assert (after[0] - before[0], after[1] - before[1]) == (launches, 0)


def test_capacity_may_be_more_than_a_position_holds(emulator: ModuleType) -> None:
    inputs = predictions_and_targets((3, 5))
    assert torch.equal(
        run("detr_fast_emulated", "match", *inputs, max_count=20_000)[0], run("detr_fast", "match", *inputs)[0]
    )


def test_offsets_that_are_none_harm_nothing(emulator: ModuleType) -> None:
    logits, boxes, labels, target_boxes, _ = predictions_and_targets((3, 5))
    for offsets in ([0, 4, 10**9], [0, 8, 2], [-7, 4, 8]):
        inputs = (logits, boxes, labels, target_boxes, torch.tensor(offsets, dtype=torch.int32))
        assert (run("detr_fast_emulated", "match", *inputs)[0] >= -1).all()


@pytest.mark.parametrize("limit", [1024, 4])
def test_groups_with_a_max_count_that_is_too_small_and_little_memory(emulator: ModuleType, limit: int) -> None:
    """Images that are larger are left unmatched, the others are matched; in KiB."""
    inputs = predictions_and_targets((3, 40), 2, 3 * 50, 11)
    emulator.use_shared_memory_limit(limit * 1024)
    try:
        found = run("detr_fast_emulated", "match", *inputs, max_count=3, groups=3)[0]
        whole = run("detr_fast_emulated", "match", *inputs, max_count=40, groups=3)[0]
    finally:
        emulator.use_shared_memory_limit(1 << 20)
    expected = run("detr_fast", "match", *inputs, groups=3)[0]
    assert torch.equal(whole, expected)
    assert torch.equal(found[:, :9], expected[:, :9])
    assert ((found == expected) | (found == -1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_dialects_have_the_bits_of_the_cpu(emulator: ModuleType, kind: str) -> None:
    inputs = predictions_and_targets((3, 0, 17), 2, 70, 16)
    inputs[1][:, :, ::3, 2:] = 0
    for dialect in (Dialect(1e-5, 0.0, 1e-6), Dialect(1e-3, 0.1, 0.0), Dialect(1e-12, 0.2, 0.05)):
        assert_same(*inputs, kind=kind, dialect=dialect)
