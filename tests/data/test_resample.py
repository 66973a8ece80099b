"""Batches resampled as tensors have the bits of Pillow's, whatever was drawn, and whatever else is in the batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from detr_fast.data.batch import Batch, collate
from detr_fast.data.coco import CocoDetection
from detr_fast.data.raw_batch import collate_raw
from detr_fast.data.resample import FRACTION_BITS, bilinear_taps, levels
from detr_fast.data.sketch import RawImage, Sketch, rows_come_first
from detr_fast.data.transforms import (
    Chain,
    Crop,
    Flip,
    Normalise,
    Resize,
    Sample,
    Target,
    Transform,
    evaluation_transform,
    seeded,
    train_transform,
)

TRANSFORMS: dict[str, Transform] = {
    "train": train_transform((24, 40, 64), 96),
    "down": train_transform((8, 16), 20),
    "up": train_transform((70, 200), 300),
    "evaluation": evaluation_transform(33, 50),
    "tiny crops": train_transform((20, 40), 300, crop_range=(1, 3)),
    "nothing": Normalise(),
    "flip": Chain((Flip(1.0), Normalise())),
    "flips around a crop": Chain(
        (Flip(1.0), Crop(5, 30), Flip(), Resize((20, 31)), Flip(1.0), Crop(4, 30), Normalise())
    ),
    "three resizes": Chain(
        (Resize((30, 50)), Crop(9, 40), Resize((60,)), Crop(20, 50), Flip(), Resize((25,)), Normalise())
    ),
}
SIZES = ((40, 30), (1, 1), (1, 57), (57, 1), (2, 90), (64, 64), (33, 50), (120, 9))  # (height, width)


def both(sizes: Any, transform: Transform, seed: int = 0, **options: Any) -> tuple[Batch, Batch]:
    """The batch of Pillow's images, and that of raw pixels."""
    random = np.random.default_rng(seed)
    ready: list[Sample] = []
    raw: list[tuple[RawImage, Target]] = []
    for index, (height, width) in enumerate(sizes):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        boxes = torch.tensor([[0, 0, width, height], [0, 0, width / 2, height / 3]], dtype=torch.float32)[: index % 3]
        target = {"boxes": boxes, "labels": torch.arange(len(boxes)), "image_id": torch.tensor([index + 5])}
        target["orig_size"] = torch.tensor([height, width])
        ready.append(transform(Image.fromarray(pixels), target, seeded(seed, index)))
        sketch, seen = transform(Sketch.of_size(width, height), target, seeded(seed, index))
        raw.append((RawImage(pixels, sketch), seen))
    return collate(ready, **options), collate_raw(raw, **options).finished()


def assert_same(found: Batch, expected: Batch) -> None:
    assert found.image_ids == expected.image_ids
    assert found.images.sizes == expected.images.sizes
    assert found.targets.max_count == expected.targets.max_count
    for own, other in zip(found.tensors(), expected.tensors(), strict=True):
        assert own.dtype == other.dtype
        assert own.stride() == other.stride()
        assert torch.equal(own.cpu(), other)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("multiple", [1, 32])
def test_batch_has_the_bits_of_pillow(name: str, multiple: int) -> None:
    for seed in range(6):
        sizes = [SIZES[i] for i in np.random.default_rng(seed).permutation(len(SIZES))[: 1 + seed]]
        expected, found = both(sizes, TRANSFORMS[name], seed, canvas_multiple=multiple)
        assert_same(found, expected)
        assert found.images.pixels.shape[2] % multiple == found.images.pixels.shape[3] % multiple == 0


@pytest.mark.parametrize("seed", range(20))
def test_random_sizes_have_the_bits_of_pillow(seed: int) -> None:
    """Every resize of one size to another, in one batch; by chance also of the same size."""
    random = np.random.default_rng(seed)
    ready, raw = [], []
    for _ in range(12):
        height, width, new_height, new_width = random.integers(1, 80, 4).tolist()
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        size = (width if seed % 3 == 0 else new_width, height if seed % 4 == 0 else new_height)
        target = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
        target |= {"image_id": torch.tensor([1]), "orig_size": torch.tensor([height, width])}
        image = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
        sketch = Sketch.of_size(width, height).resize(size, Image.Resampling.BILINEAR)
        ready.append((Normalise()(image, {})[0], target))
        raw.append((RawImage(pixels, Normalise()(sketch, {})[0]), target))
    assert_same(collate_raw(raw).finished(), collate(ready))


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRANSFORMS)
def test_batch_has_the_bits_of_pillow_on_a_gpu(name: str) -> None:
    random = np.random.default_rng(0)
    for seed in range(4):
        raw: list[tuple[RawImage, Target]] = []
        ready: list[Sample] = []
        for index, (height, width) in enumerate(SIZES):
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            target = {"boxes": torch.zeros(1, 4), "labels": torch.zeros(1, dtype=torch.int64)}
            target |= {"image_id": torch.tensor([index]), "orig_size": torch.tensor([height, width])}
            ready.append(TRANSFORMS[name](Image.fromarray(pixels), target, seeded(seed, index)))
            sketch, seen = TRANSFORMS[name](Sketch.of_size(width, height), target, seeded(seed, index))
            raw.append((RawImage(pixels, sketch), seen))
        assert_same(collate_raw(raw).pin_memory().to("cuda").finished(), collate(ready))


def test_order_of_the_passes_is_pillows() -> None:
    """Sizes for which versions of Pillow differ; rounding after each pass tells their order."""
    random = np.random.default_rng(0)
    for before, after in (((10, 30), (14, 10)), ((1, 110), (5, 50)), ((64, 40), (32, 80)), ((50, 90), (40, 69))):
        image = Image.fromarray(random.integers(0, 256, (before[1], before[0], 3), dtype=np.uint8))
        bilinear = Image.Resampling.BILINEAR
        corner = (before[0], after[1]) if rows_come_first(before, after) else (after[0], before[1])
        expected = image.resize(corner, bilinear).resize(after, bilinear)
        assert np.array_equal(np.asarray(image.resize(after, bilinear)), np.asarray(expected))


@pytest.mark.parametrize(("source", "length"), [(1, 1), (1, 9), (9, 1), (7, 7), (640, 1066), (640, 401), (5, 640)])
def test_taps_lie_inside_and_keep_the_mean(source: int, length: int) -> None:
    taps = bilinear_taps(source, length)
    assert len(taps) == length
    assert taps.starts.min() >= 0
    assert taps.end <= source
    error = np.abs(taps.weights.sum(0) - (1 << FRACTION_BITS))
    assert error.max() <= len(taps.weights) / 2  # each weight is rounded once
    assert 255 * (int(taps.weights.sum(0).max()) + 1) < 2**31
    if source == length:
        assert taps.weights.tolist() == [[1 << FRACTION_BITS] * length]


def test_levels_are_what_normalise_computes() -> None:
    mean, std = (0.1, 0.5, 0.7), (0.3, 0.2, 0.9)
    ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2)
    pixels, _ = Normalise(mean, std)(Image.fromarray(ramp), {})
    assert torch.equal(levels(mean, std), torch.cat([pixels.flatten(), torch.zeros(1)]))


class Launches(TorchDispatchMode):
    """Counts the operators that are no mere views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if not function.is_view:
            self.counts[str(function)] += 1
        return function(*arguments, **(options or {}))


def launches(count: int, transform: Transform, seed: int) -> Counter[str]:
    pixels = np.zeros((48, 64, 3), np.uint8)
    target = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    target |= {"image_id": torch.tensor([1]), "orig_size": torch.tensor([48, 64])}
    raw = []
    for _ in range(count):
        sketch, seen = transform(Sketch.of_size(64, 48), target, seeded(seed))
        raw.append((RawImage(pixels, sketch), seen))
    batch = collate_raw(raw)
    with Launches() as mode:
        batch.finished()
    return mode.counts


@pytest.mark.parametrize("seed", range(4))
def test_launches_do_not_depend_on_the_batch_size(seed: int) -> None:
    transform = train_transform((80, 90), 140, crop_scales=(36,))
    few, many = launches(1, transform, seed), launches(16, transform, seed)
    assert few == many
    assert sum(few.values()) <= 60
    # Nothing is read back and no shape depends on data.
    assert not [name for name in few if any(word in name for word in ("item", "_local_scalar_dense", "nonzero"))]


def test_only_what_the_crop_shows_is_computed() -> None:
    sketch = Sketch.of_size(100, 100).resize((200, 200), Image.Resampling.BILINEAR).crop((20, 50, 30, 70))
    sketch = sketch.resize((40, 80), Image.Resampling.BILINEAR)
    (first_columns, _), (first_rows, _) = sketch.columns.taps(), sketch.rows.taps()
    assert (len(first_columns), len(first_rows)) == (10, 20)
    assert first_columns.starts.min() >= 8
    assert first_columns.end <= 17


def test_faults_are_named() -> None:
    sketch = Sketch.of_size(4, 4)
    with pytest.raises(ValueError, match="resample must be BILINEAR, got"):
        sketch.resize((2, 2), Image.Resampling.BICUBIC)
    with pytest.raises(ValueError, match="method must be FLIP_LEFT_RIGHT, got"):
        sketch.transpose(Image.Transpose.ROTATE_90)
    with pytest.raises(ValueError, match=r"box must lie in the 4x4 image, got \(0, 0, 5, 4\)"):
        sketch.crop((0, 0, 5, 4))
    target = {"labels": torch.zeros(1, dtype=torch.int64), "boxes": torch.zeros(1, 4)}
    target |= {"image_id": torch.tensor([7]), "orig_size": torch.tensor([4, 4])}
    pixels = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="all images must have been normalised"):
        collate_raw([(RawImage(pixels, sketch), target)])
    finished, _ = Normalise()(sketch, {})
    with pytest.raises(ValueError, match="targets must have no masks, image id 7 has"):
        collate_raw([(RawImage(pixels, finished), {**target, "masks": torch.zeros(1, 4, 4)})])
    with pytest.raises(ValueError, match=r"image id 7, target 0: label must be in \[0, 0\)"):
        collate_raw([(RawImage(pixels, finished), target)], num_classes=0)


def test_items_of_a_data_set(write_split: Any, entry: Any) -> None:
    annotations = [entry(1, 1, [3, 3, 20, 20]), entry(2, 2, [3, 3, 20, 20], 7), entry(3, 2, [9, 9, 30, 40])]
    paths = write_split(annotations, sizes=[(40, 30), (50, 60), (33, 33)])
    data = CocoDetection(paths, train_transform((24, 32, 40), 64), seed=5)
    for epoch in range(8):
        data.set_epoch(epoch)
        expected = collate([data[index] for index in range(3)], 2)
        assert_same(collate_raw([data.raw(index) for index in range(3)], 2).finished(), expected)
        assert tuple(data.size_of(index) for index in range(3)) == expected.images.sizes
        data.set_epoch(0)
        assert tuple(data.size_of(index, epoch) for index in range(3)) == expected.images.sizes
    with pytest.raises(ValueError, match=r"the data set must have no masks \(with_masks is True\)"):
        CocoDetection(paths, with_masks=True).raw(0)


def test_batch_is_one_piece_of_memory() -> None:
    batch = both(((40, 30), (20, 25)), TRANSFORMS["train"])[1]
    small = [batch.targets.labels, batch.targets.boxes, batch.targets.offsets, batch.original_sizes]
    assert len({tensor.untyped_storage().data_ptr() for tensor in small}) == 1


def test_a_sketch_draws_what_an_image_draws() -> None:
    image = Image.fromarray(np.zeros((70, 50, 3), np.uint8))
    for seed in range(40):
        for transform in TRANSFORMS.values():
            first, second = seeded(seed), seeded(seed)
            pixels, _ = transform(image, {}, first)
            sketch, _ = transform(Sketch.of_size(50, 70), {}, second)
            assert (sketch.height, sketch.width) == tuple(pixels.shape[1:])
            assert _state(first) == _state(second)


def _state(generator: torch.Generator) -> bytes:
    state: Tensor = generator.get_state()
    return state.numpy().tobytes()
