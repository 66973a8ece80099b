"""HungarianMatcher: facebookresearch/detr's interface, the fast interface, and what happens to bad numbers."""

from __future__ import annotations

import copy

import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from detr_fast import HungarianMatcher, Predictions, Targets
from detr_fast.matcher import queries_of, replaced
from detr_fast.ops import assign, matching_cost_reference
from detr_fast.structures import offsets_of


def batch(
    counts: tuple[int, ...] = (3, 0, 12), queries: int = 10, classes: int = 7
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    outputs = {
        "pred_logits": torch.randn(len(counts), queries, classes + 1, generator=generator),
        "pred_boxes": 0.2 + 0.5 * torch.rand(len(counts), queries, 4, generator=generator),
    }
    targets = [
        {
            "labels": torch.randint(0, classes, (count,), generator=generator),
            "boxes": 0.2 + 0.5 * torch.rand(count, 4, generator=generator),
            "image_id": torch.tensor([image]),
        }
        for image, count in enumerate(counts)
    ]
    return outputs, targets


@pytest.mark.parametrize("weights", [(1, 5, 2), (1, 1, 1), (2, 0, 0)])
def test_pairs_are_those_of_scipy(weights: tuple[int, int, int]) -> None:
    outputs, targets = batch()
    pairs = HungarianMatcher(*weights)(outputs, targets)
    packed = Targets.pack(targets)
    cost = matching_cost_reference(
        outputs["pred_logits"][None],
        outputs["pred_boxes"][None],
        packed.labels,
        packed.boxes,
        packed.offsets,
        *map(float, weights),
    )[0]
    assert len(pairs) == len(targets)
    for (queries, own), block in zip(pairs, cost.split([3, 0, 12]), strict=True):
        rows, columns = scipy.optimize.linear_sum_assignment(block.mT)
        assert queries.dtype == own.dtype == torch.int64
        assert queries.tolist() == rows.tolist()
        assert own.tolist() == columns.tolist()


def test_fast_interface_matches_all_layers_as_the_old_one_does() -> None:
    (outputs, targets), (other, _) = batch(), batch(counts=(1, 2, 3))
    matcher = HungarianMatcher(1, 5, 2)
    logits = torch.stack([other["pred_logits"], outputs["pred_logits"]])
    boxes = torch.stack([other["pred_boxes"], outputs["pred_boxes"]])
    packed = Targets.pack(targets)
    query_of_target = matcher(Predictions(logits, boxes), packed)
    assert query_of_target.shape == (2, 15)
    assert query_of_target.dtype == torch.int32
    assert torch.equal(query_of_target[0], queries_of(matcher(other, targets), packed, 10))
    assert torch.equal(query_of_target[1], queries_of(matcher(outputs, targets), packed, 10))


def test_gradients_and_modes_do_not_matter() -> None:
    outputs, targets = batch()
    matcher = HungarianMatcher()
    outputs["pred_logits"].requires_grad_()
    for kind in (torch.float64, torch.bfloat16, torch.float16):
        converted = {key: value.to(kind) for key, value in outputs.items()}
        assert [len(q) for q, _ in matcher(converted, targets)] == [3, 0, 10]
    assert list(matcher.state_dict()) == []


def test_all_images_empty() -> None:
    outputs, targets = batch(counts=(0, 0))
    for queries, own in HungarianMatcher()(outputs, targets):
        assert queries.shape == own.shape == (0,)
        assert queries.dtype == torch.int64


def test_raise_names_layer_image_target_query_and_term() -> None:
    outputs, targets = batch()
    outputs["pred_logits"][2, 4, 1] = torch.nan
    with pytest.raises(ValueError, match=r"12 pair.* layer 0, image 2, target 0, query 4: class term"):
        HungarianMatcher()(outputs, targets)


def test_skip_matches_the_rest_and_counts() -> None:
    outputs, targets = batch()
    matcher = HungarianMatcher(invalid="skip")
    assert matcher.report() is None
    clean = matcher(outputs, targets)
    outputs["pred_boxes"][2, 4] = torch.nan
    for _ in range(2):
        pairs = matcher(outputs, targets)
    assert torch.equal(pairs[0][0], clean[0][0])
    assert len(pairs[2][0]) == 9
    assert 4 not in pairs[2][0].tolist()
    found = matcher.report()
    assert found is not None
    assert (found.count, found.image, found.query) == (24, 2, 4)
    assert matcher.report() is None


def test_target_values_are_checked_with_the_image() -> None:
    outputs, targets = batch()
    targets[2]["labels"][5] = 7
    with pytest.raises(ValueError, match=r"image 2 of the batch, target 5: label must be in \[0, 7\), got 7"):
        HungarianMatcher()(outputs, targets)
    with pytest.raises(ValueError, match="label must be in"):
        HungarianMatcher(kind="softmax", invalid="skip")(outputs, targets)
    assert len(HungarianMatcher(kind="focal")(outputs, targets)[2][0]) == 10


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="must not be 0"):
        HungarianMatcher(0, 0, 0)
    with pytest.raises(ValueError, match="kind must be softmax, focal or focal_stable, got 'sigmoid'"):
        HungarianMatcher(kind="sigmoid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"invalid must be one of .*'as_one' or None, got 'ignore'"):
        HungarianMatcher(invalid="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got -1"):
        HungarianMatcher(alpha=-1)
    outputs, targets = batch()
    with pytest.raises(ValueError, match="targets must have one entry for each of 3 images, got 2"):
        HungarianMatcher()(outputs, targets[:2])
    with pytest.raises(TypeError, match="got Predictions with list"):
        HungarianMatcher()(Predictions(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 4)), targets)


def published_pairs(cost: Tensor, policy: str) -> list[Tensor]:
    """What the code bases make of costs [Q, T] that are not finite, as they write it, solved by SciPy."""
    largest = 1e6  # transformers: the largest float32, to which SciPy cannot add the costs of the good pairs
    if policy == "last":
        cost = cost.nan_to_num(nan=largest, posinf=largest, neginf=largest)
    elif policy == "as_one":
        cost = cost.nan_to_num(nan=1.0)
    else:
        finite = cost[cost.isfinite()]
        cost = torch.where(cost.isfinite(), cost, finite.max() + finite.abs().max() + 1)
    return [torch.from_numpy(side) for side in scipy.optimize.linear_sum_assignment(cost.double())]


@pytest.mark.parametrize("policy", ["last", "above_largest", "as_one"])
@pytest.mark.parametrize("bad", [(0,), (3, 7), tuple(range(7))])
def test_published_policies_for_bad_pairs(policy: str, bad: tuple[int, ...]) -> None:
    for seed in range(5):
        outputs, targets = batch(counts=(4,), queries=9)
        outputs["pred_logits"] += torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(seed))
        outputs["pred_logits"][0, list(bad)] = torch.nan
        packed = Targets.pack(targets)
        arguments = (outputs["pred_logits"][None], outputs["pred_boxes"][None], packed.labels, packed.boxes)
        cost = matching_cost_reference(*arguments, packed.offsets, 1.0, 5.0, 2.0)[0].mT
        matcher = HungarianMatcher(1, 5, 2, invalid=policy)  # type: ignore[arg-type]
        queries, own = matcher(outputs, targets)[0]
        expected_queries, expected_own = published_pairs(cost, policy)
        good = [~torch.isin(side, torch.tensor(bad)) for side in (queries, expected_queries)]
        # Bad pairs cost the same: which of the bad queries a target gets says nothing.
        assert queries[good[0]].tolist() == expected_queries[good[1]].tolist()
        assert own[good[0]].tolist() == expected_own[good[1]].tolist()
        assert own.sort()[0].tolist() == expected_own.sort()[0].tolist()
        found = matcher.report()
        assert found is not None
        assert (found.count, found.query, found.terms) == (4 * len(bad), bad[0], ("class",))


def test_policies_without_targets_or_finite_costs() -> None:
    for policy in ("last", "above_largest", "as_one"):
        matcher = HungarianMatcher(1, 5, 2, invalid=policy)  # type: ignore[arg-type]
        outputs, targets = batch(counts=(0, 0))
        assert [len(q) for q, _ in matcher(outputs, targets)] == [0, 0]
        outputs, targets = batch(counts=(2, 3))
        outputs["pred_boxes"][1] = torch.nan
        assert [len(q) for q, _ in matcher(outputs, targets)] == [2, 3]


@pytest.mark.parametrize("counts", [(3, 0, 12), (0, 0), (1,)])
def test_groups_are_matched_as_if_alone(counts: tuple[int, ...]) -> None:
    groups, queries = 3, 5
    outputs, targets = batch(counts, groups * queries)
    packed = Targets.pack(targets)
    predictions = Predictions.from_dict(outputs)
    matcher = HungarianMatcher(1, 5, 2)
    found, repeated = matcher.match_groups(predictions, packed, groups), packed.repeated(groups)
    assert found.shape == (1, groups * sum(counts))
    assert repeated.offsets.tolist() == [groups * start for start in packed.offsets.tolist()]
    assert repeated.max_count == groups * max(counts)
    rows = iter(found[0].tolist())
    for image, count in enumerate(counts):
        for group in range(groups):
            part = slice(group * queries, (group + 1) * queries)
            alone = {name: value[image : image + 1, part] for name, value in outputs.items()}
            pairs = dict(
                zip(*(side.tolist() for side in matcher(alone, targets[image : image + 1])[0][::-1]), strict=True)
            )
            expected = [pairs.get(target, -1) for target in range(count)]
            assert [next(rows) for _ in range(count)] == [x if x < 0 else x + group * queries for x in expected]
    labels = torch.cat([target["labels"].repeat(groups) for target in targets])
    assert torch.equal(repeated.labels, labels)


@pytest.mark.parametrize("policy", ["last", "above_largest", "as_one"])
def test_published_policies_hold_in_each_group(policy: str) -> None:
    """As one layer of the cost: where the whole has a largest cost, each group has it."""
    outputs, targets = batch((3, 6), 12)
    outputs["pred_logits"][:, [1, 4, 5, 8]] = torch.nan
    outputs["pred_logits"][1, 6:] = torch.nan  # a group without any finite cost
    packed, predictions = Targets.pack(targets), Predictions.from_dict(outputs)
    matcher = HungarianMatcher(1, 5, 2, invalid=policy)  # type: ignore[arg-type]
    found = matcher.match_groups(predictions, packed, 2)
    arguments = (predictions.logits, predictions.boxes, packed.labels, packed.boxes, packed.offsets)
    cost = replaced(matching_cost_reference(*arguments, 1.0, 5.0, 2.0), policy, 6)  # type: ignore[arg-type]
    assert torch.equal(found, assign(cost, packed.offsets, groups=2))
    assert (found >= 0).all()
    report = matcher.report()
    assert report is not None
    assert report.count == 3 * 4 + 6 * (3 + 6)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("counts", [[2, 0, 3], [0], [4, 0], []])
def test_repeated_targets_with_spare_rows(counts: list[int], groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    total, spare = sum(counts), 2
    labels = torch.randint(0, 9, (total + spare,), generator=generator)
    targets = Targets(labels, torch.rand(total + spare, 4, generator=generator), offsets_of(counts), 9)
    repeated, group, target = targets.in_groups(groups)
    assert torch.equal(targets.repeated(groups).labels[: total * groups], repeated.labels[: total * groups])
    assert repeated.offsets.tolist() == [groups * start for start in targets.offsets.tolist()]
    assert (len(repeated.labels), repeated.max_count) == (groups * (total + spare), 9 * groups)
    row = 0
    for start, count in zip(targets.offsets.tolist(), counts, strict=False):
        for number in range(groups):
            own = slice(row, row + count)
            assert torch.equal(repeated.labels[own], labels[start : start + count])
            assert torch.equal(repeated.boxes[own], targets.boxes[start : start + count])
            assert group[own].tolist() == [number] * count
            assert target[own].tolist() == list(range(count))
            row += count


def test_a_bad_pair_of_a_group_is_reported_with_its_image() -> None:
    outputs, targets = batch((1, 2), 6)
    outputs["pred_boxes"][1, 4] = torch.nan  # the second query of the second of two groups of three
    matcher = HungarianMatcher(1, 5, 2, invalid="skip")
    matcher.match_groups(Predictions.from_dict(outputs), Targets.pack(targets), 2)
    found = matcher.report()
    assert found is not None
    assert (found.count, found.image, found.query) == (2, 1, 4)
    assert matcher.report() is None
    with pytest.raises(ValueError, match="image 1, target 0, query 4"):
        HungarianMatcher(1, 5, 2).match_groups(Predictions.from_dict(outputs), Targets.pack(targets), 2)


def test_what_is_no_list_of_dictionaries_is_named() -> None:
    outputs, targets = batch((1, 2))
    matcher = HungarianMatcher()
    for wrong, found in ((targets[0], "dict"), (None, "NoneType"), ([targets[0], [1]], "list of list"), ("ab", "str")):
        with pytest.raises(TypeError, match=f"targets must be a list of dictionaries, one of each image, got {found}$"):
            Targets.pack(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"one of each image, got {found}$"):
            matcher(outputs, wrong)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="outputs must be a dictionary, got tuple"):
        matcher((outputs["pred_logits"], outputs["pred_boxes"]), targets)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"outputs must have 'pred_logits' and 'pred_boxes', got \['pred_logits'\]"):
        matcher({"pred_logits": outputs["pred_logits"]}, targets)


def test_groups_must_divide_the_queries() -> None:
    outputs, targets = batch((1, 2), 6)
    for groups in (4, 2.0, 0):
        with pytest.raises(ValueError, match=f"groups must divide 6 queries, got {groups}"):
            HungarianMatcher().match_groups(Predictions.from_dict(outputs), Targets.pack(targets), groups)  # type: ignore
    with pytest.raises(ValueError, match="groups must be an integer, at least 1, got 0"):
        Targets.pack(targets).repeated(0)


@pytest.mark.parametrize("policy", ["last", "above_largest", "as_one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_policies_with_very_large_costs_and_unknown_labels(policy: str, dtype: torch.dtype) -> None:
    outputs, targets = batch(counts=(6,), queries=9)
    outputs = {name: value.to(dtype) for name, value in outputs.items()}
    outputs["pred_logits"][0, 1:] = torch.nan
    outputs["pred_boxes"][0, 0, 0] = 1e28
    matcher = HungarianMatcher(1, 5, 2, invalid=policy)  # type: ignore[arg-type]
    predictions, packed = Predictions.from_dict(outputs), Targets.pack(targets)
    assert (matcher(predictions, packed) >= 0).all()
    packed.labels[2] = 7  # "no object"
    found = matcher(predictions, packed)[0]
    assert found[2] == -1
    assert (found[[0, 1, 3, 4, 5]] >= 0).all()


def test_statuses_outlive_inference_mode_copies_and_fake_tensors() -> None:
    outputs, targets = batch(counts=(2, 3))
    outputs["pred_boxes"][1] = torch.nan
    packed = Targets.pack(targets)
    predictions = Predictions.from_dict(outputs)
    with torch.inference_mode():
        matcher = HungarianMatcher(1, 5, 2, invalid="skip")
        matcher.match_groups(predictions, packed, 2)
    matcher(predictions, packed)
    with FakeTensorMode(allow_non_fake_inputs=True):
        matcher(predictions, packed)
    assert list(matcher.buffers()) == []  # DistributedDataParallel would give all ranks those of the first
    found = copy.deepcopy(matcher).report()
    assert found is not None
    assert found.count == 60
    assert matcher.report() == found
    assert matcher.report() is None
