"""The replaced loss functions by themselves: faulty input, types, gradients that pass other ways, processes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.loss import loss_utils

from detr_fast.integrations.patching import Patch, patch
from detr_fast.integrations.transformers import settings
from detr_fast.integrations.transformers.versions import installed_quirks

L, B, Q, C = 3, 2, 9, 5
KINDS = ("ForObjectDetection", "DeformableDetrForObjectDetection")


def config_of(kind: str) -> SimpleNamespace:
    return SimpleNamespace(
        class_cost=2,
        bbox_cost=5,
        giou_cost=2,
        num_labels=C,
        eos_coefficient=0.1,
        focal_alpha=0.3,
        auxiliary_loss=True,
        decoder_layers=L,
        bbox_loss_coefficient=4,
        giou_loss_coefficient=3,
    )


def outputs_of(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    classes = C + (kind == "ForObjectDetection")
    logits = torch.randn(L, B, Q, classes, generator=generator).to(dtype)
    boxes = (torch.rand(L, B, Q, 4, generator=generator) * 0.4 + 0.2).to(dtype)
    return logits.requires_grad_(), boxes.requires_grad_()


def labels_of(*counts: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        {
            "class_labels": torch.randint(0, C, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.4 + 0.2,
        }
        for count in counts
    ]


def computed(kind: str, logits: Tensor, boxes: Tensor, labels: list[dict[str, Tensor]]) -> Any:
    function: Callable[..., Any] = loss_utils.LOSS_MAPPING[kind]
    return function(logits[-1], labels, torch.device("cpu"), boxes[-1], config_of(kind), logits, boxes)


def test_labels_without_a_key_are_named() -> None:
    labels = labels_of(2, 1)
    labels[1]["labels"] = labels[1].pop("class_labels")
    with patch("transformers"), pytest.raises(ValueError, match=r"labels of image 1 .*'class_labels' is missing, got"):
        computed("ForObjectDetection", *outputs_of("ForObjectDetection"), labels)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_keep_their_gradients(kind: str) -> None:
    gradients = []
    for is_patched in (False, True):
        logits, boxes = outputs_of(kind)
        with patch("transformers", mode="compat") if is_patched else patch_of_nothing():
            _, losses, _ = computed(kind, logits, boxes, labels_of(2, 3))
        (losses["loss_giou_0"] + 2 * losses["loss_ce"]).backward()
        gradients.append((logits.grad, boxes.grad))
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def patch_of_nothing() -> Patch:
    return Patch("nothing", "stable", ())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["retained", "hook", "detached", "another tensor"])
def test_a_result_that_is_not_just_the_last_layer(kind: str, way: str) -> None:
    """The last layer may be taken from the stacked ones only if nothing can tell."""
    seen = []
    for is_patched in (False, True):
        logits, boxes = outputs_of(kind)
        result = logits[-1].detach() if way == "detached" else logits[-1]
        if way == "another tensor":
            result = result * 2
        if way == "retained":
            result.retain_grad()
        if way == "hook":
            result.register_hook(lambda gradient: gradient * 3)
        function = loss_utils.LOSS_MAPPING[kind]
        with patch("transformers", mode="compat") if is_patched else patch_of_nothing():
            function = loss_utils.LOSS_MAPPING[kind]
            total, _, _ = function(result, labels_of(2, 3), "cpu", boxes[-1], config_of(kind), logits, boxes)
        total.backward()
        seen.append([logits.grad, boxes.grad, *([result.grad] if way == "retained" else [])])
    for expected, found in zip(*seen, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_stays(kind: str) -> None:
    """The package fails: its weights and targets are float32."""
    exact, _, _ = computed(kind, *outputs_of(kind), labels_of(2, 3))
    with patch("transformers", mode="compat"):
        total, losses, _ = computed(kind, *outputs_of(kind, torch.float64), labels_of(2, 3))
    assert {x.dtype for x in (total, *losses.values())} <= {torch.float64, torch.float32}
    assert total.dtype == losses["loss_bbox"].dtype == torch.float64
    torch.testing.assert_close(total, exact.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["stable", "compat"])
def test_half_types(kind: str, dtype: torch.dtype, mode: Any) -> None:
    logits, boxes = outputs_of(kind, dtype)
    with torch.no_grad():
        logits[0, 0, 0, 0] = 20.0  # the focal cost with an epsilon is infinite there in float16
    exact = computed_by_package(kind, logits.detach().float(), boxes.detach().float(), labels_of(2, 3))
    with patch("transformers", mode=mode):
        total, losses, _ = computed(kind, logits, boxes, labels_of(2, 3))
    total.backward()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, exact, rtol=1e-4, atol=1e-4)
    assert all(x.isfinite() for x in losses.values())
    assert logits.grad is not None
    assert boxes.grad is not None
    assert logits.grad.dtype == boxes.grad.dtype == dtype
    assert logits.grad.isfinite().all()


def computed_by_package(kind: str, logits: Tensor, boxes: Tensor, labels: list[dict[str, Tensor]]) -> Tensor:
    return computed(kind, logits, boxes, labels)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_that_are_not_finite(kind: str) -> None:
    logits, boxes = outputs_of(kind)
    labels = labels_of(2, 3)
    broken = logits.detach().clone()
    broken[1, 0, 4] = torch.nan
    if installed_quirks().raises:
        for function in (lambda: None, lambda: patch("transformers", mode="compat")):
            with function() or patch_of_nothing(), pytest.raises(ValueError):
                computed(kind, broken, boxes, labels)
    else:
        _, expected, _ = computed(kind, broken, boxes, labels)
        with patch("transformers", mode="compat"):
            _, found, _ = computed(kind, broken, boxes, labels)
        for key in ("loss_bbox", "loss_giou"):  # of layer 1, which leaves out the query
            torch.testing.assert_close(found[f"{key}_1"], expected[f"{key}_1"], rtol=1e-5, atol=1e-6)
    with patch("transformers") as made:
        assert made.report() is None
        _, stable, _ = computed(kind, broken, boxes, labels)
        report = made.report()
        assert report is not None
        assert "layer 1" in report
        assert made.report() is None
    assert stable["loss_bbox_1"].isfinite()
    assert stable["loss_ce_0"].isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_when_nothing_is_finite_compat_matches_and_stable_does_not(kind: str) -> None:
    if installed_quirks().raises:
        pytest.skip("this version raises an error")
    logits, boxes = outputs_of(kind)
    broken = torch.full_like(logits, torch.nan)
    with patch("transformers", mode="compat"):
        assert computed(kind, broken, boxes, labels_of(2, 3))[1]["loss_bbox"] > 0
    with patch("transformers"):
        assert computed(kind, broken, boxes, labels_of(2, 3))[1]["loss_bbox"] == 0


@pytest.mark.parametrize(("mode", "expected"), [("stable", 6.0), ("compat", 3.0)])
def test_normaliser_of_two_processes(monkeypatch: pytest.MonkeyPatch, mode: Any, expected: float) -> None:
    """The mean count of targets is 6; the package divides it by the number of processes again."""

    class PartialState:
        _shared_state = {"backend": "gloo"}  # noqa: RUF012
        num_processes = 2

    monkeypatch.setattr(settings, "mean_box_count", lambda offsets: torch.tensor(6.0))
    monkeypatch.setitem(sys.modules, "accelerate", SimpleNamespace(PartialState=PartialState))
    logits, boxes = outputs_of(KINDS[0])
    labels = labels_of(2, 2)
    _, alone, _ = computed(KINDS[0], logits, boxes, labels)
    with patch("transformers", mode=mode):
        _, losses, _ = computed(KINDS[0], logits, boxes, labels)
    for key in ("loss_bbox", "loss_giou_1"):
        torch.testing.assert_close(losses[key], alone[key] * 4 / expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["loss_ce"], alone["loss_ce"], rtol=1e-5, atol=1e-6)


def test_without_accelerate_each_process_counts_its_own_in_compat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "mean_box_count", lambda offsets: torch.tensor(6.0))
    monkeypatch.delitem(sys.modules, "accelerate", raising=False)
    logits, boxes = outputs_of(KINDS[0])
    expected, _, _ = computed(KINDS[0], logits, boxes, labels_of(2, 2))
    with patch("transformers", mode="compat"):
        found, _, _ = computed(KINDS[0], logits, boxes, labels_of(2, 2))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_the_configuration_does_not_know_have_no_weight(kind: str) -> None:
    logits, boxes = outputs_of(kind)
    config = config_of(kind)
    config.decoder_layers = 2
    arguments = (logits[-1], labels_of(2, 3), "cpu", boxes[-1], config, logits, boxes)
    expected, entries, _ = loss_utils.LOSS_MAPPING[kind](*arguments)
    with patch("transformers", mode="compat"):
        found, own, _ = loss_utils.LOSS_MAPPING[kind](*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own["loss_bbox_1"], entries["loss_bbox_1"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_in_one_graph(kind: str) -> None:
    logits, boxes = outputs_of(kind)
    labels, config = labels_of(2, 3), config_of(kind)

    def total(function: Callable[..., Any]) -> Tensor:
        return function(logits[-1], labels, "cpu", boxes[-1], config, logits, boxes)[0]

    with patch("transformers"):
        function = loss_utils.LOSS_MAPPING[kind]
        expected = total(function)  # the first step makes the matcher, which a graph cannot
        found = torch.compile(total, backend="eager", fullgraph=True)(function)
    torch.testing.assert_close(found, expected)
