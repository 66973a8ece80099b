"""Box formats and overlaps."""

from __future__ import annotations

import torch

from detr_fast.boxes import box_cxcywh_to_xyxy, box_iou, box_xyxy_to_cxcywh, generalized_box_iou, masks_to_boxes


def test_formats_round_trip() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.0, 1.0, 0.0, 0.0]])
    assert torch.allclose(box_cxcywh_to_xyxy(boxes)[0], torch.tensor([0.4, 0.3, 0.6, 0.7]))
    assert torch.allclose(box_xyxy_to_cxcywh(box_cxcywh_to_xyxy(boxes)), boxes)


def test_iou_and_giou_of_known_boxes() -> None:
    first = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    second = torch.tensor([[1.0, 0.0, 3.0, 2.0], [0.0, 0.0, 2.0, 2.0], [3.0, 0.0, 4.0, 2.0]])
    iou, union = box_iou(first, second)
    assert torch.allclose(iou, torch.tensor([[1 / 3, 1.0, 0.0]]))
    assert union.tolist() == [[6.0, 4.0, 6.0]]
    assert torch.allclose(generalized_box_iou(first, second), torch.tensor([[1 / 3, 1.0, -0.25]]))


def test_masks_to_boxes_is_tight_and_inclusive() -> None:
    masks = torch.zeros(3, 6, 8)
    masks[0, 2:5, 1:7] = 1
    masks[1, 3, 4] = 1
    assert masks_to_boxes(masks).tolist() == [[1, 2, 6, 4], [4, 3, 4, 3], [0, 0, 0, 0]]
    assert masks_to_boxes(masks[:0]).shape == (0, 4)
