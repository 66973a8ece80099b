"""COCO evaluation: recorded numbers, and every image once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_fast.engine.distributed import Processes
from detr_fast.engine.evaluate import NUMBERS, coco_numbers, evaluate, results_of_image
from detr_fast.engine.loaders import evaluation_dataset
from detr_fast.engine.predict import load_detector

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluation"


@pytest.mark.parametrize(("kind", "results"), [("bbox", "detections.json"), ("segm", "segmentations.json")])
def test_recorded_numbers(kind: str, results: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = json.loads((GOLDEN / "coco_numbers.json").read_text())[kind]
    assert coco_numbers(GOLDEN / "instances.json", GOLDEN / results, kind) == pytest.approx(expected, abs=1e-12)
    assert capsys.readouterr().out == ""


def test_no_detections_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("[]")
    assert coco_numbers(GOLDEN / "instances.json", tmp_path / "none.json")[0] == 0


def test_results_are_xywh_with_the_ids_of_the_data_set() -> None:
    nan = float("nan")
    detections = {
        "scores": torch.tensor([0.5, nan]),
        "labels": torch.tensor([1, 0]),
        "boxes": torch.tensor([[1.0, 2, 4, 8], [0, 0, 1, 1]]),
    }
    expected = {"image_id": 7, "category_id": 90, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.5}
    assert results_of_image(7, detections, (3, 90)) == [expected]


class Oracle(torch.nn.Module):
    """Answers with the truth of the images in the order of the data set."""

    def __init__(self, dataset: Any) -> None:
        super().__init__()
        self.targets = iter([dataset[index][1] for index in range(len(dataset))])

    def forward(self, images: Any) -> dict[str, torch.Tensor]:
        logits = torch.full((len(images), 10, 4), -20.0)
        logits[..., 3] = 20.0  # no object
        boxes = torch.full((len(images), 10, 4), 0.5)
        for image in range(len(images)):
            target = next(self.targets)
            for row, (label, box) in enumerate(zip(target["labels"], target["boxes"], strict=True)):
                logits[image, row, label], logits[image, row, 3] = 20.0, -20.0
                boxes[image, row] = box
        return {"pred_logits": logits, "pred_boxes": boxes}


def test_the_truth_scores_one(straight: Path) -> None:
    detector, config = load_detector(straight)
    dataset = evaluation_dataset(config.data, detector.categories)
    found = evaluate(Oracle(dataset), dataset, batch_size=2)
    assert found is not None
    assert found.images == 5
    assert (found.numbers["AP"], found.numbers["AP50"]) == pytest.approx((1, 1), abs=1e-9)
    assert set(found.per_class) == {"circle", "rectangle", "triangle"}
    assert "average precision at IoU 0.50" in str(found)
    assert list(found.numbers) == list(NUMBERS)


def test_shards_cover_every_image_once(straight: Path) -> None:
    detector, config = load_detector(straight)
    dataset = evaluation_dataset(config.data, detector.categories)
    seen: list[int] = []

    class Shard(Processes):
        def gather(self, value: Any) -> list[Any]:
            if isinstance(value, tuple):
                seen.extend(value[1])
            return [value]

        def broadcast(self, value: Any) -> Any:
            return value

    for rank in range(3):
        evaluate(detector.model, dataset, batch_size=1, processes=Shard(rank, 3))
    assert sorted(seen) == list(dataset.image_ids)


def test_a_stopped_evaluation_has_no_result(straight: Path) -> None:
    detector, config = load_detector(straight)
    dataset = evaluation_dataset(config.data, detector.categories)
    assert evaluate(detector.model, dataset, should_stop=lambda: True) is None
