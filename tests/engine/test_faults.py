"""What breaks while a run trains: signals, disks, files and numbers. A run says why, stays whole and goes on."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine.conftest import smallest
from engine.launch import Recorded, train_recorded
from engine.test_train import assert_same_run
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, Dataset

from detr_fast.__main__ import main
from detr_fast.data.batch import Batch
from detr_fast.data.coco import CocoDetection
from detr_fast.engine.checkpoint import load_checkpoint
from detr_fast.engine.config import Config
from detr_fast.engine.errors import CheckpointError
from detr_fast.engine.loaders import loader_options
from detr_fast.engine.run import Run
from detr_fast.engine.train import train

Settings = Callable[..., Config]


@pytest.fixture(scope="module")
def as_two(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """An undisturbed run of two processes: two steps in each of two epochs."""
    return train_recorded(smallest(shapes, tmp_path_factory.mktemp("runs") / "as_two", {}), 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stopped_by_a_signal_to_one_equal_two_undisturbed(
    as_two: Recorded, settings: Settings, number: int
) -> None:
    config = settings("run")
    begun = train_recorded(config, 2, stop_after=1, stop_by=number)
    assert len(begun.steps) == 2  # all learn of it in the step after
    ended = train_recorded(config, 2, resume=begun.folder)
    assert_same_run(as_two.folder, ended.folder)


class Slow(Dataset[int]):
    """Its second item takes for ever."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        time.sleep(3600 * index)
        return index


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_is_ended_by_its_reader_alone_also_when_it_hangs(number: int) -> None:
    batches: Any = iter(DataLoader(Slow(), batch_size=None, **loader_options(1, torch.device("cpu"))))
    (worker,) = batches._workers
    assert next(batches) == 0
    for _ in range(3):
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
        worker.join(0.2)
        assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


# --- disks


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Callable[[str], None]]:
    """A file system in memory; what is given can mount it again with other options."""

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"this machine does not let the test mount a file system: {done.stderr.strip()}")

    folder.mkdir()
    mount(options)
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def train_words(arguments: Sequence[str], folder: Path, *more: str) -> list[str]:
    return ["train", *arguments, f"--train.output={folder}", *more]


def assert_one_line(said: str, *parts: str) -> None:
    assert said.startswith("detr-fast: error: ")
    assert said.count("\n") == 1
    for part in parts:
        assert part in said


@pytest.mark.parametrize(("room", "file"), [(0, "log.jsonl"), (1_000_000, "last.pth")])
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], room: int, file: str
) -> None:
    """Without any room the log is what cannot be written; with some it is the checkpoint."""
    disk = tmp_path / "disk"
    with mounted(disk, "size=64m"):
        folder = disk / "run"
        assert main(train_words(arguments, folder, "--train.epochs=1")) == 0
        (folder / "previous.pth").unlink()  # its room would be free when the next checkpoint is written
        free = shutil.disk_usage(disk).free
        with (disk / "filler").open("wb") as filler:
            filler.write(bytes(free - room))
        capsys.readouterr()
        assert main(train_words(arguments, folder, "--resume")) == 2
        assert_one_line(capsys.readouterr().err, "No space left on device", str(folder / file))
        assert load_checkpoint(folder / "last.pth")["place"]["epoch"] == 1
        assert not list(folder.glob(".*.part"))
        (disk / "filler").unlink()
        assert main(train_words(arguments, folder, "--resume")) == 0
        assert load_checkpoint(folder / "last.pth")["place"]["epoch"] == 2


def test_a_read_only_folder_is_one_line_and_keeps_the_checkpoint(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "size=64m") as remount:
        folder = disk / "run"
        assert main(train_words(arguments, folder, "--train.epochs=1")) == 0
        remount("ro")
        for output, option in ((folder, "--resume"), (disk / "new", "--train.seed=1")):
            capsys.readouterr()
            assert main(train_words(arguments, output, option)) == 2
            assert_one_line(capsys.readouterr().err, "Read-only file system", str(output))
        assert load_checkpoint(folder / "last.pth")["place"]["epoch"] == 1


def test_a_disk_that_is_full_at_the_last_moment_keeps_the_checkpoint(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems find room only when they flush."""
    folder = train(settings("run", {"train.epochs": 1}))
    before = (folder / "last.pth").read_bytes()
    original = os.fsync

    def full(descriptor: int) -> None:
        if ".pth" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"last\.pth cannot be written: No space left on device") as caught:
        train(settings("run"), resume=folder)
    assert "\n" not in str(caught.value)
    assert (folder / "last.pth").read_bytes() == before
    assert not list(folder.glob(".*.part"))


# --- damaged checkpoints


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_taken(
    straight: Path,
    arguments: list[str],
    tmp_path: Path,
    damage: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    train_both = train_words(arguments, folder, "--train.checkpoint_steps=3")
    assert main([*train_both, "--train.epochs=1"]) == 0
    damage(folder / "last.pth")
    capsys.readouterr()
    assert main([*train_both, "--resume"]) == 2
    offered = f"the one before it is whole, at step 3: --resume {folder / 'previous.pth'}"
    assert_one_line(capsys.readouterr().err, f"checkpoint {folder / 'last.pth'} is damaged", offered)
    assert main([*train_both, "--resume", "auto"]) == 0
    assert f"continuing {folder / 'previous.pth'}" in capsys.readouterr().err
    assert_same_run(straight, folder)


def test_nothing_whole_is_not_started_anew(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(train_words(arguments, folder, "--train.epochs=1")) == 0
    for name in ("last.pth", "previous.pth"):
        # They may be one file by two names.
        shutil.copy(folder / name, folder / "copy")
        (folder / "copy").replace(folder / name)
        truncate(folder / name)
    capsys.readouterr()
    assert main(train_words(arguments, folder, "--resume", "auto")) == 2
    assert_one_line(capsys.readouterr().err, "last.pth is damaged")


# --- numbers that are not finite

BAD_STEP = 2


def is_last_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1


def spoil_pixels(run: Run, batches: list[Batch]) -> None:
    if is_last_process() and run.place.step == BAD_STEP:
        batches[0].images.pixels[1, 0, 3, 3] = torch.nan


def spoil_gradient(run: Run, batches: list[Batch]) -> None:
    if is_last_process() and run.place.step == BAD_STEP:
        handle = run.model.query_embed.weight.register_hook(lambda gradient: gradient * torch.nan)  # type: ignore[union-attr]
        run.forgotten = handle  # type: ignore[attr-defined]
    elif hasattr(run, "forgotten"):
        run.forgotten.remove()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("spoil", [spoil_pixels, spoil_gradient])
def test_a_step_that_is_not_finite_on_one_process_is_left_out_on_all(
    settings: Settings, capfd: pytest.CaptureFixture[str], count: int, spoil: Callable[[Run, list[Batch]], None]
) -> None:
    run = train_recorded(settings("run", {"train.ema_decay": 0.9}), count, before_step=spoil)
    for steps, weights in zip(run.ranks, run.weights, strict=True):
        assert [number for number, step in enumerate(steps) if step.was_skipped] == [BAD_STEP]
        assert torch.equal(steps[BAD_STEP].weights, steps[BAD_STEP - 1].weights)
        assert not torch.equal(steps[BAD_STEP + 1].weights, steps[BAD_STEP].weights)
        assert torch.equal(weights, run.weights[0])
        assert weights.isfinite().all()
    bad = run.ranks[-1][BAD_STEP].images
    every = ", ".join(str(image) for steps in run.ranks for image in steps[BAD_STEP].images)
    epoch = 1 + BAD_STEP // (8 // (2 * count))
    reasons = {
        spoil_pixels: f"step {BAD_STEP + 1}: pixels of image id {bad[1]} are not finite",
        spoil_gradient: f"step {BAD_STEP + 1}, image ids {every}: gradient_norm = nan",
    }
    assert f"left out   epoch {epoch}, {reasons[spoil]}" in capfd.readouterr().out.splitlines()
    state = load_checkpoint(run.folder / "last.pth")
    for values in (state["model"], state["average"], *state["optimizer"]["state"].values()):
        assert all(value.isfinite().all() for value in values.values())


@pytest.mark.parametrize("count", [1, 2])
def test_too_many_in_a_row_stop_the_run(settings: Settings, count: int) -> None:
    def spoil(run: Run, batches: list[Batch]) -> None:
        if is_last_process():
            batches[0].images.pixels[:] = torch.nan

    config = settings("run", {"train.most_skipped": 1, "train.epochs": 3})
    with pytest.raises(ProcessRaisedException) as caught:
        train_recorded(config, count, before_step=spoil)
    assert "TrainingError: epoch 1: 2 steps in a row were not finite" in str(caught.value)
    assert not Path(config.train.output, "last.pth").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_a_box_that_is_not_finite_is_named_and_nothing_is_poisoned(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    folder = train_recorded(settings("run", {"train.epochs": 1}), count).folder
    before = (folder / "last.pth").read_bytes()
    original = CocoDetection.__getitem__

    def spoiled(self: CocoDetection, index: int) -> Any:
        pixels, target = original(self, index)
        if int(target["image_id"]) == 3:
            target["boxes"] = torch.full((1, 4), torch.nan)
            target["labels"] = torch.zeros(1, dtype=torch.int64)
        return pixels, target

    monkeypatch.setattr(CocoDetection, "__getitem__", spoiled)
    with pytest.raises(ProcessRaisedException) as caught:
        train_recorded(settings("run"), count, resume=folder)
    if count == 1 or "LostContact" not in str(caught.value):
        assert "id 3" in str(caught.value).strip().splitlines()[-1]
    assert (folder / "last.pth").read_bytes() == before
