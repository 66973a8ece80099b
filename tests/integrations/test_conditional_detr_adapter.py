"""The adapter of Conditional DETR against its definition and recorded outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.definitions import deformable_detr as definition
from integrations.test_detr_adapter import (
    CLASSES,
    COSTS,
    COUNTS,
    GOLDEN,
    MODES,
    Draw,
    assert_recorded,
    assert_same_losses,
)

from detr_fast.integrations.conditional_detr import HungarianMatcher, SetCriterion

LOSSES = ["labels", "boxes", "cardinality"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_losses_are_those_of_the_definition(counts: tuple[int, ...], mode: str) -> None:
    draw = Draw(counts)
    outputs = draw.layers()
    criterion = SetCriterion(CLASSES, HungarianMatcher(*COSTS, mode=mode), {}, 0.3, LOSSES, mode=mode)
    assert_same_losses(
        outputs, criterion(outputs, draw.targets), definition.criterion(outputs, draw.targets, COSTS, 0.3)
    )
    assert criterion.focal_alpha == 0.3


def test_weighted_loss_is_the_weighted_sum() -> None:
    draw = Draw(COUNTS["usual"])
    weights = {"loss_ce": 2.0, "loss_ce_enc": 3.0, "loss_bbox_0": 5.0}
    criterion = SetCriterion(CLASSES, HungarianMatcher(*COSTS), weights, 0.25, LOSSES)
    for further in ({}, {"enc_outputs": draw.layer(queries=30)}):
        outputs = {**draw.layers(), **further}
        losses = criterion(outputs, draw.targets)
        total, entries = criterion.weighted_loss(outputs, draw.targets)
        torch.testing.assert_close(total, criterion.weighted_sum(losses))
        assert list(entries) == list(losses)


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("conditional_*.npz")), ids=lambda file: file.stem)
def test_recorded_case(file: Path) -> None:
    def build(config: dict[str, Any], weights: dict[str, float]) -> SetCriterion:
        costs = (config["costs"][name] for name in ("class", "bbox", "giou"))
        options = (config["focal_alpha"], config["losses"])
        matcher = HungarianMatcher(*costs, mode="compat")
        return SetCriterion(config["num_classes"], matcher, weights, *options, mode="compat")

    assert_recorded(file, build)
