"""Generated predictions and targets of the kinds that a detector meets while it learns, and their matching costs.

- trained: about three queries at each target, the others background; almost no two targets want the same query;
- mid: half trained, boxes spread at random and weak classes;
- init: random weights, all queries almost equal, so that all targets want the same few queries;
- identical: all queries equal, hence nothing but ties; duplicates: all targets of an image equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from detr_fast.boxes import box_xyxy_to_cxcywh
from detr_fast.data.batch import Batch, collate
from detr_fast.data.shapes import draw
from detr_fast.data.transforms import MEAN, STD, Sample
from detr_fast.ops.matching_cost import matching_cost_reference
from detr_fast.structures import Predictions, Targets

Kind = Literal["trained", "mid", "init", "identical", "duplicates"]
KINDS: tuple[Kind, ...] = get_args(Kind)
COST_WEIGHTS = (1.0, 5.0, 2.0)  # class, L1, GIoU, as published


@dataclass(frozen=True)
class Scene:
    predictions: Predictions
    targets: list[dict[str, Tensor]]  # labels [n], boxes [n, 4] of each image

    def to(self, device: torch.device) -> Scene:
        logits, boxes = self.predictions.logits.to(device), self.predictions.boxes.to(device)
        targets = [{name: value.to(device) for name, value in target.items()} for target in self.targets]
        return Scene(Predictions(logits, boxes), targets)


def scene(kind: Kind, counts: Sequence[int], queries: int, layers: int = 1, labels: int = 91, seed: int = 0) -> Scene:
    """One image for each of ``counts`` targets; logits have one class more than there are labels."""
    random = np.random.default_rng(seed)
    targets = [_targets(random, count, labels, kind == "duplicates") for count in counts]
    logits = np.empty((layers, len(counts), queries, labels + 1), dtype=np.float32)
    boxes = np.empty((layers, len(counts), queries, 4), dtype=np.float32)
    for layer in range(layers):
        for image, (image_labels, image_boxes) in enumerate(targets):
            found = _predictions(random, kind, queries, labels, image_labels, image_boxes)
            logits[layer, image], boxes[layer, image] = found
    as_dicts = [{"labels": torch.from_numpy(x), "boxes": torch.from_numpy(y).float()} for x, y in targets]
    return Scene(Predictions(torch.from_numpy(logits), torch.from_numpy(boxes)), as_dicts)


def coco_like_counts(images: int, seed: int = 0) -> list[int]:
    """Targets of each image: geometric with mean 7, at most 63, as in COCO."""
    return np.random.default_rng(seed).geometric(1 / 7, images).clip(max=63).tolist()


def training_sizes(images: int, seed: int = 0) -> tuple[tuple[int, int], ...]:
    """Heights and widths close to those that DETR trains on.

    COCO's commonest shapes in about their shares, shorter side 480 to 800, longer at most 1333; no random crop.
    """
    random = np.random.default_rng(seed)
    shapes = [(480, 640), (427, 640), (640, 480), (640, 427), (375, 500), (640, 640), (360, 640)]
    found = []
    for shape in random.choice(len(shapes), images, p=[0.38, 0.27, 0.14, 0.08, 0.06, 0.04, 0.03]):
        short, long = sorted(shapes[shape])
        scale = min(random.choice(np.arange(480, 801, 32)) / short, 1333 / long)
        height, width = shapes[shape]
        found.append((round(height * scale), round(width * scale)))
    return tuple(found)


def coco_like_batch(images: int, labels: int = 91, seed: int = 0, shrink: float = 1) -> Batch:
    """Noise in the sizes that DETR trains on, divided by ``shrink``, with as many targets as COCO has."""
    generator = torch.Generator().manual_seed(seed)
    targets = scene("mid", coco_like_counts(images, seed), 1, labels=labels, seed=seed).targets
    sizes = [(round(height / shrink), round(width / shrink)) for height, width in training_sizes(images, seed)]
    pixels = [torch.randn(3, *size, generator=generator) for size in sizes]
    return collate([_sample(x, target, image) for image, (x, target) in enumerate(zip(pixels, targets, strict=True))])


def shapes_batch(images: int, size: int = 128, seed: int = 0) -> Batch:
    """Generated pictures of shapes with up to 6 objects, labels 0, 1 and 2; no two seeds share a picture."""
    return collate([_drawn(np.random.default_rng([seed, image]), size, image) for image in range(images)])


def _drawn(random: np.random.Generator, size: int, image: int) -> Sample:
    picture = draw(random, size)
    pixels = torch.from_numpy(picture.pixels).permute(2, 0, 1) / 255
    corners = [[np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (0, 1)] for mask in picture.masks]
    boxes = torch.tensor([[x[0], y[0], x[1] + 1, y[1] + 1] for x, y in corners], dtype=torch.float32).reshape(-1, 4)
    target = {"labels": torch.tensor(picture.labels, dtype=torch.int64) - 1, "boxes": box_xyxy_to_cxcywh(boxes) / size}
    return _sample((pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None], target, image)


def _sample(pixels: Tensor, target: dict[str, Tensor], image: int) -> Sample:  # [3, height, width]
    return pixels, {**target, "image_id": torch.tensor([image]), "orig_size": torch.tensor(pixels.shape[1:])}


def costs(kind: Kind, problems: int, queries: int, targets: int, seed: int = 0) -> Tensor:
    """Matching costs ``[problems, targets, queries]`` float32 of images with equally many targets."""
    made = scene(kind, [targets] * problems, queries, seed=seed)
    packed = Targets.pack(made.targets)
    predictions = made.predictions
    cost = matching_cost_reference(
        predictions.logits, predictions.boxes, packed.labels, packed.boxes, packed.offsets, *COST_WEIGHTS
    )
    return cost.reshape(problems, targets, queries)


def _targets(random: np.random.Generator, count: int, labels: int, equal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Labels and boxes of one image: log-normal sizes inside the image, at most five classes."""
    size = np.exp(random.normal(-2.0, 0.9, (count, 2))).clip(0.01, 0.95)
    centre = random.uniform(0, 1, (count, 2)) * (1 - size) + size / 2
    present = random.integers(0, labels, max(1, min(5, count)))
    label = present[random.integers(0, len(present), count)]
    box = np.concatenate([centre, size], 1)
    if equal and count:
        label[:], box[:] = label[0], box[0]
    return label, box


def _predictions(
    random: np.random.Generator,
    kind: Kind,
    queries: int,
    labels: int,
    target_labels: np.ndarray,  # [n]
    target_boxes: np.ndarray,  # [n, 4]
) -> tuple[np.ndarray, np.ndarray]:  # [queries, labels + 1], [queries, 4]
    shape = (queries, labels + 1)
    if kind == "identical":
        return np.zeros(shape), np.full((queries, 4), 0.5)
    if kind == "init":
        common_box, common_logits = random.normal(0, 0.3, 4), random.normal(0, 0.5, labels + 1)
        boxes = 1 / (1 + np.exp(-common_box - random.normal(0, 0.02, (queries, 4))))
        return common_logits + random.normal(0, 0.03, shape), boxes
    trained = kind == "trained"
    logits = random.normal(0, 1, shape)
    logits[:, -1] += 7 if trained else 4
    size = np.exp(random.normal(-1.5 if trained else -1.2, 0.8 if trained else 0.5, (queries, 2))).clip(0.01, 0.95)
    boxes = np.concatenate([random.uniform(0.05, 0.95, (queries, 2)), size], 1)
    count = len(target_labels)
    if trained and count:
        near = random.permutation(queries)[: 3 * count]
        target = np.arange(len(near)) % count
        best = np.arange(len(near)) < count
        goal = target_boxes[target]
        noise = random.normal(0, 1, goal.shape) * np.where(best, 0.03, 0.12)[:, None] * np.tile(goal[:, 2:], 2)
        boxes[near] = np.clip(goal + noise, 0.005, 0.995)
        logits[near, target_labels[target]] += np.where(
            best, random.uniform(4, 9, len(near)), random.uniform(2, 7, len(near))
        )
    return logits, boxes
