"""From logits and boxes to detections in pixels."""

from __future__ import annotations

import pytest
import torch

from detr_fast.models.postprocess import postprocess_detections, postprocess_top_scores
from detr_fast.structures import Predictions

LOGITS = torch.tensor([[[2.0, 1.0, 5.0], [0.0, 3.0, -1.0]]])  # two classes and "no object"
BOXES = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 1.0, 0.5]]])
SIZES = torch.tensor([[100, 200]])  # height, width


def test_no_object_is_never_the_label() -> None:
    (result,) = postprocess_detections({"pred_logits": LOGITS, "pred_boxes": BOXES}, SIZES)
    assert result["labels"].tolist() == [0, 1]
    expected = torch.stack([LOGITS[0, 0].softmax(-1)[0], LOGITS[0, 1].softmax(-1)[1]])
    torch.testing.assert_close(result["scores"], expected)


def test_boxes_are_corners_in_pixels_and_not_clipped() -> None:
    (result,) = postprocess_detections({"pred_logits": LOGITS, "pred_boxes": BOXES}, SIZES)
    torch.testing.assert_close(result["boxes"], torch.tensor([[80.0, 30, 120, 70], [-50, 25, 150, 75]]))


def test_predictions_give_their_last_layer() -> None:
    predictions = Predictions(torch.stack([-LOGITS, LOGITS]), torch.stack([BOXES / 2, BOXES]))
    (found,) = postprocess_detections(predictions, SIZES)
    (expected,) = postprocess_detections({"pred_logits": LOGITS, "pred_boxes": BOXES}, SIZES)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_half_types_are_widened() -> None:
    outputs = {"pred_logits": LOGITS.bfloat16(), "pred_boxes": BOXES.bfloat16()}
    (result,) = postprocess_detections(outputs, SIZES)
    assert result["scores"].dtype == result["boxes"].dtype == torch.float32


def test_top_scores_may_take_a_query_twice() -> None:
    (result,) = postprocess_top_scores({"pred_logits": LOGITS[..., :2], "pred_boxes": BOXES}, SIZES, count=3)
    torch.testing.assert_close(result["scores"], torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    assert result["labels"].tolist() == [1, 0, 1]
    torch.testing.assert_close(result["boxes"][:, 0], torch.tensor([-50.0, 80.0, 80.0]))


def test_sizes_must_be_one_row_an_image() -> None:
    with pytest.raises(ValueError, match=r"target_sizes must be \[1, 2\] \(height, width\).*got \[2\]"):
        postprocess_detections({"pred_logits": LOGITS, "pred_boxes": BOXES}, torch.tensor([100, 200]))
