"""Shards of an optimizer's moments on a disk: damage and a full disk are one error, with its reason."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engine.steps import CLASSES, batch_of, model_of
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from detr_fast.engine.build import build_criterion
from detr_fast.engine.config import Config, OptimizerConfig
from detr_fast.engine.distributed import Processes
from detr_fast.engine.errors import CheckpointError
from detr_fast.engine.optimizer import build_optimizer
from detr_fast.engine.sharded import check_shards, load_shards, save_shards
from detr_fast.engine.step import TrainingStep


@pytest.fixture(scope="module")
def trained() -> Iterator[tuple[ZeroRedundancyOptimizer, nn.Module]]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = model_of()
    optimizer = build_optimizer(model, OptimizerConfig(), sharded=True)
    assert isinstance(optimizer, ZeroRedundancyOptimizer)
    TrainingStep(model, build_criterion(Config(), CLASSES), optimizer)([batch_of(2, 1)])
    yield optimizer, model
    dist.destroy_process_group()


def flip_bits(content: bytearray) -> bytes:
    for place in range(len(content) // 4, len(content) * 3 // 4, len(content) // 60):
        content[place] ^= 0x40
    return bytes(content)


DAMAGES: dict[str, Callable[[bytearray], bytes]] = {
    "flipped": flip_bits,
    "zeroed": lambda content: bytes(len(content)),
    "cut off": lambda content: bytes(content[:-1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", ["*.distcp", ".metadata"])
def test_damage_is_found_and_named(
    trained: tuple[ZeroRedundancyOptimizer, nn.Module], tmp_path: Path, damage: str, pattern: str
) -> None:
    folder = tmp_path / "optimizer"
    sums = save_shards(*trained, folder, Processes())
    check_shards(folder, sums, Processes())
    file = max(folder.glob(pattern), key=lambda file: file.stat().st_size)
    file.write_bytes(DAMAGES[damage](bytearray(file.read_bytes())))
    with pytest.raises(CheckpointError, match=rf"optimizer state {folder} cannot be read: ") as caught:
        check_shards(folder, sums, Processes())
    assert "\n" not in str(caught.value)


def test_shards_without_sums_are_looked_at_for_their_lengths(
    trained: tuple[ZeroRedundancyOptimizer, nn.Module], tmp_path: Path
) -> None:
    save_shards(*trained, tmp_path, Processes())
    check_shards(tmp_path, {}, Processes())
    file = max(tmp_path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is cut off"):
        check_shards(tmp_path, {}, Processes())


def test_what_cannot_be_read_is_one_line(trained: tuple[ZeroRedundancyOptimizer, nn.Module], tmp_path: Path) -> None:
    save_shards(*trained, tmp_path, Processes())
    file = max(tmp_path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match=rf"optimizer state {tmp_path} cannot be read: \w") as caught:
        load_shards(*trained, tmp_path)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    trained: tuple[ZeroRedundancyOptimizer, nn.Module], tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written: File too large") as caught:
            save_shards(*trained, tmp_path / "optimizer", Processes())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "optimizer").exists()


def test_moments_are_those_that_were_saved(trained: tuple[ZeroRedundancyOptimizer, nn.Module], tmp_path: Path) -> None:
    optimizer, model = trained
    before = [value.clone() for state in optimizer.optim.state.values() for value in state.values()]
    check_shards(tmp_path, save_shards(optimizer, model, tmp_path, Processes()), Processes())
    for state in optimizer.optim.state.values():
        for value in state.values():
            value.fill_(7)
    load_shards(optimizer, model, tmp_path)
    after = [value for state in optimizer.optim.state.values() for value in state.values()]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
