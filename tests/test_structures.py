"""Packing of targets and images, and errors that name the image."""

from __future__ import annotations

import pytest
import torch

from detr_fast.structures import Images, Predictions, StaticTargets, Targets, offsets_of


def target(labels: list[int], boxes: list[list[float]] | None = None) -> dict[str, torch.Tensor]:
    return {
        "labels": torch.tensor(labels, dtype=torch.int64),
        "boxes": torch.tensor(boxes or [[0.5, 0.5, 0.1, 0.1]] * len(labels)).reshape(-1, 4),
    }


def test_targets_are_one_flat_list() -> None:
    packed = Targets.pack([target([3, 1]), target([]), target([2])])
    assert packed.labels.tolist() == [3, 1, 2]
    assert packed.boxes.shape == (3, 4)
    assert packed.offsets.tolist() == [0, 2, 2, 3]
    assert packed.offsets.dtype == torch.int32
    assert (packed.max_count, len(packed)) == (2, 3)


def test_image_of_each_row() -> None:
    packed = Targets.pack([target([]), target([3, 1]), target([]), target([2])])
    assert packed.image_of_row().tolist() == [1, 1, 3]
    assert packed.image_of_row().dtype == torch.int64
    static = StaticTargets.with_capacity(4, 6)
    static.copy_(packed)
    assert static.image_of_row().tolist() == [1, 1, 3, 3, 3, 3]
    assert Targets.pack([]).image_of_row().shape == (0,)
    assert StaticTargets.with_capacity(0, 2).image_of_row().tolist() == [0, 0]


def test_no_images() -> None:
    packed = Targets.pack([])
    assert packed.offsets.tolist() == [0]
    assert (len(packed), packed.max_count) == (0, 0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "image 17: 'boxes' is missing, got \\['labels'\\]"),
        (
            {**target([1]), "labels": torch.zeros(1)},
            r"image 17: labels must be \[n\] integers, got \[1\]",
        ),
        ({**target([1]), "boxes": torch.zeros(2, 4)}, r"image 17: boxes must be \[1, 4\] .* got \[2, 4\]"),
        ({**target([1]), "boxes": torch.zeros(1, 4).long()}, "image 17: boxes must be .* got .* torch.int64"),
        (target([1, 8]), r"image 17, target 1: label must be in \[0, 8\), got 8"),
        (target([-1]), r"image 17, target 0: label must be in \[0, 8\), got -1"),
        (target([1, 2], [[0.1] * 4, [0.5, 0.5, -0.1, 0.1]]), "image 17, target 1: box must be .* got"),
    ],
)
def test_malformed_targets_name_the_image(bad: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Targets.pack([target([1, 2]), bad], num_classes=8, names=[5, 17])
    with pytest.raises(ValueError, match="image 1 of the batch"):
        Targets.pack([target([1, 2]), bad], num_classes=8)


def test_images_share_a_canvas() -> None:
    images = Images.batch([torch.ones(3, 4, 6), torch.ones(3, 5, 2)])
    assert images.pixels.shape == (2, 3, 5, 6)
    assert images.sizes == ((4, 6), (5, 2))
    assert images.pixels.sum((1, 2, 3)).tolist() == [72, 30]
    assert (~images.padding).sum((1, 2)).tolist() == [24, 10]
    assert not images.padding[1, :5, :2].any()
    assert len(images) == 2


def test_a_tensor_has_no_padding() -> None:
    images = Images.batch(torch.ones(2, 3, 4, 5))
    assert not images.padding.any()
    assert images.sizes == ((4, 5), (4, 5))
    with pytest.raises(ValueError, match=r"image 0 must be \[channels, height, width\], got \[4, 5\]"):
        Images.batch([torch.ones(4, 5)])


def test_predictions_as_dictionary_and_back() -> None:
    predictions = Predictions(torch.rand(3, 2, 5, 4), torch.rand(3, 2, 5, 4))
    outputs = predictions.as_dict()
    assert len(outputs["aux_outputs"]) == 2
    assert torch.equal(outputs["pred_logits"], predictions.logits[2])
    again = Predictions.from_dict(outputs)
    assert torch.equal(again.logits, predictions.logits)
    assert torch.equal(again.boxes, predictions.boxes)
    assert "aux_outputs" not in Predictions(predictions.logits[:1], predictions.boxes[:1]).as_dict()


def test_slices_of_one_tensor_are_not_copied() -> None:
    base = (torch.rand(3, 2, 5, 4, requires_grad=True) * 2, torch.rand(3, 2, 5, 4, requires_grad=True) * 2)
    again = Predictions.from_dict(Predictions(*base).as_dict())
    assert again.logits is base[0]
    assert again.boxes is base[1]


@pytest.mark.parametrize("change", ["detach", "order", "retain_grad", "hook", "part"])
def test_other_slices_are_stacked_with_their_own_gradient(change: str) -> None:
    leaf = torch.rand(3, 2, 5, 4, requires_grad=True)
    base = leaf * 1
    layers = list(base.unbind())
    if change == "detach":
        layers[1] = layers[1].detach()
    elif change == "order":
        layers[0], layers[1] = layers[1], layers[0]
    elif change == "retain_grad":
        layers[1].retain_grad()
    elif change == "hook":
        layers[1].register_hook(lambda gradient: gradient * 0)
    else:
        layers = layers[:2]
    outputs = {"pred_logits": layers[-1], "pred_boxes": layers[-1]}
    outputs["aux_outputs"] = [{"pred_logits": x, "pred_boxes": x} for x in layers[:-1]]
    stacked = Predictions.from_dict(outputs).logits
    assert torch.equal(stacked, torch.stack(layers))
    stacked.sum().backward()
    expected = torch.ones(3, 2, 5, 4)
    if change in ("detach", "hook"):
        expected[1] = 0
    elif change == "part":
        expected[2] = 0
    assert torch.equal(leaf.grad, expected)
    assert (change == "retain_grad") == (layers[1].retains_grad and layers[1].grad is not None)


def test_offsets() -> None:
    assert offsets_of([2, 0, 3]).tolist() == [0, 2, 2, 5]
    assert offsets_of([]).tolist() == [0]


@pytest.mark.gpu
def test_targets_reach_the_device_in_one_copy() -> None:
    packed = Targets.pack([target([3, 1]), target([2])]).to("cuda")
    assert packed.labels.tolist() == [3, 1, 2]
    assert packed.boxes.data_ptr() - packed.labels.data_ptr() == 3 * 8


def test_memory_of_fixed_capacity_takes_over_targets() -> None:
    kept = StaticTargets.with_capacity(images=2, capacity=6, max_count=4)
    assert (len(kept), kept.max_count, kept.labels.shape, kept.offsets.tolist()) == (2, 4, (6,), [0, 0, 0])
    addresses = [x.data_ptr() for x in (kept.labels, kept.boxes, kept.offsets)]
    for counts in ((4, 2), (0, 1), (0, 0)):
        given = Targets.pack([{"labels": torch.arange(n), "boxes": torch.rand(n, 4)} for n in counts])
        kept.copy_(given)
        assert torch.equal(kept.offsets, given.offsets)
        assert torch.equal(kept.labels[: sum(counts)], given.labels)
        assert torch.equal(kept.boxes[: sum(counts)], given.boxes)
    assert addresses == [x.data_ptr() for x in (kept.labels, kept.boxes, kept.offsets)]
    with pytest.raises(ValueError, match=r"max_count must be in \[0, 6\], got 7"):
        StaticTargets.with_capacity(2, 6, 7)
    with pytest.raises(ValueError, match="capacity must be at least 0, got -1"):
        StaticTargets.with_capacity(2, -1)
    masked = [{"labels": torch.zeros(1).long(), "boxes": torch.rand(1, 4), "masks": torch.ones(1, 2, 2) > 0}] * 2
    with pytest.raises(ValueError, match="targets must have no masks"):
        kept.copy_(Targets.pack(masked))


def test_boxes_that_are_not_finite_name_their_image() -> None:
    boxes = torch.rand(2, 4)
    boxes[1, 0] = torch.nan
    targets = [{"labels": torch.zeros(2).long(), "boxes": box} for box in (torch.rand(2, 4), boxes)]
    with pytest.raises(ValueError, match=r"targets of image 1 of the batch, target 1: box must be .* finite, .* got"):
        Targets.pack(targets)


@pytest.mark.parametrize("box", [[100.0, 50.0, 30.0, 20.0], [0.5, -7.0, 0.1, 0.1], [torch.inf, 0.5, 0.1, 0.1]])
def test_boxes_in_pixels_name_their_image(box: list[float]) -> None:
    beyond = {"labels": torch.zeros(1).long(), "boxes": torch.tensor([[1.1, -0.2, 1.6, 0.4]])}  # of a cropped image
    Targets.pack([beyond], 3)
    wrong = {"labels": torch.zeros(1).long(), "boxes": torch.tensor([box])}
    with pytest.raises(ValueError, match=r"image 1 of the batch, target 0: box must be \(cx, cy, w, h\) in fractions"):
        Targets.pack([beyond, wrong], 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_empty_tensors_of_any_shape_are_no_targets(dtype: torch.dtype) -> None:
    empty = {"labels": torch.tensor([], dtype=dtype), "boxes": torch.tensor([])}
    full = {"labels": torch.tensor([3, 1]), "boxes": torch.full((2, 4), 0.5)}
    packed = Targets.pack([empty, full, empty])
    assert packed.labels.tolist() == [3, 1]
    assert packed.labels.dtype == torch.int64
    assert packed.offsets.tolist() == [0, 0, 2, 2]
    alone = Targets.pack([empty])
    assert alone.boxes.shape == (0, 4)
    assert alone.labels.dtype == torch.int64


def test_outputs_without_a_key_are_named() -> None:
    outputs = {"logits": torch.zeros(1, 2, 3), "pred_boxes": torch.zeros(1, 2, 4)}
    with pytest.raises(ValueError, match=r"must have 'pred_logits' and 'pred_boxes', got \['logits', 'pred_boxes'\]"):
        Predictions.from_dict(outputs)
