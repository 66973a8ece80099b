"""Mask costs at sampled points, and Mask2Former's matcher, against their definition."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from accuracy import assert_as_accurate
from integrations.definitions import mask_cost as definition
from integrations.reading import assert_reads_nothing
from scipy.optimize import linear_sum_assignment

from detr_fast import matcher as core
from detr_fast.integrations.further_cost import match_with_cost, report_of
from detr_fast.integrations.mask_cost import (
    HungarianMatcher,
    logits_at,
    pack_with_masks,
    point_mask_cost,
    targets_at,
)
from detr_fast.ops.matching_cost import matching_cost
from detr_fast.structures import Predictions

CLASSES = 5
EMPTY = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
WEIGHTS = {"cost_class": 2.0, "cost_mask": 5.0, "cost_dice": 5.0}


def random_batch(counts=(3, 0, 5), queries=9, layers=1, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, len(counts), queries, CLASSES + 1, generator=generator)
    masks = torch.randn(layers, len(counts), queries, 8, 12, generator=generator) * 4
    targets = [
        {
            "labels": torch.randint(0, CLASSES, (count,), generator=generator),
            "masks": torch.rand(count, 16, 20 + image, generator=generator) > 0.6,
        }
        for image, count in enumerate(counts)
    ]
    return logits.to(dtype), masks.to(dtype), targets


def assert_pairs(actual, expected):
    assert len(actual) == len(expected)
    for found, wanted in zip(actual, expected, strict=True):
        for side, other in zip(found, wanted, strict=True):
            assert side.dtype == torch.int64
            torch.testing.assert_close(side, other, rtol=0, atol=0)


def pairs_by(cost_of_image, logits, masks, targets, points, **weights):
    """SciPy's pairs of one layer; points [B, P, 2]."""
    pairs = []
    for parts in zip(logits, masks, targets, points, strict=True):
        rows, columns = linear_sum_assignment(cost_of_image(*parts, **weights).numpy())
        pairs.append((torch.as_tensor(rows), torch.as_tensor(columns)))
    return pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [True, False])
def test_cost_is_the_definition(dtype, shared):
    _, masks, targets = random_batch(layers=2)
    points = torch.rand(1 if shared else 2, 1 if shared else 3, 40, 2, dtype=dtype)
    packed = pack_with_masks(targets)
    found = point_mask_cost(
        logits_at(masks.to(dtype), points), targets_at(packed.masks, points, 2), len(packed.labels), 3.0, 2.0
    )
    assert found.shape == (2, 8, 9)

    def blocks(kind):
        every = points.expand(2, 3, -1, -1).to(kind)
        for layer in range(2):
            rows = []
            for image, target in enumerate(targets):
                x = definition.sampled(masks[layer, image].to(kind), every[layer, image])
                y = definition.sampled(target["masks"].to(kind), every[layer, image])
                rows.append((3 * definition.binary_cross_entropy(x, y) + 2 * definition.dice(x, y)).mT)
            yield torch.cat(rows)

    assert_as_accurate(found, torch.stack(list(blocks(dtype))), torch.stack(list(blocks(torch.float64))))


def test_points_in_the_corners_see_zeros_or_the_border():
    masks = torch.ones(1, 1, 1, 4, 4)
    points = torch.tensor([[[[0.0, 0.0], [0.5, 0.5]]]])
    assert logits_at(masks, points).flatten().tolist() == [0.25, 1.0]
    assert logits_at(masks, points, "border").flatten().tolist() == [1.0, 1.0]


def test_rows_past_the_targets_cost_nothing():
    _, masks, targets = random_batch((2, 1))
    points = torch.rand(1, 1, 4, 2)
    wanted = targets_at(pack_with_masks(targets).masks, points, 1)
    cost = point_mask_cost(logits_at(masks, points), wanted, 6)
    assert (cost[:, :3] != 0).all()
    assert (cost[:, 3:] == 0).all()


@pytest.mark.parametrize("mode", ["stable", "compat"])
@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0), (4,), (12, 2)])
def test_pairs_and_points_are_those_of_mask2former(mode, counts):
    logits, masks, targets = random_batch(counts)
    outputs = {"pred_logits": logits[0], "pred_masks": masks[0]}
    matcher = HungarianMatcher(**WEIGHTS, num_points=30, mode=mode)
    torch.manual_seed(5)
    found = matcher(outputs, targets)
    torch.manual_seed(5)
    assert_pairs(found, definition.mask2former_match(outputs, targets, 30, **WEIGHTS))
    assert matcher.report() is None


def test_each_weight_counts():
    logits, masks, targets = random_batch((6, 6))
    outputs = {"pred_logits": logits[0], "pred_masks": masks[0]}
    seen = []
    for name in WEIGHTS:
        weights = {**dict.fromkeys(WEIGHTS, 0.0), name: 1.0}
        torch.manual_seed(0)
        seen.append(HungarianMatcher(**weights, num_points=20)(outputs, targets))
        torch.manual_seed(0)
        assert_pairs(seen[-1], definition.mask2former_match(outputs, targets, 20, **weights))
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert any(
            not torch.equal(x[0], y[0]) or not torch.equal(x[1], y[1]) for x, y in zip(seen[a], seen[b], strict=True)
        )


def test_weights_may_be_changed():
    logits, masks, targets = random_batch((6, 6))
    outputs = {"pred_logits": logits[0], "pred_masks": masks[0]}
    matcher = HungarianMatcher(**WEIGHTS, num_points=20)
    weights = dict(WEIGHTS)
    for name, weight in (("cost_class", 100.0), ("cost_mask", 0.0), ("cost_class", 0.0), ("cost_dice", 1.0)):
        weights[name] = weight
        setattr(matcher, name, weight)
        torch.manual_seed(0)
        found = matcher(outputs, targets)
        torch.manual_seed(0)
        assert_pairs(found, definition.mask2former_match(outputs, targets, 20, **weights))


def test_nothing_is_read_back():
    logits, masks, targets = random_batch(layers=2)
    packed = pack_with_masks(targets)
    matcher = HungarianMatcher(**WEIGHTS, num_points=20)

    def match(outputs, empty):
        own = replace(empty, masks=tuple(outputs["targets"]))
        found = matcher.match_layers(outputs["logits"], outputs["masks"], own)
        return {"found": found.sum() + 0 * outputs["logits"].sum()}

    outputs = {"logits": logits.requires_grad_(), "masks": masks, "targets": list(packed.masks)}
    assert_reads_nothing(match, outputs, [{"labels": packed.labels, "boxes": packed.boxes}] + 2 * [EMPTY])

    def pack(outputs, _):
        listed = [{"labels": labels, "masks": own} for labels, own in outputs["targets"]]
        found = pack_with_masks(listed)
        assert found.boxes.shape == (8, 4)
        return {"found": outputs["logits"].sum()}

    outputs["targets"] = [(target["labels"], target["masks"]) for target in targets]
    assert_reads_nothing(pack, outputs, [])


def test_boxes_of_the_whole_image_where_there_are_none():
    _, _, targets = random_batch((2, 0, 1))
    assert pack_with_masks(targets).boxes.tolist() == [[0.5, 0.5, 1.0, 1.0]] * 3
    targets[2]["boxes"] = torch.full((1, 4), 0.25)
    assert pack_with_masks(targets).boxes.tolist() == [[0.5, 0.5, 1.0, 1.0]] * 2 + [[0.25] * 4]


@pytest.mark.parametrize("invalid", ["skip", "last", "above_largest", "as_one"])
@pytest.mark.parametrize("groups", [1, 2])
def test_unknown_labels_match_nothing(groups, invalid):
    """As a device sees them, where looking would wait."""
    boxes = torch.rand(1, 1, 8, 4) * 0.3 + 0.3
    listed = [{"labels": torch.tensor([1, 99, -1]), "boxes": torch.rand(3, 4) * 0.3 + 0.3}]
    targets = core.Targets.pack(listed, check_values=False)
    matcher = core.HungarianMatcher(1, 2, 3, kind="focal_stable", invalid=invalid)
    predictions = Predictions(torch.randn(1, 1, 8, CLASSES), boxes)
    found = match_with_cost(matcher, predictions, targets, torch.zeros(1, 3, 8), groups)
    assert (found[0] >= 0).tolist() == [True, False, False] * groups
    assert report_of(matcher).count == 16


def test_given_generator():
    logits, masks, targets = random_batch()
    outputs = {"pred_logits": logits[0], "pred_masks": masks[0]}
    generator = torch.Generator().manual_seed(5)
    state = torch.get_rng_state()
    found = HungarianMatcher(**WEIGHTS, num_points=30, generator=generator)(outputs, targets)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert_pairs(found, definition.mask2former_match(outputs, targets, 30, **WEIGHTS))


def test_all_layers_at_given_points():
    logits, masks, targets = random_batch(layers=3)
    points = torch.rand(3, 3, 25, 2)
    packed = pack_with_masks(targets, CLASSES)
    found = HungarianMatcher(**WEIGHTS, num_points=25).match_layers(logits, masks, packed, points)
    assert found.shape == (3, 8)
    assert found.dtype == torch.int32
    for layer in range(3):
        expected = pairs_by(definition.mask2former_cost, logits[layer], masks[layer], targets, points[layer], **WEIGHTS)
        assert_pairs(core.pairs_of(found[layer], packed.offsets), expected)


def test_layers_one_by_one_draw_the_same_points():
    logits, masks, targets = random_batch(layers=2)
    matcher = HungarianMatcher(**WEIGHTS, num_points=25)
    packed = pack_with_masks(targets, CLASSES)
    torch.manual_seed(1)
    at_once = matcher.match_layers(logits, masks, packed)
    torch.manual_seed(1)
    for layer in range(2):
        pairs = matcher({"pred_logits": logits[layer], "pred_masks": masks[layer]}, targets)
        assert_pairs(pairs, core.pairs_of(at_once[layer], packed.offsets))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    logits, masks, targets = random_batch(dtype=dtype)
    outputs = {"pred_logits": logits[0], "pred_masks": masks[0]}
    matcher = HungarianMatcher(**WEIGHTS, num_points=30)
    torch.manual_seed(5)
    found = matcher(outputs, targets)
    torch.manual_seed(5)
    exact = {name: value.float() for name, value in outputs.items()}
    assert_pairs(found, definition.mask2former_match(exact, targets, 30, **WEIGHTS))
    assert matcher.report() is None


def test_autocast_does_not_reach_the_cost():
    _, masks, targets = random_batch()
    packed, points = pack_with_masks(targets), torch.rand(1, 1, 30, 2)

    def cost():
        return point_mask_cost(logits_at(masks, points), targets_at(packed.masks, points, 1), len(packed.labels))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cost()
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, cost(), rtol=0, atol=0)


@pytest.mark.parametrize("where", ["masks", "logits"])
def test_invalid_costs(where):
    logits, masks, targets = random_batch((2, 3), queries=4)
    part = masks if where == "masks" else logits
    part[0, 1, 2] = torch.nan
    outputs = {"pred_logits": logits[0], "pred_masks": masks[0]}
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="image 1, target 0, query 2"):
        HungarianMatcher(**WEIGHTS, num_points=10, mode="compat")(outputs, targets)
    matcher = HungarianMatcher(**WEIGHTS, num_points=10)
    pairs = matcher(outputs, targets)
    assert pairs[0][0].shape == (2,)
    assert pairs[1][0].tolist() == [0, 1, 3]
    report = matcher.report()
    assert (report.count, report.image, report.target, report.query) == (3, 1, 0, 2)
    assert report.terms == (("extra",) if where == "masks" else ("class",))
    assert matcher.report() is None


def test_reports_add_up_and_keep_the_first():
    logits, masks, targets = random_batch((2, 3), queries=4)
    matcher = HungarianMatcher(**WEIGHTS, num_points=10)
    for image, query in ((1, 3), (0, 1), (1, 2)):
        broken = masks[0].clone()
        broken[image, query] = torch.nan
        matcher({"pred_logits": logits[0], "pred_masks": broken}, targets)
    report = matcher.report()
    assert (report.count, report.image, report.target, report.query) == (8, 0, 0, 1)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("invalid", ["skip", "above_largest", "last"])
def test_further_cost_of_groups(groups, invalid):
    generator = torch.Generator().manual_seed(0)
    counts, queries = (3, 0, 4), 12
    targets = [
        {
            "labels": torch.randint(0, CLASSES, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.4 + 0.1,
        }
        for count in counts
    ]
    packed = core.Targets.pack(targets)
    logits = torch.randn(2, 3, queries, CLASSES, generator=generator)
    boxes = torch.rand(2, 3, queries, 4, generator=generator) * 0.4 + 0.1
    extra = torch.randn(2, 7, queries, generator=generator) * 3
    matcher = core.HungarianMatcher(1, 2, 3, kind="focal_stable", invalid=invalid)
    found = match_with_cost(matcher, Predictions(logits, boxes), packed, extra, groups)
    assert report_of(matcher) is None
    assert found.shape == (2, 7 * groups)
    arguments = (logits, boxes, packed.labels, packed.boxes, packed.offsets)
    cost = matching_cost(*arguments, 1, 2, 3, "focal_stable") + extra
    for layer in range(2):
        row = 0
        for start, end in ((0, 3), (3, 3), (3, 7)):
            for group, block in enumerate(cost[layer, start:end].chunk(groups, 1)):
                shift = group * queries // groups
                rows, columns = linear_sum_assignment(block.numpy())
                own = found[layer, row : row + end - start].tolist()
                assert own == (columns + shift).tolist()
                assert rows.tolist() == list(range(end - start))
                row += end - start


@pytest.mark.parametrize(("invalid", "expected"), [("skip", [0, 2, 1]), ("above_largest", [0, 1, 2])])
def test_policy_for_a_further_cost_that_is_invalid(invalid, expected):
    """The number that replaces NaN, 2 + 3 + 1, is less than what the pairs without NaN cost more."""
    boxes = torch.full((1, 1, 3, 4), 0.5)
    targets = core.Targets.pack([{"labels": torch.arange(3), "boxes": torch.full((3, 4), 0.5)}])
    matcher = core.HungarianMatcher(0, 0, 1, kind="focal_stable", invalid=invalid)
    cost = torch.tensor([[-3.0, 2.0, 2.0], [2.0, -3.0, 1.9], [2.0, 1.9, torch.nan]])
    extra = (cost + 1)[None]  # GIoU costs -1
    found = match_with_cost(matcher, Predictions(torch.zeros(1, 1, 3, 3), boxes), targets, extra)
    assert found.tolist() == [expected]
    assert report_of(matcher).terms == ("extra",)


def test_copies_and_state():
    matcher = HungarianMatcher(**WEIGHTS, num_points=10)
    assert dict(matcher.state_dict()) == {}
    assert "num_points=10" in repr(copy.deepcopy(matcher))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HungarianMatcher(0, 0, 0, 1), "at least one of"),
        (lambda: HungarianMatcher(1, 1, 1), "num_points must be at least 1, got 0"),
        (lambda: HungarianMatcher(1, 1, 1, 1, mode="exact"), "mode must be"),
        (lambda: pack_with_masks([{"labels": torch.zeros(1, dtype=torch.int64)}]), "image 0 of the batch: 'masks' is"),
        (lambda: targets_at((), torch.rand(2, 1, 3, 2), 3), "points must be of 1 or 3 layers, got 2"),
        (lambda: matched(labels=(0, 5)), "label must be in"),
        (lambda: matched(images=2), "one entry for each of 2 images, got 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def matched(labels=(0, 1), images=1):
    logits, masks, _ = random_batch((0,) * images)
    target = {"labels": torch.tensor(labels), "masks": torch.ones(len(labels), 4, 4)}
    return HungarianMatcher(1, 1, 1, 5)({"pred_logits": logits[0], "pred_masks": masks[0]}, [target])
