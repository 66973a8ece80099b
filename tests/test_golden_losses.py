"""Matcher and criterion against recorded losses, assignments and gradients of the published implementation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from detr_fast import HungarianMatcher, Predictions, SetCriterion, Targets

FILES = sorted((Path(__file__).parent / "golden" / "losses").glob("detr_*.npz"))
RELATIVE = 1e-5  # the recorded numbers are float32


def targets_of(data: np.lib.npyio.NpzFile) -> list[dict[str, torch.Tensor]]:
    ends = np.cumsum(data["target_counts"])
    return [
        {
            "labels": torch.from_numpy(data["target_labels"][end - count : end]),
            "boxes": torch.from_numpy(data["target_boxes"][end - count : end]),
        }
        for end, count in zip(ends, data["target_counts"], strict=True)
    ]


@pytest.fixture(params=["cpu", "emulated CUDA"])
def _kernels(request: pytest.FixtureRequest) -> None:
    if request.param != "cpu":
        request.getfixturevalue("emulated_ops")


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("fast", [False, True], ids=["dictionaries", "Predictions"])
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_recorded_case(file: Path, fast: bool) -> None:
    with np.load(file) as data:
        meta = json.loads(str(data["meta"]))
        config = meta["criterion"]
        matcher = HungarianMatcher(*(config["costs"][name] for name in ("class", "bbox", "giou")))
        criterion = SetCriterion(
            config["num_classes"], matcher, meta["weight_dict"], config["eos_coef"], config["losses"]
        )
        logits = torch.from_numpy(data["logits"]).requires_grad_()
        boxes = torch.from_numpy(data["boxes"]).requires_grad_()
        predictions, targets = Predictions(logits, boxes), targets_of(data)
        losses = criterion(predictions, Targets.pack(targets)) if fast else criterion(predictions.as_dict(), targets)

        names = json.loads(str(data["loss_names"]))
        assert list(losses) == names
        for name, expected in zip(names, data["loss_values"], strict=True):
            assert abs(losses[name].item() - expected) <= RELATIVE * max(abs(expected), 1e-3), name
        criterion.weighted_sum(losses).backward()
        for gradient, expected in ((logits.grad, data["grad_logits"]), (boxes.grad, data["grad_boxes"])):
            assert np.abs(gradient.numpy() - expected).max() <= RELATIVE * max(np.abs(expected).max(), 1e-12)

        at = 0
        for layer in range(len(logits)):
            outputs = {"pred_logits": logits[layer].detach(), "pred_boxes": boxes[layer].detach()}
            for image, (queries, own) in enumerate(matcher(outputs, targets)):
                count = data["match_counts"][layer][image]
                assert queries.numpy().tolist() == data["match_query"][at : at + count].tolist()
                assert own.numpy().tolist() == data["match_target"][at : at + count].tolist()
                at += count


def test_cases_are_there() -> None:
    assert len(FILES) == 4
