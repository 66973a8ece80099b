"""Instance masks and panoptic maps: padding, merging, small segments, and the published behaviour on request."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detr_fast.models.postprocess_masks import PostProcessPanoptic, PostProcessSegm

THINGS = {0: True, 1: False, 2: True}  # class 1 is stuff, class 3 is "no object"


def block(rows: slice, columns: slice, size: tuple[int, int] = (32, 32)) -> Tensor:
    mask = torch.full(size, -8.0)
    mask[rows, columns] = 8.0
    return mask


def outputs(labels: list[int], masks: list[Tensor]) -> dict[str, Tensor]:
    logits = torch.full((1, len(labels), 4), -10.0)
    logits[0, range(len(labels)), labels] = 10.0
    return {"pred_logits": logits, "pred_masks": torch.stack(masks)[None]}


def ids_of(result: dict) -> np.ndarray:
    rgb = np.asarray(Image.open(io.BytesIO(result["png_string"])).convert("RGB"), np.int64)
    return rgb @ np.array([1, 256, 65536])


ALL = slice(None)
LEFT, RIGHT = slice(0, 16), slice(16, 32)


def test_segments_areas_and_sizes() -> None:
    given = outputs([0, 3, 1], [block(ALL, LEFT), block(ALL, ALL) + 1, block(ALL, RIGHT)])
    (result,) = PostProcessPanoptic(THINGS)(given, [(32, 32)], [(64, 128)])
    ids = ids_of(result)
    assert ids.shape == (64, 128)
    assert (ids[:, :64] == 0).all()
    assert (ids[:, 64:] == 1).all()
    assert result["segments_info"] == [
        {"id": 0, "isthing": True, "category_id": 0, "area": 64 * 64},
        {"id": 1, "isthing": False, "category_id": 1, "area": 64 * 64},
    ]


def test_padding_is_cut_off_unless_the_published_behaviour_is_asked_for() -> None:
    """An object over the left half of a canvas of two images, which is all of the first image's 32 columns."""
    first = outputs([0, 1], [block(ALL, LEFT), block(ALL, RIGHT)])
    given = {key: value.repeat(2, *[1] * (value.dim() - 1)) for key, value in first.items()}
    sizes = [(64, 32), (64, 64)]
    cut, _ = PostProcessPanoptic(THINGS)(given, sizes)
    squashed, _ = PostProcessPanoptic(THINGS, reference_padding=True)(given, sizes)
    assert (ids_of(cut) == 0).all()
    assert (ids_of(squashed)[:, 16:] == 1).all()


def test_stuff_of_one_class_stays_merged() -> None:
    """Stuff in two masks, over the two halves, and a thing that owns a corner but lies under both."""
    thing = torch.full((32, 32), 7.0)
    thing[:4, :4] = 9.0
    given = outputs([1, 1, 0], [block(ALL, LEFT), block(ALL, RIGHT), thing])
    (result,) = PostProcessPanoptic(THINGS)(given, [(32, 32)])
    areas = {s["category_id"]: s["area"] for s in result["segments_info"]}
    assert sum(areas.values()) == 32 * 32
    assert areas[0] < 6 * 6
    (published,) = PostProcessPanoptic(THINGS, reference_merge=True)(given, [(32, 32)])
    areas = {s["category_id"]: s["area"] for s in published["segments_info"]}
    assert areas[0] > 32 * 16  # the second mask's half went to the thing


def test_things_of_one_class_are_not_merged() -> None:
    given = outputs([0, 0], [block(ALL, LEFT), block(ALL, RIGHT)])
    (result,) = PostProcessPanoptic(THINGS)(given, [(32, 32)])
    assert [s["id"] for s in result["segments_info"]] == [0, 1]


@pytest.mark.parametrize(("side", "kept"), [(2, False), (3, True)])
def test_segments_of_four_pixels_or_less_are_dropped(side: int, kept: bool) -> None:
    speck = block(slice(0, side), slice(0, side)) + 1
    given = outputs([2, 0], [speck, block(ALL, ALL)])
    (result,) = PostProcessPanoptic(THINGS)(given, [(32, 32)])
    assert ([s["category_id"] for s in result["segments_info"]] == [2, 0]) is kept
    assert sum(s["area"] for s in result["segments_info"]) == 32 * 32


def test_nothing_found() -> None:
    (result,) = PostProcessPanoptic(THINGS)(outputs([3], [block(ALL, ALL)]), torch.tensor([[20, 30]]))
    assert result["segments_info"] == []
    assert ids_of(result).shape == (20, 30)
    assert not ids_of(result).any()


def test_unknown_label_and_sizes() -> None:
    with pytest.raises(ValueError, match=r"is_thing_map must say.*2 is missing"):
        PostProcessPanoptic({0: True})(outputs([2], [block(ALL, ALL)]), [(32, 32)])
    with pytest.raises(ValueError, match="one row for each of 1 images, got 2 and 2"):
        PostProcessPanoptic(THINGS)(outputs([2], [block(ALL, ALL)]), [(32, 32), (32, 32)])


def test_instance_masks_leave_the_padding_and_take_the_original_size() -> None:
    masks = block(slice(0, 8), slice(0, 8), (16, 16))[None, None].repeat(2, 1, 1, 1)  # of a canvas of 64 x 64
    results = PostProcessSegm()([{}, {}], {"pred_masks": masks}, torch.tensor([[8, 8], [128, 32]]), SIZES)
    first, second = (result["masks"] for result in results)
    assert first.dtype == torch.uint8
    assert first.shape == (1, 1, 8, 8)
    assert first.all()  # the 32 x 32 image ends where the mask does
    assert second.shape == (1, 1, 128, 32)
    assert second[0, 0, :64, :16].all()
    assert not second[0, 0, 68:].any()
    assert not second[0, 0, :, 17:].any()


SIZES = torch.tensor([[32, 32], [64, 64]])
