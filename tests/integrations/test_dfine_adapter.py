"""The adapters of D-FINE and DEIM against their definition and the parts that transformers has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integrations.definitions import dfine as definition
from integrations.definitions.rtdetr import shared_weights
from integrations.reading import assert_reads_nothing
from integrations.test_rtdetr_adapter import CLASSES, COSTS, COUNTS, MODES, assert_same, compared
from torch import Tensor

from detr_fast.integrations import layer_losses
from detr_fast.integrations.dfine import DEIMCriterion, DFINECriterion, HungarianMatcher, local_losses
from detr_fast.integrations.edge_distributions import bins_of, weighting
from detr_fast.structures import Predictions, StaticTargets, Targets

WEIGHTS = shared_weights(loss_fgl=0.15, loss_ddf=1.5)
LOSSES = ["vfl", "boxes", "local"]


def dfine(mode: str, losses: list[str] = LOSSES, **options: Any) -> tuple[DFINECriterion, definition.Criterion]:
    settings = (dict(WEIGHTS), losses, 0.75, 2.0, CLASSES)
    matcher = HungarianMatcher(COSTS, use_focal_loss=True, mode=mode)
    expected = definition.Criterion(definition.Matcher(COSTS), *settings, **options)
    return DFINECriterion(matcher, *settings, **options, mode=mode), expected


def deim(mode: str, losses: tuple[str, ...] = ("mal", "boxes", "local"), **options: Any) -> tuple[Any, Any]:
    settings = (WEIGHTS | {"loss_mal": 1.0}, list(losses), 0.75, 1.5, CLASSES)
    matcher = HungarianMatcher(COSTS, use_focal_loss=True, mode=mode)
    expected = definition.Criterion(definition.Matcher(COSTS), *settings, **options)
    return DEIMCriterion(matcher, *settings, **options, mode=mode), expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("agreeing", [True, False], ids=["agreeing", "random"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_losses_of_dfine(counts: tuple[int, ...], agreeing: bool, mode: str) -> None:
    compared(*dfine(mode), definition.random_batch(counts, agreeing=agreeing))


def test_a_decoder_of_six_layers_has_68_losses() -> None:
    losses = compared(*dfine("stable"), definition.random_batch(layers=6))
    assert len(losses) == 68
    assert {
        "loss_fgl",
        "loss_ddf_aux_4",
        "loss_giou_pre",
        "loss_vfl_enc_0",
        "loss_fgl_dn_5",
        "loss_bbox_dn_pre",
    } <= set(losses)
    assert losses["loss_ddf_dn_5"] == 0  # its own teacher


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mal_alpha", [None, 0.4])
def test_losses_of_deim(mal_alpha: float | None, mode: str) -> None:
    compared(*deim(mode, mal_alpha=mal_alpha), definition.random_batch(dtype=torch.float32))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_deim_without_the_union(counts: tuple[int, ...]) -> None:
    compared(*deim("compat", use_uni_set=False), definition.random_batch(counts, agreeing=False))


def test_stable_localises_each_pair_by_its_own_target() -> None:
    class Corrected(definition.Criterion):
        def local(self, *arguments: Any) -> dict[str, Tensor]:
            self.bins.clear()  # reference points are the same in all layers
            return super().local(*arguments)

    batch = definition.random_batch(agreeing=False)
    criterion, expected = deim("stable", use_uni_set=False)
    published = {name: loss.item() for name, loss in expected(*batch[:2]).items()}
    expected.__class__ = Corrected
    corrected = compared(criterion, expected, batch)
    assert corrected["loss_fgl_aux_0"] != published["loss_fgl_aux_0"]


def test_deim_of_rtdetr_has_no_distributions() -> None:
    outputs, targets, leaves = definition.random_batch()
    for layer in (outputs, *outputs["aux_outputs"], *outputs["dn_outputs"]):
        for name in ("pred_corners", "ref_points", "teacher_corners", "teacher_logits"):
            layer.pop(name, None)
    for name in ("up", "reg_scale", "pre_outputs", "dn_pre_outputs"):
        outputs.pop(name)
    found = compared(*deim("stable"), (outputs, targets, leaves))
    assert not any("fgl" in name or "pre" in name for name in found)
    compared(*deim("stable", losses=("mal", "boxes")), (outputs, targets, leaves))


@pytest.mark.parametrize("losses", [["focal", "boxes"], ["vfl", "local"], ["boxes"], ["focal", "vfl"]])
def test_which_losses_are_asked_for(losses: list[str]) -> None:
    criterion, expected = dfine("compat", losses)
    criterion.weight_dict["loss_focal"] = expected.weight_dict["loss_focal"] = 0.7
    compared(criterion, expected, definition.random_batch())


@pytest.mark.parametrize("weighting", ["iou", "giou"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_losses_weighted_by_quality(counts: tuple[int, ...], weighting: str) -> None:
    compared(*dfine("compat", boxes_weight_format=weighting), definition.random_batch(counts))


def test_matchability_of_negative_giou_is_0_in_stable() -> None:
    outputs, targets, leaves = definition.random_batch(agreeing=False)
    criterion, _ = deim("stable", boxes_weight_format="giou")
    losses = criterion(outputs, targets)
    assert losses["loss_mal"] > 0
    gradient = torch.autograd.grad(losses["loss_mal"], leaves["last logits"])[0]
    assert gradient.isfinite().all()
    published, expected = deim("compat", boxes_weight_format="giou")
    assert expected(outputs, targets)["loss_mal"] == 0  # NaN, replaced
    assert published(outputs, targets)["loss_mal"] == 0


@pytest.mark.parametrize("is_agnostic", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_class_agnostic_encoder(mode: str, is_agnostic: bool) -> None:
    outputs, targets, leaves = definition.random_batch(encoder_classes=1 if is_agnostic else None)
    criterion, expected = dfine(mode)
    if is_agnostic and mode == "compat":
        with pytest.raises(ValueError, match="label must be in"):
            criterion(outputs, targets)
    if is_agnostic:
        for target in targets:
            target["labels"].zero_()
    compared(criterion, expected, (outputs, targets, leaves))


def test_stable_matches_a_class_agnostic_encoder_without_classes() -> None:
    outputs, targets, leaves = definition.random_batch(encoder_classes=1)

    class Corrected(definition.Matcher):
        def costs(self, layer: dict, targets: list) -> list[Tensor]:
            if layer["pred_logits"].shape[-1] == 1:
                targets = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
            return super().costs(layer, targets)

    criterion, expected = dfine("stable")
    expected.matcher = Corrected(COSTS)
    compared(criterion, expected, (outputs, targets, leaves))


def test_boxes_of_negative_size() -> None:
    """D-FINE's decoder can cross the edges of a box."""
    batch = definition.random_batch()
    with torch.no_grad():
        for layer in (batch[0], *batch[0]["aux_outputs"], *batch[0]["dn_outputs"]):
            layer["pred_boxes"][:, ::2, 2] *= -0.3
            layer["pred_boxes"][:, ::3, 3] *= -0.2
    compared(*dfine("compat"), batch)
    criterion, expected = dfine("stable")
    losses = criterion(*batch[:2])
    matcher = expected.matcher

    class Sized(definition.Matcher):
        def costs(self, layer: dict, targets: list) -> list[Tensor]:
            boxes = torch.cat([layer["pred_boxes"][..., :2], layer["pred_boxes"][..., 2:].clamp(min=0)], -1)
            return super().costs({**layer, "pred_boxes": boxes}, targets)

    expected.matcher = Sized(COSTS)
    assert matcher(batch[0], batch[1])[0][0].tolist() != []
    assert_same(losses, expected(*batch[:2]), batch[2])


def test_queries_that_are_not_a_number() -> None:
    outputs, targets, _ = definition.random_batch()
    with torch.no_grad():
        outputs["pred_logits"][2, 4:9] = torch.nan
        outputs["aux_outputs"][0]["pred_boxes"][0, 3] = torch.nan
    for layer in (outputs, outputs["aux_outputs"][0]):
        wanted = definition.Matcher(COSTS)(layer, targets)
        found = HungarianMatcher(COSTS, True, mode="compat")(layer, targets)["indices"]
        for own, expected in zip(found, wanted, strict=True):
            assert torch.equal(own[0], expected[0])
            assert torch.equal(own[1], expected[1])
    criterion, expected = dfine("compat")
    published = expected(outputs, targets)
    losses = criterion(outputs, targets)
    assert losses["loss_vfl"] == published["loss_vfl"] == 0
    for name, loss in published.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-5, atol=1e-7, msg=name)

    criterion, _ = dfine("stable")
    losses = criterion(outputs, targets)
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_bbox"] > 0
    assert "image 2" in criterion.matcher_report() or "image 0" in criterion.matcher_report()
    queries = criterion.matcher(outputs, targets)["indices"][2][0]
    assert not set(queries.tolist()) & set(range(4, 9))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rounds", [1, 3])
def test_matched_several_times(rounds: int, mode: str) -> None:
    outputs, targets, _ = definition.random_batch(queries=40)
    wanted = definition.Matcher(COSTS).several(outputs, targets, rounds, blocks_target_numbers=mode == "compat")
    found = HungarianMatcher(COSTS, True, mode=mode)(outputs, targets, return_topk=rounds)
    assert list(found) == ["indices_o2m"]
    for own, expected, target in zip(found["indices_o2m"], wanted, targets, strict=True):
        assert len(own[0]) == rounds * len(target["labels"])
        assert torch.equal(own[0], expected[0])
        assert torch.equal(own[1], expected[1])


def test_stable_uses_no_query_twice() -> None:
    outputs, targets, _ = definition.random_batch((3, 7), queries=12)
    found = HungarianMatcher(COSTS, True)(outputs, targets, return_topk=2)["indices_o2m"]
    for (queries, _), target in zip(found, targets, strict=True):
        assert len(queries) == len(queries.unique()) == min(12, 2 * len(target["labels"]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_focal_loss", [True, False])
def test_pairs_are_those_of_scipy(use_focal_loss: bool, mode: str) -> None:
    for counts in COUNTS.values():
        outputs, targets, _ = definition.random_batch(counts, classes=CLASSES)
        for target in targets:
            target["labels"].clamp_(max=CLASSES - 2)
        wanted = definition.Matcher(COSTS, use_focal_loss=use_focal_loss)(outputs, targets)
        found = HungarianMatcher(COSTS, use_focal_loss, mode=mode)(outputs, targets)
        assert list(found) == ["indices"]
        for own, expected in zip(found["indices"], wanted, strict=True):
            for side, wanted_side in zip(own, expected, strict=True):
                assert side.dtype == torch.int64
                assert torch.equal(side, wanted_side)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_focal_loss", [True, False])
def test_the_matcher_changes_at_an_epoch(use_focal_loss: bool, mode: str) -> None:
    outputs, targets, _ = definition.random_batch()
    for target in targets:
        target["labels"].clamp_(max=CLASSES - 2)
    options = {"change_matcher": True, "iou_order_alpha": 3.0, "matcher_change_epoch": 5}
    matcher = HungarianMatcher(COSTS, use_focal_loss, mode=mode, **options)
    usual = definition.Matcher(COSTS, use_focal_loss=use_focal_loss)
    later = definition.Matcher(COSTS, use_focal_loss=use_focal_loss, iou_order=3.0)
    for epoch, expected in ((0, usual), (4, usual), (5, later), (70, later)):
        found = matcher(outputs, targets, epoch=epoch)["indices"]
        for cost, own, wanted in zip(expected.costs(outputs, targets), found, expected(outputs, targets), strict=True):
            # Pairs that do not overlap cost 0 in all: the assignment is one of several.
            assert len(own[0]) == len(wanted[0])
            torch.testing.assert_close(cost[own].sum(), cost[wanted].sum())


def test_deim_tells_its_matcher_the_epoch() -> None:
    outputs, targets, _ = definition.random_batch()
    criterion, _ = deim("stable")
    usual = criterion(outputs, targets)
    criterion.matcher.change_matcher, criterion.matcher.matcher_change_epoch = True, 5
    assert torch.equal(criterion(outputs, targets, epoch=4)["loss_mal"], usual["loss_mal"])
    assert not torch.equal(criterion(outputs, targets, 5)["loss_mal"], usual["loss_mal"])


def test_a_matcher_of_another_kind_is_asked_for_each_set() -> None:
    batch = definition.random_batch()
    criterion, _ = dfine("stable")
    expected = criterion(*batch[:2])

    class Published(torch.nn.Module):
        def forward(self, outputs: dict, targets: list) -> Any:
            return {"indices": definition.Matcher(COSTS)(outputs, targets)}

    criterion.matcher = Published()
    assert_same(criterion(*batch[:2]), expected, batch[2])


def test_teachers_of_their_own_memory() -> None:
    """What the decoder's last layer teaches may be a copy, or another one for each layer."""
    batch = definition.random_batch()
    expected = {name: loss.detach() for name, loss in dfine("stable")[0](*batch[:2]).items()}
    for layer in (*batch[0]["aux_outputs"], *batch[0]["dn_outputs"]):
        for name in ("teacher_corners", "teacher_logits"):
            layer[name] = layer[name].detach().clone()
    losses = compared(*dfine("stable"), batch)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name].detach(), loss, rtol=1e-5, atol=1e-7, msg=name)


def test_views_of_one_tensor_are_their_own_teacher() -> None:
    outputs, targets, leaves = definition.random_batch()
    corners = torch.stack([layer["pred_corners"] for layer in outputs["dn_outputs"]])
    for index, layer in enumerate(outputs["dn_outputs"]):
        layer["pred_corners"], layer["teacher_corners"] = corners[index], corners[-1]
    assert dfine("stable")[0](outputs, targets)["loss_ddf_dn_2"] == 0
    compared(*dfine("stable"), (outputs, targets, leaves))


def test_scale_as_a_number() -> None:
    batch = definition.random_batch()
    expected = dfine("stable")[0](*batch[:2])
    batch[0]["reg_scale"] = 4.0
    assert_same(dfine("stable")[0](*batch[:2]), expected, batch[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    outputs, targets, leaves = definition.random_batch(dtype=dtype)
    with torch.no_grad():
        outputs["pred_logits"][0, :4] = torch.tensor([30.0, -30.0, 9.0, -18.0])[:, None]
    for mode in MODES:
        for criterion in (dfine(mode)[0], deim(mode)[0], dfine(mode, boxes_weight_format="iou")[0]):
            losses = criterion(outputs, targets)
            gradients = torch.autograd.grad(sum(losses.values()), list(leaves.values()))
            assert all(loss.isfinite() for loss in losses.values())
            assert all(g.isfinite().all() and g.dtype == dtype for g in gradients)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"use_uni_set": False}, {"boxes_weight_format": "giou"}], ids=str)
def test_nothing_is_read_back(options: dict[str, Any], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tensors without values have no memory to compare.
    monkeypatch.setattr(local_losses, "_are_same", lambda one, other: one is other)
    for encoder_classes in (None, 1):
        outputs, targets, _ = definition.random_batch(encoder_classes=encoder_classes)
        criterion, _ = deim(mode, **options)
        assert_reads_nothing(criterion, outputs, targets)
        criterion.matcher.change_matcher, criterion.matcher.matcher_change_epoch = True, 5
        assert_reads_nothing(criterion, outputs, targets, 5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_denoising", [True, False])
@pytest.mark.parametrize("wrong", ["label", "box"])
def test_annotations_that_are_wrong_are_named(wrong: str, with_denoising: bool, mode: str) -> None:
    outputs, targets, _ = definition.random_batch(with_denoising=with_denoising)
    if wrong == "label":
        targets[2]["labels"][1] = CLASSES
    else:
        targets[2]["boxes"][1, 3] = torch.nan
    for criterion in (dfine(mode)[0], deim(mode)[0]):
        with pytest.raises(ValueError, match=f"image 2 of the batch, target 1: {wrong} must be"):
            criterion(outputs, targets)


@pytest.mark.parametrize("epoch", [0, 5])
@pytest.mark.parametrize("use_focal_loss", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_unknown_labels_match_nothing(mode: str, use_focal_loss: bool, epoch: int) -> None:
    """As a device sees them, where looking would wait."""
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2])
    labels = torch.tensor([1, 99, -1, CLASSES - 1, 2])
    targets = Targets.pack([{"labels": labels, "boxes": boxes.expand(5, 4)}], check_values=False)
    predictions = Predictions(torch.randn(1, 1, 8, CLASSES), boxes.expand(1, 1, 8, 4))
    options = {"change_matcher": True, "matcher_change_epoch": 5}
    matcher = HungarianMatcher(COSTS, use_focal_loss, mode=mode, **options)
    found = matcher(predictions, targets, epoch=epoch)[0]
    assert (found >= 0).tolist() == [True, False, False, use_focal_loss, True]
    report = matcher.report()
    assert (report.count, report.image, report.target, report.query) == (8 * (3 - use_focal_loss), 0, 1, 0)
    assert "label" in report.terms


@pytest.mark.parametrize("mode", MODES)
def test_unknown_labels_match_nothing_several_times(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Targets, "check_values", lambda *_: None)  # as on a device
    outputs, targets, _ = definition.random_batch((3,))
    targets[0]["labels"][1] = 99
    ((_, own),) = HungarianMatcher(COSTS, True, mode=mode)(outputs, targets, return_topk=3)["indices_o2m"]
    assert sorted(own.tolist()) == [0, 0, 0, 2, 2, 2]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", ["pred_logits", "pred_boxes"])
def test_the_changed_matcher_reports_what_is_not_finite(part: str, mode: str) -> None:
    outputs, targets, _ = definition.random_batch()
    with torch.no_grad():
        outputs[part][2, 4:9] = torch.nan
    matcher = HungarianMatcher(COSTS, True, mode=mode, change_matcher=True, matcher_change_epoch=5)
    queries = matcher(outputs, targets, epoch=5)["indices"][2][0]
    assert mode == "compat" or not set(queries.tolist()) & set(range(4, 9))
    report = matcher.report()
    assert (report.count, report.layer, report.image, report.target, report.query) == (35, 0, 2, 0, 4)
    assert report.terms == (("class",) if part == "pred_logits" else ("GIoU",))
    assert matcher.report() is None


@pytest.mark.parametrize("mode", MODES)
def test_the_changed_matcher_ignores_rows_past_the_targets(mode: str) -> None:
    outputs, targets, _ = definition.random_batch((3, 2))
    static = StaticTargets.with_capacity(2, 9)
    static.labels.fill_(99)
    static.boxes.fill_(torch.nan)
    static.copy_(Targets.pack(targets))
    predictions = Predictions(outputs["pred_logits"][None], outputs["pred_boxes"][None])
    matcher = HungarianMatcher(COSTS, True, mode=mode, change_matcher=True, matcher_change_epoch=5)
    found = matcher(predictions, static, epoch=5)[0]
    assert (found >= 0).tolist() == [True] * 5 + [False] * 4
    assert torch.equal(found[:5], matcher(predictions, Targets.pack(targets), epoch=5)[0])
    assert matcher.report() is None


@pytest.mark.parametrize("size", [0.0, 0.1, -0.1])
def test_gradient_of_boxes_without_size(size: float) -> None:
    outputs, targets, leaves = definition.random_batch()
    with torch.no_grad():
        for layer in (outputs, *outputs["aux_outputs"], *outputs["dn_outputs"]):
            layer["pred_boxes"][:, :, 2] = size
    criterion, expected = dfine("compat", ["boxes"])
    criterion.weight_dict.pop("loss_giou")
    expected.weight_dict.pop("loss_giou", None)
    compared(criterion, expected, (outputs, targets, leaves))


def test_normalisers_are_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, targets, _ = definition.random_batch()
    criterion, _ = dfine("stable")
    alone = criterion(outputs, targets)
    monkeypatch.setattr(layer_losses, "mean_box_count", lambda offsets: 2 * offsets[-1].float())
    for name, loss in criterion(outputs, targets).items():
        expected = alone[name] / (1 if "ddf" in name else 2)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0, msg=name)


def test_wrong_arguments() -> None:
    matcher = HungarianMatcher(COSTS, True)
    with pytest.raises(ValueError, match="losses must be of focal, vfl, boxes, local, got 'mal'"):
        DFINECriterion(matcher, WEIGHTS, ["mal"])
    with pytest.raises(ValueError, match="losses must be of focal, vfl, mal, boxes, local, got 'bce'"):
        DEIMCriterion(matcher, WEIGHTS, ["bce"])
    with pytest.raises(ValueError, match="mode must be"):
        DFINECriterion(matcher, WEIGHTS, ["vfl"], mode="fast")
    criterion, _ = dfine("stable")
    outputs, targets, _ = definition.random_batch()
    with pytest.raises(ValueError, match="outputs must have 'aux_outputs'"):
        criterion({name: value for name, value in outputs.items() if name != "aux_outputs"}, targets)
    with pytest.raises(TypeError, match="Predictions with Targets"):
        matcher(outputs, criterion._packed(outputs, targets))
    outputs["pre_outputs"] = {name: value[:, :10] for name, value in outputs["pre_outputs"].items()}
    with pytest.raises(ValueError, match=r"pred_boxes of set '_pre' must be \[4, 20, 4\] as others, got \[4, 10, 4\]"):
        criterion(outputs, targets)


@pytest.mark.parametrize(("reg_max", "up", "scale"), [(32, 0.5, 4.0), (16, 0.7, -2.5), (32, 0.3, 8.0)])
def test_bins_are_those_of_transformers(reg_max: int, up: float, scale: float) -> None:
    pytest.importorskip("transformers")
    from transformers.loss import loss_d_fine

    generator = torch.Generator().manual_seed(0)
    points = torch.rand(200, 4, generator=generator) * 0.5 + 0.01
    boxes = torch.rand(200, 4, generator=generator) * 0.9 + 0.001
    bound = torch.tensor([up])
    theirs = loss_d_fine.weighting_function(reg_max, bound, scale)
    torch.testing.assert_close(weighting(reg_max, bound, scale), theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(definition.weighting(reg_max, bound, scale), theirs, rtol=1e-6, atol=1e-6)
    corners = definition.corners(boxes)
    left, right, _ = loss_d_fine.bbox2distance(points, corners, reg_max, scale, bound)
    for own_left, own_right in (
        bins_of(points, boxes, reg_max, scale, bound),
        definition.bins_of(points, corners, reg_max, scale, bound),
    ):
        position, wanted = own_left + own_right, left.long().view(-1, 4) + right.view(-1, 4)
        torch.testing.assert_close(position.float(), wanted, rtol=0, atol=2e-4)
    assert (right == 1).any()  # beyond the last value of W
    assert ((left == 0) & (right == 0)).any()  # before the first


def test_the_definition_of_local_losses_is_what_transformers_computes() -> None:
    """One set: there the union is its matching. The published factor of the batch is 8, that of transformers 1."""
    pytest.importorskip("transformers")
    from transformers import DFineConfig
    from transformers.loss.loss_d_fine import DFineLoss

    outputs, targets, _ = definition.random_batch()
    layer = outputs["aux_outputs"][0]
    expected = definition.Criterion(definition.Matcher(COSTS), WEIGHTS, LOSSES, 0.75, 2.0, CLASSES)
    expected.bins = {}
    pairs = definition.Matcher(COSTS)(layer, targets)
    ours = expected.local(layer, definition.Pairs(pairs, targets), 15.0, (outputs["up"], 4.0), False)
    config = DFineConfig(num_labels=CLASSES, reg_scale=4.0, up=0.5)
    theirs = DFineLoss(config).loss_local(layer, targets, pairs, 15.0)
    for name, loss in theirs.items():
        torch.testing.assert_close(ours[name], loss, rtol=1e-5, atol=1e-6, msg=name)
