"""The adapter of facebookresearch/detr against its definition and recorded outputs; what all adapters' tests share."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integrations.definitions import detr as definition
from integrations.reading import assert_reads_nothing
from torch import Tensor

import detr_fast
from detr_fast.integrations.detr import HungarianMatcher, SetCriterion, build_matcher

MODES = ["stable", "compat"]
COUNTS = {"usual": (3, 0, 5), "single": (1,), "no targets": (0, 0), "more targets than queries": (12, 2)}
COSTS = (2.0, 5.0, 2.0)
CLASSES, QUERIES = 7, 9
RELATIVE = 1e-5
GOLDEN = Path(__file__).parents[1] / "golden" / "losses"
RECORDED = sorted(file for file in GOLDEN.glob("detr_*.npz") if "masks" not in file.stem)

Outputs = dict[str, Any]
Target = dict[str, Tensor]


class Draw:
    """Random layers and targets of a batch; every tensor of a layer is a leaf that collects a gradient."""

    def __init__(self, counts: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype
        self.images = len(counts)
        self.targets = [self.target(count) for count in counts]

    def boxes(self, *shape: int) -> Tensor:
        unit = torch.rand(*shape, 4, generator=self.generator)
        return torch.cat([0.25 + 0.5 * unit[..., :2], 0.05 + 0.4 * unit[..., 2:]], dim=-1)

    def target(self, count: int) -> Target:
        labels = torch.randint(0, CLASSES, (count,), generator=self.generator)
        return {"labels": labels, "boxes": self.boxes(count)}

    def layer(self, queries: int = QUERIES, classes: int = CLASSES) -> Outputs:
        logits = 2 * torch.randn(self.images, queries, classes, generator=self.generator)
        boxes = self.boxes(self.images, queries)
        return {
            "pred_logits": logits.to(self.dtype).requires_grad_(),
            "pred_boxes": boxes.to(self.dtype).requires_grad_(),
        }

    def layers(self, count: int = 3, **shape: int) -> Outputs:
        last, *others = (self.layer(**shape) for _ in range(count))
        return {**last, "aux_outputs": others}


def leaves_of(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield from [outputs] if outputs.requires_grad else []
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from leaves_of(value)
    elif isinstance(outputs, list):
        for value in outputs:
            yield from leaves_of(value)


def assert_same_losses(outputs: Outputs, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same entries, values and gradients of every input."""
    assert sorted(actual) == sorted(expected)
    for name, value in expected.items():
        assert actual[name].dim() == 0
        assert abs(actual[name].item() - value.item()) <= RELATIVE * max(abs(value.item()), 1e-3), name
        assert actual[name].requires_grad or not value.requires_grad, name
    leaves = list(leaves_of(outputs))
    assert leaves
    for own, other in zip(gradients_of(actual, leaves), gradients_of(expected, leaves), strict=True):
        assert (own - other).abs().max() <= RELATIVE * max(other.abs().max().item(), 1e-12)


def gradients_of(losses: Mapping[str, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Of a sum in which every entry has another weight."""
    names = [name for name in sorted(losses) if losses[name].requires_grad]
    total = sum(losses[name] * (1 + 0.37 * position) for position, name in enumerate(names))
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if x is None else x for leaf, x in zip(leaves, found, strict=True)]


def assert_same_pairs(actual: definition.Pairs, expected: definition.Pairs) -> None:
    assert len(actual) == len(expected)
    for (queries, own), (other_queries, other) in zip(actual, expected, strict=True):
        assert queries.dtype == own.dtype == torch.int64
        assert (queries.tolist(), own.tolist()) == (other_queries.tolist(), other.tolist())


def assert_recorded(file: Path, build: Callable[[dict[str, Any], dict[str, float]], Any]) -> None:
    """The criterion, given its recorded configuration and weights, computes what the published one computed."""
    with np.load(file) as archive:
        data = {name: archive[name] for name in archive.files}
    meta = json.loads(str(data["meta"]))
    names = ["logits", "boxes", *(name for name in ("enc_logits", "enc_boxes") if name in data)]
    inputs = {name: torch.from_numpy(data[name]).requires_grad_() for name in names}
    outputs = detr_fast.Predictions(inputs["logits"], inputs["boxes"]).as_dict()
    if "enc_logits" in inputs:
        outputs["enc_outputs"] = {"pred_logits": inputs["enc_logits"], "pred_boxes": inputs["enc_boxes"]}
    ends = np.cumsum(data["target_counts"])
    targets = [
        {name: torch.from_numpy(data[f"target_{name}"][end - count : end]) for name in ("labels", "boxes")}
        for end, count in zip(ends, data["target_counts"], strict=True)
    ]
    criterion = build(meta["criterion"], meta["weight_dict"])
    losses = criterion(outputs, targets)
    names = json.loads(str(data["loss_names"]))
    assert sorted(losses) == sorted(names)
    for name, expected in zip(names, data["loss_values"], strict=True):
        assert abs(losses[name].item() - expected) <= RELATIVE * max(abs(expected), 1e-3), name
    criterion.weighted_sum(losses).backward()
    for name, leaf in inputs.items():
        expected = data[f"grad_{name}"]
        assert np.abs(leaf.grad.numpy() - expected).max() <= RELATIVE * max(np.abs(expected).max(), 1e-12)


def criterion_of(mode: str, costs: tuple[float, float, float] = COSTS) -> SetCriterion:
    matcher = HungarianMatcher(*costs, mode=mode)
    return SetCriterion(CLASSES, matcher, {}, 0.1, ["labels", "boxes", "cardinality"], mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_losses_and_pairs_are_those_of_the_definition(counts: tuple[int, ...], mode: str) -> None:
    draw = Draw(counts)
    outputs = draw.layers(classes=CLASSES + 1)
    criterion = criterion_of(mode)
    expected = definition.criterion(outputs, draw.targets, CLASSES, COSTS, 0.1)
    assert_same_losses(outputs, criterion(outputs, draw.targets), expected)
    assert_same_pairs(criterion.matcher(outputs, draw.targets), definition.match(outputs, draw.targets, COSTS))


def test_another_weight_is_noticed() -> None:
    draw = Draw(COUNTS["usual"])
    outputs = draw.layers(classes=CLASSES + 1)
    expected = definition.criterion(outputs, draw.targets, CLASSES, COSTS, 0.1)
    for wrong in (
        criterion_of("stable", (0.02, 5.0, 2.0)),
        SetCriterion(7, HungarianMatcher(*COSTS), {}, 0.11, ["labels"]),
    ):
        actual = wrong(outputs, draw.targets)
        with pytest.raises(AssertionError):
            assert_same_losses(outputs, actual, {name: expected[name] for name in actual})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_recorded_case(file: Path, mode: str) -> None:
    def build(config: dict[str, Any], weights: dict[str, float]) -> SetCriterion:
        matcher = HungarianMatcher(*(config["costs"][name] for name in ("class", "bbox", "giou")), mode=mode)
        return SetCriterion(config["num_classes"], matcher, weights, config["eos_coef"], config["losses"], mode=mode)

    assert_recorded(file, build)


def test_predictions_without_finite_cost() -> None:
    draw = Draw((3, 2))
    outputs = draw.layers(classes=CLASSES + 1)
    outputs["pred_logits"].data[1, 4] = torch.nan
    with pytest.raises(ValueError, match="image 1, target 0, query 4: class term"):
        criterion_of("compat")(outputs, draw.targets)
    criterion = criterion_of("stable")
    losses = criterion(outputs, draw.targets)
    assert losses["loss_bbox"].isfinite()
    assert "2 pair(s) without a finite cost" in criterion.matcher_report()
    queries, own = criterion.matcher(outputs, draw.targets)[1]
    assert 4 not in queries
    assert sorted(own.tolist()) == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_half_types(dtype: torch.dtype, mode: str) -> None:
    draw = Draw(COUNTS["usual"], dtype=dtype)
    outputs = draw.layers(classes=CLASSES + 1)
    losses = criterion_of(mode)(outputs, draw.targets)
    assert all(value.isfinite() for value in losses.values())
    for leaf, gradient in zip(leaves_of(outputs), gradients_of(losses, list(leaves_of(outputs))), strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.isfinite().all()


def test_nothing_is_read_back() -> None:
    draw = Draw(COUNTS["usual"])
    assert_reads_nothing(criterion_of("stable"), draw.layers(classes=CLASSES + 1), draw.targets)


def test_masks_that_no_loss_uses_are_not_looked_at() -> None:
    draw = Draw((3, 2))
    outputs, criterion = draw.layers(classes=CLASSES + 1), criterion_of("stable")
    expected = criterion(outputs, draw.targets)
    found = criterion(outputs, [{**draw.targets[0], "masks": torch.ones(8, 8)}, draw.targets[1]])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_state_and_options_are_the_published_ones() -> None:
    assert list(criterion_of("stable").state_dict()) == ["empty_weight"]
    matcher = build_matcher(Namespace(set_cost_class=1, set_cost_bbox=5, set_cost_giou=2), mode="compat")
    assert (matcher.cost_class, matcher.cost_bbox, matcher.cost_giou, matcher.invalid) == (1, 5, 2, "raise")
    assert HungarianMatcher().cost_bbox == 1
    with pytest.raises(ValueError, match="SetCriterion: mode must be 'stable' or 'compat', got 'fast'"):
        SetCriterion(7, matcher, {}, 0.1, [], mode="fast")
    with pytest.raises(ValueError, match="mode must be that of its matcher, 'compat', got 'stable'"):
        SetCriterion(7, matcher, {}, 0.1, [])
    with pytest.raises(ValueError, match="HungarianMatcher: mode must be"):
        HungarianMatcher(mode="fast")
    with pytest.raises(ValueError, match="at least one of cost_class"):
        HungarianMatcher(0, 0, 0)
