"""Which files a command line means, and boxes drawn on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_fast.engine.draw import colour_of_class, draw_boxes
from detr_fast.engine.pictures import distinct_names, find_pictures


def test_files_folders_and_patterns_each_once(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.PNG", "notes.txt", "sub/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_pictures([str(tmp_path), str(tmp_path / "*.jpg"), str(tmp_path / "sub" / "b.jpg")])
    assert [str(file.relative_to(tmp_path)) for file in found] == ["a.PNG", "b.jpg", "sub/b.jpg"]
    assert list(distinct_names(found).values()) == ["a.png", "b.png", "b-2.png"]


def test_what_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\*\.jpg"):
        find_pictures([str(tmp_path / "nothing*.jpg")])


def test_a_box_is_drawn_where_it_is_and_the_image_is_left_alone() -> None:
    image = Image.new("RGB", (64, 48))
    drawn = np.asarray(draw_boxes(image, [(10, 20, 30, 40)], [1], [""]))
    colour = np.array(colour_of_class(1))
    rows, columns = np.nonzero((drawn == colour).all(-1))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (10, 20, 30, 40)
    assert not np.asarray(image).any()


def test_boxes_outside_of_the_picture_and_turned_boxes_are_no_fault() -> None:
    draw_boxes(Image.new("RGB", (20, 20)), [(-5, -5, 50, 50), (15, 15, 3, 3)], [0, 1], ["a long caption", "b"])
