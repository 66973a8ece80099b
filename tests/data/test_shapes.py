"""The generated data set: exact, the same for the same seed, complete or not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_fast.data.check import check_data
from detr_fast.data.coco import CocoDetection
from detr_fast.data.layouts import find_split
from detr_fast.data.shapes import MIN_VISIBLE, NAMES, draw, write_shapes


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.*"))}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    first = contents(write_shapes(tmp_path / "a", {"train": 4, "val": 2}, 64, seed=3))
    assert contents(write_shapes(tmp_path / "b", {"train": 4, "val": 2}, 64, seed=3)) == first
    other = contents(write_shapes(tmp_path / "c", {"train": 4, "val": 2}, 64, seed=4))
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first)
    assert first["train/000000.jpg"] != first["val/000000.jpg"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_boxes_and_areas_are_those_of_the_masks(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "shapes", {"train": 30}, seed=1)
    data = CocoDetection(find_split(folder, "train"), with_masks=True)
    assert data.categories.names == NAMES
    seen = 0
    for index in range(len(data)):
        _, target = data[index]
        centres, sizes = (target["boxes"] * 128).split(2, 1)
        for mask, low, high, area in zip(
            target["masks"], centres - sizes / 2, centres + sizes / 2, target["area"], strict=True
        ):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert low.round().tolist() == [columns.min(), rows.min()]
            assert high.round().tolist() == [columns.max() + 1, rows.max() + 1]
            assert float(area) == mask.sum()
            seen += 1
        assert int(target["masks"].sum(0).max() if len(target["masks"]) else 0) <= 1  # visible parts do not overlap
    assert seen > 30


def test_data_set_is_varied_and_without_faults(tmp_path: Path) -> None:
    report = check_data(write_shapes(tmp_path / "shapes", {"train": 80, "val": 20}))
    assert report.faults == ()
    assert report.notes == ()
    train = report.splits[0]
    assert train.images_without_objects > 0
    assert train.most_objects == 6
    assert min(train.objects_per_class.values()) > train.objects / 5


def test_masks_lie_where_the_colour_is() -> None:
    """Objects are drawn in stronger colours than the ground."""
    for seed in range(10):
        picture = draw(np.random.default_rng(seed), 128, 4)
        assert len(picture.labels) == len(picture.masks)
        for mask in picture.masks:
            inside = picture.pixels[mask].astype(float)
            around = ~np.any(picture.masks, axis=0)
            outside = picture.pixels[around].astype(float)
            saturation = [(values.max(1) - values.min(1)).mean() for values in (inside, outside)]
            assert saturation[0] > saturation[1]


def test_objects_stay_visible() -> None:
    """A circle's visible area is at least its promised share of the disc its box spans."""
    for seed in range(40):
        picture = draw(np.random.default_rng(seed))
        for label, mask in zip(picture.labels, picture.masks, strict=True):
            if label == 1:
                side = max(mask.any(0).sum(), mask.any(1).sum())
                # The box may have shrunk with the disc; a rim of half a pixel is rounding.
                assert mask.sum() >= MIN_VISIBLE * np.pi / 4 * (side - 1) ** 2


def test_written_once(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "shapes", {"train": 2}, 64)
    marker = folder / "train" / "000000.jpg"
    before = marker.stat().st_mtime_ns
    assert write_shapes(folder, {"train": 2}, 64) == folder
    assert marker.stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="exists and holds something else"):
        write_shapes(folder, {"train": 3}, 64)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("important")
    with pytest.raises(FileExistsError):
        write_shapes(tmp_path / "mine", {"train": 2}, 64)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_shapes(tmp_path / "shapes", {"train": 2}, 64)
    assert list(tmp_path.iterdir()) == []


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size must be at least 32"):
        write_shapes(tmp_path / "a", {"train": 1}, 16)
    with pytest.raises(ValueError, match="every count at least 1"):
        write_shapes(tmp_path / "a", {"train": 0})


def test_is_valid_json_in_the_format_of_coco(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "shapes", {"train": 3}, 64)
    content = json.loads((folder / "annotations" / "instances_train.json").read_text())
    assert [entry["name"] for entry in content["categories"]] == ["circle", "rectangle", "triangle"]
    keys = {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"}
    assert all(set(entry) == keys for entry in content["annotations"])


def test_extent_bounds_the_size_of_objects(tmp_path: Path) -> None:
    write_shapes(tmp_path / "large", {"train": 20}, 64, max_objects=1, extent=(0.5, 0.6))
    content = json.loads((tmp_path / "large" / "annotations" / "instances_train.json").read_text())
    sides = [max(entry["bbox"][2:]) for entry in content["annotations"]]
    assert sides
    # A square has a side of 0.7 times its diameter, a triangle about as much; nothing hides the only object.
    assert all(0.65 * 0.5 * 64 - 1 <= side <= 0.6 * 64 + 1 for side in sides)
