"""The report is one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from detr_fast.engine.config import Config
from detr_fast.engine.errors import EngineError
from detr_fast.engine.loaders import evaluation_dataset
from detr_fast.engine.report import _choose, overlay, write_report
from detr_fast.engine.train import train


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]


def test_a_report_holds_everything(straight: Path, tmp_path: Path) -> None:
    reader = Reader()
    text = write_report(straight, tmp_path / "report.html", pictures=2, looks=1).read_text(encoding="utf-8")
    reader.feed(text)
    assert reader.tags.count("svg") == 2
    assert reader.tags.count("img") == 2 * 2 + 4  # truth and prediction, and the attention of four queries
    assert all(source.startswith("data:image/jpeg;base64,") for source in reader.sources)
    assert not {"script", "link", "iframe"} & set(reader.tags)
    assert "average precision at IoU 0.50" in text
    assert "rectangle" in text


def test_a_run_that_never_evaluates_is_told_to(settings: Callable[..., Config], tmp_path: Path) -> None:
    folder = train(settings("run", {"train.epochs": 1, "evaluate.every": 0}))
    with pytest.raises(
        EngineError, match=r"run has no evaluation yet: .* --resume .*run --evaluate\.every=1` to the end"
    ):
        write_report(folder, tmp_path / "report.html")


def test_pictures_are_spread_over_a_small_split(shapes: Path) -> None:
    dataset = evaluation_dataset(Config().with_overrides({"data.path": str(shapes)}).data)
    full = [image_id for image_id in dataset.image_ids if dataset.coco.getAnnIds(imgIds=[image_id])]
    assert _choose(dataset, 100) == full
    assert len(set(_choose(dataset, 2))) == 2


def test_attention_is_bright_where_the_weights_are() -> None:
    weights = torch.zeros(4, 4)
    weights[0, 3] = 1
    drawn = overlay(Image.new("RGB", (40, 40), "gray"), weights)
    assert drawn.getpixel((36, 3))[0] > 1.5 * drawn.getpixel((5, 35))[0]
