"""The demonstration from end to end, too short to learn anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detr_fast.data.shapes import DESCRIPTION
from detr_fast.engine import demo as module
from detr_fast.engine.config import Config
from detr_fast.engine.demo import SETTINGS, demo
from detr_fast.engine.errors import ConfigError


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COUNTS", {"train": 16, "val": 4})


def test_a_model_that_has_not_learned_fails_and_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"train.epochs": 1, "data.workers": 0}
    assert demo(tmp_path / "demo", short.items()) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "AP50 0." in last
    assert last.endswith(f"report: {tmp_path / 'demo' / 'report.html'}")
    assert "DETR learns shapes" in (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    monkeypatch.setattr(module, "ENOUGH", 0.0)
    monkeypatch.setattr(module, "COUNTS", {"train": 17, "val": 4})  # an earlier demonstration is replaced
    assert demo(tmp_path / "demo", short.items()) == 0


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="holds something else"):
        demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["shapes", "run"])
def test_a_folder_of_the_user_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / "shapes" / "annotations").mkdir(parents=True)
    info = {"description": "mine" if name == "shapes" else DESCRIPTION}
    (tmp_path / "shapes" / "annotations" / "instances_train.json").write_text(json.dumps({"info": info}))
    (tmp_path / name / "mine.txt").parent.mkdir(exist_ok=True)
    (tmp_path / name / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match=f"{name} is not of an earlier demonstration"):
        demo(tmp_path)
    assert (tmp_path / name / "mine.txt").read_text() == "precious"


def test_the_settings_are_valid() -> None:
    assert Config().with_overrides(SETTINGS).model.name == "detr_tiny"
