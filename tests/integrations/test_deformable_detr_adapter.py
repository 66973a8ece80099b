"""The adapter of Deformable DETR against its definition and recorded outputs."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.definitions import deformable_detr as definition
from integrations.definitions.detr import match
from integrations.reading import assert_reads_nothing
from integrations.test_detr_adapter import (
    CLASSES,
    COSTS,
    COUNTS,
    GOLDEN,
    MODES,
    Draw,
    assert_recorded,
    assert_same_losses,
    assert_same_pairs,
    gradients_of,
    leaves_of,
)
from torch import nn

import detr_fast
from detr_fast import Predictions, Targets
from detr_fast.integrations.deformable_detr import HungarianMatcher, SetCriterion, build_matcher
from detr_fast.integrations.layer_losses import Entry, LayerLosses

LOSSES = ["labels", "boxes", "cardinality"]
WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou_0": 2.0, "loss_ce_enc": 2.0, "loss_bbox_enc": 5.0}


def criterion_of(mode: str = "stable", losses: list[str] = LOSSES, focal_alpha: float = 0.25) -> SetCriterion:
    return SetCriterion(CLASSES, HungarianMatcher(*COSTS, mode=mode), WEIGHTS, losses, focal_alpha, mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("proposals", [0, 30])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_losses_and_pairs_are_those_of_the_definition(counts: tuple[int, ...], proposals: int, mode: str) -> None:
    draw = Draw(counts)
    outputs = draw.layers()
    if proposals:
        outputs["enc_outputs"] = draw.layer(queries=proposals)
    criterion = criterion_of(mode, focal_alpha=0.3)
    expected = definition.criterion(outputs, draw.targets, COSTS, 0.3)
    actual = criterion(outputs, draw.targets)
    assert_same_losses(outputs, actual, expected)
    pairs = match(outputs, draw.targets, COSTS, definition.focal_cost)
    assert_same_pairs(criterion.matcher(outputs, draw.targets), pairs)


def test_another_weight_is_noticed() -> None:
    draw = Draw(COUNTS["usual"])
    outputs = {**draw.layers(), "enc_outputs": draw.layer(queries=30)}
    expected = definition.criterion(outputs, draw.targets, COSTS, 0.25)
    with pytest.raises(AssertionError, match="loss_ce"):
        assert_same_losses(outputs, criterion_of(focal_alpha=0.251)(outputs, draw.targets), expected)


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("deformable_*.npz")), ids=lambda file: file.stem)
def test_recorded_case(file: Path) -> None:
    def build(config: dict[str, Any], weights: dict[str, float]) -> SetCriterion:
        costs = (config["costs"][name] for name in ("class", "bbox", "giou"))
        matcher = HungarianMatcher(*costs, mode="compat")
        options = (config["losses"], config["focal_alpha"])
        return SetCriterion(config["num_classes"], matcher, weights, *options, mode="compat")

    assert_recorded(file, build)


def test_modes_differ_where_the_published_cost_is_flat() -> None:
    """Two queries whose logits both lie where 1e-8 hides the difference, and boxes that say the other."""
    logits = torch.tensor([-25.0, -28.0]).view(1, 2, 1)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.201, 0.2]])[None]
    targets = [{"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.201, 0.2]])}]
    outputs = {"pred_logits": logits, "pred_boxes": boxes}
    assert HungarianMatcher(2, 5, 2, mode="compat")(outputs, targets)[0][0].tolist() == [1]
    assert HungarianMatcher(2, 5, 2, mode="stable")(outputs, targets)[0][0].tolist() == [0]
    assert match(outputs, targets, COSTS, definition.focal_cost)[0][0].tolist() == [1]


def test_predictions_without_finite_cost() -> None:
    draw = Draw((3, 2))
    outputs = {**draw.layers(), "enc_outputs": draw.layer(queries=30)}
    outputs["enc_outputs"]["pred_boxes"].data[0, 7, 2] = torch.inf
    with pytest.raises(ValueError, match="image 0, target 0, query 7: box and GIoU term"):
        criterion_of("compat")(outputs, draw.targets)
    criterion = criterion_of("stable")
    losses = criterion(outputs, draw.targets)
    assert all(value.isfinite() for value in losses.values())
    assert "3 pair(s) without a finite cost" in criterion.matcher_report()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_half_types(dtype: torch.dtype, mode: str) -> None:
    draw = Draw(COUNTS["usual"], dtype=dtype)
    outputs = {**draw.layers(), "enc_outputs": draw.layer(queries=30)}
    outputs["pred_logits"].data[0, :2] = 15  # where the published cost is infinite in float16
    losses = criterion_of(mode)(outputs, draw.targets)
    assert all(value.isfinite() for value in losses.values())
    for leaf, gradient in zip(leaves_of(outputs), gradients_of(losses, list(leaves_of(outputs))), strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.isfinite().all()


def test_nothing_is_read_back() -> None:
    draw = Draw(COUNTS["usual"])
    outputs = {**draw.layers(), "enc_outputs": draw.layer(queries=30)}
    assert_reads_nothing(criterion_of(), outputs, draw.targets)


def test_structures_and_weighted_loss() -> None:
    draw = Draw(COUNTS["usual"])
    outputs, criterion = draw.layers(), criterion_of()
    listed = criterion(outputs, draw.targets)
    packed = criterion(Predictions.from_dict(outputs), Targets.pack(draw.targets))
    assert list(listed) == list(packed)
    assert all(torch.equal(listed[name], packed[name]) for name in listed)
    for further in ({}, {"enc_outputs": draw.layer(queries=30)}):
        own = {**outputs, **further}
        losses = criterion(own, draw.targets)
        total, entries = criterion.weighted_loss(own, draw.targets)
        assert list(entries) == list(losses)
        torch.testing.assert_close(total, sum(losses[name] * WEIGHTS[name] for name in losses if name in WEIGHTS))
        assert not any(value.requires_grad for value in entries.values())
    with pytest.raises(ValueError, match=r"weighted_loss: joint must be None"):
        criterion.weighted_loss(own, draw.targets, torch.ones(2))
    with pytest.raises(ValueError, match=r"capture: losses must be of decoder layers alone.*also of enc_outputs"):
        criterion.capture(own, 10)
    total, _ = criterion.capture(outputs, 10)(outputs, draw.targets)
    torch.testing.assert_close(total, criterion.weighted_loss(outputs, draw.targets)[0])


class PublishedMatcher(nn.Module):
    """A matcher of somebody else, which returns pairs and reads what the published one reads."""

    def forward(self, outputs: dict[str, Any], targets: list[dict[str, torch.Tensor]]) -> Any:
        assert "enc_outputs" not in outputs or "pred_logits" in outputs
        return match(outputs, targets, COSTS, definition.focal_cost)


def test_foreign_matcher() -> None:
    draw = Draw(COUNTS["usual"])
    outputs = {**draw.layers(), "enc_outputs": draw.layer(queries=30)}
    criterion = SetCriterion(CLASSES, PublishedMatcher(), {}, LOSSES)
    expected = definition.criterion(outputs, draw.targets, COSTS, 0.25)
    assert_same_losses(outputs, criterion(outputs, draw.targets), expected)
    assert criterion.matcher_report() is None


def test_masks_are_of_the_last_layer() -> None:
    draw = Draw((3, 2))
    masks = torch.randn(2, 9, 8, 8, requires_grad=True)
    outputs = {**draw.layers(), "enc_outputs": draw.layer(queries=30), "pred_masks": masks}
    targets = [{**t, "masks": torch.rand(len(t["labels"]), 16, 16) > 0.5} for t in draw.targets]
    losses = criterion_of(losses=[*LOSSES, "masks"])(outputs, targets)
    assert [name for name in losses if "mask" in name or "dice" in name] == ["loss_mask", "loss_dice"]
    (losses["loss_mask"] + losses["loss_dice"]).backward()
    assert masks.grad.abs().sum() > 0


@pytest.mark.parametrize("has_masks", [(True, False), (True, True)], ids=str)
def test_masks_that_no_loss_uses_are_not_looked_at(has_masks: tuple[bool, bool]) -> None:
    draw = Draw((3, 2))
    outputs, criterion = draw.layers(), criterion_of()
    expected = criterion(outputs, draw.targets)
    masks = {"masks": torch.ones(8, 8)}  # of the image, not of its objects
    targets = [own | masks if has else own for own, has in zip(draw.targets, has_masks, strict=True)]
    found = criterion(outputs, targets)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    packed = replace(Targets.pack(draw.targets), masks=(torch.ones(3, 8, 8), torch.ones(2, 8, 8)))
    assert criterion.structured(outputs, packed)[1].masks is None
    assert criterion_of(losses=["masks"]).structured(outputs, packed)[1].masks is packed.masks


@pytest.mark.parametrize("fault", ["label", "size"])
def test_annotations_that_nobody_checks_are_reported_or_refused(fault: str) -> None:
    """As of targets on a device: these are packed without a look at their values."""
    draw = Draw((3, 2))
    if fault == "label":
        draw.targets[1]["labels"][0] = CLASSES
    else:
        draw.targets[1]["boxes"][0, 2] = -0.1
    packed, outputs = Targets.pack(draw.targets, check_values=False), draw.layers()
    with pytest.raises(ValueError, match="image 1 of the batch, target 0"):
        criterion_of("compat")(outputs, packed)
    criterion = criterion_of("stable")
    assert all(value.isfinite() for value in criterion(outputs, packed).values())
    assert "image 1, target 0" in criterion.matcher_report()
    for mode in MODES:
        with pytest.raises(ValueError, match="image 1 of the batch, target 0"):
            criterion_of(mode)(outputs, draw.targets)


def test_a_matcher_that_computes_otherwise_is_refused() -> None:
    with pytest.raises(ValueError, match="mode must be that of its matcher, 'compat', got 'stable'"):
        SetCriterion(CLASSES, HungarianMatcher(mode="compat"), {}, LOSSES)
    with pytest.raises(ValueError, match="mode must be that of its matcher, 'stable', got 'compat'"):
        SetCriterion(CLASSES, HungarianMatcher(), {}, LOSSES, mode="compat")
    with pytest.raises(ValueError, match=r"matcher must have a sigmoid class cost.*last of 7 labels"):
        SetCriterion(CLASSES, detr_fast.HungarianMatcher(), {}, LOSSES)
    assert SetCriterion(CLASSES, detr_fast.HungarianMatcher(kind="focal"), {}, LOSSES, mode="compat").mode == "compat"


def test_alpha_follows_its_published_name() -> None:
    draw = Draw((3, 2))
    outputs, criterion = draw.layers(), criterion_of(focal_alpha=0.25)
    criterion.focal_alpha = 0.4
    expected = definition.criterion(outputs, draw.targets, COSTS, 0.4)
    assert_same_losses(outputs, criterion(outputs, draw.targets), expected)


def test_losses_may_be_multiplied_in_place() -> None:
    draw = Draw((3, 2))
    outputs = draw.layers()
    losses = criterion_of()(outputs, draw.targets)
    before = {name: value.detach().clone() for name, value in losses.items()}
    for value in losses.values():
        value *= 2
    assert all(torch.equal(losses[name], 2 * before[name]) for name in losses)


def test_weighted_entries_follow_their_weights() -> None:
    weights = {"loss_a": 2.0, "loss_b": 3.0}
    entries = [Entry("loss_a", "a"), Entry("loss_b", "b", ("", "_x")), Entry("unweighted", "c")]
    named = LayerLosses(entries, weights, terms=("a", "b", "c"))
    values = torch.arange(1.0, 10.0).view(3, 3).requires_grad_()
    for _ in range(2):  # the second time with other weights
        losses = named(values, ["_0", "_x", ""])
        expected = {"loss_a": 7, "loss_b": 8, "loss_a_0": 1, "loss_a_x": 4, "loss_b_x": 5}
        assert list(losses) == list(expected)
        for name, value in expected.items():
            assert losses[name].item() == value * weights[name[:6]]
        (gradient,) = torch.autograd.grad(losses["loss_b_x"], values)
        assert gradient.flatten().nonzero().tolist() == [[4]]
        assert gradient[1, 1] == weights["loss_b"]
        weights["loss_b"] = 7.0
    with pytest.raises(ValueError, match=r"values must be \[2, 3\], got \[3, 3\]"):
        named(values, ["_0", ""])
    with pytest.raises(ValueError, match="term of loss_d must be of"):
        LayerLosses([Entry("loss_d", "d")])
    with pytest.raises(ValueError, match="a term of their own"):
        LayerLosses([Entry("loss_a", "class"), Entry("loss_b", "class")], weights)


def test_state_and_options_are_the_published_ones() -> None:
    assert not criterion_of().state_dict()
    matcher = build_matcher(Namespace(set_cost_class=2, set_cost_bbox=5, set_cost_giou=2), mode="compat")
    assert (matcher.cost_class, matcher.cost_bbox, matcher.cost_giou, matcher.alpha) == (2, 5, 2, 0.25)
    with pytest.raises(ValueError, match=r"alpha of the focal loss must be in \[0, 1\], got -1"):
        criterion_of(focal_alpha=-1)
    with pytest.raises(ValueError, match="losses must be of labels, cardinality, boxes, masks, got 'bce'"):
        criterion_of(losses=["bce"])
    with pytest.raises(ValueError, match="SetCriterion: mode must be"):
        criterion_of().__class__(CLASSES, matcher, {}, LOSSES, mode="fast")
