"""What only a GPU can show: the kernels there beside those of the CPU, streams, graphs, synchronisations, memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ops.problems import cost_matrices, matchings, predictions_and_targets
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.scenes import COST_WEIGHTS, KINDS, costs, scene
from detr_fast import HungarianMatcher, Predictions, SetCriterion, StaticTargets, Targets
from detr_fast.ops import ForbiddenPairs, assign, assign_with_prices, match, matching_cost, set_loss, unite
from detr_fast.structures import offsets_of

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
LAYERS = 6
WEIGHTS = {
    name + suffix: weight
    for suffix in ("", *(f"_{layer}" for layer in range(LAYERS - 1)))
    for name, weight in (("loss_ce", 1.0), ("loss_bbox", 5.0), ("loss_giou", 2.0))
}


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def on(device: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


def assert_same(ours, theirs) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.cpu(), other.cpu(), rtol=0, atol=0, equal_nan=True)


# ---- equality with the CPU kernels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_assignments_and_prices_have_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    problems = [(torch.from_numpy(cost)[None], offsets_of([len(cost)])) for cost in cost_matrices(0, 60)]
    for queries, targets in ((100, 60), (300, 100), (300, 300), (900, 100), (900, 300), (50, 400)):
        for kind in KINDS:
            cost = costs(kind, 2, queries, targets)
            problems.append((cost.reshape(1, -1, queries), offsets_of([targets, targets])))
    generator = torch.Generator().manual_seed(0)
    counts = [1, 2, 31, 32, 33, 64, 65, 128, 129, 240, 256, 257, 300]
    ragged = torch.rand(2, sum(counts), 310, generator=generator).round(decimals=2)
    ragged[0, ::7, ::3] = torch.nan
    problems.append((ragged, offsets_of(counts)))
    problems.append((torch.rand(1, 4096, 700, generator=generator), offsets_of([4096])))
    for cost, offsets in problems:
        assert_same(
            assign_with_prices(*on(DEVICE, cost.to(dtype), offsets)), assign_with_prices(cost.to(dtype), offsets)
        )


@pytest.mark.parametrize(("queries", "targets"), [(200, 102), (300, 102), (500, 101), (900, 99)])
def test_shared_memory_just_below_what_needs_no_leave(queries: int, targets: int) -> None:
    cost = torch.rand(1, targets, queries)
    moved = on(DEVICE, cost, offsets_of([targets]))
    assert_same([assign(*moved, targets)], [assign(cost, offsets_of([targets]), targets)])


@pytest.mark.parametrize("kind", ["softmax", "focal", "focal_stable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_costs_and_matches_have_the_bits_of_the_cpu(kind: str, dtype: torch.dtype) -> None:
    for classes, counts in ((92, (3, 0, 40, 7)), (191, (5,)), (384, (5, 5)), (2, (60,))):
        inputs = predictions_and_targets(counts, 3, 100, classes, dtype)
        inputs[0][0, 0, 3, 0] = torch.nan
        results = []
        for device in (DEVICE, "cpu"):
            status = ForbiddenPairs.new_status(device)
            moved = on(device, *inputs)
            cost = matching_cost(*moved, *COST_WEIGHTS, kind, status=status)  # type: ignore[arg-type]
            results.append((cost, match(*moved, *COST_WEIGHTS, kind, max_count=max(counts)), status))  # type: ignore[arg-type]
        assert_same(*results)


def test_more_problems_than_the_device_runs_at_once() -> None:
    """Images with many targets come first; losses take tiles of 64 queries."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 40, (80,), generator=generator).tolist()
    inputs = predictions_and_targets(tuple(counts), 6, 130, 20)
    cost = matching_cost(*inputs)
    offsets = inputs[-1]
    assert_same([assign(*on(DEVICE, cost, offsets), 40)], [assign(cost, offsets)])
    pairs = match(*inputs)
    moved = on(DEVICE, *inputs)
    assert_same([match(*moved, max_count=40)], [pairs])
    ours = set_loss(*moved[:2], pairs.to(DEVICE), *moved[2:])
    eps = torch.finfo(torch.float32).eps  # sums are taken in double, in another order
    torch.testing.assert_close(ours.cpu(), set_loss(*inputs[:2], pairs, *inputs[2:]), rtol=4 * eps, atol=0)


@pytest.mark.parametrize("kind", ["softmax", "focal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_losses_and_gradients_are_those_of_the_cpu(kind: str, dtype: torch.dtype) -> None:
    inputs = predictions_and_targets((3, 0, 40, 7), 3, 100, 92, dtype)
    pairs = match(*inputs, *COST_WEIGHTS, kind)  # type: ignore[arg-type]
    results = []
    for device in (DEVICE, "cpu"):
        logits, boxes, *targets = on(device, *inputs)
        logits.requires_grad_()
        boxes.requires_grad_()
        losses = set_loss(logits, boxes, pairs.to(device), *targets, kind=kind)  # type: ignore[arg-type]
        results.append((losses, *torch.autograd.grad(losses[:, :3].sum(), (logits, boxes))))
    for ours, theirs in zip(*results, strict=True):
        eps = torch.finfo(theirs.dtype).eps
        torch.testing.assert_close(ours.cpu(), theirs, rtol=4 * eps, atol=2 * eps * float(theirs.detach().abs().max()))


@pytest.mark.parametrize("queries", [100, 300, 900, 3900])
def test_unions_are_those_of_the_cpu_and_wait_for_nothing(queries: int) -> None:
    for counts in ((5, 0, 40), (300,), tuple(range(40)), (0, 0)):
        inputs = matchings(8, counts, queries, 0.6, queries)
        moved = on(DEVICE, *inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            united = unite(*moved, queries)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same([united], [unite(*inputs, queries)])


# ---- the criterion ---------------------------------------------------------------------------------------------------


def criterion_of() -> SetCriterion:
    return SetCriterion(91, HungarianMatcher(*COST_WEIGHTS), WEIGHTS, 0.1, ["labels", "boxes", "cardinality"]).to(
        DEVICE
    )


def batch(counts: list[int], seed: int = 0) -> tuple[Predictions, Targets]:
    made = scene("mid", counts, 100, LAYERS, seed=seed)
    logits, boxes = on(DEVICE, made.predictions.logits, made.predictions.boxes)
    return Predictions(logits.requires_grad_(), boxes.requires_grad_()), Targets.pack(made.targets)


def step(criterion, predictions: Predictions, targets: Targets) -> list[Tensor]:
    total, losses = criterion(predictions, targets)
    gradients = torch.autograd.grad(total, (predictions.logits, predictions.boxes))
    return [total.detach().clone(), *(x.clone() for x in losses.values()), *(x.clone() for x in gradients)]


def test_every_run_gives_the_same_bits() -> None:
    criterion, (predictions, targets) = criterion_of(), batch([7, 0, 30, 12])
    first = step(criterion.weighted_loss, predictions, targets)
    for _ in range(100):
        assert_same(step(criterion.weighted_loss, predictions, targets), first)


def test_a_step_waits_for_nothing() -> None:
    criterion = criterion_of()
    for counts in ([7, 0, 30], [1, 2, 3]):
        predictions, targets = batch(counts)
        if counts[0] == 7:
            step(criterion.weighted_loss, predictions, targets)  # moves constants to the device once
            criterion.weighted_sum(criterion(predictions, targets))
            captured = criterion.capture(predictions, capacity=60, max_count=40)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(criterion.weighted_loss, predictions, targets)
            criterion.weighted_sum(criterion(predictions, targets)).backward()
            step(captured, predictions, targets)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_launches() -> None:
    torch.use_deterministic_algorithms(False)  # which would fill all new memory with NaN
    criterion, (predictions, targets) = criterion_of(), batch([7, 0, 30])
    targets = targets.to(DEVICE)
    step(criterion.weighted_loss, predictions, targets)
    torch.cuda.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        total, _ = criterion.weighted_loss(predictions, targets)
        torch.autograd.grad(total, (predictions.logits, predictions.boxes), torch.ones_like(total))
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in kernels if not name.startswith("Memset")]
    assert sum("detr::cuda" in name for name in kernels) == 4, kernels
    assert len(kernels) == 5, kernels  # and the incoming 1 of this test


def test_captured_criterion_with_changing_targets() -> None:
    criterion = criterion_of()
    captured = criterion.capture(batch([1, 1, 1])[0], capacity=120, max_count=63)
    for seed, counts in enumerate([[7, 0, 30], [63, 20, 1], [0, 0, 0], [12, 12, 12]]):
        predictions, targets = batch(counts, seed)
        for given in (targets, targets.to(DEVICE)):
            assert_same(
                step(captured, predictions, given),
                step(criterion.weighted_loss, predictions, targets),
            )


def test_ops_inside_a_graph_of_their_own() -> None:
    predictions, targets = batch([7, 0, 30])
    kept = StaticTargets.with_capacity(3, 64, 40, DEVICE)
    kept.copy_(targets)
    cost = torch.rand(2, 37, 50, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    arguments = (predictions.logits.detach(), predictions.boxes.detach(), kept.labels, kept.boxes, kept.offsets)
    match(*arguments)
    assign(cost, kept.offsets[:2])
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        pairs = match(*arguments, max_count=40)
        chosen = assign(cost, kept.offsets[:2], 40)
    for seed in range(3):
        _, targets = batch([5 + seed, 3, 20], seed)
        kept.copy_(targets)
        cost.copy_(torch.rand(2, 37, 50))
        graph.replay()
        assert_same([pairs, chosen], [match(*arguments), assign(cost, kept.offsets[:2])])


def test_forward_and_backward_inside_one_graph() -> None:
    criterion, (predictions, targets) = criterion_of(), batch([7, 0, 30])
    kept = StaticTargets.with_capacity(3, 64, 40, DEVICE)
    kept.copy_(targets)
    inputs = (predictions.logits, predictions.boxes)
    torch.autograd.grad(criterion.weighted_loss(predictions, kept)[0], inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total, _ = criterion.weighted_loss(predictions, kept)
        gradients = torch.autograd.grad(total, inputs)
    for seed, counts in enumerate([[7, 0, 30], [20, 40, 1], [0, 0, 0]]):
        other, targets = batch(counts, seed)
        kept.copy_(targets)
        with torch.no_grad():
            for mine, theirs in zip(inputs, (other.logits, other.boxes), strict=True):
                mine.copy_(theirs)
        graph.replay()
        expected = step(criterion.weighted_loss, other, targets)
        assert_same([total.detach(), *gradients], [expected[0], *expected[-2:]])


def test_compiles_whole_and_not_again_when_targets_change() -> None:
    criterion = criterion_of()

    def total(logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        return criterion.weighted_loss(Predictions(logits, boxes), targets)[0]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(total, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for counts in ([3, 0, 7], [4, 4, 11], [2, 2, 2]):
        predictions, targets = batch(counts)
        targets = targets.to(DEVICE)
        inputs = (predictions.logits, predictions.boxes)
        expected = torch.autograd.grad(total(*inputs, targets), inputs)
        found = torch.autograd.grad(compiled(*inputs, targets), inputs)
        assert_same(found, expected)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


# ---- streams, devices, memory, errors --------------------------------------------------------------------------------


def test_two_streams_at_once() -> None:
    batches = [batch([7, 0, 30], 0), batch([20, 5, 1], 1)]
    criteria = [criterion_of(), criterion_of()]
    expected = [step(c.weighted_loss, *b) for c, b in zip(criteria, batches, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    for _ in range(20):
        found = []
        for stream, criterion, given in zip(streams, criteria, batches, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(criterion.weighted_loss, *given))
        torch.cuda.synchronize()
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)


def test_work_goes_to_the_current_stream() -> None:
    cost, offsets = on(DEVICE, torch.rand(6, 60, 100), offsets_of([60]))
    expected = assign(cost, offsets)
    stream = torch.cuda.Stream()
    late = torch.empty_like(cost)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(cost)
        found = assign(late, offsets)  # on another stream it would read what is not there yet
    stream.synchronize()
    assert_same([found], [expected])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device_while_the_first_is_current() -> None:
    inputs = predictions_and_targets()
    cost = torch.rand(1, 300, 400)
    for op, arguments in ((match, inputs), (assign, (cost, offsets_of([300])))):
        found = op(*on("cuda:1", *arguments))
        assert found.device == torch.device("cuda:1")
        assert torch.cuda.current_device() == 0
        assert_same([found], [op(*arguments)])


def test_running_out_of_memory_leaves_a_usable_state() -> None:
    criterion, (predictions, targets) = criterion_of(), batch([7, 0, 30])
    expected = step(criterion.weighted_loss, predictions, targets)
    free, _ = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(0.05)
    try:
        queries = int((free / 4096) ** 0.5) * 32
        with pytest.raises(RuntimeError):  # the stable ABI hands on no other type
            matching_cost(*on(DEVICE, *predictions_and_targets((queries // 8,), 8, queries, 2)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert_same(step(criterion.weighted_loss, predictions, targets), expected)


def test_tensors_of_several_devices_are_refused_by_name() -> None:
    logits, boxes, labels, target_boxes, offsets = predictions_and_targets()
    moved = on(DEVICE, logits, boxes, labels, target_boxes)
    with pytest.raises(RuntimeError, match="match: offsets must be on cuda:0 as logits, got cpu"):
        match(*moved, offsets)
    with pytest.raises(RuntimeError, match="assign: offsets must be on cuda:0 as cost, got cpu"):
        assign(torch.rand(1, 3, 4, device=DEVICE), offsets_of([3]))


def test_faults_are_reported_when_asked() -> None:
    criterion, (predictions, targets) = criterion_of(), batch([7, 0, 30])
    with torch.no_grad():
        predictions.logits[2, 2, 5] = torch.nan
    step(criterion.weighted_loss, predictions, targets)
    report = criterion.matcher_report()
    assert report is not None
    assert "layer 2, image 2, target 0, query 5: class term" in report


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    here = Path(__file__).parent
    # Without PyTorch's cache every tensor is an allocation of its own, whose end memcheck knows.
    paths = {"PYTHONPATH": f"{here.parent.parent}:{here.parent}", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment = {**os.environ, **paths}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, str(here / "sanitized.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not run on this machine")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
