"""The data set: targets, categories, faults, and randomness that depends on nothing but seed, epoch and index."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

from detr_fast.data.coco import Categories, CocoDetection, coco_target
from detr_fast.data.faults import DataFault
from detr_fast.data.transforms import train_transform


def test_item(write_split: Any, entry: Any) -> None:
    paths = write_split([entry(1, 1, [10, 6, 20, 12], 7, area=200), entry(2, 1, [0, 0, 4, 3], 3)])
    data = CocoDetection(paths)
    pixels, target = data[0]
    assert pixels.shape == (3, 30, 40)
    assert pixels.dtype == torch.float32
    assert target["labels"].tolist() == [1, 0]
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.5, 0.4, 0.5, 0.4], [0.05, 0.05, 0.1, 0.1]]))
    assert target["area"].tolist() == [200, 12]  # given, and of the box where it is not
    assert target["image_id"].tolist() == [1]
    assert target["orig_size"].tolist() == target["size"].tolist() == [30, 40]
    assert data.path_of(1) == paths.images / "1.png"


def test_image_without_annotations_is_kept(write_split: Any, entry: Any) -> None:
    data = CocoDetection(write_split([entry(1, 2, [1, 1, 9, 9])]), train_transform((32,), 64))
    assert len(data) == 2
    _, target = data[0]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["labels"].dtype == torch.int64


def test_crowds_clamped_and_degenerate_boxes_are_counted(write_split: Any, entry: Any) -> None:
    annotations = [
        entry(1, 1, [1, 1, 10, 10]),
        entry(2, 1, [30, 20, 40, 40]),  # reaches out
        entry(3, 1, [50, 0, 5, 5]),  # outside
        entry(4, 1, [5, 5, -2, 5]),
        entry(5, 1, [5, 5, 0, 5]),
        entry(6, 1, [0, 0, 30, 30], iscrowd=1),
    ]
    data = CocoDetection(write_split(annotations))
    assert (data.crowds, data.clamped) == (1, 1)
    assert [fault.kind for fault in data.faults] == ["box without area"] * 3
    assert "annotation 3: box [50, 0, 5, 5] lies outside the 40x30 image" in data.faults[0].detail
    _, target = data[0]
    assert len(target["boxes"]) == 2
    torch.testing.assert_close(target["boxes"][1], torch.tensor([35 / 40, 25 / 30, 10 / 40, 10 / 30]))
    for part in ("2 images", "2 objects", "1 images without objects", "1 crowds", "box without area (3)"):
        assert part in data.summary()


def test_categories_are_contiguous_in_the_order_of_their_ids() -> None:
    dataset = {"categories": [{"id": 90, "name": "b"}, {"id": 2, "name": "a"}, {"id": 5}]}
    categories = Categories.from_coco(dataset)
    assert categories == Categories((2, 5, 90), ("a", "5", "b"))
    assert categories.num_classes == 3
    assert Categories.from_dict(categories.to_dict()) == categories
    published = Categories.from_coco(dataset, published_ids=True)
    assert published.num_classes == 91
    assert published.ids[90] == 90
    assert published.names[90] == "b"


def test_published_ids_keep_the_category_id_as_label(write_split: Any, entry: Any) -> None:
    data = CocoDetection(write_split([entry(1, 1, [1, 1, 9, 9], 7)]), published_ids=True)
    assert data[0][1]["labels"].tolist() == [7]
    assert data.categories.num_classes == 8


def test_categories_of_a_model_must_fit(write_split: Any) -> None:
    paths = write_split()
    assert CocoDetection(paths, categories=Categories((1, 3, 7), ("x", "cat", "dog"))).categories.num_classes == 3
    with pytest.raises(DataFault, match=r"category 7 'dog' is not a class of the model \(3 cat"):
        CocoDetection(paths, categories=Categories((3,), ("cat",)))
    with pytest.raises(DataFault, match=r"category 7 is 'dog', the model knows it as 'horse'"):
        CocoDetection(paths, categories=Categories((3, 7), ("cat", "horse")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 5}, r"1\.png: annotation 1 has category 5, which is not declared"),
        ({"bbox": [1, 2, 3]}, r"1\.png: annotation 1: bbox must be 4 finite numbers.*got \[1, 2, 3\]"),
        ({"bbox": [1, 2, 3, float("nan")]}, r"1\.png: annotation 1: bbox must be 4 finite numbers"),
        ({"bbox": None}, r"1\.png: annotation 1: bbox must be"),
        ({"image_id": "1"}, "annotation must have an integer 'image_id'"),
    ],
)
def test_unusable_annotations(write_split: Any, entry: Any, change: dict[str, Any], message: str) -> None:
    paths = write_split([{**entry(1, 1, [1, 1, 5, 5]), **change}, entry(2, 1, [2, 2, 6, 6])])
    with pytest.raises(DataFault, match=message):
        CocoDetection(paths)
    data = CocoDetection(paths, on_fault="skip")
    assert len(data.faults) == 1
    assert len(data[0][1]["boxes"]) == 1


def test_damaged_images_raise_with_their_name(write_split: Any) -> None:
    paths = write_split()
    (paths.images / "1.png").unlink()
    Image.new("RGB", (7, 8)).save(paths.images / "2.png")
    data = CocoDetection(paths)
    with pytest.raises(DataFault, match=r"1\.png: file not found"):
        data[0]
    with pytest.raises(DataFault, match=r"2\.png: size in the annotations is 50x60, the file is 7x8"):
        data[1]
    with pytest.raises(DataFault, match=r"1\.png: file not found"):
        list(DataLoader(data, batch_size=None, num_workers=1))


def test_skipped_images_leave_no_trace_in_the_ground_truth(write_split: Any, entry: Any) -> None:
    paths = write_split([entry(i, i, [1, 1, 5, 5]) for i in (1, 2, 3)], sizes=[(20, 20)] * 3)
    (paths.images / "2.png").write_bytes((paths.images / "2.png").read_bytes()[:100])
    data = CocoDetection(paths, on_fault="skip")
    assert data.image_ids == (1, 3)
    assert [int(data[i][1]["image_id"]) for i in range(2)] == [1, 3]
    assert data.coco.getImgIds() == [1, 3]
    assert [a["image_id"] for a in data.coco.loadAnns(data.coco.getAnnIds())] == [1, 3]
    assert [str(fault).split(":")[0] for fault in data.faults] == ["2.png"]


@pytest.mark.parametrize("ids", [(0, 1), (4, 4), (None, 9)])
def test_annotation_ids_that_pycocotools_gets_wrong_are_replaced(write_split: Any, entry: Any, ids: Any) -> None:
    data = CocoDetection(write_split([entry(i, 1, [k, 1, 5, 5]) for k, i in enumerate(ids)]))
    found = data.coco.loadAnns(data.coco.getAnnIds(imgIds=[1]))
    assert [a["id"] for a in found] == [1, 2]
    assert [a["bbox"][0] for a in found] == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "a list 'images'"),
        ('{"images": [], "annotations": []}', "a list 'categories'"),
        ('{"images": [], "annotations": [], "categories": []}', "'categories' is empty"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}, {"id": 1}]}', "category id 1 is declared twice"),
    ],
)
def test_file_that_is_not_an_annotation_file(write_split: Any, content: str, message: str) -> None:
    paths = write_split()
    paths.annotations.write_text(content)
    with pytest.raises(DataFault, match=message) as error:
        CocoDetection(paths)
    assert "instances_train.json" in str(error.value)


def test_duplicate_image_id(write_split: Any) -> None:
    paths = write_split(more_images=[{"id": 2, "file_name": "b.png", "width": 1, "height": 1}])
    with pytest.raises(DataFault, match=r"b\.png: has id 2, as has 2\.png"):
        CocoDetection(paths)
    assert len(CocoDetection(paths, on_fault="skip")) == 2


def test_nothing_is_printed(write_split: Any, capfd: pytest.CaptureFixture[str]) -> None:
    CocoDetection(write_split())
    assert capfd.readouterr().out == ""


def test_masks_of_every_encoding() -> None:
    square = [[2, 1, 6, 1, 6, 4, 2, 4]]
    code = coco_mask.merge(coco_mask.frPyObjects(square, 8, 10))
    text = {"size": [8, 10], "counts": code["counts"].decode()}
    pixels = coco_mask.decode(code)
    runs = {"size": [8, 10], "counts": [2 * 8 + 1, 3, 5, 3, 5, 3, 5, 3, 4 * 8 + 4]}  # column by column
    annotations = [
        {"id": i, "bbox": [2, 1, 4, 3], "area": 12, "category_id": 1, "segmentation": segmentation}
        for i, segmentation in enumerate((square, text, runs, []))
    ]
    masks = coco_target(10, 8, 1, annotations, True)["masks"]
    assert masks.dtype == torch.bool
    assert torch.equal(masks[0], torch.from_numpy(pixels).bool())
    assert masks.sum((1, 2)).tolist() == [12, 12, 12, 0]
    assert torch.equal(masks[1], masks[0])
    assert torch.equal(masks[2], masks[0])


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "annotation 4: segmentation must be polygons or a run-length code, got None"),
        ({"size": [9, 10], "counts": [90]}, r"annotation 4: segmentation must have the image's size \[8, 10\]"),
        ({"size": [8, 10]}, "annotation 4: segmentation cannot be rasterised"),
        ([["a"] * 6], "annotation 4: segmentation cannot be rasterised"),
    ],
)
def test_masks_that_cannot_be_made_are_named(segmentation: Any, message: str) -> None:
    annotation = {"id": 4, "bbox": [2, 1, 4, 3], "category_id": 1, "segmentation": segmentation}
    with pytest.raises(DataFault, match=message):
        coco_target(10, 8, 1, [annotation], True)


def test_keypoints_follow_their_objects_but_do_not_reach_training(write_split: Any, entry: Any) -> None:
    annotations = [entry(i, 1, [i, 0, i - 1, 5], keypoints=[i, 2, 2] * 4) for i in (1, 2, 3)]  # the first has no width
    assert coco_target(40, 30, 1, annotations, False)["keypoints"][:, 0, 0].tolist() == [2, 3]
    assert "keypoints" not in CocoDetection(write_split(annotations))[0][1]


def test_items_depend_on_seed_epoch_and_index_only(write_split: Any, entry: Any) -> None:
    paths = write_split([entry(1, 1, [3, 3, 20, 20]), entry(2, 2, [3, 3, 20, 20])])
    transform = train_transform((24, 32, 40), 64)
    first, second = CocoDetection(paths, transform, seed=5), CocoDetection(paths, transform, seed=5)
    seen = []
    for epoch in range(12):
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        torch.manual_seed(epoch)
        items = [second[1], second[0]][::-1]  # another order must not matter
        for index, item in enumerate(items):
            assert torch.equal(first[index][0], item[0])
            assert torch.equal(first[index][1]["boxes"], item[1]["boxes"])
        seen.append(items[0][0].shape)
    assert len(set(seen)) > 2


def test_items_of_one_epoch_and_runs_of_other_seeds_differ(write_split: Any) -> None:
    paths = write_split(sizes=[(60, 50)] * 12)
    transform = train_transform(range(20, 60), 90)
    shapes = [
        [item[0].shape for item in map(CocoDetection(paths, transform, seed=s).__getitem__, range(12))] for s in (0, 1)
    ]
    assert len(set(shapes[0])) > 4
    assert shapes[0] != shapes[1]


def test_epoch_reaches_workers_that_live_on(write_split: Any) -> None:
    data = CocoDetection(write_split(sizes=[(60, 50)] * 2), train_transform((24, 28, 32, 36, 40), 64))
    loader = DataLoader(data, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in range(4):
        data.set_epoch(epoch)
        for index, (pixels, _) in enumerate(loader):
            assert torch.equal(pixels, data[index][0])


def test_data_set_can_be_pickled(write_split: Any) -> None:
    data = CocoDetection(write_split(), train_transform((24, 32)))
    assert torch.equal(pickle.loads(pickle.dumps(data))[1][0], data[1][0])


def test_on_fault_is_checked(write_split: Any) -> None:
    with pytest.raises(ValueError, match="on_fault must be 'raise' or 'skip', got 'ignore'"):
        CocoDetection(write_split(), on_fault="ignore")  # type: ignore[arg-type]
