"""Where images and annotations of a split are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from detr_fast.data.layouts import CocoPaths, find_split, find_splits


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")


@pytest.mark.parametrize(
    ("split", "annotations", "images"),
    [
        ("train", "annotations/instances_train2017.json", "train2017/"),
        ("val", "annotations/instances_val2014.json", "val2014/"),
        ("train2017", "annotations/instances_train2017.json", "train2017/"),
        ("train", "annotations/instances_train2017.json", "images/train2017/"),
        ("test", "annotations/instances_test.json", "test/"),
        ("val", "annotations/val.json", "images/val/"),
        ("train", "train/_annotations.coco.json", "train/"),
        ("val", "valid/_annotations.coco.json", "valid/"),
        ("valid", "annotations/instances_val2017.json", "val2017/"),
    ],
)
def test_layouts(tmp_path: Path, split: str, annotations: str, images: str) -> None:
    make(tmp_path, annotations, images)
    expected = CocoPaths(tmp_path / images, tmp_path / annotations)
    assert find_split(tmp_path, split) == expected
    assert list(find_splits(tmp_path).values()) == [expected]


def test_explicit_paths(tmp_path: Path) -> None:
    make(tmp_path, "labels/a.json", "pictures/")
    expected = CocoPaths(tmp_path / "pictures", tmp_path / "labels/a.json")
    assert find_split(None, "train", images=expected.images, annotations=expected.annotations) == expected
    assert find_split(tmp_path, "train", images="pictures", annotations="labels/a.json") == expected
    with pytest.raises(FileNotFoundError, match=r"annotations='labels/b.json' not found"):
        find_split(tmp_path, "train", images="pictures", annotations="labels/b.json")
    with pytest.raises(FileNotFoundError, match="images must be a folder"):
        find_split(tmp_path, "train", images="labels/a.json", annotations="labels/a.json")


def test_images_alone_may_be_explicit(tmp_path: Path) -> None:
    make(tmp_path, "annotations/instances_train.json", "elsewhere/")
    assert find_split(tmp_path, "train", images="elsewhere").images == tmp_path / "elsewhere"


def test_missing_split_lists_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    make(tmp_path, "annotations/instances_test.json", "test/")
    with pytest.raises(FileNotFoundError) as error:
        find_split(tmp_path, "train")
    tried, there = ("instances_train2017.json", "train/_annotations.coco.json"), ("test/", "instances_test.json")
    for part in tried + there:
        assert part in str(error.value)


def test_missing_image_folder_is_named(tmp_path: Path) -> None:
    make(tmp_path, "annotations/instances_train.json")
    with pytest.raises(FileNotFoundError, match=r"no folder of its images; looked for train/, images/train/"):
        find_split(tmp_path, "train")


def test_root_must_be_a_folder(tmp_path: Path) -> None:
    make(tmp_path, "file.json")
    with pytest.raises(FileNotFoundError, match="must be a folder, not found"):
        find_split(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match="must be a folder, it is a file"):
        find_splits(tmp_path / "file.json")


def test_splits_come_in_order(tmp_path: Path) -> None:
    for split in ("valid", "test", "extra", "train"):
        make(tmp_path, f"{split}/_annotations.coco.json")
    assert list(find_splits(tmp_path)) == ["train", "valid", "test", "extra"]
