"""Reads an annotation file in COCO's detection format and sorts out every entry that cannot be used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detr_fast.data.faults import DataFault, Fault
from detr_fast.data.remote import AnyPath

# Faults of an annotation file after which training on the rest would silently not be what the user asked for.
FATAL = ("malformed image entry", "duplicate image id", "malformed annotation", "unknown category")


@dataclass(frozen=True)
class Annotations:
    """The usable part of an annotation file, and what was found in the rest."""

    total: int  # annotations in the file, usable or not
    dataset: dict[str, Any]  # COCO's dictionary, only entries that can be used; every annotation has id, area, iscrowd
    faults: tuple[Fault, ...]  # entries that were left out, or will be when targets are made
    crowds: int  # regions of many objects: no targets, ignored in evaluation
    clamped: tuple[str, ...]  # boxes that reach out of their image and will be clamped to it, described
    empty: int  # images without any object to learn

    def fatal(self) -> list[Fault]:
        return [fault for fault in self.faults if fault.kind in FATAL]


def read_annotations(path: AnyPath) -> Annotations:
    """Reads and inspects a file.

    Annotation ids are numbered anew from 1 where they are missing, repeated or 0: pycocotools takes the match with an
    annotation of id 0 for no match.

    Raises:
        DataFault: the file is missing, cannot be reached, is not JSON, or lacks ``images``, ``annotations`` or
            ``categories``.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataFault(f"{path}: file not found") from None
    except DataFault:
        raise
    except ValueError as error:  # JSON and UTF-8 errors
        raise DataFault(f"{path}: not a JSON file ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataFault(f"{path}: must be an object with a list '{key}', as COCO's instances_*.json has")
    return inspect(content, path.name)


def inspect(
    content: Mapping[str, Any],
    name: str,  # of the annotation file, for faults that belong to no image
) -> Annotations:
    """Sorts out the entries of a COCO dictionary; see :func:`read_annotations`."""
    faults: list[Fault] = []
    categories = _categories(content["categories"], name)
    images = _images(content["images"], name, faults)
    kept: list[dict[str, Any]] = []
    clamped: list[str] = []
    crowds, occupied = 0, set()
    for annotation in content["annotations"]:
        fault = _fault_of_annotation(annotation, images, categories, name)
        if fault is not None:
            faults.append(fault)
            if fault.kind != "box without area":
                continue
        kept.append(annotation)
        if annotation.get("iscrowd"):
            crowds += 1
        elif fault is None:
            image = images[annotation["image_id"]]
            occupied.add(annotation["image_id"])
            if (outside := _outside(annotation["bbox"], image["width"], image["height"])) > 0:
                clamped.append(_clamped_note(annotation, image, outside))
    faults += _complete(kept, images)
    dataset = {**content, "images": list(images.values()), "annotations": kept}
    empty = len(images) - len(occupied)
    return Annotations(len(content["annotations"]), dataset, tuple(faults), crowds, tuple(clamped), empty)


def _categories(entries: Sequence[Any], name: str) -> set[int]:
    ids: set[int] = set()
    for entry in entries:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")):
            raise DataFault(f"{name}: every category must have an integer 'id', got {_short(entry)}")
        if entry["id"] in ids:
            raise DataFault(f"{name}: category id {entry['id']} is declared twice")
        ids.add(entry["id"])
    if not ids:
        raise DataFault(f"{name}: 'categories' is empty")
    return ids


def _images(entries: Sequence[Any], name: str, faults: list[Fault]) -> dict[int, dict[str, Any]]:
    images: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if not _is_image(entry):
            wanted = "must have an integer 'id', a 'file_name' and a positive integer 'width' and 'height'"
            faults.append(Fault("malformed image entry", name, f"image entry {wanted}, got {_short(entry)}"))
        elif entry["id"] in images:
            other = images[entry["id"]]["file_name"]
            faults.append(Fault("duplicate image id", entry["file_name"], f"has id {entry['id']}, as has {other}"))
        else:
            images[entry["id"]] = entry
    return images


def _is_image(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and _is_id(entry.get("id"))
        and isinstance(entry.get("file_name"), str)
        and all(_is_id(entry.get(side)) and entry[side] > 0 for side in ("width", "height"))
    )


def _fault_of_annotation(
    annotation: Any, images: Mapping[int, Mapping[str, Any]], categories: set[int], name: str
) -> Fault | None:
    if not isinstance(annotation, dict) or not _is_id(annotation.get("image_id")):
        return Fault(
            "malformed annotation", name, f"annotation must have an integer 'image_id', got {_short(annotation)}"
        )
    where = f"annotation {_short(annotation.get('id'))}"
    image = images.get(annotation["image_id"])
    if image is None:
        return Fault(
            "unknown image", name, f"{where} belongs to image id {annotation['image_id']}, which is not listed"
        )
    if not isinstance(annotation.get("id", 0), (int, float, str, type(None))):
        return Fault("malformed annotation", image["file_name"], f"{where}: id must be an integer")
    if annotation.get("iscrowd", 0) not in (0, 1):
        crowd = _short(annotation["iscrowd"])
        return Fault("malformed annotation", image["file_name"], f"{where}: iscrowd must be 0 or 1, got {crowd}")
    box: Any = annotation.get("bbox")
    file, category = image["file_name"], annotation.get("category_id")
    if not _is_id(category) or category not in categories:
        return Fault("unknown category", file, f"{where} has category {category!r}, which is not declared")
    if not _is_box(box):
        wanted = "bbox must be 4 finite numbers (x, y, width, height)"
        return Fault("malformed annotation", file, f"{where}: {wanted}, got {_short(box)}")
    if annotation.get("iscrowd") or is_object(annotation, image):
        return None
    reason = "lies outside" if box[2] > 0 and box[3] > 0 else "has no area in"
    size = f"{image['width']}x{image['height']}"
    return Fault("box without area", file, f"{where}: box {_numbers(box)} {reason} the {size} image")


def is_object(annotation: Mapping[str, Any], image: Mapping[str, Any]) -> bool:
    """True if something is left to learn: not a crowd, and a box with area inside the image."""
    x, y, width, height = annotation["bbox"]
    inside = min(x + width, image["width"]) > max(x, 0) and min(y + height, image["height"]) > max(y, 0)
    return inside and width > 0 and height > 0 and not annotation.get("iscrowd")


def _complete(annotations: list[dict[str, Any]], images: Mapping[int, Mapping[str, Any]]) -> list[Fault]:
    """Fills in what pycocotools relies on, in place; returns the repeated ids."""
    faults, seen = [], set()
    for annotation in annotations:
        annotation.setdefault("iscrowd", 0)
        if not _is_number(annotation.get("area")):
            annotation["area"] = max(annotation["bbox"][2], 0) * max(annotation["bbox"][3], 0)
        identity = annotation.get("id")
        if identity is not None and identity in seen:
            file = images[annotation["image_id"]]["file_name"]
            faults.append(Fault("duplicate annotation id", file, f"annotation id {identity} is used more than once"))
        seen.add(identity)
    if faults or None in seen or 0 in seen:
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
    return faults


def _clamped_note(annotation: Mapping[str, Any], image: Mapping[str, Any], outside: float) -> str:
    box, size = _numbers(annotation["bbox"]), f"{image['width']}x{image['height']}"
    file, identity = image["file_name"], annotation.get("id")
    return f"{file}: annotation {identity}: box {box} reaches {outside:.4g} px out of the {size} image"


def _outside(box: Sequence[float], width: float, height: float) -> float:
    """Pixels by which a box reaches out of its image; 0 if it lies inside."""
    x, y, w, h = box
    return max(-x, -y, x + w - width, y + h - height, 0)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(_is_number(x) for x in value)


def _numbers(box: Sequence[float]) -> str:
    return "[" + ", ".join(f"{x:g}" for x in box) + "]"


def _short(entry: Any) -> str:
    text = repr(entry)
    return text if len(text) <= 80 else text[:77] + "..."
