"""HungarianMatcher: facebookresearch/detr's interface, the fast interface, and what happens to bad numbers."""

from __future__ import annotations

import pytest
import scipy.optimize
import torch
from torch import Tensor

from detr_fast import HungarianMatcher, Predictions, Targets
from detr_fast.matcher import queries_of
from detr_fast.ops import matching_cost_reference


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
    with pytest.raises(ValueError, match="invalid must be 'raise', 'skip' or None, got 'ignore'"):
        HungarianMatcher(invalid="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got -1"):
        HungarianMatcher(alpha=-1)
    outputs, targets = batch()
    with pytest.raises(ValueError, match="targets must have one entry for each of 3 images, got 2"):
        HungarianMatcher()(outputs, targets[:2])
    with pytest.raises(TypeError, match="got Predictions with list"):
        HungarianMatcher()(Predictions(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 4)), targets)
