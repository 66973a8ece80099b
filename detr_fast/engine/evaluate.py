"""COCO evaluation: the 12 numbers and average precision per class, through pycocotools."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from tqdm import tqdm

from detr_fast.engine.distributed import Processes
from detr_fast.engine.loaders import evaluation_loader, naming_faults
from detr_fast.models.postprocess import postprocess_detections

# Name and meaning of COCO's 12 numbers, in its order; detections are limited to the 100 most certain of an image.
NUMBERS = {
    "AP": "average precision, mean over IoU 0.50:0.95",
    "AP50": "average precision at IoU 0.50",
    "AP75": "average precision at IoU 0.75",
    "AP_small": "AP of objects under 32 x 32 pixels",
    "AP_medium": "AP of objects from 32 x 32 to 96 x 96 pixels",
    "AP_large": "AP of objects over 96 x 96 pixels",
    "AR_1": "average recall, 1 detection an image",
    "AR_10": "average recall, 10 detections an image",
    "AR_100": "average recall, 100 detections an image",
    "AR_small": "AR_100 of objects under 32 x 32 pixels",
    "AR_medium": "AR_100 of objects from 32 x 32 to 96 x 96 pixels",
    "AR_large": "AR_100 of objects over 96 x 96 pixels",
}


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation; a number that no object defines is -1, as COCO prints it."""

    numbers: dict[str, float]  # of NUMBERS
    per_class: dict[str, dict[str, float]]  # class name -> AP, AP50
    images: int
    detections: list[dict[str, Any]]  # COCO results: image_id, category_id, bbox xywh absolute, score

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without the detections."""
        return {"images": self.images, "numbers": self.numbers, "per_class": self.per_class}

    def __str__(self) -> str:
        lines = [f"{self.images} images, {len(self.detections)} detections"]
        lines += [f"  {name:<10} {_number(self.numbers[name])}  {meaning}" for name, meaning in NUMBERS.items()]
        width = max((len(name) for name in self.per_class), default=0)
        width = max(width, len("class"))
        lines.append(f"  {'class':<{width}}     AP   AP50")
        for name, values in self.per_class.items():
            lines.append(f"  {name:<{width}} {_number(values['AP'])} {_number(values['AP50'])}")
        return "\n".join(lines)


def _number(value: float) -> str:
    return "     -" if value < 0 else f"{value:6.3f}"


def coco_numbers(ground_truth_path: str | Path, results_path: str | Path, iou_type: str = "bbox") -> list[float]:
    """The 12 COCO numbers of a results file; ``iou_type`` is ``bbox`` or ``segm``."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(str(ground_truth_path))
    results = json.loads(Path(results_path).read_text(encoding="utf-8"))
    return [float(x) for x in run_coco(ground_truth, results, iou_type).stats]


def run_coco(
    ground_truth: COCO, results: list[dict[str, Any]], iou_type: str = "bbox", image_ids: Sequence[int] | None = None
) -> COCOeval:
    """pycocotools' evaluation after ``summarize``, silenced; also of no detections at all."""
    with contextlib.redirect_stdout(io.StringIO()):
        detections = ground_truth.loadRes(copy.deepcopy(results)) if results else _no_detections(ground_truth)
        evaluation = COCOeval(ground_truth, detections, iou_type)
        if image_ids is not None:
            evaluation.params.imgIds = sorted(set(image_ids))
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _no_detections(ground_truth: COCO) -> COCO:
    empty = COCO()
    empty.dataset = {**ground_truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


def summarize_detections(ground_truth: COCO, results: list[dict[str, Any]], image_ids: Sequence[int]) -> Evaluation:
    """Numbers and per-class table of COCO results over the given images."""
    evaluation = run_coco(ground_truth, results, "bbox", image_ids)
    numbers = {name: float(value) for name, value in zip(NUMBERS, evaluation.stats, strict=True)}
    precision = evaluation.eval["precision"][
        :, :, :, 0, -1
    ]  # [IoU thresholds, recalls, classes], all areas, 100 detections
    per_class = {}
    for index, category_id in enumerate(evaluation.params.catIds):
        name = ground_truth.cats[category_id].get("name", str(category_id))
        values = precision[:, :, index]
        per_class[name] = {"AP": _mean_of_defined(values), "AP50": _mean_of_defined(values[0])}
    return Evaluation(numbers, per_class, len(set(image_ids)), results)


def _mean_of_defined(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


def results_of_image(
    image_id: int, detections: dict[str, torch.Tensor], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """COCO results of one image from ``scores [n]``, ``labels [n]`` and ``boxes [n, 4]`` absolute xyxy."""
    boxes = detections["boxes"].double()
    corners = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    labels, scores = detections["labels"].tolist(), detections["scores"].double().tolist()
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for label, score, box in zip(labels, scores, corners, strict=True)
        if all(map(math.isfinite, (score, *box)))
    ]


@torch.no_grad()
def detect(
    model: nn.Module,
    batches: Iterable[Any],  # of detr_fast.data.batch.Batch
    category_ids: Sequence[int],
    device: torch.device,
    precision: torch.dtype = torch.float32,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[list[dict[str, Any]], list[int]]:
    """COCO results and image ids of all batches, the model in evaluation mode; stops early if asked to."""
    was_training = model.training
    model.eval()
    results: list[dict[str, Any]] = []
    image_ids: list[int] = []
    for batch in batches:
        if should_stop():
            break
        images = batch.images.to(device)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            predictions = model(images)
        outputs = predictions if isinstance(predictions, dict) else predictions.as_dict()
        found = postprocess_detections(outputs, batch.original_sizes.to(device))
        for image_id, detections in zip(batch.image_ids, found, strict=True):
            on_host = {name: value.float().cpu() for name, value in detections.items() if name != "labels"}
            results += results_of_image(image_id, on_host | {"labels": detections["labels"].cpu()}, category_ids)
            image_ids.append(image_id)
    model.train(was_training)
    return results, image_ids


def evaluate(
    model: nn.Module,
    dataset: Any,  # CocoDetection
    *,
    batch_size: int = 2,
    workers: int = 0,
    processes: Processes | None = None,
    precision: torch.dtype = torch.float32,
    should_stop: Callable[[], bool] = lambda: False,
    progress: bool = False,
) -> Evaluation | None:
    """Evaluates on all images of ``dataset``, each on one process and none twice.

    The model is on ``processes.device``. Every process returns the same evaluation, or None if any was asked to stop.
    """
    processes = processes or Processes()
    loader = evaluation_loader(dataset, batch_size, workers, processes)
    shown = tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=None if progress else True)
    category_ids = dataset.categories.ids
    results, image_ids = detect(model, naming_faults(shown), category_ids, processes.device, precision, should_stop)
    if processes.any(should_stop()):
        return None
    gathered = processes.gather((results, image_ids))
    evaluation = None
    if processes.is_main:
        all_results = [result for part, _ in gathered for result in part]
        all_ids = [image_id for _, part in gathered for image_id in part]
        evaluation = summarize_detections(dataset.coco, all_results, all_ids)
    return processes.broadcast(evaluation)
