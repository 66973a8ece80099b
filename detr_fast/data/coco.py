"""Object detection data in COCO's format: a torch Dataset of normalised images and their targets.

Source: Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, https://cocodataset.org/#format-data
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from detr_fast.data.annotations import is_object, read_annotations
from detr_fast.data.faults import DataFault, Fault, count_by_kind
from detr_fast.data.images import ImageFile, check_image, read_image
from detr_fast.data.layouts import CocoPaths
from detr_fast.data.shards import Shards
from detr_fast.data.sketch import RawImage, Sketch
from detr_fast.data.transforms import Normalise, Sample, Target, Transform, seeded


@dataclass(frozen=True)
class Categories:
    """The classes of a model in the order of its logits, and the data set's id of each."""

    ids: tuple[int, ...]  # category id of each class
    names: tuple[str, ...]

    @classmethod
    def from_coco(cls, dataset: Mapping[str, Any], published_ids: bool = False) -> Categories:
        """Classes of a COCO dictionary, in the order of their ids.

        ``published_ids``: class c is category id c, as in the published checkpoints (91 classes for COCO's ids up to
        90); ids that are not declared become classes without a name.
        """
        names = {entry["id"]: str(entry.get("name", entry["id"])) for entry in dataset["categories"]}
        if not published_ids:
            ids = tuple(sorted(names))
            return cls(ids, tuple(names[i] for i in ids))
        if min(names) < 0:
            raise DataFault(f"published_ids: category ids must be at least 0, got {min(names)}")
        ids = tuple(range(max(names) + 1))
        return cls(ids, tuple(names.get(i, "") for i in ids))

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Categories:
        return cls(tuple(state["ids"]), tuple(state["names"]))

    def to_dict(self) -> dict[str, Any]:
        return {"ids": list(self.ids), "names": list(self.names)}

    @property
    def num_classes(self) -> int:
        return len(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def check_match(self, dataset: Mapping[str, Any], name: object) -> None:
        """Raises a DataFault unless every category of a COCO dictionary is one of these, under the same name."""
        known = dict(zip(self.ids, self.names, strict=True))
        others = Categories.from_coco(dataset)
        for category, other in zip(others.ids, others.names, strict=True):
            if category not in known:
                classes = ", ".join(f"{i} {n}" for i, n in list(known.items())[:10])
                raise DataFault(f"{name}: category {category} '{other}' is not a class of the model ({classes} ...)")
            if known[category] not in ("", other):
                raise DataFault(f"{name}: category {category} is '{other}', the model knows it as '{known[category]}'")


def coco_target(
    width: int,
    height: int,
    image_id: int,
    annotations: Sequence[Mapping[str, Any]],
    return_masks: bool,
) -> Target:
    """Targets of one image before any transform.

    Crowds are dropped, boxes clamped to the image, and objects dropped whose box then has no area.

    Returns:
        ``boxes [n, 4]`` float32 xyxy in pixels; ``labels [n]`` int64, the category ids as they are; ``area [n]``
        float32; ``iscrowd [n]`` int64; ``image_id [1]``; ``orig_size [2]`` and ``size [2]``, both (height, width);
        ``masks [n, height, width]`` bool on request; ``keypoints [n, K, 3]`` if every object has them.
    """
    objects = [annotation for annotation in annotations if not annotation.get("iscrowd", 0)]
    boxes = torch.tensor([entry["bbox"] for entry in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2].clamp_(min=0, max=width)
    boxes[:, 1::2].clamp_(min=0, max=height)
    area = [entry["area"] if "area" in entry else entry["bbox"][2] * entry["bbox"][3] for entry in objects]
    target = {
        "boxes": boxes,
        "labels": torch.tensor([entry["category_id"] for entry in objects], dtype=torch.int64),
        "area": torch.tensor(area, dtype=torch.float32),
        "iscrowd": torch.zeros(len(objects), dtype=torch.int64),
    }
    if return_masks:
        target["masks"] = torch.stack(
            [_mask(entry, width, height) for entry in objects] or [torch.empty(0, height, width, dtype=torch.bool)]
        ).reshape(-1, height, width)
    if objects and all("keypoints" in entry for entry in objects):
        keypoints = torch.tensor([entry["keypoints"] for entry in objects], dtype=torch.float32)
        target["keypoints"] = keypoints.reshape(len(objects), -1, 3)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    target = {name: value[keep] for name, value in target.items()}
    size = torch.tensor([height, width])
    return {**target, "image_id": torch.tensor([image_id]), "orig_size": size, "size": size.clone()}


def _mask(annotation: Mapping[str, Any], width: int, height: int) -> Tensor:  # [height, width] bool
    """Rasterises polygons or a run-length code; several polygons are parts of one object."""
    where = f"image id {annotation.get('image_id')}: annotation {annotation.get('id')}"
    segmentation = annotation.get("segmentation")
    try:
        if isinstance(segmentation, list):  # a polygon of fewer than three points has no inside
            polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
            codes = coco_mask.frPyObjects(polygons, height, width) if polygons else []
        elif isinstance(segmentation, dict):
            packed = not isinstance(segmentation["counts"], list)
            codes = [segmentation if packed else coco_mask.frPyObjects(segmentation, height, width)]
        else:
            raise DataFault(f"{where}: segmentation must be polygons or a run-length code, got {segmentation!r}")
        if any(list(code["size"]) != [height, width] for code in codes):
            raise DataFault(f"{where}: segmentation must have the image's size [{height}, {width}]")
        pixels = coco_mask.decode(codes) if codes else np.zeros((height, width, 1), np.uint8)
    except DataFault:
        raise
    except Exception as error:  # pycocotools raises bare exceptions
        raise DataFault(f"{where}: segmentation cannot be rasterised ({error})") from error
    return torch.from_numpy(pixels.any(-1))


class CocoDetection(Dataset[Sample]):
    """Images and targets of one split.

    An item is ``(pixels [3, h, w] float32, target)``; the target holds ``labels [n]`` (classes, not category ids),
    ``boxes [n, 4]`` cxcywh in [0, 1], ``area``, ``iscrowd``, ``image_id [1]``, ``orig_size [2]``, ``size [2]`` and, on
    request, ``masks [n, h, w]``. Images without objects are kept. Which crop or size an item gets depends on nothing
    but ``(seed, epoch, index)``, so that a run resumes with the same pixels whatever the number of workers.

    ``on_fault="raise"``: annotations that cannot be used (see ``annotations.FATAL``) raise here, damaged image files
    when they are read. ``on_fault="skip"``: both are left out and counted in ``faults``; for that every file is decoded
    once here (about 1 ms a photograph and core), so that training and evaluation see the same, complete list of images
    and ``coco`` holds no annotation of an image that is not evaluated.
    """

    def __init__(
        self,
        paths: CocoPaths,
        transform: Transform | None = None,
        categories: Categories | None = None,
        on_fault: Literal["raise", "skip"] = "raise",
        with_masks: bool = False,
        *,
        published_ids: bool = False,
        seed: int = 0,
    ) -> None:
        if on_fault not in ("raise", "skip"):
            raise ValueError(f"CocoDetection: on_fault must be 'raise' or 'skip', got {on_fault!r}")
        found = read_annotations(paths.annotations)
        if (fatal := found.fatal()) and on_fault == "raise":
            raise DataFault(_fatal_message(paths.annotations, fatal))
        dataset, self.faults = found.dataset, list(found.faults)
        self.crowds, self.clamped = found.crowds, len(found.clamped)
        self.paths, self.with_masks, self.seed = paths, with_masks, seed
        self.transform: Transform = Normalise() if transform is None else transform
        if on_fault == "raise" and isinstance(paths.images, Shards):
            paths.images.check([entry["file_name"] for entry in dataset["images"]], paths.annotations)
        if on_fault == "skip":
            dataset = self._without_damaged_images(dataset)
        if categories is None:
            categories = Categories.from_coco(dataset, published_ids)
        else:
            categories.check_match(dataset, paths.annotations)
        self.categories = categories
        self._class_of = {category: index for index, category in enumerate(categories.ids)}
        self.coco = _index(dataset, keep_segmentation=with_masks)
        self.image_ids: tuple[int, ...] = tuple(sorted(self.coco.imgs))
        # In shared memory, because workers that live longer than an epoch hold copies of this object.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the random transforms of the items; reaches running workers too."""
        self._epoch.fill_(epoch)

    def path_of(self, image_id: int) -> ImageFile:
        return self.paths.images / self.coco.imgs[image_id]["file_name"]

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def most_objects(self) -> int:
        """Of one image, crowds included."""
        return max((len(annotations) for annotations in self.coco.imgToAnns.values()), default=0)

    def __getitem__(self, index: int) -> Sample:
        entry = self._entry(index)
        image = read_image(self.paths.images / entry["file_name"], (entry["width"], entry["height"]))
        return self.transform(image, self._target(entry), self._generator(index, int(self._epoch)))

    def raw(self, index: int) -> tuple[RawImage, Target]:
        """The item with its pixels as they are in the file; ``raw_batch.collate_raw`` batches such items.

        Raises:
            ValueError: the data set has masks, which are only transformed with their image.
        """
        if self.with_masks:
            raise ValueError("CocoDetection.raw: the data set must have no masks (with_masks is True)")
        entry = self._entry(index)
        size = entry["width"], entry["height"]
        pixels = np.asarray(read_image(self.paths.images / entry["file_name"], size))
        generator = self._generator(index, int(self._epoch))
        sketch, target = self.transform(Sketch.of_size(*size), self._target(entry), generator)
        return RawImage(pixels, sketch), target

    def size_of(
        self,
        index: int,
        epoch: int | None = None,  # default: the one chosen last
    ) -> tuple[int, int]:
        """(height, width) of an item's pixels, without reading its file: 0.06 ms."""
        entry = self._entry(index)
        generator = self._generator(index, int(self._epoch) if epoch is None else epoch)
        sketch, _ = self.transform(Sketch.of_size(entry["width"], entry["height"]), {}, generator)
        return sketch.height, sketch.width

    def _entry(self, index: int) -> dict[str, Any]:
        return self.coco.imgs[self.image_ids[index]]

    def _generator(self, index: int, epoch: int) -> torch.Generator:
        return seeded(self.seed, epoch, index)

    def _target(self, entry: Mapping[str, Any]) -> Target:
        annotations = self.coco.imgToAnns.get(entry["id"], ())
        target = coco_target(entry["width"], entry["height"], entry["id"], annotations, self.with_masks)
        target.pop("keypoints", None)  # the transforms cannot know which of them a flip exchanges
        target["labels"] = torch.tensor([self._class_of[i] for i in target["labels"].tolist()], dtype=torch.int64)
        return target

    def summary(self) -> str:
        """One line: images, objects, and everything that was dropped or changed."""
        usable = [a for a in self.coco.anns.values() if is_object(a, self.coco.imgs[a["image_id"]])]
        empty = len(self) - len({annotation["image_id"] for annotation in usable})
        parts = [f"{len(self)} images", f"{len(usable)} objects", f"{len(self.categories)} classes"]
        counts = {"images without objects": empty, "crowds": self.crowds, "boxes clamped to their image": self.clamped}
        parts += [f"{count} {what}" for what, count in counts.items() if count]
        listed = ", ".join(f"{kind} ({count})" for kind, count in count_by_kind(self.faults).items())
        return f"{self.paths.annotations.name}: {', '.join(parts)}" + (f"; faults: {listed}" if listed else "")

    def _without_damaged_images(self, dataset: dict[str, Any]) -> dict[str, Any]:
        def check(entry: Mapping[str, Any]) -> Fault | None:
            path = self.paths.images / entry["file_name"]
            return check_image(path, (entry["width"], entry["height"]), entry["file_name"])

        with ThreadPoolExecutor() as pool:
            found = list(pool.map(check, dataset["images"]))
        self.faults += [fault for fault in found if fault is not None]
        images = [entry for entry, fault in zip(dataset["images"], found, strict=True) if fault is None]
        ids = {entry["id"] for entry in images}
        annotations = [entry for entry in dataset["annotations"] if entry["image_id"] in ids]
        return {**dataset, "images": images, "annotations": annotations}


def _index(dataset: dict[str, Any], keep_segmentation: bool) -> COCO:
    """pycocotools' index, without its prints and without polygons nobody needs (most of the memory of a worker)."""
    if not keep_segmentation:
        for annotation in dataset["annotations"]:
            annotation.pop("segmentation", None)
    coco = COCO()
    coco.dataset = {"info": {}, **dataset}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _fatal_message(file: object, faults: Sequence[Fault]) -> str:
    listed = "".join(f"\n  {fault}" for fault in faults[:5])
    more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
    advice = 'correct them, or leave them out with on_fault="skip" (--data.on_fault=skip)'
    return f"{file}: {len(faults)} entries cannot be used; {advice}{listed}{more}"
