"""Every op beside its definition or rival, for pytest-benchmark: ``pytest benchmarks``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.assignment import batch, single
from benchmarks.harness import Options
from benchmarks.scenes import COST_WEIGHTS, coco_like_counts, costs, scene
from detr_fast.ops import attention, attention_reference, match, matching_cost, matching_cost_reference, set_loss
from detr_fast.ops.set_loss import set_loss_reference
from detr_fast.structures import Targets, offsets_of

Timer = Callable[..., Any]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def arguments() -> tuple[Tensor, ...]:
    """Logits, boxes, labels, boxes of targets, offsets: six layers, four images, 100 queries."""
    made = scene("mid", coco_like_counts(4), 100, layers=6)
    packed = Targets.pack(made.targets)
    predictions = made.predictions
    return predictions.logits, predictions.boxes, packed.labels, packed.boxes, packed.offsets


@pytest.mark.parametrize("kind", ["trained", "mid", "init"])
@pytest.mark.parametrize("provider", ["detr_fast", "scipy", "lapjvr"])
def test_assign(benchmark: Timer, kind: str, provider: str) -> None:
    case = batch(costs(kind, 16, 100, 20), kind, Options())  # type: ignore[arg-type]
    case.check(provider, benchmark(case.providers[provider]))


@pytest.mark.parametrize("size", [(100, 7), (300, 60)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("provider", ["detr_fast", "scipy"])
def test_numpy_linear_sum_assignment(benchmark: Timer, size: tuple[int, int], provider: str) -> None:
    case = single("mid", *size, np.dtype("float64"))
    case.check(provider, benchmark(case.providers[provider]))


@pytest.mark.parametrize("provider", [matching_cost, matching_cost_reference])
def test_matching_cost(benchmark: Timer, arguments: tuple[Tensor, ...], provider: Callable[..., Any]) -> None:
    benchmark(lambda: provider(*arguments, *COST_WEIGHTS))


def test_match(benchmark: Timer, arguments: tuple[Tensor, ...]) -> None:
    logits, boxes, labels, goals, offsets = arguments
    benchmark(lambda: match(logits, boxes, labels, goals, offsets, *COST_WEIGHTS))


def test_eager_match_of_one_layer(benchmark: Timer) -> None:
    made = scene("mid", coco_like_counts(4), 100)
    logits, boxes = made.predictions.logits[0], made.predictions.boxes[0]
    benchmark(lambda: eager.match(logits, boxes, made.targets))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with gradient"])
@pytest.mark.parametrize("provider", [set_loss, set_loss_reference])
def test_set_loss(
    benchmark: Timer, arguments: tuple[Tensor, ...], provider: Callable[..., Tensor], backward: bool
) -> None:
    logits, boxes, labels, goals, offsets = arguments
    query_of_target = match(logits, boxes, labels, goals, offsets, *COST_WEIGHTS)
    inputs = [x.clone().requires_grad_(backward) for x in (logits, boxes)]
    class_weight = torch.ones(logits.shape[-1])
    num_boxes = offsets[-1].to(torch.float32)

    def run() -> Any:
        losses = provider(*inputs, query_of_target, labels, goals, offsets, num_boxes, class_weight)
        return torch.autograd.grad(losses[:, :3].sum(), inputs) if backward else losses

    benchmark(run)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with gradient"])
@pytest.mark.parametrize("provider", ["detr_fast", "reference"])
def test_attention(benchmark: Timer, provider: str, backward: bool) -> None:
    """Self-attention of an encoder layer: two images of 20x30 and 15x25 cells."""
    counts = [20 * 30, 15 * 25]
    offsets = offsets_of(counts)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(sum(counts), 8, 32, generator=generator).requires_grad_(backward) for _ in range(3)
    )

    def run() -> Any:
        if provider == "detr_fast":
            output = attention(query, key, value, offsets, offsets, max(counts), max(counts))
        else:
            output = attention_reference(query, key, value, offsets, offsets)[0]
        return torch.autograd.grad(output.sum(), (query, key, value)) if backward else output

    benchmark(run)
