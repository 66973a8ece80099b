"""From JPEG files to batches on the device: one epoch of training data, with the paper's random transforms.

The reference's way: random order, a plain DataLoader of floats, each image copied to a padded canvas, an upload that
waits. Every provider makes the same pixels of the same image; where images are transformed on a CPU device, that is
checked but not timed, as nobody would do it.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Benchmark, DisagreementError, Faster, Options
from detr_fast.boxes import box_xyxy_to_cxcywh
from detr_fast.data.batch import TrainingSampler, canvas_of
from detr_fast.data.coco import CocoDetection, coco_target
from detr_fast.data.layouts import CocoPaths
from detr_fast.data.transforms import MEAN, STD, Chain, Sample, seeded, train_transform
from detr_fast.engine.config import Config
from detr_fast.engine.distributed import Processes
from detr_fast.engine.loaders import TrainingLoader

IMAGES, QUICK_IMAGES = 64, 8
BATCH_SIZES, QUICK_BATCH_SIZES = (2, 8), (2,)
SIZES = ((480, 640), (427, 640), (640, 480), (640, 427), (375, 500), (640, 640), (360, 640))  # height and width
SHARES = (0.38, 0.27, 0.14, 0.08, 0.06, 0.04, 0.03)  # of images in COCO, about
BARS = (Faster("reference", 1),)


def benchmarks(options: Options) -> Iterator[Benchmark]:
    dataset = data_set(QUICK_IMAGES if options.quick else IMAGES, 4 if options.quick else 1)
    for batch_size in QUICK_BATCH_SIZES if options.quick else BATCH_SIZES:
        yield epoch(dataset, batch_size, options.device)


def workers() -> int:
    return min(os.cpu_count() or 1, 16)


@functools.cache
def data_set(images: int, shrink: int) -> CocoDetection:
    """Generated photographs in COCO's sizes, divided by ``shrink``; their folder is removed when Python ends."""
    folder = tempfile.TemporaryDirectory(prefix="detr-fast-input-")
    root, random = Path(folder.name), np.random.default_rng(0)
    entries, annotations = [], []
    for identity, size in enumerate(random.choice(len(SIZES), images, p=SHARES), start=1):
        height, width = (side // shrink for side in SIZES[size])
        _photograph(random, height, width).save(root / f"{identity}.jpg", quality=90)
        entries.append({"id": identity, "file_name": f"{identity}.jpg", "width": width, "height": height})
        box = [width / 4, height / 4, width / 2, height / 2]
        annotations.append({"id": identity, "image_id": identity, "category_id": 1, "bbox": box, "area": 1})
    content = {"images": entries, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "instances.json").write_text(json.dumps(content))
    scales = [scale // shrink for scale in range(480, 801, 32)]
    found = CocoDetection(CocoPaths(root, root / "instances.json"), train_transform(scales, 1333 // shrink))
    found.folder = folder  # type: ignore[attr-defined]  # lives as long as the data set
    return found


def _photograph(random: np.random.Generator, height: int, width: int) -> Image.Image:
    """Smooth patches and some grain: about as many bytes a pixel as a photograph."""
    patches = Image.fromarray(random.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8))
    smooth = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    return Image.fromarray((smooth + random.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8))


def epoch(dataset: CocoDetection, batch_size: int, device: torch.device) -> Benchmark:
    ours = loader_of(dataset, batch_size, device, "auto")
    reference = reference_loader(dataset, batch_size, device)
    sources: dict[str, Callable[[], Iterable[Made]]] = {
        "detr_fast": lambda: map(_made, ours.start(0)),
        "reference": lambda: reference_batches(reference, device),
    }
    if device.type == "cuda":
        on_workers = loader_of(dataset, batch_size, device, "workers")
        sources["detr_fast, transformed by workers"] = lambda: map(_made, on_workers.start(0))
    else:
        batch = next(loader_of(dataset, batch_size, device, "device", processes=0).start(0))
        require_pixels("detr_fast, transformed on the device", [_made(batch)], dataset)

    def check(provider: str, result: object) -> None:
        seen = require_pixels(provider, sources[provider](), dataset)
        if seen != set(dataset.image_ids):
            raise DisagreementError(f"{provider}: an epoch must have {len(dataset)} images, got {len(seen)}")

    share, without = (valid_share(dataset, batch_size, images) for images in (Config().data.bucket_images, 0))
    return Benchmark(
        case="input pipeline, JPEG files to batches",
        axis="images",
        value=f"{len(dataset)} in batches of {batch_size}, {workers()} workers, {share:.0%} of the pixels valid "
        f"(reference: {without:.0%})",
        providers={name: functools.partial(_consume, source) for name, source in sources.items()},
        check=check,
        bars=BARS,
    )


@dataclass(frozen=True)
class Made:
    """What a provider made of a batch."""

    pixels: Tensor  # [B, 3, height, width]
    padding: Tensor  # [B, height, width]
    image_ids: Sequence[int]


def _made(batch: Any) -> Made:
    return Made(batch.images.pixels, batch.images.padding, batch.image_ids)


def _consume(source: Callable[[], Iterable[Made]]) -> None:
    for _ in source():
        pass


def loader_of(
    dataset: CocoDetection, batch_size: int, device: torch.device, place: str, processes: int | None = None
) -> TrainingLoader:
    count = workers() if processes is None else processes
    settings = {"data.workers": count, "data.transform_on": place, "train.batch_size": batch_size}
    return TrainingLoader(dataset, Config().with_overrides(settings), Processes(device=device))


def valid_share(dataset: CocoDetection, batch_size: int, bucket_images: int) -> float:
    """Pixels of images among those of their canvases, in the first epoch."""
    sampler = TrainingSampler(len(dataset), batch_size, bucket_images=bucket_images, shape_of=dataset.size_of)
    sizes = [[dataset.size_of(index, 0) for index in batch] for batch in sampler]
    valid = sum(height * width for batch in sizes for height, width in batch)
    return valid / sum(len(batch) * int(np.prod(canvas_of(batch))) for batch in sizes)


class ReferenceItems(Dataset[Sample]):
    """As torchvision's ToTensor and Normalize make them, after the same transforms with the same draws."""

    def __init__(self, dataset: CocoDetection) -> None:
        self.dataset = dataset
        transform = dataset.transform
        assert isinstance(transform, Chain)
        self.transform = Chain(transform.steps[:-1])

    def __getitem__(self, index: int) -> Sample:
        identity = self.dataset.image_ids[index]
        with Image.open(str(self.dataset.path_of(identity))) as file:
            image = file.convert("RGB")
        target = coco_target(*image.size, identity, self.dataset.coco.imgToAnns[identity], return_masks=False)
        image, target = self.transform(image, target, seeded(self.dataset.seed, 0, index))
        target["boxes"] = box_xyxy_to_cxcywh(target["boxes"]) / torch.tensor([image.width, image.height] * 2)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        return pixels.clone().sub_(mean).div_(std), target

    def __len__(self) -> int:
        return len(self.dataset)


def reference_loader(dataset: CocoDetection, batch_size: int, device: torch.device) -> DataLoader[Any]:
    return DataLoader(
        ReferenceItems(dataset),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers(),
        persistent_workers=True,
        collate_fn=padded,
    )


def padded(samples: Sequence[Sample]) -> Made:
    images = [image for image, _ in samples]
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    pixels = torch.zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for image, place, padding in zip(images, pixels, mask, strict=True):
        place[:, : image.shape[1], : image.shape[2]].copy_(image)
        padding[: image.shape[1], : image.shape[2]] = False
    return Made(pixels, mask, [int(target["image_id"]) for _, target in samples])


def reference_batches(loader: DataLoader[Any], device: torch.device) -> Iterator[Made]:
    for made in loader:
        yield Made(made.pixels.to(device), made.padding.to(device), made.image_ids)


def require_pixels(provider: str, batches: Iterable[Made], dataset: CocoDetection) -> set[int]:
    """The images' ids.

    Raises:
        DisagreementError: an image has other pixels than the data set's item, or not only zeros around it.
    """
    dataset.set_epoch(0)
    seen: set[int] = set()
    for made in batches:
        for pixels, padding, identity in zip(made.pixels.cpu(), made.padding.cpu(), made.image_ids, strict=True):
            exact, _ = dataset[dataset.image_ids.index(identity)]
            _, height, width = exact.shape
            expected = torch.zeros_like(pixels)
            expected[:, :height, :width] = exact
            is_padding = torch.ones_like(padding)
            is_padding[:height, :width] = False
            if not (torch.equal(pixels, expected) and torch.equal(padding, is_padding)):
                raise DisagreementError(f"{provider}: image {identity} has other pixels or padding than the data set's")
            seen.add(identity)
    return seen
