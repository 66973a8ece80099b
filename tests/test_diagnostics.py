"""Diagnostics of a matching against a plain count, pair by pair."""

from __future__ import annotations

import copy

import pytest
import torch

from detr_fast import HungarianMatcher, Predictions, SetCriterion, Targets
from detr_fast.diagnostics import diagnose
from detr_fast.ops import matching_cost_reference

COSTS = {"class": (1.0, 0.0, 0.0), "bbox": (0.0, 5.0, 0.0), "giou": (0.0, 0.0, 2.0)}


def batch(counts: tuple[int, ...] = (3, 0, 12), layers: int = 3, queries: int = 10) -> tuple[Predictions, Targets]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(layers, len(counts), queries, 8, generator=generator)
    boxes = 0.2 + 0.5 * torch.rand(layers, len(counts), queries, 4, generator=generator)
    targets = [
        {
            "labels": torch.randint(0, 7, (count,), generator=generator),
            "boxes": 0.2 + 0.5 * torch.rand(count, 4, generator=generator),
        }
        for count in counts
    ]
    return Predictions(logits, boxes), Targets.pack(targets)


@pytest.mark.parametrize("kind", ["softmax", "focal_stable"])
def test_diagnostics_are_those_of_a_plain_count(kind: str) -> None:
    predictions, targets = batch()
    predictions.logits[1, 0, 4] = torch.nan
    predictions.boxes[2, 2, 3] = torch.inf
    predictions.boxes[0, 2, 5, 2] = -0.1  # the giou term alone
    matcher = HungarianMatcher(1, 5, 2, kind=kind, invalid="skip")  # type: ignore[arg-type]
    query_of_target = matcher(predictions, targets)
    found = diagnose(matcher, predictions, targets, query_of_target).as_dict()
    arguments = (predictions.logits, predictions.boxes, targets.labels, targets.boxes, targets.offsets)
    changed = [[int(a != b) for a, b in zip(*query_of_target[k : k + 2].tolist(), strict=True)] for k in (0, 1)]
    assert found["changed"] == pytest.approx([sum(row) / 15 for row in changed])
    assert found["dropped"] == 2
    assert found["forbidden"] == {0: {"class": 3}, 2: {"bbox": 12, "giou": 24}}
    for term, weights in COSTS.items():
        cost = matching_cost_reference(*arguments, *weights, kind=kind)  # type: ignore[arg-type]
        for layer, queries in enumerate(query_of_target.tolist()):
            own = [float(cost[layer, t, q]) for t, q in enumerate(queries) if q >= 0]
            assert found["cost"][term][layer] == pytest.approx(sum(own) / len(own), rel=1e-5)


def test_a_batch_without_targets() -> None:
    predictions, targets = batch((0, 0))
    matcher = HungarianMatcher(1, 5, 2)
    found = diagnose(matcher, predictions, targets, matcher(predictions, targets)).as_dict()
    assert found["changed"] == [0.0, 0.0]
    assert (found["dropped"], found["forbidden"]) == (0, {})
    assert found["cost"]["giou"] == [0.0, 0.0, 0.0]


def test_a_criterion_tells_of_its_latest_batch() -> None:
    criterion = SetCriterion(7, HungarianMatcher(1, 5, 2), {"loss_ce": 1.0}, 0.1, ["labels", "boxes"])
    assert criterion.diagnostics() is None
    for counts in ((1, 2), (3, 12)):
        predictions, targets = batch(counts)
        predictions.logits.requires_grad_()
        criterion.weighted_loss(predictions, targets)
        found = criterion.diagnostics()
        assert found is not None
        assert not found.cost.requires_grad
        expected = diagnose(criterion.matcher, predictions, targets, criterion.matcher(predictions, targets))
        assert found.as_dict() == expected.as_dict()
    assert found.as_dict()["dropped"] == 2
    assert copy.deepcopy(criterion).diagnostics() is None
    foreign = SetCriterion(7, torch.nn.Identity(), {"loss_ce": 1.0}, 0.1, ["labels"])
    assert foreign.diagnostics() is None
