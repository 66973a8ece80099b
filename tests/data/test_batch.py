"""Batches, and samplers that lose and repeat nothing over ranks, epochs and resumes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detr_fast.data.batch import EvaluationSampler, TrainingSampler, canvas_of, collate
from detr_fast.data.buckets import alike

ROOT = Path(__file__).parents[2]


def sample(image_id: int, height: int, width: int, labels: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.full((3, height, width), float(image_id)), {
        "labels": torch.tensor(labels, dtype=torch.int64),
        "boxes": torch.full((len(labels), 4), 0.5),
        "image_id": torch.tensor([image_id]),
        "orig_size": torch.tensor([2 * height, 2 * width]),
    }


def test_collate() -> None:
    batch = collate([sample(7, 4, 6, [0, 2]), sample(9, 5, 3, [])], num_classes=3)
    assert batch.images.pixels.shape == (2, 3, 5, 6)
    assert batch.images.sizes == ((4, 6), (5, 3))
    assert batch.targets.offsets.tolist() == [0, 2, 2]
    assert batch.image_ids == (7, 9)
    assert batch.original_sizes.tolist() == [[8, 12], [10, 6]]
    assert batch.original_sizes.dtype == torch.int64
    assert len(batch) == 2
    moved = batch.to("cpu")
    assert torch.equal(moved.images.pixels, batch.images.pixels)
    assert moved.image_ids == batch.image_ids


def test_canvas_is_rounded_up_and_the_rest_is_padding() -> None:
    batch = collate([sample(7, 4, 6, [0]), sample(9, 5, 3, [])], canvas_multiple=4)
    assert batch.images.pixels.shape == (2, 3, 8, 8)
    assert batch.images.sizes == ((4, 6), (5, 3))
    present = (~batch.images.padding).nonzero().tolist()
    assert present == [[0, y, x] for y in range(4) for x in range(6)] + [[1, y, x] for y in range(5) for x in range(3)]
    assert torch.equal(batch.images.pixels[0], torch.where(batch.images.padding[0], 0.0, 7.0).expand(3, -1, -1))
    assert canvas_of([(8, 4)], 4) == (8, 4)


def test_collate_names_the_image_of_a_bad_label() -> None:
    with pytest.raises(ValueError, match=r"image id 9, target 1: label must be in \[0, 3\), got 3"):
        collate([sample(7, 4, 6, [0]), sample(9, 4, 6, [1, 3])], num_classes=3)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_training_sampler_covers_the_data_once(world_size: int, drop_last: bool) -> None:
    length, batch_size = 26, 2
    samplers = [TrainingSampler(length, batch_size, 1, rank, world_size, drop_last) for rank in range(world_size)]
    batches = [list(sampler) for sampler in samplers]
    assert all(len(sampler) == len(part) for sampler, part in zip(samplers, batches, strict=True))
    assert len({len(part) for part in batches}) == 1  # a rank with fewer steps would hang the others
    assert {len(batch) for part in batches for batch in part} == {batch_size}
    drawn = [index for part in batches for batch in part for index in batch]
    step = batch_size * world_size
    if drop_last:
        assert len(drawn) == len(set(drawn)) == length // step * step
    else:
        assert set(drawn) == set(range(length))
        assert len(drawn) == -(-length // step) * step


def test_training_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = TrainingSampler(40, 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(0)
    first = order(0, 0)
    torch.manual_seed(1)
    assert order(0, 0) == first
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_order_of_a_step_does_not_depend_on_how_ranks_share_it() -> None:
    one = list(TrainingSampler(40, 8, 3))
    two = [list(TrainingSampler(40, 4, 3, rank, 2)) for rank in range(2)]
    assert one == [a + b for a, b in zip(*two, strict=True)]


def test_resume_in_the_middle_of_an_epoch() -> None:
    sampler = TrainingSampler(40, 4, 3, 1, 2)
    sampler.set_epoch(6)
    whole = list(sampler)
    state = sampler.state_dict(images=16)
    other = TrainingSampler(40, 4, 3, 1, 2)
    other.load_state_dict(state)
    assert other.start_image == 16
    assert list(other) == whole[2:]
    assert len(other) == 3
    assert other.state_dict(images=16) == state
    other.set_epoch(7)
    assert len(other) == len(list(other)) == 5


@pytest.mark.parametrize(("length", "seed", "name"), [(41, 3, "length"), (40, 4, "seed")])
def test_resume_on_other_data_is_refused(length: int, seed: int, name: str) -> None:
    state = TrainingSampler(40, 4, 3).state_dict(1)
    with pytest.raises(ValueError, match=f"{name} was .* when saved, is .* now"):
        TrainingSampler(length, 4, seed).load_state_dict(state)


def test_training_sampler_arguments() -> None:
    with pytest.raises(ValueError, match="a step takes 4 images on each of 2 processes, the data set has only 7"):
        TrainingSampler(7, 4, 0, 0, 2)
    assert len(TrainingSampler(7, 4, 0, 0, 2, drop_last=False)) == 1
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        TrainingSampler(7, 1, 0, 2, 2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TrainingSampler(7, 0)
    with pytest.raises(ValueError, match="group must be at least 1, got 0"):
        TrainingSampler(7, 1, group=0)
    with pytest.raises(ValueError, match="a step takes 4 images, 2 times, on each of 1 processes, the data set has"):
        TrainingSampler(7, 4, group=2)
    with pytest.raises(ValueError, match="bucket_images must be at least 0, and 0 without shape_of, got 8"):
        TrainingSampler(7, 1, bucket_images=8)
    with pytest.raises(ValueError, match=r"start_image must be in \[0, 7\], got 8"):
        TrainingSampler(7, 1).set_epoch(0, 8)


def shape_of(index: int, epoch: int) -> tuple[int, int]:
    height, width = np.random.default_rng((index, epoch)).integers(1, 60, 2).tolist()
    return height, width


def bucketed(
    length: int, batch_size: int, rank: int = 0, ranks: int = 1, group: int = 1, **more: Any
) -> TrainingSampler:
    options: dict[str, Any] = {"bucket_images": 24, "shape_of": shape_of, "group": group}
    return TrainingSampler(length, batch_size, 3, rank, ranks, **{**options, **more})


def steps(
    batch_size: int, ranks: int, group: int, state: dict[str, Any] | None = None, length: int = 75, **more: Any
) -> list[list[int]]:
    """The images of every step, whoever of the ranks takes them."""
    parts = []
    for rank in range(ranks):
        sampler = bucketed(length, batch_size, rank, ranks, group, **more)
        sampler.set_epoch(2)
        if state is not None:
            sampler.load_state_dict(state)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert len(batches) % group == 0
        assert {len(batch) for batch in batches} <= {batch_size}
        parts.append(batches)
    joined = [[i for part in at_once for i in part] for at_once in zip(*parts, strict=True)]
    return [[i for batch in joined[k : k + group] for i in batch] for k in range(0, len(joined), group)]


SPLITS = ((2, 1, 4), (2, 4, 1), (2, 2, 2), (8, 1, 1), (1, 4, 2))  # batch size, ranks, group: 8 images a step


@pytest.mark.parametrize("bucket_images", [0, 24])
@pytest.mark.parametrize("drop_last", [True, False])
def test_a_step_has_the_same_images_however_it_is_shared(bucket_images: int, drop_last: bool) -> None:
    found = [steps(*split, bucket_images=bucket_images, drop_last=drop_last) for split in SPLITS]
    assert all(order == found[0] for order in found)
    drawn = [index for step in found[0] for index in step]
    if drop_last:
        assert len(drawn) == len(set(drawn)) == 72
    else:
        assert set(drawn) == set(range(75))
        assert len(set(drawn[:75])) == 75
        assert len(drawn) == 80


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("images", [0, 16, 24, 40, 72])
def test_resume_elsewhere_sees_every_remaining_image_once(split: tuple[int, int, int], images: int) -> None:
    before = steps(8, 1, 1)
    sampler = bucketed(75, 8)
    sampler.set_epoch(2)
    state = sampler.state_dict(images)
    for batch_size, ranks, group in (split, (3, 1, 1), (5, 2, 1), (1, 3, 2)):
        step = batch_size * ranks * group
        after = steps(batch_size, ranks, group, state, bucket_images=7)  # of the own settings only the step counts
        assert len(after) == (75 - images) // step
        seen = [index for batch in before[: images // 8] for index in batch]
        rest = [index for batch in after for index in batch]
        assert rest == [index for batch in before for index in batch][images : images + len(rest)] + rest[72 - images :]
        assert len(set(seen + rest)) == len(seen) + len(rest)


def other_shape_of(index: int, epoch: int) -> tuple[int, int]:
    height, width = shape_of(index, epoch + 1000)
    return height, width


@pytest.mark.parametrize("images", [0, 8, 16, 24, 40, 72])
def test_resume_with_images_of_other_sizes_sees_every_remaining_image_once(images: int) -> None:
    """As with other scales: the window that was begun is finished in its own order."""
    before = [index for batch in steps(8, 1, 1) for index in batch][:images]
    sampler = bucketed(75, 8)
    sampler.set_epoch(2)
    state = sampler.state_dict(images)
    json.loads(json.dumps(state))
    for split in ((8, 1, 1), (3, 1, 1), (2, 2, 2)):
        rest = [index for step in steps(*split, state, shape_of=other_shape_of) for index in step]
        assert len(set(before + rest)) == len(before) + len(rest)
        same = [index for step in steps(*split, state) for index in step]
        finished = -images % 24 if images < 72 else len(rest)
        assert rest[:finished] == same[:finished]
        assert images == 72 or rest != same  # the others are sorted by their sizes now
    again = bucketed(75, 8, shape_of=other_shape_of)
    again.load_state_dict(state)
    assert again.state_dict(images) == state
    if images == 8:  # saved once more in the same window
        more = [index for batch in itertools.islice(again, 1) for index in batch]
        third = bucketed(75, 8)
        third.load_state_dict(again.state_dict(16))
        assert len(set(before + more + [index for batch in third for index in batch])) == 72


def test_the_epoch_after_a_resume_has_its_own_order() -> None:
    state = bucketed(75, 8).state_dict(16)
    resumed, fresh = bucketed(75, 3), bucketed(75, 3)
    resumed.load_state_dict(state)
    assert resumed.state_dict(16) == state
    for sampler in (resumed, fresh):
        sampler.set_epoch(1)
    assert list(resumed) == list(fresh)
    assert resumed.state_dict(0) == fresh.state_dict(0) != state


def test_state_of_a_checkpoint_without_buckets() -> None:
    plain = list(TrainingSampler(75, 8, 3))
    resumed = bucketed(75, 4)
    resumed.load_state_dict({"epoch": 0, "images": 16, "seed": 3, "length": 75})
    rest = [index for batch in resumed for index in batch]
    assert rest[:56] == [index for batch in plain[2:] for index in batch]
    assert len(set(rest)) == len(rest) == 56
    state = bucketed(75, 8).state_dict(16)
    with pytest.raises(ValueError, match="the saved order is by shape, but shape_of is None"):
        TrainingSampler(75, 8, 3).load_state_dict(state)


def valid_share(sampler: TrainingSampler) -> float:
    valid, total = 0, 0
    for batch in sampler:
        shapes = [shape_of(index, sampler.epoch) for index in batch]
        height, width = canvas_of(shapes)
        valid, total = valid + sum(h * w for h, w in shapes), total + len(shapes) * height * width
    return valid / total


@pytest.mark.parametrize(("batch_size", "ranks", "group"), [(2, 1, 1), (8, 1, 1), (2, 4, 2)])
def test_buckets_save_padding(batch_size: int, ranks: int, group: int) -> None:
    shares = [
        valid_share(bucketed(2000, batch_size, ranks - 1, ranks, group, bucket_images=images))
        for images in (0, 100, 1000)
    ]
    assert shares == sorted(shares)
    assert 1 - shares[2] < (1 - shares[0]) / 2


def test_buckets_of_an_epoch_depend_on_its_shapes_and_stay_random() -> None:
    orders = []
    for epoch in (0, 0, 1):
        sampler = bucketed(75, 4)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[1] != orders[2]
    areas = [np.mean([np.prod(shape_of(i, 0)) for i in batch]) for batch in bucketed(960, 4, bucket_images=960)]
    assert abs(np.corrcoef(areas, np.arange(len(areas)))[0, 1]) < 4 / np.sqrt(len(areas))  # four standard deviations


def test_order_is_the_same_in_another_process() -> None:
    code = "from tests.data.test_batch import steps; print(steps(8, 1, 1))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == str(steps(8, 1, 1)), found.stderr


@pytest.mark.parametrize(("length", "chunk"), [(1, 1), (8, 8), (48, 16), (60, 3)])
def test_alike_is_a_permutation(length: int, chunk: int) -> None:
    shapes = np.array([shape_of(index, 0) for index in range(length)])
    assert sorted(alike(shapes, chunk).tolist()) == list(range(length))


@pytest.mark.parametrize(("length", "world_size"), [(10, 1), (10, 3), (2, 4), (0, 2)])
def test_evaluation_sampler_gives_every_image_once(length: int, world_size: int) -> None:
    samplers = [EvaluationSampler(length, 2, rank, world_size) for rank in range(world_size)]
    drawn = [index for sampler in samplers for batch in sampler for index in batch]
    assert sorted(drawn) == list(range(length))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]
