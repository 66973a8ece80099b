"""Every kind of model of the installed transformers in training: losses and gradients before and after patching."""

from __future__ import annotations

from fnmatch import fnmatch
from functools import lru_cache
from typing import Any

import pytest
import torch
from integrations.definitions.transformers_models import BUILDERS, LABELS, build, is_available
from torch import Tensor, nn

from detr_fast.integrations.patching import patch
from detr_fast.integrations.transformers.versions import installed_quirks

NAMES = [name for name in BUILDERS if is_available(name)]
COUNTS = {"an image without objects": (2, 0, 3), "no objects": (0, 0, 0), "more objects than queries": (9, 20, 0)}

# Entries that mode="stable" defines otherwise on healthy input, see the adapter's docstring.
OTHERWISE: dict[str, tuple[str, ...]] = {"conditional_segmentation": ("loss*", "cardinality*")}
if installed_quirks().cardinality_of_last_class:
    sigmoid = ("conditional_detr", "dab_detr", "deformable_detr", "deformable_two_stage")
    OTHERWISE |= dict.fromkeys(sigmoid, ("cardinality*",))
if installed_quirks().result_with_denoising:
    with_denoising = ("rt_detr", "rt_detr_v2", "rt_detr_softmax_matching", "d_fine")
    OTHERWISE |= dict.fromkeys(with_denoising, ("loss_vfl", "loss_bbox", "loss_giou"))
    # The package's loss reads a variable that it sets only together with the losses of other layers.
    FAILING = ("rt_detr_last_layer",)
else:
    FAILING = ()


@lru_cache(maxsize=1)
def model_of(name: str) -> nn.Module:
    return build(name)


def batch_of(name: str, counts: tuple[int, ...]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(sum(counts))
    side = 96 if "two_stage" in name else 64  # the coarsest of four levels must have more than one place
    labels = [
        {
            "class_labels": torch.randint(0, LABELS, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.3 + 0.2,
            "masks": torch.rand(count, side, side, generator=generator) > 0.5,
        }
        for count in counts
    ]
    return torch.randn(len(counts), 3, side, side, generator=generator), labels


def step(model: nn.Module, pixels: Tensor, labels: list[dict[str, Tensor]]) -> tuple[Any, list[Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)  # dropout and denoising
    outputs = model(pixel_values=pixels, labels=labels)
    outputs.loss.backward()
    return outputs, [torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in model.parameters()]


def assert_same_structure(expected: Any, found: Any) -> None:
    assert list(found.loss_dict) == list(expected.loss_dict)
    assert [x.dtype for x in found.loss_dict.values()] == [x.dtype for x in expected.loss_dict.values()]
    assert found.loss.shape == expected.loss.shape
    assert (found.auxiliary_outputs is None) == (expected.auxiliary_outputs is None)
    for own, other in zip(found.auxiliary_outputs or (), expected.auxiliary_outputs or (), strict=True):
        assert list(own) == list(other)
        for key in own:
            assert torch.equal(own[key], other[key]), key


def assert_equal_but(patterns: tuple[str, ...], expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for key, value in expected.items():
        if not any(fnmatch(key, pattern) for pattern in patterns):
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=lambda x, key=key: f"{key}: {x}")


def assert_same_gradients(expected: list[Tensor], found: list[Tensor]) -> None:
    largest = max(x.abs().max() for x in expected)
    assert largest > 0
    for own, other in zip(found, expected, strict=True):
        assert (own - other).abs().max() <= 1e-5 * largest


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FAILING])
def test_compat_is_the_package(name: str) -> None:
    model = model_of(name)
    for kind, counts in COUNTS.items():
        batch = batch_of(name, counts)
        expected, gradients = step(model, *batch)
        with patch("transformers", mode="compat"):
            found, own = step(model, *batch)
        assert_same_structure(expected, found)
        assert_equal_but((), expected.loss_dict, found.loss_dict)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6, msg=lambda x, kind=kind: kind + x)
        assert_same_gradients(gradients, own)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("d_fine_without_denoising", *FAILING)])
def test_stable_differs_only_as_documented(name: str) -> None:
    model, batch = model_of(name), batch_of(name, COUNTS["an image without objects"])
    expected, gradients = step(model, *batch)
    with patch("transformers"):
        found, own = step(model, *batch)
    assert_same_structure(expected, found)
    excepted = OTHERWISE.get(name, ())
    assert_equal_but(excepted, expected.loss_dict, found.loss_dict)
    if not any(x.startswith("loss") for x in excepted):
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
        assert_same_gradients(gradients, own)
    assert found.loss.isfinite()


@pytest.mark.parametrize("name", FAILING)
def test_what_fails_in_the_package_has_a_loss_here(name: str) -> None:
    model, batch = model_of(name), batch_of(name, COUNTS["an image without objects"])
    with pytest.raises(UnboundLocalError):
        step(model, *batch)
    with patch("transformers"):
        assert step(model, *batch)[0].loss.isfinite()


@pytest.mark.parametrize("mode", ["stable", "compat"])
@pytest.mark.parametrize("name", NAMES)
def test_a_faulty_annotation_of_any_model_is_named(name: str, mode: Any) -> None:
    model, (pixels, labels) = model_of(name), batch_of(name, COUNTS["an image without objects"])
    labels[2]["class_labels"][1] = LABELS
    with patch("transformers", mode=mode), pytest.raises(ValueError, match="image 2 of the batch, target 1: label"):
        model(pixel_values=pixels, labels=labels)


@pytest.mark.parametrize("name", [name for name in NAMES if name == "d_fine_without_denoising"])
def test_stable_judges_all_layers_of_d_fine_without_denoising(name: str) -> None:
    model, batch = model_of(name), batch_of(name, COUNTS["an image without objects"])
    expected, _ = step(model, *batch)
    with patch("transformers"):
        found, _ = step(model, *batch)
    assert "loss_fgl_aux_0" in found.loss_dict
    for key, value in expected.loss_dict.items():
        torch.testing.assert_close(found.loss_dict[key], value, rtol=1e-5, atol=1e-6)


def test_evaluation_of_groups_is_one_group_in_stable() -> None:
    if not is_available("lw_detr"):
        pytest.skip("this version has no LW-DETR")
    model = build("lw_detr").eval()
    batch = batch_of("lw_detr", (2, 0, 3))
    with torch.no_grad():
        of_groups = model(pixel_values=batch[0], labels=batch[1]).loss
        groups, model.config.group_detr = model.config.group_detr, 1
        of_one = model(pixel_values=batch[0], labels=batch[1]).loss
        model.config.group_detr = groups
        with patch("transformers", mode="compat"):
            compat = model(pixel_values=batch[0], labels=batch[1]).loss
        with patch("transformers"):
            stable = model(pixel_values=batch[0], labels=batch[1]).loss
    torch.testing.assert_close(compat, of_groups, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stable, of_one, rtol=1e-5, atol=1e-6)
    assert abs(of_groups - of_one) > 1e-2
