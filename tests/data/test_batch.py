"""Batches, and samplers that lose and repeat nothing over ranks, epochs and resumes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detr_fast.data.batch import EvaluationSampler, TrainingSampler, collate


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
    state = sampler.state_dict(batch=2)
    other = TrainingSampler(40, 4, 3, 1, 2)
    other.load_state_dict(state)
    assert list(other) == whole[2:]
    assert len(other) == 3
    assert other.state_dict(batch=2) == state
    other.set_epoch(7)
    assert len(other) == len(list(other)) == 5
    smaller = TrainingSampler(40, 2, 3, 1, 2)  # the same place with half the batch size
    smaller.load_state_dict(state)
    assert (smaller.epoch, smaller.start_batch) == (6, 4)


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
    with pytest.raises(ValueError, match=r"start_batch must be in \[0, 7\], got 8"):
        TrainingSampler(7, 1).set_epoch(0, 8)


@pytest.mark.parametrize(("length", "world_size"), [(10, 1), (10, 3), (2, 4), (0, 2)])
def test_evaluation_sampler_gives_every_image_once(length: int, world_size: int) -> None:
    samplers = [EvaluationSampler(length, 2, rank, world_size) for rank in range(world_size)]
    drawn = [index for sampler in samplers for batch in sampler for index in batch]
    assert sorted(drawn) == list(range(length))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]
