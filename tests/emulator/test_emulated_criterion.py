"""The whole criterion on the emulated CUDA kernels: as on the CPU, in a fixed number of launches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.scenes import COST_WEIGHTS, scene
from detr_fast import HungarianMatcher, Predictions, SetCriterion, StaticTargets, Targets

LOSSES = ["labels", "boxes", "cardinality"]
LAYERS = 6


def weights() -> dict[str, float]:
    suffixes = ["", *(f"_{layer}" for layer in range(LAYERS - 1))]
    return {
        name + suffix: w
        for suffix in suffixes
        for name, w in zip(("loss_ce", "loss_bbox", "loss_giou"), (1, 5, 2), strict=True)
    }


def criterion_of(kind: str) -> SetCriterion:
    matcher = HungarianMatcher(*COST_WEIGHTS, kind=kind, invalid="skip")  # type: ignore[arg-type]
    return SetCriterion(91 + (kind == "focal"), matcher, weights(), 0.1, LOSSES)


def batch(counts: list[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Predictions, Targets]:
    made = scene("mid", counts, 50, LAYERS, seed=seed)
    predictions = Predictions(*(x.to(dtype) for x in (made.predictions.logits, made.predictions.boxes)))
    return predictions, Targets.pack(made.targets)


def results(criterion, predictions: Predictions, targets: Targets) -> list[Tensor]:
    logits, boxes = (x.clone().requires_grad_() for x in (predictions.logits, predictions.boxes))
    total, losses = criterion(Predictions(logits, boxes), targets)
    return [total.detach(), *losses.values(), *torch.autograd.grad(total, (logits, boxes))]


@pytest.fixture
def expected(request: pytest.FixtureRequest) -> dict:
    """What the CPU kernels say, before the emulated ones take their place."""
    found = {}
    for kind in ("softmax", "focal"):
        for dtype in (torch.float32, torch.bfloat16):
            found[kind, dtype] = results(criterion_of(kind).weighted_loss, *batch([5, 0, 12], dtype=dtype))
    return found


@pytest.mark.parametrize("kind", ["softmax", "focal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients(expected: dict, emulated_ops, kind: str, dtype: torch.dtype) -> None:
    before = emulated_ops.counts()[0]
    ours = results(criterion_of(kind).weighted_loss, *batch([5, 0, 12], dtype=dtype))
    assert emulated_ops.counts()[0] == before + 4  # cost, assignment, losses; gradients
    for mine, other in zip(ours, expected[kind, dtype], strict=True):
        eps = torch.finfo(mine.dtype).eps
        torch.testing.assert_close(mine, other, rtol=4 * eps, atol=2 * eps * float(other.abs().max()))


def test_captured_criterion_with_changing_targets(emulated_ops) -> None:
    criterion = criterion_of("softmax")
    captured = criterion.capture(batch([1, 1, 1])[0], capacity=40, max_count=20)
    for seed, counts in enumerate([[5, 0, 12], [20, 20, 0], [0, 0, 0]]):
        predictions, targets = batch(counts, seed)
        for ours, theirs in zip(
            results(captured, predictions, targets),
            results(criterion.weighted_loss, predictions, targets),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


def test_nothing_depends_on_the_targets_but_values(emulated_ops) -> None:
    """Launches are the same whatever the counts: what a CUDA graph needs."""
    criterion, launches = criterion_of("softmax"), set()
    kept = StaticTargets.with_capacity(3, 40, 20)
    for seed, counts in enumerate([[5, 0, 12], [20, 20, 0], [0, 0, 0]]):
        predictions, targets = batch(counts, seed)
        kept.copy_(targets)
        before = emulated_ops.counts()
        criterion.weighted_loss(predictions, kept)
        after = emulated_ops.counts()
        launches.add((after[0] - before[0], after[1] - before[1]))
    assert launches == {(3, 1)}


def test_matcher_reports_faults(emulated_ops) -> None:
    predictions, targets = batch([5, 0, 12])
    predictions.logits[2, 2, 7] = torch.nan
    criterion = criterion_of("softmax")
    total, _ = criterion.weighted_loss(predictions, targets)
    assert total.isnan()
    report = criterion.matcher_report()
    assert report is not None
    assert "12 pair(s)" in report
    assert "layer 2, image 2, target 0, query 7: class term" in report
    assert criterion.matcher_report() is None
