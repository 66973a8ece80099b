"""The adapter of detrex against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integrations.definitions import detrex as definition
from integrations.definitions.deformable_detr import without_class
from integrations.definitions.detr import match
from integrations.reading import assert_reads_nothing
from integrations.test_detr_adapter import (
    CLASSES,
    COSTS,
    COUNTS,
    MODES,
    Draw,
    assert_same_losses,
    assert_same_pairs,
    gradients_of,
    leaves_of,
)
from torch import nn

from detr_fast import Predictions
from detr_fast.boxes import box_cxcywh_to_xyxy
from detr_fast.integrations.detrex import (
    CrossEntropyCost,
    DINOCriterion,
    FocalLossCost,
    GIoUCost,
    GroupHungarianMatcher,
    GroupSetCriterion,
    HungarianMatcher,
    L1Cost,
    ModifedMatcher,
    SetCriterion,
    TwoStageCriterion,
)

GROUPS, STRIDE = 3, 26


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"alpha": 0.4, "gamma": 1.5}], ids=["defaults", "alpha and gamma"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_focal_losses_and_pairs(counts: tuple[int, ...], options: dict[str, float], mode: str) -> None:
    draw = Draw(counts)
    outputs = draw.layers()
    criterion = SetCriterion(CLASSES, HungarianMatcher(*COSTS, **options, mode=mode), {}, **options, mode=mode)
    expected, matchings = definition.criterion(outputs, draw.targets, COSTS, **options)
    actual, found = criterion(outputs, draw.targets, return_indices=True)
    assert_same_losses(outputs, actual, expected)
    for own, other in zip(found, matchings, strict=True):
        assert_same_pairs(own, other)
    assert_same_pairs(criterion.matcher(outputs, draw.targets), matchings[-1])
    assert not criterion.state_dict()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_softmax_losses_and_pairs(counts: tuple[int, ...], mode: str) -> None:
    draw = Draw(counts)
    outputs = draw.layers(classes=CLASSES + 1)
    matcher = HungarianMatcher(*COSTS, cost_class_type="ce_cost", mode=mode)
    criterion = SetCriterion(CLASSES, matcher, {}, eos_coef=0.2, loss_class_type="ce_loss", mode=mode)
    weight = torch.tensor([1.0] * CLASSES + [0.2])
    expected, matchings = definition.criterion(outputs, draw.targets, COSTS, weight)
    actual, found = criterion(outputs, draw.targets, return_indices=True)
    assert_same_losses(outputs, actual, expected)
    assert_same_pairs(found[-1], matchings[-1])
    assert list(criterion.state_dict()) == ["empty_weight"]


def test_boxes_without_area_have_a_cost() -> None:
    """Their GIoU is 0 / 0 without detrex's epsilon, and here 0."""
    draw = Draw((3, 2))
    outputs = draw.layers()
    for boxes in (*(t["boxes"] for t in draw.targets), outputs["pred_boxes"].data):
        boxes[..., 2:] = 0
    criterion = SetCriterion(CLASSES, HungarianMatcher(*COSTS, mode="compat"), {}, mode="compat")
    expected, _ = definition.criterion(outputs, draw.targets, COSTS)
    actual = criterion(outputs, draw.targets)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


def test_another_epsilon_or_weight_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Draw(COUNTS["usual"])
    outputs = draw.layers()
    for boxes in (*(t["boxes"] for t in draw.targets), *(x.data for x in leaves_of(outputs) if x.shape[-1] == 4)):
        boxes[..., 2:] *= 0.02  # where the epsilon counts
    actual = SetCriterion(CLASSES, HungarianMatcher(*COSTS), {}, alpha=0.251)(outputs, draw.targets)
    expected, _ = definition.criterion(outputs, draw.targets, COSTS)
    with pytest.raises(AssertionError, match="loss_class"):
        assert_same_losses(outputs, actual, expected)
    actual = SetCriterion(CLASSES, HungarianMatcher(*COSTS), {})(outputs, draw.targets)
    assert_same_losses(outputs, actual, expected)
    monkeypatch.setattr(definition, "EPSILON", 1e-7)
    expected, _ = definition.criterion(outputs, draw.targets, COSTS)
    with pytest.raises(AssertionError, match="loss_giou"):
        assert_same_losses(outputs, actual, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_two_stages(counts: tuple[int, ...], binary: bool, mode: str) -> None:
    draw = Draw(counts)
    outputs = {**draw.layers(), "enc_outputs": draw.layer(queries=30)}
    matcher = HungarianMatcher(*COSTS, mode=mode)
    criterion = TwoStageCriterion(CLASSES, matcher, {}, two_stage_binary_cls=binary, mode=mode)
    expected = definition.two_stage(outputs, draw.targets, COSTS, binary)
    labels = [target["labels"] for target in draw.targets]
    assert_same_losses(outputs, criterion(outputs, draw.targets), expected)
    left = without_class(draw.targets) if binary and mode == "compat" else [{"labels": own} for own in labels]
    for target, own in zip(draw.targets, left, strict=True):
        assert target["labels"].tolist() == own["labels"].tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_denoising(counts: tuple[int, ...], binary: bool, mode: str) -> None:
    draw = Draw(counts)
    outputs = {**draw.layers(), "enc_outputs": draw.layer(queries=30)}
    known = draw.layers(queries=GROUPS * STRIDE)
    metas = {"output_known_lbs_bboxes": known, "dn_num": GROUPS, "single_padding": STRIDE}
    matcher = HungarianMatcher(*COSTS, mode=mode)
    criterion = DINOCriterion(CLASSES, matcher, {}, two_stage_binary_cls=binary, mode=mode)
    denoised_with = without_class(draw.targets) if binary and mode == "compat" else draw.targets
    expected = definition.two_stage(outputs, draw.targets, COSTS, binary)
    expected |= definition.denoising(known, denoised_with, GROUPS, STRIDE)
    assert_same_losses({**outputs, "known": known}, criterion(outputs, draw.targets, metas), expected)


def test_without_denoising() -> None:
    draw = Draw(COUNTS["usual"])
    outputs = draw.layers()
    actual = DINOCriterion(CLASSES, HungarianMatcher(*COSTS), {})(outputs, draw.targets)
    expected, _ = definition.criterion(outputs, draw.targets, COSTS)
    for suffix in ("_dn", "_dn_0", "_dn_1"):
        expected |= {name + suffix: torch.tensor(0.0) for name in ("loss_class", "loss_bbox", "loss_giou")}
    assert_same_losses(outputs, actual, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("counts", [*COUNTS.values(), (20, 1)], ids=[*COUNTS, "more targets than a group"])
def test_groups(counts: tuple[int, ...], training: bool, mode: str) -> None:
    draw = Draw(counts)
    outputs = draw.layers(queries=GROUPS * 15)
    matcher = GroupHungarianMatcher(*COSTS, mode=mode)
    criterion = GroupSetCriterion(CLASSES, matcher, {}, GROUPS, mode=mode).train(training)
    count = GROUPS if training else 1
    expected = definition.groups(outputs, draw.targets, COSTS, count)
    assert_same_losses(outputs, criterion(outputs, draw.targets), expected)
    pairs = definition.group_matching(outputs, draw.targets, COSTS, count)
    assert_same_pairs(matcher(outputs, draw.targets, group_nums=count), pairs)
    with torch.no_grad():
        assert torch.equal(
            criterion(Predictions.from_dict(outputs), draw.targets)["loss_giou"],
            criterion(outputs, draw.targets)["loss_giou"],
        )


def test_groups_that_do_not_fit() -> None:
    draw = Draw((3, 2))
    outputs = draw.layers(queries=10)
    with pytest.raises(ValueError, match="GroupHungarianMatcher: group_nums must divide the 10 queries, got 3"):
        GroupHungarianMatcher()(outputs, draw.targets, 3)
    with pytest.raises(ValueError, match="GroupSetCriterion: group_nums must divide the 10 queries, got 3"):
        GroupSetCriterion(CLASSES, GroupHungarianMatcher(), {}, 3)(outputs, draw.targets)
    with pytest.raises(TypeError, match="GroupSetCriterion: matcher must be a GroupHungarianMatcher"):
        GroupSetCriterion(CLASSES, nn.Identity(), {}, 2)(outputs, draw.targets)


@pytest.mark.parametrize("mode", MODES)
def test_exchangeable_costs(mode: str) -> None:
    draw = Draw(COUNTS["usual"])
    outputs = draw.layer()
    listed = [[target[name] for target in draw.targets] for name in ("labels", "boxes")]
    found = ModifedMatcher(mode=mode)(outputs["pred_logits"], outputs["pred_boxes"], *listed)
    assert_same_pairs(found, definition.matching(outputs, draw.targets, (2.0, 5.0, 2.0)))
    costs = (FocalLossCost(alpha=0.4, gamma=1.5, weight=3.0), L1Cost(4.0), GIoUCost(1.0))
    found = ModifedMatcher(*costs, mode=mode)(outputs["pred_logits"], outputs["pred_boxes"], *listed)
    assert_same_pairs(found, definition.matching(outputs, draw.targets, (3.0, 4.0, 1.0), alpha=0.4, gamma=1.5))
    softmax = ModifedMatcher(CrossEntropyCost(), mode=mode)
    found = softmax(outputs["pred_logits"], outputs["pred_boxes"], *listed)
    assert_same_pairs(found, definition.matching(outputs, draw.targets, (1.0, 5.0, 2.0), "ce_cost"))
    assert softmax.report() is None


@pytest.mark.parametrize("kind", [FocalLossCost, CrossEntropyCost])
def test_costs_are_those_of_the_matching(kind: type[nn.Module]) -> None:
    draw = Draw((4,))
    outputs, target = draw.layer(), draw.targets[0]
    logits, boxes = outputs["pred_logits"].detach(), outputs["pred_boxes"].detach()
    bounds = box_cxcywh_to_xyxy(boxes[0]), box_cxcywh_to_xyxy(target["boxes"])
    cost = kind(weight=2.0)(logits[0], target["labels"])
    torch.testing.assert_close(GIoUCost(2.0)(*bounds), -2 * definition.pairwise_giou(boxes[0], target["boxes"]))
    cost = cost + L1Cost(5.0)(boxes[0], target["boxes"]) + GIoUCost(2.0)(*bounds)
    pairs = match(outputs, draw.targets, (1.0, 0.0, 0.0), lambda *_: cost, lambda *_: 0)
    found = ModifedMatcher(kind(weight=2.0), mode="compat")(logits, boxes, [target["labels"]], [target["boxes"]])
    assert_same_pairs(found, pairs)


@pytest.mark.parametrize("mode", MODES)
def test_predictions_without_finite_cost(mode: str) -> None:
    draw = Draw((3, 2))
    outputs = draw.layers(queries=10)
    outputs["pred_logits"].data[1, 4] = torch.nan
    criteria: dict[str, Any] = {
        "one": SetCriterion(CLASSES, HungarianMatcher(*COSTS, mode=mode), {}, mode=mode),
        "groups": GroupSetCriterion(CLASSES, GroupHungarianMatcher(*COSTS, mode=mode), {}, 2, mode=mode),
    }
    for criterion in criteria.values():
        if mode == "compat":
            with pytest.raises(ValueError, match="query 4: class term"):
                criterion(outputs, draw.targets)
        else:
            assert criterion(outputs, draw.targets)["loss_bbox"].isfinite()
            assert "2 pair(s) without a finite cost" in criterion.matcher_report()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_half_types(dtype: torch.dtype, mode: str) -> None:
    draw = Draw(COUNTS["usual"], dtype=dtype)
    outputs = {**draw.layers(queries=10), "enc_outputs": draw.layer(queries=30)}
    for criterion in (
        DINOCriterion(CLASSES, HungarianMatcher(*COSTS, mode=mode), {}, mode=mode),
        GroupSetCriterion(CLASSES, GroupHungarianMatcher(*COSTS, mode=mode), {}, 2, mode=mode),
    ):
        losses = criterion(outputs, draw.targets)
        assert all(value.isfinite() for value in losses.values())
        for leaf, gradient in zip(leaves_of(outputs), gradients_of(losses, list(leaves_of(outputs))), strict=True):
            assert gradient.dtype == leaf.dtype
            assert gradient.isfinite().all()


def test_nothing_is_read_back() -> None:
    draw = Draw(COUNTS["usual"])
    outputs = {**draw.layers(queries=10), "enc_outputs": draw.layer(queries=30)}
    metas = {
        "output_known_lbs_bboxes": draw.layers(queries=GROUPS * STRIDE),
        "dn_num": GROUPS,
        "single_padding": STRIDE,
    }
    criterion = DINOCriterion(CLASSES, HungarianMatcher(*COSTS), {}, two_stage_binary_cls=True)
    assert_reads_nothing(criterion, outputs, draw.targets, metas)
    assert_reads_nothing(GroupSetCriterion(CLASSES, GroupHungarianMatcher(*COSTS), {}, 2), outputs, draw.targets)


def test_weighted_loss() -> None:
    draw = Draw(COUNTS["usual"])
    outputs = {**draw.layers(queries=10), "enc_outputs": draw.layer(queries=30)}
    weights = {"loss_class": 2.0, "loss_bbox_1": 5.0, "loss_class_enc": 3.0}
    for criterion in (
        SetCriterion(CLASSES, HungarianMatcher(*COSTS), weights),
        TwoStageCriterion(CLASSES, HungarianMatcher(*COSTS), weights),
        GroupSetCriterion(CLASSES, GroupHungarianMatcher(*COSTS), weights, 2),
    ):
        losses = criterion(outputs, draw.targets)
        total, entries = criterion.weighted_loss(outputs, draw.targets)
        assert list(entries) == list(losses)
        torch.testing.assert_close(total, sum(losses[name] * weights[name] for name in losses if name in weights))
    with pytest.raises(ValueError, match="matched one to one, here also of further groups of queries"):
        criterion.capture(outputs, 10)


@pytest.mark.parametrize("proposals", [True, False])
@pytest.mark.parametrize("denoises", [True, False])
def test_weighted_loss_has_denoising(denoises: bool, proposals: bool) -> None:
    draw = Draw(COUNTS["usual"])
    outputs = {**draw.layers(), **({"enc_outputs": draw.layer(queries=30)} if proposals else {})}
    known = draw.layers(queries=GROUPS * STRIDE)
    metas = {"output_known_lbs_bboxes": known, "dn_num": GROUPS, "single_padding": STRIDE} if denoises else None
    weights = {"loss_class": 2.0, "loss_bbox_dn": 5.0, "loss_class_dn_1": 3.0}
    criterion = DINOCriterion(CLASSES, HungarianMatcher(*COSTS), weights)
    losses = criterion(outputs, draw.targets, metas)
    total, entries = criterion.weighted_loss(outputs, draw.targets, metas)
    assert list(entries) == list(losses)
    torch.testing.assert_close(total, criterion.weighted_sum(losses))
    assert not any(value.requires_grad for value in entries.values())
    with pytest.raises(ValueError, match=r"DINOCriterion.weighted_loss: joint must be None"):
        criterion.weighted_loss(outputs, draw.targets, metas, joint=torch.ones(2))
    with pytest.raises(ValueError, match=r"DINOCriterion.capture: losses must be .* here also of denoising queries"):
        criterion.capture(draw.layers(), 10)


@pytest.mark.parametrize(("groups", "stride"), [(2, STRIDE), (GROUPS, STRIDE + 1)])
def test_denoising_groups_that_do_not_fit(groups: int, stride: int) -> None:
    draw = Draw((3, 2))
    known = draw.layers(queries=GROUPS * STRIDE)
    metas = {"output_known_lbs_bboxes": known, "dn_num": groups, "single_padding": stride}
    with pytest.raises(ValueError, match=f"denoising queries must be {groups} groups of {stride}, got 78 queries"):
        DINOCriterion(CLASSES, HungarianMatcher(), {})(draw.layers(), draw.targets, metas)


def test_diagnostics_are_not_those_of_an_earlier_batch() -> None:
    draw = Draw(COUNTS["usual"])
    outputs = draw.layers(queries=10)
    criterion = GroupSetCriterion(CLASSES, GroupHungarianMatcher(*COSTS), {}, 2)
    criterion.eval()(outputs, draw.targets)
    assert criterion.diagnostics() is not None
    criterion.train()(outputs, draw.targets)
    assert criterion.diagnostics() is None


def test_matchers_that_compute_otherwise_are_refused() -> None:
    class OwnMatcher(GroupHungarianMatcher):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            raise NotImplementedError

    class NamedMatcher(GroupHungarianMatcher):
        pass

    draw = Draw((3, 2))
    outputs = draw.layers(queries=10)
    with pytest.raises(TypeError, match=r"without a forward of its own, got .*OwnMatcher"):
        GroupSetCriterion(CLASSES, OwnMatcher(), {}, 2)(outputs, draw.targets)
    assert GroupSetCriterion(CLASSES, NamedMatcher(), {}, 2)(outputs, draw.targets)
    for criterion in (SetCriterion, GroupSetCriterion):
        with pytest.raises(ValueError, match=r"matcher must have a sigmoid class cost.*last of 7 labels"):
            criterion(CLASSES, HungarianMatcher(cost_class_type="ce_cost"), {})
        with pytest.raises(ValueError, match="mode must be that of its matcher, 'compat', got 'stable'"):
            criterion(CLASSES, HungarianMatcher(mode="compat"), {})
    with pytest.raises(ValueError, match="mode must be that of its matcher"):
        SetCriterion(CLASSES, ModifedMatcher(mode="compat"), {})


@pytest.mark.parametrize("mode", MODES)
def test_exchangeable_costs_are_those_at_the_call(mode: str) -> None:
    draw = Draw(COUNTS["usual"])
    outputs, matcher = draw.layer(), ModifedMatcher(mode=mode)
    listed = [[target[name] for target in draw.targets] for name in ("labels", "boxes")]
    arguments = (outputs["pred_logits"], outputs["pred_boxes"], *listed)
    matcher.cost_class.weight, matcher.cost_bbox.weight, matcher.cost_giou.weight = 9.0, 0.5, 0.1
    expected = definition.matching(outputs, draw.targets, (9.0, 0.5, 0.1))
    assert [x.tolist() for x, _ in expected] != [x.tolist() for x, _ in ModifedMatcher(mode=mode)(*arguments)]
    assert_same_pairs(matcher(*arguments), expected)
    matcher.cost_class = CrossEntropyCost(9.0)
    expected = definition.matching(outputs, draw.targets, (9.0, 0.5, 0.1), "ce_cost")
    assert_same_pairs(matcher(*arguments), expected)
    one = HungarianMatcher(*COSTS, mode=mode)
    one.cost_class, one.cost_bbox, one.alpha = 9.0, 0.5, 0.4
    found = one({name: outputs[name] for name in ("pred_logits", "pred_boxes")}, draw.targets)
    assert_same_pairs(found, definition.matching(outputs, draw.targets, (9.0, 0.5, 2.0), alpha=0.4))
    with pytest.raises(AttributeError):
        one.cost_class_type = "ce_cost"


def test_options_that_are_not_there() -> None:
    matcher = HungarianMatcher()
    with pytest.raises(ValueError, match="cost_class_type must be 'focal_loss_cost' or 'ce_cost', got 'l2'"):
        HungarianMatcher(cost_class_type="l2")
    with pytest.raises(ValueError, match="SetCriterion: loss_class_type must be 'focal_loss' or 'ce_loss', got 'bce'"):
        SetCriterion(CLASSES, matcher, {}, loss_class_type="bce")
    with pytest.raises(ValueError, match="TwoStageCriterion: losses must be of class, boxes, got 'labels'"):
        TwoStageCriterion(CLASSES, matcher, {}, losses=["labels"])
    with pytest.raises(ValueError, match="eos_coef must be a number for loss_class_type 'ce_loss', got None"):
        TwoStageCriterion(CLASSES, matcher, {}, loss_class_type="ce_loss")
    with pytest.raises(ValueError, match=r"GroupSetCriterion: alpha of the focal loss must be in \[0, 1\], got -1"):
        GroupSetCriterion(CLASSES, matcher, {}, alpha=-1)
    with pytest.raises(ValueError, match="gamma must be at least 0"):
        SetCriterion(CLASSES, matcher, {}, gamma=-1)
    with pytest.raises(TypeError, match="cost_class must be a FocalLossCost or CrossEntropyCost, got Identity"):
        ModifedMatcher(nn.Identity())
    with pytest.raises(ValueError, match="ModifedMatcher: mode must be"):
        ModifedMatcher(mode="fast")
