"""The adapters of RT-DETR and RT-DETRv2 against their definition and the losses of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integrations.definitions import rtdetr as definition
from integrations.reading import assert_reads_nothing
from torch import Tensor

from detr_fast.integrations import layer_losses
from detr_fast.integrations.rtdetr import HungarianMatcher, HungarianMatcherv2, RTDETRCriterionv2, SetCriterion
from detr_fast.structures import Targets

COSTS = {"cost_class": 2.0, "cost_bbox": 5.0, "cost_giou": 2.0}
CLASSES = 11
MODES = ("compat", "stable")
COUNTS = {
    "usual": (3, 0, 7, 5),
    "none": (0, 0),
    "one": (1,),
    "more targets than queries": (25, 2),
}


def compared(
    criterion: torch.nn.Module,
    expected: definition.Criterion,
    batch: tuple[dict, list[dict[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The criterion's losses, which with their gradients must be the definition's."""
    outputs, targets, leaves = batch
    losses = expected(outputs, targets)
    assert_same(criterion(outputs, targets), losses, leaves)
    return losses


def assert_same(actual: dict[str, Tensor], losses: dict[str, Tensor], leaves: dict[str, Tensor]) -> None:
    assert set(actual) == set(losses)
    for name, loss in losses.items():
        torch.testing.assert_close(actual[name].double(), loss.double(), rtol=1e-5, atol=1e-7, msg=name)
    names = sorted(name for name, loss in losses.items() if loss.requires_grad)
    assert all(actual[name].requires_grad for name in names)
    # Different factors, so that no exchange of gradients between entries goes unseen.
    gradients = [
        torch.autograd.grad(
            sum(some[name] * (1 + 0.1 * index) for index, name in enumerate(names)),
            list(leaves.values()),
            allow_unused=True,
        )
        for some in (actual, losses)
    ]
    for name, own, wanted in zip(leaves, *gradients, strict=True):
        wanted = torch.zeros_like(leaves[name]) if wanted is None else wanted
        own = torch.zeros_like(leaves[name]) if own is None else own
        assert own.dtype == leaves[name].dtype
        assert (own - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-9, name


def both(losses: list[str], weights: dict[str, float], mode: str, **options: Any) -> tuple[Any, Any]:
    """RTDETRCriterionv2 and its definition."""
    settings = (weights, losses, 0.75, 2.0, CLASSES)
    matcher = HungarianMatcherv2(COSTS, use_focal_loss=True, mode=mode)
    expected = definition.Criterion(definition.Matcher(COSTS), *settings, **options)
    return RTDETRCriterionv2(matcher, *settings, **options, mode=mode), expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_losses_of_v2(counts: tuple[int, ...], mode: str) -> None:
    criterion, expected = both(["vfl", "boxes"], definition.shared_weights(), mode)
    batch = definition.random_batch(counts)
    losses = compared(criterion, expected, batch)
    if sum(counts):
        assert {"loss_vfl", "loss_bbox_aux_1", "loss_giou_enc_0", "loss_vfl_dn_2"} < set(losses)
        assert all(value > 0 for value in losses.values())


@pytest.mark.parametrize("losses", [["focal", "boxes"], ["boxes", "vfl", "focal"], ["focal"], ["boxes"]])
def test_which_losses_are_asked_for(losses: list[str]) -> None:
    weights = definition.shared_weights(loss_focal=0.7)
    compared(*both(losses, weights, "compat"), definition.random_batch())


def test_entries_without_a_weight_are_left_out() -> None:
    criterion, expected = both(["vfl", "boxes"], {"loss_giou": 2.0}, "stable")
    assert all(name.startswith("loss_giou") for name in compared(criterion, expected, definition.random_batch()))


def test_weights_are_looked_up_at_every_call() -> None:
    criterion, expected = both(["vfl", "boxes"], definition.shared_weights(), "stable")
    batch = definition.random_batch()
    compared(criterion, expected, batch)
    criterion.weight_dict["loss_bbox"] = expected.weight_dict["loss_bbox"] = 1.5
    compared(criterion, expected, batch)


@pytest.mark.parametrize("losses", [["vfl", "boxes"], ["boxes", "focal", "vfl"]])
@pytest.mark.parametrize("weighting", ["iou", "giou"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_losses_weighted_by_quality(counts: tuple[int, ...], weighting: str, losses: list[str]) -> None:
    weights = definition.shared_weights(loss_focal=0.7)
    criterion, expected = both(losses, weights, "compat", boxes_weight_format=weighting)
    compared(criterion, expected, definition.random_batch(counts))


def test_stable_does_not_drive_disjoint_pairs_apart() -> None:
    outputs, targets, leaves = definition.random_batch((1,), layers=1, with_encoder=False, with_denoising=False)
    with torch.no_grad():
        outputs["pred_boxes"].copy_(torch.tensor([0.1, 0.1, 0.1, 0.1]))
        targets[0]["boxes"].copy_(torch.tensor([0.8, 0.8, 0.1, 0.1]))
    found = {}
    for mode in MODES:
        criterion, _ = both(["vfl", "boxes"], definition.shared_weights(), mode, boxes_weight_format="giou")
        found[mode] = criterion(outputs, targets)
    assert found["compat"]["loss_giou"] < 0
    assert found["stable"]["loss_giou"] == 0
    gradient = torch.autograd.grad(found["stable"]["loss_vfl"], leaves["last logits"])[0]
    assert gradient.isfinite().all()


def test_pairs_of_the_last_layer_for_all() -> None:
    criterion, expected = both(["vfl", "boxes"], definition.shared_weights(), "stable", share_matched_indices=True)
    batch = definition.random_batch()
    shared = compared(criterion, expected, batch)
    own = both(["vfl", "boxes"], definition.shared_weights(), "stable")[0](*batch[:2])
    assert not torch.allclose(shared["loss_bbox_aux_0"], own["loss_bbox_aux_0"])
    assert torch.allclose(shared["loss_bbox_enc_0"], own["loss_bbox_enc_0"])


def test_sets_of_other_shapes() -> None:
    outputs, targets, leaves = definition.random_batch()
    larger = definition.random_batch(queries=33, seed=1, layers=1)
    outputs["enc_aux_outputs"] = [{name: larger[0][name] for name in ("pred_logits", "pred_boxes")}]
    leaves = leaves | {f"other {name}": larger[2][f"last {name}"] for name in ("logits", "boxes")}
    compared(*both(["vfl", "boxes"], definition.shared_weights(), "compat"), (outputs, targets, leaves))


@pytest.mark.parametrize("mode", MODES)
def test_class_agnostic_encoder(mode: str) -> None:
    outputs, targets, leaves = definition.random_batch(encoder_classes=1)
    criterion, expected = both(["vfl", "boxes"], definition.shared_weights(), mode)
    if mode == "compat":
        with pytest.raises(ValueError, match=r"image 0 of the batch, target 0: label must be in \[0, 1\)"):
            criterion(outputs, targets)
        for target in targets:
            target["labels"].zero_()
        compared(criterion, expected, (outputs, targets, leaves))
        return
    actual = criterion(outputs, targets)
    zero = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
    of_encoder = {name: loss for name, loss in expected(outputs, zero).items() if "_enc_" in name}
    outputs.pop("enc_aux_outputs")
    assert_same(actual, expected(outputs, targets) | of_encoder, leaves)


def test_class_agnostic_encoder_in_compat_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where values are not looked at, targets with a label above 0 have no proposal."""
    monkeypatch.setattr(Targets, "check_values", lambda *_: None)
    outputs, targets, _ = definition.random_batch(encoder_classes=1, with_denoising=False)
    for target in targets:
        target["labels"][::2] = 0
    criterion, _ = both(["vfl", "boxes"], definition.shared_weights(), "compat")
    criterion.matcher = HungarianMatcherv2(COSTS, use_focal_loss=True)  # which raises on the CPU only
    found = criterion(outputs, targets)
    report = criterion.matcher.report()
    is_zero = [target["labels"] == 0 for target in targets]
    counts = [sum(len(own) for own in is_zero), sum(int(own.sum()) for own in is_zero)]
    assert report.terms == ("label",)
    assert report.count == (counts[0] - counts[1]) * outputs["pred_logits"].shape[1]
    zero = [{name: x[own] for name, x in target.items()} for target, own in zip(targets, is_zero, strict=True)]
    expected = criterion(outputs, zero)
    for name in ("loss_bbox_enc_0", "loss_giou_enc_0", "loss_vfl_enc_0"):
        torch.testing.assert_close(found[name] * counts[0], expected[name] * counts[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("losses", [["vfl", "boxes"], ["focal", "bce", "boxes", "cardinality"], ["labels", "boxes"]])
def test_losses_of_v1(losses: list[str], counts: tuple[int, ...], mode: str) -> None:
    has_no_object = "labels" in losses
    weights = definition.shared_weights(loss_focal=0.3, loss_bce=0.4, loss_ce=0.6, cardinality_error=0.5, class_error=2)
    batch = definition.random_batch(counts, classes=CLASSES + has_no_object)
    for target in batch[1]:
        target["labels"].clamp_(max=CLASSES - 1)
    matcher = HungarianMatcher(COSTS, use_focal_loss=not has_no_object, mode=mode)
    settings = (weights, losses, 0.25, 2.0)
    criterion = SetCriterion(matcher, *settings, eos_coef=0.1, num_classes=CLASSES, mode=mode)
    expected = definition.Criterion(
        definition.Matcher(COSTS, use_focal_loss=not has_no_object), *settings, CLASSES, eos_coef=0.1
    )
    found = compared(criterion, expected, _as_v1(batch))
    assert ("class_error" in found) == has_no_object
    assert set(criterion.state_dict()) == {"empty_weight"}


def _as_v1(batch: tuple[dict, Any, dict]) -> tuple[dict, Any, dict]:
    """Encoder proposals are the last of the auxiliary sets."""
    outputs = {**batch[0], "aux_outputs": [*batch[0]["aux_outputs"], *batch[0]["enc_aux_outputs"]]}
    del outputs["enc_aux_outputs"]
    return outputs, *batch[1:]


def test_focal_without_alpha() -> None:
    settings = ({"loss_focal": 1.0}, ["focal"], -1, 2.0)
    criterion = RTDETRCriterionv2(HungarianMatcherv2(COSTS, True), *settings, num_classes=CLASSES)
    expected = definition.Criterion(definition.Matcher(COSTS), *settings, CLASSES)
    compared(criterion, expected, definition.random_batch())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_focal_loss", [True, False])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_pairs_are_those_of_scipy(counts: tuple[int, ...], use_focal_loss: bool, mode: str) -> None:
    outputs, targets, _ = definition.random_batch(counts, classes=CLASSES)
    for target in targets:
        target["labels"].clamp_(max=CLASSES - 2)  # of softmax the last class is "no object"
    expected = definition.Matcher(COSTS, use_focal_loss, 0.3, 1.5)(outputs, targets)
    of_v1 = HungarianMatcher(COSTS, use_focal_loss, 0.3, 1.5, mode=mode)(outputs, targets)
    of_v2 = HungarianMatcherv2(COSTS, use_focal_loss, 0.3, 1.5, mode=mode)(outputs, targets)
    assert list(of_v2) == ["indices"]
    for found in (of_v1, of_v2["indices"]):
        assert isinstance(found, list)
        assert len(found) == len(expected)
        for own, wanted in zip(found, expected, strict=True):
            assert isinstance(own, tuple)
            for side, wanted_side in zip(own, wanted, strict=True):
                assert side.dtype == torch.int64
                assert torch.equal(side, wanted_side)


def test_a_matcher_of_another_kind_is_asked_for_each_layer() -> None:
    batch = definition.random_batch()
    criterion, _ = both(["vfl", "boxes"], definition.shared_weights(), "stable")
    expected = criterion(*batch[:2])
    asked = []

    class Published(torch.nn.Module):
        def forward(self, outputs: dict, targets: list) -> Any:
            asked.append(outputs)
            pairs = definition.Matcher(COSTS)(outputs, targets)
            return {"indices": pairs} if len(asked) % 2 else pairs

    criterion.matcher = Published()
    assert_same(criterion(*batch[:2]), expected, batch[2])
    assert len(asked) == 4
    assert criterion.matcher_report() is None


def test_queries_that_are_not_finite() -> None:
    outputs, targets, _ = definition.random_batch(with_denoising=False)
    with torch.no_grad():
        outputs["aux_outputs"][1]["pred_logits"][2, :15] = torch.nan
    criterion, _ = both(["vfl", "boxes"], definition.shared_weights(), "compat")
    with pytest.raises(ValueError, match="layer 2, image 2, target 0, query 0: class"):
        criterion(outputs, targets)
    criterion, _ = both(["vfl", "boxes"], definition.shared_weights(), "stable")
    losses = criterion(outputs, targets)
    assert losses["loss_bbox_aux_1"].isfinite()
    assert losses["loss_vfl"].isfinite()
    assert "layer 2, image 2" in criterion.matcher_report()
    assert criterion.matcher_report() is None
    queries, numbers = criterion.matcher(outputs["aux_outputs"][1], targets)["indices"][2]
    assert queries.min() >= 15
    assert len(numbers) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    outputs, targets, leaves = definition.random_batch(dtype=dtype)
    with torch.no_grad():
        outputs["pred_logits"][0, :4] = torch.tensor([30.0, -30.0, 9.0, -18.0])[:, None]
    for mode in MODES:
        criterion, _ = both(["vfl", "boxes"], definition.shared_weights(), mode)
        losses = criterion(outputs, targets)
        gradients = torch.autograd.grad(sum(losses.values()), list(leaves.values()))
        assert all(loss.isfinite() for loss in losses.values())
        assert all(g.isfinite().all() and g.dtype == dtype for g in gradients)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_read_back(mode: str) -> None:
    for options in ({}, {"boxes_weight_format": "giou"}, {"share_matched_indices": True}):
        for encoder_classes in (None, 1):
            outputs, targets, _ = definition.random_batch(encoder_classes=encoder_classes)
            weights = definition.shared_weights(loss_focal=1.0)
            criterion, _ = both(["vfl", "focal", "boxes"], weights, mode, **options)
            criterion.matcher = HungarianMatcherv2(COSTS, use_focal_loss=True)  # one that raises looks at the CPU
            assert_reads_nothing(criterion, outputs, targets)
    outputs, targets, _ = _as_v1(definition.random_batch(classes=CLASSES + 1))
    weights = definition.shared_weights(loss_ce=0.6, cardinality_error=0.5, class_error=2)
    settings = (weights, ["labels", "boxes", "cardinality"], 0.25, 2.0)
    criterion = SetCriterion(HungarianMatcher(COSTS), *settings, num_classes=CLASSES, mode=mode)
    assert_reads_nothing(criterion, outputs, targets)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_denoising", [True, False])
@pytest.mark.parametrize("wrong", ["label", "box"])
def test_annotations_that_are_wrong_are_named(wrong: str, with_denoising: bool, mode: str) -> None:
    criterion, _ = both(["vfl", "boxes"], definition.shared_weights(), mode)
    outputs, targets, _ = definition.random_batch(with_denoising=with_denoising)
    if wrong == "label":
        targets[2]["labels"][1] = CLASSES
    else:
        targets[2]["boxes"][1, 3] = torch.nan
    with pytest.raises(ValueError, match=f"image 2 of the batch, target 1: {wrong} must be"):
        criterion(outputs, targets)


@pytest.mark.parametrize("mode", MODES)
def test_packed_targets(mode: str) -> None:
    outputs, targets, leaves = definition.random_batch()
    criterion, _ = both(["vfl", "boxes"], definition.shared_weights(), mode)
    assert_same(criterion(outputs, Targets.pack(targets)), criterion(outputs, targets), leaves)


def test_losses_may_be_changed_in_place() -> None:
    batch = definition.random_batch()
    criterion, _ = both(["vfl", "boxes"], definition.shared_weights(), "stable")
    losses = criterion(*batch[:2])
    before = {name: loss.item() for name, loss in losses.items()}
    losses["loss_bbox"] *= 2
    assert losses["loss_giou"] == before["loss_giou"]
    sum(losses.values()).backward()


def test_normalisers_are_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, targets, _ = definition.random_batch()
    criterion, _ = both(["vfl", "boxes"], definition.shared_weights(), "stable")
    alone = criterion(outputs, targets)
    monkeypatch.setattr(layer_losses, "mean_box_count", lambda offsets: 2 * offsets[-1].float())
    for name, loss in criterion(outputs, targets).items():
        expected = alone[name] / 2
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0, msg=name)


def test_wrong_arguments() -> None:
    matcher = HungarianMatcherv2(COSTS, True)
    weights = definition.shared_weights()
    for wrong, message in (
        ({"losses": ["vfl", "masks"]}, "losses must be of focal, vfl, boxes, got 'masks'"),
        ({"boxes_weight_format": "diou"}, "boxes_weight_format must be 'iou', 'giou' or None, got 'diou'"),
        ({"mode": "fast"}, "mode must be 'stable' or 'compat', got 'fast'"),
    ):
        with pytest.raises(ValueError, match=message):
            RTDETRCriterionv2(matcher, weights, **({"losses": ["vfl"]} | wrong))
    with pytest.raises(ValueError, match="losses must be of labels, bce, focal, vfl, boxes, cardinality, got 'masks'"):
        SetCriterion(matcher, weights, ["masks"])
    with pytest.raises(ValueError, match="weight_dict must have cost_class, cost_bbox, cost_giou"):
        HungarianMatcher({"cost_class": 1.0})
    with pytest.raises(ValueError, match="mode must be"):
        HungarianMatcher(COSTS, mode="fast")

    criterion, _ = both(["vfl", "boxes"], weights, "compat")
    outputs, targets, _ = definition.random_batch()
    with pytest.raises(ValueError, match="one entry for each of 4 images, got 3"):
        criterion(outputs, targets[:3])
    wrong = [{**targets[0], "labels": torch.tensor([1, CLASSES, 2])}, *targets[1:]]
    with pytest.raises(ValueError, match="image 0 of the batch, target 1: label must be in"):
        criterion(outputs, wrong)
    positive = outputs["dn_meta"]["dn_positive_idx"]
    outputs["dn_meta"]["dn_positive_idx"] = (positive[0][:-1], *positive[1:])
    with pytest.raises(ValueError, match=r"must have 2 \(dn_num_group\) queries for each of 15 targets, got 29"):
        criterion(outputs, targets)
    outputs["dn_meta"]["dn_positive_idx"] = positive[:3]
    with pytest.raises(ValueError, match="dn_positive_idx"):
        criterion(outputs, targets)
    criterion.num_classes = CLASSES + 1
    with pytest.raises(ValueError, match="pred_logits must have 12 classes"):
        criterion(outputs, targets)


def test_the_definition_is_what_transformers_computes() -> None:
    pytest.importorskip("transformers")
    from transformers import RTDetrConfig
    from transformers.loss.loss_rt_detr import RTDetrLoss

    outputs, targets, _ = _as_v1(definition.random_batch())
    config = RTDetrConfig(num_labels=CLASSES)
    weights = {
        "loss_vfl": config.weight_loss_vfl,
        "loss_bbox": config.weight_loss_bbox,
        "loss_giou": config.weight_loss_giou,
    }

    def renamed(layer: dict) -> dict:
        return {"logits": layer["pred_logits"], "pred_boxes": layer["pred_boxes"]}

    theirs = RTDetrLoss(config)(
        renamed(outputs)
        | {"auxiliary_outputs": [renamed(layer) for layer in outputs["aux_outputs"]]}
        | {"dn_auxiliary_outputs": [renamed(layer) for layer in outputs["dn_aux_outputs"]]}
        | {"denoising_meta_values": outputs["dn_meta"]},
        [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets],
    )
    settings = (weights, ["vfl", "boxes"], config.focal_loss_alpha, config.focal_loss_gamma)
    ours = definition.Criterion(definition.Matcher(COSTS), *settings, CLASSES)(outputs, targets)
    assert set(theirs) == set(ours)
    for name, loss in theirs.items():
        torch.testing.assert_close(ours[name], loss, rtol=1e-5, atol=1e-7, msg=name)
