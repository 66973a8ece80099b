"""The adapter of IDEA-Research/DINO against its definition."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from integrations.definitions import dino as definition
from integrations.definitions.deformable_detr import focal_cost
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

from detr_fast import Targets
from detr_fast.integrations.dino import HungarianMatcher, SetCriterion, build_matcher

LOSSES = ["labels", "boxes", "cardinality"]
ALPHA, GROUPS, STRIDE = 0.3, 3, 26  # a group has room for 13 positive and as many negative queries


def criterion_of(mode: str = "stable", losses: list[str] = LOSSES, alpha: float = ALPHA) -> SetCriterion:
    matcher = HungarianMatcher(*COSTS, focal_alpha=ALPHA, mode=mode)
    return SetCriterion(CLASSES, matcher, {"loss_ce": 1.0, "loss_bbox_dn": 5.0}, alpha, losses, mode=mode)


def outputs_of(draw: Draw, denoises: bool = True, proposals: bool = True) -> dict[str, Any]:
    outputs: dict[str, Any] = {**draw.layers(), "dn_meta": None}
    if proposals:
        outputs |= {"interm_outputs": draw.layer(), "enc_outputs": [draw.layer(queries=30), draw.layer(queries=20)]}
    if denoises:
        known = draw.layers(queries=GROUPS * STRIDE)
        outputs["dn_meta"] = {
            "output_known_lbs_bboxes": known,
            "num_dn_group": GROUPS,
            "pad_size": GROUPS * STRIDE,
        }
    return outputs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_losses_and_pairs_are_those_of_the_definition(counts: tuple[int, ...], training: bool, mode: str) -> None:
    draw = Draw(counts)
    outputs, criterion = outputs_of(draw), criterion_of(mode).train(training)
    expected, matchings = definition.criterion(outputs, draw.targets, COSTS, ALPHA, training)
    actual, found = criterion(outputs, draw.targets, return_indices=True)
    assert_same_losses(outputs, actual, expected)
    assert not actual["loss_xy"].requires_grad
    assert len(found) == len(matchings) == 3 + 1 + 2
    for own, other in zip(found, matchings, strict=True):
        assert_same_pairs(own, other)
    pairs = match(outputs, draw.targets, COSTS, partial(focal_cost, alpha=ALPHA))
    assert_same_pairs(criterion.matcher(outputs, draw.targets), pairs)


@pytest.mark.parametrize("meta", [None, {}, {"pad_size": 0, "num_dn_group": 1}])
def test_without_denoising_and_proposals(meta: Any) -> None:
    draw = Draw(COUNTS["usual"])
    outputs = {**outputs_of(draw, denoises=False, proposals=False), "dn_meta": meta}
    expected, _ = definition.criterion(outputs, draw.targets, COSTS, ALPHA)
    actual = criterion_of()(outputs, draw.targets)
    assert_same_losses(outputs, actual, expected)
    zeros = [name for name in actual if "_dn" in name]
    assert len(zeros) == 6 * 3
    assert all(actual[name] == 0 for name in zeros)


def test_another_weight_is_noticed() -> None:
    draw = Draw(COUNTS["usual"])
    outputs = outputs_of(draw)
    expected, _ = definition.criterion(outputs, draw.targets, COSTS, ALPHA)
    with pytest.raises(AssertionError, match="loss_ce"):
        assert_same_losses(outputs, criterion_of(alpha=0.301)(outputs, draw.targets), expected)
    outputs["dn_meta"]["num_dn_group"] = 2
    with pytest.raises(AssertionError, match="_dn"):
        assert_same_losses(outputs, criterion_of()(outputs, draw.targets), expected)


def test_only_the_losses_asked_for() -> None:
    draw = Draw(COUNTS["usual"])
    losses = criterion_of(losses=["boxes"])(outputs_of(draw), draw.targets)
    assert {name.split("_")[1] for name in losses} == {"bbox", "giou", "xy", "hw"}
    assert len(losses) == 4 * (3 + 3 + 3)


def test_groups_that_do_not_fit() -> None:
    draw = Draw((3, 2))
    outputs = outputs_of(draw)
    outputs["dn_meta"]["num_dn_group"] = 4
    with pytest.raises(ValueError, match="pad_size of dn_meta must be a multiple of 4 groups, got 78"):
        criterion_of()(outputs, draw.targets)
    outputs["dn_meta"] |= {"num_dn_group": GROUPS, "pad_size": 2 * GROUPS * STRIDE}
    with pytest.raises(ValueError, match="denoising queries must be 3 groups of 52, got 78 queries"):
        criterion_of()(outputs, draw.targets)
    outputs["dn_meta"] |= {"num_dn_group": 39, "pad_size": GROUPS * STRIDE}
    with pytest.raises(ValueError, match="a denoising group must have a query for each of 3 targets, got 2"):
        criterion_of()(outputs, draw.targets)


def test_predictions_without_finite_cost() -> None:
    draw = Draw((3, 2))
    outputs = outputs_of(draw)
    outputs["enc_outputs"][1]["pred_logits"].data[1, 5] = torch.nan
    with pytest.raises(ValueError, match="image 1, target 0, query 5: class term"):
        criterion_of("compat")(outputs, draw.targets)
    criterion = criterion_of("stable")
    losses = criterion(outputs, draw.targets)
    assert [name for name, value in losses.items() if not value.isfinite()] == ["loss_ce_enc_1"]
    assert "2 pair(s) without a finite cost" in criterion.matcher_report()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_half_types(dtype: torch.dtype, mode: str) -> None:
    draw = Draw(COUNTS["usual"], dtype=dtype)
    outputs = outputs_of(draw)
    losses = criterion_of(mode)(outputs, draw.targets)
    assert all(value.isfinite() for value in losses.values())
    for leaf, gradient in zip(leaves_of(outputs), gradients_of(losses, list(leaves_of(outputs))), strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.isfinite().all()


def test_nothing_is_read_back_but_matchings() -> None:
    draw = Draw(COUNTS["usual"])
    outputs, criterion = outputs_of(draw), criterion_of()
    assert_reads_nothing(criterion, outputs, draw.targets)
    assert_reads_nothing(criterion, outputs_of(draw, denoises=False), draw.targets)
    with pytest.raises(AssertionError, match="this copy waits"):
        assert_reads_nothing(partial(criterion, return_indices=True), outputs, draw.targets)


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    draw = Draw(COUNTS["usual"])
    outputs, criterion, targets = outputs_of(draw), criterion_of(), Targets.pack(draw.targets)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    assert_same_losses(outputs, compiled(outputs, targets), criterion(outputs, targets))


def test_weighted_loss_has_all_sets() -> None:
    draw = Draw(COUNTS["usual"])
    outputs, criterion = outputs_of(draw), criterion_of()
    losses = criterion(outputs, draw.targets)
    total, entries = criterion.weighted_loss(outputs, draw.targets)
    torch.testing.assert_close(total, losses["loss_ce"] + 5 * losses["loss_bbox_dn"])
    assert list(entries) == list(losses)
    with pytest.raises(
        ValueError, match=r"capture: losses must be of decoder layers alone.*here also of denoising queries"
    ):
        criterion.capture(draw.layers(), 10)


def test_options_are_the_published_ones() -> None:
    options = {"set_cost_class": 2, "set_cost_bbox": 5, "set_cost_giou": 2, "focal_alpha": 0.4}
    matcher = build_matcher(Namespace(matcher_type="HungarianMatcher", **options))
    assert (matcher.cost_class, matcher.cost_bbox, matcher.cost_giou, matcher.alpha) == (2, 5, 2, 0.4)
    assert not criterion_of().state_dict()
    with pytest.raises(ValueError, match="matcher_type must be 'HungarianMatcher', got 'SimpleMinsumMatcher'"):
        build_matcher(Namespace(matcher_type="SimpleMinsumMatcher", **options))
    with pytest.raises(ValueError, match=r"alpha of the focal loss must be in \[0, 1\], got -1"):
        criterion_of(alpha=-1)
    with pytest.raises(ValueError, match="alpha"):
        HungarianMatcher(focal_alpha=-1)
    matcher.focal_alpha = 0.7
    assert matcher.alpha == 0.7


def losses_of_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    draw = Draw(COUNTS["usual"] if rank == 0 else (0, 0, 0), seed=rank)
    torch.save(criterion_of()(outputs_of(draw), draw.targets), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_boxes_are_counted_across_ranks(tmp_path: Path) -> None:
    multiprocessing.start_processes(losses_of_rank, (tmp_path,), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = []
    for rank, counts in enumerate((COUNTS["usual"], (0, 0, 0))):
        draw = Draw(counts, seed=rank)
        alone.append(definition.criterion(outputs_of(draw), draw.targets, COSTS, ALPHA)[0])
    for name, value in alone[0].items():
        if name.startswith("loss_"):  # 8 boxes on one rank of two: the mean is 4
            torch.testing.assert_close(first[name], 2 * value, msg=name)
            # A rank without targets still learns that there is nothing, divided by the same 4.
            torch.testing.assert_close(second[name], alone[1][name] / 4, msg=name)
