"""check-data counts what is there and finds every planted fault, each with its image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr_fast.data.check import check_data


def test_counts(write_split: Any, entry: Any) -> None:
    annotations = [
        entry(1, 1, [0, 0, 10, 10], area=100),
        entry(2, 1, [0, 0, 20, 20], 7, area=32**2),
        entry(3, 1, [0, 0, 20, 20], 7, area=96**2 + 1),
        entry(4, 2, [0, 0, 20, 20], iscrowd=1),
        entry(5, 3, [0, 0, 20, 20], 7, area=96**2),
    ]
    report = check_data(write_split(annotations, sizes=[(40, 30), (50, 60), (20, 20)]).images.parent)
    (split,) = report.splits
    assert (split.images, split.images_without_objects, split.annotations, split.crowds) == (3, 1, 5, 1)
    assert (split.objects, split.most_objects) == (4, 3)
    assert (split.small, split.medium, split.large) == (1, 2, 1)
    assert split.objects_per_class == {"cat": 1, "dog": 3}
    assert (split.smallest_image, split.largest_image) == ((20, 20), (50, 60))
    assert report.faults == ()
    assert "no faults" in str(report)


def plant_faults(write_split: Any, entry: Any) -> Path:
    box = [1, 1, 9, 9]
    annotations = [
        entry(1, 1, box),
        entry(1, 2, box),
        entry(2, 1, box, 99),
        entry(3, 77, box),
        entry(4, 3, [1, 2, 3]),
        entry(5, 3, [1, 2, 3, float("inf")]),
        entry(6, 3, [5, 5, 0, 5]),
        entry(7, 3, [5, 5, -5, 5]),
        entry(8, 3, [90, 5, 5, 5]),
        entry(9, 3, [35, 5, 10, 5]),
    ]
    more = [
        {"id": 1, "file_name": "again.png", "width": 4, "height": 4},
        {"id": 50, "file_name": "gone.png", "width": 4, "height": 4},
        {"id": 51, "file_name": "unsized.png"},
    ]
    paths = write_split(annotations, sizes=[(40, 30)] * 5, more_images=more)
    (paths.images / "4.png").write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(paths.images / "5.png")
    Image.new("RGB", (8, 9)).save(paths.images / "extra.png")
    return paths.images.parent


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": [1]}, "annotation [1]: id must be an integer"),
        ({"iscrowd": "0"}, "annotation 1: iscrowd must be 0 or 1, got '0'"),
        ({"iscrowd": 2}, "annotation 1: iscrowd must be 0 or 1, got 2"),
        ({"iscrowd": [0]}, "annotation 1: iscrowd must be 0 or 1, got [0]"),
    ],
)
def test_fields_of_a_wrong_type_are_faults(write_split: Any, entry: Any, change: dict[str, Any], said: str) -> None:
    report = check_data(write_split([{**entry(1, 1, [1, 1, 9, 9]), **change}]).images.parent)
    assert [(fault.kind, str(fault)) for fault in report.faults] == [("malformed annotation", f"train/1.png: {said}")]


EXPECTED = (
    ("duplicate image id", "train/again.png: has id 1, as has 1.png"),
    ("malformed image entry", "train/instances_train.json: image entry must have"),
    ("unknown category", "train/1.png: annotation 2 has category 99"),
    ("unknown image", "train/instances_train.json: annotation 3 belongs to image id 77"),
    ("malformed annotation", "train/3.png: annotation 4: bbox must be 4 finite numbers"),
    ("malformed annotation", "train/3.png: annotation 5: bbox must be 4 finite numbers"),
    ("box without area", "train/3.png: annotation 6: box [5, 5, 0, 5] has no area in"),
    ("box without area", "train/3.png: annotation 7: box [5, 5, -5, 5] has no area in"),
    ("box without area", "train/3.png: annotation 8: box [90, 5, 5, 5] lies outside"),
    ("duplicate annotation id", "train/2.png: annotation id 1 is used more than once"),
    ("unreadable file", "train/4.png: cannot be read"),
    ("size differs", "train/5.png: size in the annotations is 40x30, the file is 8x8"),
    ("missing file", "train/gone.png: file not found"),
)


def test_every_fault_is_found_with_its_image(write_split: Any, entry: Any) -> None:
    report = check_data(plant_faults(write_split, entry))
    assert len(report.faults) == len(EXPECTED)
    text = str(report)
    for (kind, start), fault in zip(EXPECTED, report.faults, strict=True):
        assert fault.kind == kind
        assert str(fault).startswith(start)
        assert str(fault) in text
    assert report.splits[0].annotations == 10
    notes = "\n".join(report.notes)
    assert "will be clamped: 1, first: 3.png: annotation 9: box [35, 5, 10, 5] reaches 5 px out" in notes
    assert "not in the annotations: 1, first: extra.png" in notes
    assert "classes without objects: 1 of 2: dog" in notes


def test_text_can_be_cut_but_says_so(write_split: Any, entry: Any) -> None:
    text = check_data(plant_faults(write_split, entry)).text(limit=2)
    assert "annotation 8" not in text
    assert "box without area: 3" in text
    assert "and 1 more" in text


def test_json(write_split: Any, entry: Any) -> None:
    content = json.loads(check_data(plant_faults(write_split, entry)).to_json())
    assert content["splits"][0]["images"] == 6
    assert len(content["faults"]) == len(EXPECTED)
    assert content["faults"][-1]["kind"] == "missing file"


def test_unreadable_annotations_of_one_split_do_not_hide_the_others(write_split: Any) -> None:
    root = write_split().images.parent
    write_split(split="val").annotations.write_text("{")
    report = check_data(root)
    assert [split.name for split in report.splits] == ["train"]
    assert [fault.kind for fault in report.faults] == ["unusable annotation file"]
    assert "instances_val.json: not a JSON file" in str(report)


def test_between_splits(write_split: Any) -> None:
    root = write_split().images.parent
    write_split(split="val", categories=[{"id": 3, "name": "bird"}, {"id": 7, "name": "dog"}])
    report = check_data(root)
    (fault,) = report.faults
    assert fault.kind == "categories differ"
    assert fault.detail == "category 3 is 'bird', in train it is 'cat'"
    assert any(note.startswith("same images in train and val: 2") for note in report.notes)
    assert check_data(root, "val").faults == ()


@pytest.mark.parametrize(
    ("scale", "corners", "hint"), [(1 / 40, False, "are they in [0, 1]?"), (1, True, "are they (x1, y1, x2, y2)?")]
)
def test_other_box_formats_are_recognised(write_split: Any, entry: Any, scale: float, corners: bool, hint: str) -> None:
    low, high = np.random.default_rng(0).uniform((4, 4), (36, 26), (2, 20, 2))
    x1, x2 = np.minimum(low, high), np.maximum(low, high)
    boxes = np.concatenate([x1, x2 if corners else x2 - x1], 1) * scale
    report = check_data(write_split([entry(i + 1, 1, box) for i, box in enumerate(boxes.tolist())]).images.parent)
    assert hint in "\n".join(report.notes)


def test_annotations_without_images_are_mentioned(write_split: Any) -> None:
    root = write_split().images.parent
    (root / "annotations" / "instances_val.json").write_text("{}")
    assert check_data(root).notes[-1].endswith("folder of their images: instances_val.json")


def test_explicit_paths(write_split: Any) -> None:
    paths = write_split()
    report = check_data(paths.images, annotations=paths.annotations, images=paths.images)
    assert report.splits[0].images == 2
    with pytest.raises(FileNotFoundError):
        check_data(paths.images)
