"""A detector takes images in every form and says what it found in their pixels."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.data.faults import DataFault
from detr_fast.engine.checkpoint import load_checkpoint
from detr_fast.engine.errors import CheckpointError, ConfigError
from detr_fast.engine.predict import Detections, Detector
from detr_fast.models import build_model


@pytest.fixture(scope="module")
def detector(straight: Path) -> Detector:
    return Detector.load(straight, device="cpu")


@pytest.fixture
def files(shapes: Path) -> list[Path]:
    return sorted((shapes / "val").iterdir())


def assert_same(one: Detections, two: Detections, tolerance: float = 0) -> None:
    assert one.names == two.names
    assert torch.allclose(one.boxes, two.boxes, rtol=0, atol=tolerance)


def test_every_form_of_an_image_gives_the_same(detector: Detector, files: list[Path]) -> None:
    picture = Image.open(files[0]).convert("RGB")
    array = np.asarray(picture)
    forms = [files[0], str(files[0]), picture, array, torch.from_numpy(array.copy()).permute(2, 0, 1)]
    forms.append(forms[-1].float() / 255)
    for form in forms:
        assert_same(detector.predict(form, threshold=0.0)[0], detector.predict(files[0], threshold=0.0)[0])


def test_batches_change_nothing_but_rounding(detector: Detector, files: list[Path]) -> None:
    single = detector.predict(files, threshold=0.0)
    # Boxes are pixels of a 64 pixel image computed from values of about 1 through a dozen layers in float32.
    tolerance = 64 * 1000 * torch.finfo(torch.float32).eps
    for one, two in zip(single, detector.predict(files, threshold=0.0, batch_size=3), strict=True):
        assert torch.allclose(one.scores, two.scores, rtol=0, atol=tolerance)
        assert len(one) == len(two) == 8


def test_the_threshold_and_the_order(detector: Detector, files: list[Path]) -> None:
    everything = detector.predict(files[0], threshold=0.0)[0]
    scores = everything.scores.tolist()
    assert scores == sorted(scores, reverse=True)
    some = detector.predict(files[0], threshold=scores[2])[0]
    assert some.scores.tolist() == scores[: len(some)]
    assert len(some) == sum(score >= scores[2] for score in scores)
    nothing = detector.predict(files[0], threshold=1.0)[0]
    assert (len(nothing), nothing.to_dict()["objects"]) == (0, [])
    assert np.array_equal(np.asarray(nothing.draw(files[0])), np.asarray(Image.open(files[0]).convert("RGB")))


@pytest.mark.parametrize("threshold", [7, -0.1, float("nan")])
def test_a_threshold_that_is_no_score_is_refused(detector: Detector, files: list[Path], threshold: float) -> None:
    with pytest.raises(ConfigError, match=rf"threshold must be in \[0, 1\], got {threshold}"):
        detector.predict(files[0], threshold=threshold)


def test_what_is_found_can_be_written_as_json(detector: Detector, files: list[Path]) -> None:
    found = json.loads(json.dumps(detector.predict(files[0], threshold=0.0)[0].to_dict()))
    assert (found["height"], found["width"], len(found["objects"])) == (64, 64, 8)
    assert found["objects"][0]["name"] in ("circle", "rectangle", "triangle")
    assert found["objects"][0]["category_id"] in (1, 2, 3)


def test_an_unreadable_image_is_named(detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(DataFault, match=r"broken\.jpg: cannot be read"):
        detector.predict(tmp_path / "broken.jpg")


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), torch.zeros(4, 4, 3)])
def test_an_image_of_another_shape_or_type_is_refused(detector: Detector, image: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        detector.predict([image])  # type: ignore[list-item]


def test_a_published_checkpoint_needs_the_name_of_its_model(straight: Path, tmp_path: Path, shapes: Path) -> None:
    published = tmp_path / "published.pth"
    options = {"num_queries": 8, "hidden_dim": 32, "nheads": 2, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 32}
    torch.save({"model": build_model("detr_tiny", 91, **options).state_dict()}, published)
    with pytest.raises(CheckpointError, match=r"published\.pth was not written by detr_fast: say which model"):
        Detector.load(published)
    with pytest.raises(ConfigError, match=r"did you mean model\.num_queries"):
        Detector.load(published, model="detr_tiny", num_query=8)
    found = Detector.load(published, model="detr_tiny", **options).predict(shapes / "val" / "000000.jpg", 0.0)[0]
    assert found.names[0] == f"category {found.category_ids[0]}"


def test_a_checkpoint_of_the_published_script_brings_its_number_of_classes(tmp_path: Path) -> None:
    published = tmp_path / "published.pth"
    state = {"model": build_model("detr_tiny", 7).state_dict(), "args": argparse.Namespace(lr=1e-4), "epoch": 3}
    torch.save(state, published)
    with pytest.raises(CheckpointError, match="say which model"):
        Detector.load(published)
    assert Detector.load(published, model="detr_tiny").model.num_classes == 7


def test_a_checkpoint_of_another_model_is_refused(straight: Path) -> None:
    load_checkpoint(straight / "best.pth")
    with pytest.raises(CheckpointError, match=r"best\.pth is not of this model"):
        Detector.load(straight / "best.pth", num_queries=9)
