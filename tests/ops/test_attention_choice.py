"""Which tiles the attention kernels take: timed once for each class of shapes and kept. No kernel runs here."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from detr_fast.ops.triton import choice
from detr_fast.ops.triton.choice import ShapeClass, Tiles, candidates

SHAPE = ShapeClass("forward", "bfloat16", 32, 32, 8, "none", False, "half", 8, 2048, 2048)
OPTIONS = candidates("forward", "half", 32)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Tiles]:
    """Tiles that were timed; the second is the fastest. Looks like a CUDA device whose cache is empty."""
    found: list[Tiles] = []

    def do_bench(run, **_: object) -> float:
        run()
        return float(found[-1] != OPTIONS[1])

    monkeypatch.setattr(choice.triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Test")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(choice, "_file", lambda _: tmp_path / "kept" / "attention.json")
    torch.use_deterministic_algorithms(False)  # conftest.py switches it on, and off again
    return found


def chosen(timed: list[Tiles]) -> Tiles:
    return choice.choose(SHAPE, OPTIONS, timed.append, torch.device("cuda", 0))


def test_the_fastest_is_chosen_once_and_kept_for_other_processes(timed: list[Tiles], tmp_path: Path) -> None:
    assert chosen(timed) == OPTIONS[1]
    assert timed == list(OPTIONS)
    assert chosen(timed) == OPTIONS[1]
    choice._chosen.clear()  # as in another process
    assert chosen(timed) == OPTIONS[1]
    assert len(timed) == len(OPTIONS)
    assert list(json.loads((tmp_path / "kept" / "attention.json").read_text())) == [str(SHAPE)]


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}'], ids=["cut off", "no table", "another class"])
def test_a_file_without_an_answer_is_written_anew(timed: list[Tiles], tmp_path: Path, content: str) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "attention.json").write_text(content)
    assert chosen(timed) == OPTIONS[1]
    assert str(SHAPE) in json.loads((tmp_path / "kept" / "attention.json").read_text())


def test_with_deterministic_algorithms_the_first_is_taken(timed: list[Tiles]) -> None:
    """Whatever was timed before, so that other processes get the same bits."""
    assert chosen(timed) == OPTIONS[1]
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert chosen(timed) == OPTIONS[0]
    assert len(timed) == len(OPTIONS)


def test_while_a_graph_is_captured_nothing_is_timed(timed: list[Tiles], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen(timed) == OPTIONS[0]
    assert (timed, choice._chosen) == ([], {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    chosen(timed)
    choice._chosen.clear()  # as in another process
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen(timed) == OPTIONS[1]  # what the file knows is used


def test_every_class_of_shapes_has_a_name_of_its_own() -> None:
    changes = {"kernel": "x", "type": "x", "key_width": 1, "value_width": 1, "heads": 1, "mask": "x", "dropout": True}
    changes |= {"products": "x", "images": 1, "longest_query": 1, "longest_key": 1}
    assert set(changes) == {field.name for field in fields(ShapeClass)}
    names = {str(replace(SHAPE, **{name: value})) for name, value in changes.items()}
    assert len(names | {str(SHAPE)}) == len(changes) + 1


def test_a_folder_that_cannot_be_written_is_a_warning(timed: list[Tiles], tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")  # a file in the way
    with pytest.warns(UserWarning, match="the chosen tiles are not kept"):
        assert chosen(timed) == OPTIONS[1]
