"""Transforms keep boxes, masks and areas true to the pixels: objects are painted, and the pixels are the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.boxes import box_cxcywh_to_xyxy
from detr_fast.data.transforms import (
    Crop,
    Normalise,
    Resize,
    crop,
    evaluation_transform,
    flip_horizontally,
    resize,
    resized_size,
    seeded,
    train_transform,
)

BOXES = ((4, 6, 20, 16), (30, 2, 44, 30), (0, 24, 10, 32))  # xyxy, do not overlap
HEIGHT, WIDTH = 32, 48


def painted() -> tuple[Image.Image, dict[str, torch.Tensor]]:
    """Boxes of grey levels 80, 160, 240 on black, and their targets."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    masks = torch.zeros(len(BOXES), HEIGHT, WIDTH, dtype=torch.bool)
    for index, (x1, y1, x2, y2) in enumerate(BOXES):
        pixels[y1:y2, x1:x2] = 80 * (index + 1)
        masks[index, y1:y2, x1:x2] = True
    boxes = torch.tensor(BOXES, dtype=torch.float32)
    return Image.fromarray(pixels), {
        "boxes": boxes,
        "labels": torch.arange(len(BOXES)),
        "masks": masks,
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(1),
        "iscrowd": torch.zeros(len(BOXES), dtype=torch.int64),
        "orig_size": torch.tensor([HEIGHT, WIDTH]),
        "size": torch.tensor([HEIGHT, WIDTH]),
    }


def assert_consistent(image: Image.Image, target: dict[str, torch.Tensor]) -> None:
    """Boxes and masks against the grey levels; exact, so only for transforms that do not resample."""
    levels = torch.from_numpy(np.array(image)[..., 0])
    assert len({len(target[name]) for name in ("boxes", "labels", "masks", "area", "iscrowd")}) == 1
    assert target["size"].tolist() == [image.height, image.width]
    assert set(target["labels"].tolist()) == {int(level) // 80 - 1 for level in levels.unique() if level}
    for label, box, mask, area in zip(*(target[n] for n in ("labels", "boxes", "masks", "area")), strict=True):
        there = levels == 80 * (int(label) + 1)
        rows, columns = there.any(1).nonzero(), there.any(0).nonzero()
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert torch.equal(mask, there)
        assert float(area) == there.sum()


def test_flip() -> None:
    assert_consistent(*flip_horizontally(*painted()))


@pytest.mark.parametrize("top", range(0, 17, 4))
def test_crop(top: int) -> None:
    for left in range(0, 33, 4):
        assert_consistent(*crop(*painted(), top, left, 16, 16))


def test_random_crop_draws_every_side_and_place() -> None:
    image, target = painted()
    sizes, generator = set(), seeded(0)
    for _ in range(300):
        cropped, result = Crop(8, 12)(image, target, generator)
        assert_consistent(cropped, result)
        sizes.add(cropped.size)
    assert {w for w, _ in sizes} == {h for _, h in sizes} == set(range(8, 13))


def test_crop_of_an_image_smaller_than_the_range_keeps_what_there_is() -> None:
    cropped, target = Crop(384, 600)(*painted(), seeded(0))
    assert cropped.size == (WIDTH, HEIGHT)
    assert_consistent(cropped, target)


def test_resize_by_a_whole_factor_is_exact() -> None:
    image, target = resize(*painted(), (64, 96))
    assert torch.equal(target["boxes"], torch.tensor(BOXES) * 2.0)
    assert torch.equal(target["area"], painted()[1]["area"] * 4)
    assert torch.equal(target["masks"], painted()[1]["masks"].repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert target["size"].tolist() == [64, 96] == [image.height, image.width]
    assert target["orig_size"].tolist() == [HEIGHT, WIDTH]


@pytest.mark.parametrize(
    ("size", "shorter", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1066)),
        ((640, 480), 800, 1333, (1066, 800)),
        ((200, 640), 800, 1333, (417, 1334)),  # the published rule may exceed the limit by a pixel
        ((800, 800), 800, 1333, (800, 800)),
        ((750, 1500), 800, 1333, (666, 1332)),
        ((480, 640), 800, None, (800, 1066)),
        ((1, 5000), 800, 1333, (1, 5000)),  # too thin for the rule
    ],
)
def test_resized_size(size: tuple[int, int], shorter: int, longest: int | None, expected: tuple[int, int]) -> None:
    assert resized_size(size, shorter, longest) == expected


def test_resize_draws_every_size() -> None:
    generator = seeded(1)
    sizes = {Resize((16, 24, 40))(*painted(), generator)[0].height for _ in range(60)}
    assert sizes == {16, 24, 40}


def test_normalise() -> None:
    image = Image.fromarray(np.full((2, 4, 3), (255, 0, 51), np.uint8))
    pixels, target = Normalise()(image, {"boxes": torch.tensor([[1.0, 0.0, 3.0, 1.0]])})
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(pixels, torch.tensor(expected).view(3, 1, 1).expand(3, 2, 4))
    assert target["boxes"].tolist() == [[0.5, 0.25, 0.5, 0.5]]


def test_train_transform_keeps_boxes_on_their_objects() -> None:
    transform = train_transform((48, 56, 64), 96)
    crops, flips, checked = 0, 0, 0
    for seed in range(60):
        pixels, target = transform(*painted(), seeded(seed))
        height, width = pixels.shape[1:]
        assert target["size"].tolist() == [height, width]
        levels = (pixels[0] * 0.229 + 0.485) * 255
        boxes = box_cxcywh_to_xyxy(target["boxes"]) * torch.tensor([width, height, width, height])
        assert bool((boxes >= -1e-3).all())
        for label, box in zip(target["labels"].tolist(), boxes, strict=True):
            x1, y1, x2, y2 = (round(float(v)) for v in box)
            # Two resizes blur a pixel each: 1.5 times larger at most, then 64 / 31 times.
            inner = levels[y1 + 6 : max(y2 - 6, 0), x1 + 6 : max(x2 - 6, 0)]
            assert torch.allclose(inner, torch.tensor(80.0 * (label + 1)), rtol=0, atol=1)
            checked += inner.numel() > 0
        crops += len(boxes) < len(BOXES) or round(height / width, 2) != round(HEIGHT / WIDTH, 2)
        flips += bool((boxes[target["labels"] == 0, 0] > width / 2).any())
    assert 15 < crops < 45  # half of 60, 4 standard deviations
    assert 5 < flips < 55
    assert checked > 60


def test_train_transform_without_crop_and_flip_keeps_all() -> None:
    for seed in range(10):
        pixels, target = train_transform((64,), 96, flip=False, crop=False)(*painted(), seeded(seed))
        assert pixels.shape == (3, 64, 96)
        assert torch.equal(target["labels"], torch.arange(3))


def test_crop_defaults_are_those_of_the_paper() -> None:
    default = train_transform()
    assert default == train_transform(crop_scales=(400, 500, 600), crop_range=(384, 600))


def test_image_without_targets() -> None:
    pixels, target = evaluation_transform(64, 200)(painted()[0], {})
    assert pixels.shape == (3, 64, 96)
    assert target == {}


def test_seeded_tells_its_numbers_apart() -> None:
    draws = {float(torch.rand((), generator=seeded(*numbers))) for numbers in [(0, 1), (1, 0), (0, 0), (0,), (1, 1)]}
    assert len(draws) == 5
