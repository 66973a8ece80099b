"""Looks over a data set in COCO's format before it is trained on: what is in it, and every fault with its image.

Faults stop a training run or cost it data; notes are worth knowing and cost nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from detr_fast.data.annotations import Annotations, is_object, read_annotations
from detr_fast.data.faults import CONSEQUENCES, DataFault, Fault, count_by_kind
from detr_fast.data.images import sound_content
from detr_fast.data.layouts import CocoPaths, find_split, find_splits
from detr_fast.data.remote import AnyPath, as_path
from detr_fast.data.shards import Shards

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
SMALL, LARGE = 32**2, 96**2  # square pixels, the limits of COCO's evaluation


@dataclass(frozen=True)
class SplitReport:
    """What one split holds. Objects are what is learned: no crowds, no boxes without area."""

    name: str
    annotation_file: str
    image_folder: str  # or what stands for it
    images: int
    images_without_objects: int
    smallest_image: tuple[int, int]  # (width, height) of least and of most area
    largest_image: tuple[int, int]
    annotations: int  # in the file, usable or not
    crowds: int
    objects: int
    most_objects: int  # in one image
    small: int  # objects below 32x32 px, between, above 96x96 px
    medium: int
    large: int
    objects_per_class: dict[str, int]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]
    categories: dict[int, str] = field(repr=False)
    digests: dict[str, str] = field(repr=False)  # of the content of each image file -> its name


@dataclass(frozen=True)
class DataReport:
    """Every split of a data set; ``str(report)`` is for people, ``to_json`` for programs."""

    path: str
    splits: tuple[SplitReport, ...]
    faults: tuple[Fault, ...]  # of all splits, images named ``split/file``
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return self.text()

    def text(
        self,
        limit: int | None = None,  # most faults listed of each kind, None for all
    ) -> str:
        parts = [self.path, *_sources(self.path, self.splits), "", *_table(self.splits), ""]
        parts += _listed_faults(self.faults, limit)
        if self.notes:
            parts += ["", *(f"note: {note}" for note in self.notes)]
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self)
        for split in content["splits"]:
            del split["digests"], split["categories"]
        return content

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def check_data(
    path: str | AnyPath,
    split: str | None = None,
    *,
    images: str | Path | None = None,
    annotations: str | Path | None = None,
) -> DataReport:
    """Reads the annotations and decodes every image of all splits found, or of one.

    ``images`` and ``annotations`` name one split directly, see :func:`find_split`. Takes about a second for a thousand
    photographs a core.

    Raises:
        FileNotFoundError: there is no data set.
    """
    if split is not None or annotations is not None:
        found = {split or "data": find_split(path, split or "data", images=images, annotations=annotations)}
        return check_splits(path, found)
    found = find_splits(path)
    report = check_splits(path, found)
    return replace(report, notes=(*report.notes, *_without_images(as_path(path), found)))


def check_splits(path: str | AnyPath, found: Mapping[str, CocoPaths]) -> DataReport:
    """The same of splits that lie anywhere; ``path`` is what the report calls the data set."""
    reports: list[SplitReport] = []
    faults: list[Fault] = []
    for name, paths in found.items():
        try:
            reports.append(_check_split(name, paths))
        except DataFault as error:
            faults.append(Fault("unusable annotation file", name, str(error)))
    for report in reports:
        faults += [replace(fault, image=f"{report.name}/{fault.image}") for fault in report.faults]
    faults += _differing_categories(reports)
    notes = [f"{report.name}: {note}" for report in reports for note in report.notes]
    notes += _shared_images(reports)
    return DataReport(str(path), tuple(reports), tuple(faults), tuple(notes))


def _check_split(name: str, paths: CocoPaths) -> SplitReport:
    found = read_annotations(paths.annotations)
    images = {entry["id"]: entry for entry in found.dataset["images"]}
    categories = _names(found.dataset["categories"])
    objects = [entry for entry in found.dataset["annotations"] if is_object(entry, images[entry["image_id"]])]
    of_class = Counter(entry["category_id"] for entry in objects)
    of_image = Counter(entry["image_id"] for entry in objects)
    areas = [entry["area"] for entry in objects]
    sizes = sorted(((entry["width"], entry["height"]) for entry in images.values()), key=lambda s: s[0] * s[1])
    damaged, digests = _check_files(name, paths.images, list(images.values()))
    return SplitReport(
        name=name,
        annotation_file=str(paths.annotations),
        image_folder=str(paths.images),
        images=len(images),
        images_without_objects=found.empty,
        smallest_image=sizes[0] if sizes else (0, 0),
        largest_image=sizes[-1] if sizes else (0, 0),
        annotations=found.total,
        crowds=found.crowds,
        objects=len(objects),
        most_objects=max(of_image.values(), default=0),
        small=sum(area < SMALL for area in areas),
        medium=sum(SMALL <= area <= LARGE for area in areas),
        large=sum(area > LARGE for area in areas),
        objects_per_class={categories[i]: of_class[i] for i in sorted(categories)},
        faults=(*found.faults, *damaged),
        notes=tuple(_notes(found, paths.images, of_class, categories)),
        categories=categories,
        digests=digests,
    )


def _names(entries: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Name of each category id; names used twice are told apart by the id."""
    names = {entry["id"]: str(entry.get("name", entry["id"])) for entry in entries}
    count = Counter(names.values())
    return {i: name if count[name] == 1 else f"{name} (id {i})" for i, name in names.items()}


def _check_files(
    name: str, folder: Path | Shards, images: Sequence[Mapping[str, Any]]
) -> tuple[list[Fault], dict[str, str]]:
    """Decodes every image; returns the faults, and the name of each content."""

    def check(entry: Mapping[str, Any]) -> Fault | str:
        file = folder / entry["file_name"]
        found = sound_content(file, (entry["width"], entry["height"]), entry["file_name"])
        return found if isinstance(found, Fault) else hashlib.blake2b(found, digest_size=16).hexdigest()

    with ThreadPoolExecutor() as pool:
        results = list(tqdm(pool.map(check, images), f"check {name}", len(images), leave=False, disable=None))
    faults = [result for result in results if isinstance(result, Fault)]
    pairs = zip(results, images, strict=True)
    return faults, {result: entry["file_name"] for result, entry in pairs if isinstance(result, str)}


def _notes(
    found: Annotations, folder: Path | Shards, of_class: Mapping[int, int], categories: Mapping[int, str]
) -> Iterator[str]:
    if found.clamped:
        clamped, objects = len(found.clamped), sum(of_class.values())
        yield f"boxes that reach out of their image and will be clamped: {clamped}, first: {found.clamped[0]}"
        if objects >= 10 and clamped > objects / 4:
            yield "so many boxes reach out of their image: are they (x1, y1, x2, y2)? COCO has (x, y, width, height)"
    sides = [side for entry in found.dataset["annotations"] for side in entry["bbox"][2:]]
    if sides and max(sides) <= 1:
        yield "no box is larger than a pixel: are they in [0, 1]? COCO has pixels"
    if unused := [categories[i] for i in sorted(categories) if not of_class[i]]:
        yield f"classes without objects: {len(unused)} of {len(categories)}: {', '.join(unused)}"
    listed = Counter(entry["file_name"] for entry in found.dataset["images"])
    if repeated := [file for file, count in listed.items() if count > 1]:
        yield f"image files listed more than once: {len(repeated)}, first: {repeated[0]}"
    if unlisted := [file for file in _image_files(folder) if file not in listed]:
        where = "folder" if isinstance(folder, Path) else "shards"
        yield f"images in the {where} but not in the annotations: {len(unlisted)}, first: {unlisted[0]}"


def _image_files(folder: Path | Shards) -> list[str]:
    if isinstance(folder, Shards):
        return sorted(folder.file_names)
    files = (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES)
    return [file.relative_to(folder).as_posix() for file in files]


def _without_images(root: AnyPath, found: Mapping[str, CocoPaths]) -> Iterator[str]:
    if not isinstance(root, Path):
        return
    used = {paths.annotations for paths in found.values()}
    if others := sorted(set(root.glob("annotations/instances_*.json")) - used):
        yield f"not looked at, for want of a folder of their images: {', '.join(file.name for file in others)}"


def _differing_categories(reports: Sequence[SplitReport]) -> Iterator[Fault]:
    for report in reports[1:]:
        first = reports[0]
        if unknown := report.categories.items() - first.categories.items():
            category, name = min(unknown)
            other = first.categories.get(category)
            there = "is not declared" if other is None else f"is '{other}'"
            detail = f"category {category} is '{name}', in {first.name} it {there}"
            yield Fault("categories differ", f"{report.name}/{Path(report.annotation_file).name}", detail)


def _shared_images(reports: Sequence[SplitReport]) -> Iterator[str]:
    for index, report in enumerate(reports):
        for other in reports[index + 1 :]:
            if shared := report.digests.keys() & other.digests.keys():
                example = min(report.digests[digest] for digest in shared)
                yield f"same images in {report.name} and {other.name}: {len(shared)}, first: {example}"


def _sources(root: str, splits: Sequence[SplitReport]) -> list[str]:
    def short(path: str) -> str:
        return str(Path(path).relative_to(root)) if Path(path).is_relative_to(root) else path

    width = max((len(split.name) for split in splits), default=0)
    ends = ["" if split.image_folder.endswith(".tar") else "/" for split in splits]
    pairs = [
        (short(split.annotation_file), short(split.image_folder) + end) for split, end in zip(splits, ends, strict=True)
    ]
    return [f"  {s.name:{width}}  {file}, images in {folder}" for s, (file, folder) in zip(splits, pairs, strict=True)]


def _table(splits: Sequence[SplitReport]) -> list[str]:
    """One column a split."""
    rows: list[tuple[str, list[str]]] = [("", [split.name for split in splits])]

    def add(label: str, values: Sequence[int | str]) -> None:
        rows.append((label, [f"{value:,}" if isinstance(value, int) else value for value in values]))

    add("images", [split.images for split in splits])
    add("  without objects", [split.images_without_objects for split in splits])
    add("  smallest", ["{}x{}".format(*split.smallest_image) for split in splits])
    add("  largest", ["{}x{}".format(*split.largest_image) for split in splits])
    add("annotations", [split.annotations for split in splits])
    add("  crowds", [split.crowds for split in splits])
    add("objects", [split.objects for split in splits])
    add("  mean per image", [f"{split.objects / max(split.images, 1):.1f}" for split in splits])
    add("  most in an image", [split.most_objects for split in splits])
    add("  small, below 32x32", [split.small for split in splits])
    add("  medium", [split.medium for split in splits])
    add("  large, above 96x96", [split.large for split in splits])
    classes = dict.fromkeys(name for split in splits for name in split.objects_per_class)
    add("objects of class", ["" for _ in splits])
    for name in classes:
        add(f"  {name}", [split.objects_per_class.get(name, "-") for split in splits])
    first = max(len(label) for label, _ in rows)
    widths = [max(len(values[column]) for _, values in rows) for column in range(len(splits))]
    cells = ((label, zip(values, widths, strict=True)) for label, values in rows)
    lines = (f"{label:{first}}" + "".join(f"  {value:>{width}}" for value, width in row) for label, row in cells)
    return [line.rstrip() for line in lines]


def _listed_faults(faults: Sequence[Fault], limit: int | None) -> list[str]:
    if not faults:
        return ["no faults"]
    lines = [f"{len(faults)} fault{'s' * (len(faults) > 1)}"]
    for kind, count in count_by_kind(faults).items():
        lines.append(f"  {kind}: {count}; {CONSEQUENCES[kind]}")
        of_kind = [fault for fault in faults if fault.kind == kind]
        lines += [f"    {fault}" for fault in of_kind[:limit]]
        if limit is not None and count > limit:
            lines.append(f"    and {count - limit} more")
    return lines
