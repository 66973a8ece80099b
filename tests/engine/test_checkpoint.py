"""Checkpoints: atomic, loadable without pickle, refused with a reason."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from detr_fast.engine import checkpoint
from detr_fast.engine.checkpoint import (
    keep_previous,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from detr_fast.engine.config import Config
from detr_fast.engine.errors import CheckpointError, ConfigError, ForeignCheckpointError
from detr_fast.engine.resume import choose_folder, find_checkpoint
from detr_fast.files import remove_parts, replace_file


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path / "a.pth", {"model": {"w": torch.arange(3)}, "place": {"step": 4, "ap": 0.5}, "names": ["x"]}
    )
    state = load_checkpoint(tmp_path / "a.pth")
    assert state["model"]["w"].tolist() == [0, 1, 2]
    assert state["place"] == {"step": 4, "ap": 0.5}
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_a_failure_while_writing_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"number": 1})

    def fill_the_disk(state: object, file: object) -> None:
        file.write(b"half of it")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", fill_the_disk)
    with pytest.raises(
        CheckpointError, match=r"a\.pth cannot be written: No space left on device; the one before it is"
    ):
        save_checkpoint(path, {"number": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)["number"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def no_links(self: Path, target: Path) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_without_links_the_previous_checkpoint_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "hardlink_to", no_links)
    save_checkpoint(tmp_path / "last.pth", {"number": 1})
    keep_previous(tmp_path)
    assert [load_checkpoint(tmp_path / name)["number"] for name in ("last.pth", "previous.pth")] == [1, 1]
    save_checkpoint(tmp_path / "last.pth", {"number": 2})
    keep_previous(tmp_path)
    assert [load_checkpoint(tmp_path / name)["number"] for name in ("last.pth", "previous.pth")] == [2, 2]
    assert {file.name for file in tmp_path.iterdir()} == {"last.pth", "previous.pth"}


def test_without_links_and_room_both_checkpoints_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "last.pth", {"number": 1})
    keep_previous(tmp_path)
    save_checkpoint(tmp_path / "last.pth", {"number": 2})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"previous\.pth cannot be written: No space left on device; .* is whole"):
        keep_previous(tmp_path)
    assert [load_checkpoint(tmp_path / name)["number"] for name in ("last.pth", "previous.pth")] == [2, 1]


def test_a_run_with_the_previous_checkpoint_only_is_found_and_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    save_checkpoint(folder / "previous.pth", {"number": 1})
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint(folder) == folder / "previous.pth"
    assert find_checkpoint("latest") == Path("runs/first/previous.pth")
    with pytest.raises(ConfigError, match="holds a run already"):
        choose_folder(Config().with_overrides({"train.output": str(folder)}), None)
    save_checkpoint(folder / "last.pth", {"number": 2})
    assert find_checkpoint(folder) == folder / "last.pth"
    assert find_checkpoint("latest") == Path("runs/first/last.pth")


def test_files_that_a_killed_save_has_left_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".other.part").write_bytes(b"not ours")
    (tmp_path / "last.pth").write_bytes(b"whole")

    names = []
    replace_file(tmp_path / "last.pth", lambda file: names.extend(tmp_path.glob(".last.pth.*")))
    (left,) = names
    left.write_bytes(b"half of it")
    remove_parts(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {".other.part", "last.pth"}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.pth does not exist"):
        load_checkpoint(tmp_path / "nothing.pth")


@pytest.mark.parametrize("size", [0, 100, 0.5])
def test_a_truncated_file_is_refused(tmp_path: Path, size: float) -> None:
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"model": {"w": torch.zeros(1000)}})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * size) if size < 1 else int(size)])
    with pytest.raises(CheckpointError, match=r"a\.pth is damaged or not a checkpoint"):
        load_checkpoint(path)


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"model": {"w": torch.zeros(1000)}})
    content = bytearray(path.read_bytes())
    content[content.index(bytes(400)) + 200] = 1  # in the middle of the tensor
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pth is damaged .*: .*data/0 has another check sum than when it was"):
        load_checkpoint(path)


def test_code_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"format": 1, "model": Path("x")}, path)
    with pytest.raises(CheckpointError, match=r"a\.pth is damaged or not a checkpoint: it holds Python objects"):
        load_checkpoint(path)


def archive_of_notes() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "some notes")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"PK\3\4 half of an archive", "it is cut off"),
        (archive_of_notes(), "it is not a file that torch.save has written"),
        (b"some notes", "it is not a file that torch.save has written"),
        (b"\xff\xd8\xff\xe0 a photo", "it is not a file that torch.save has written"),
        (pickle.dumps({"model": 1}), "it is not a file that torch.save has written"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_file_that_is_none_is_told_without_advice_to_run_it(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(caught.value) == f"checkpoint {path} is damaged or not a checkpoint: {reason}"


def test_no_first_byte_is_more_than_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    for byte in range(256):
        path.write_bytes(bytes([byte]) + b"0 and more that is no checkpoint\n.")
        with pytest.raises(CheckpointError, match="not a checkpoint: it is"):
            load_checkpoint(path)


def test_the_file_of_another_program_is_told_apart(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1)}}, tmp_path / "a.pth")
    with pytest.raises(ForeignCheckpointError, match=r"was not written by detr_fast"):
        load_checkpoint(tmp_path / "a.pth")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT + 1}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="update detr_fast"):
        load_checkpoint(tmp_path / "a.pth")


def test_random_states_survive_a_checkpoint(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves half a pair in the state
    np.random.normal()  # noqa: NPY002 (the global state is what is tested)
    save_checkpoint(tmp_path / "a.pth", {"random": random_state()})

    def draw() -> tuple[float, float, float]:
        return random.gauss(0, 1), np.random.normal(), float(torch.rand(()))  # noqa: NPY002

    first = draw()
    set_random_state(load_checkpoint(tmp_path / "a.pth")["random"])
    assert draw() == first
