"""The replaced loss functions and annotations: faulty ones are named, masks looked at only where a loss uses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integrations.test_transformers_patch_losses import KINDS, C, computed, labels_of, outputs_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from detr_fast.integrations.constants import Constants
from detr_fast.integrations.patching import patch
from detr_fast.integrations.transformers import sets
from detr_fast.integrations.transformers.versions import installed_quirks

FAULTS = {
    "label too large": (lambda own: own["class_labels"][2:].fill_(C), "target 2: label must be"),
    "negative label": (lambda own: own["class_labels"][1:2].fill_(-1), "target 1: label must be"),
    "negative size": (lambda own: own["boxes"][2, 3:].fill_(-0.1), "target 2: box must be"),
    "not finite": (lambda own: own["boxes"][0, 1:].fill_(torch.nan), "target 0: box must be"),
}


@pytest.mark.parametrize("mode", ["stable", "compat"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_image_of_a_faulty_annotation_is_named(fault: str, kind: str, mode: Any) -> None:
    labels = labels_of(2, 3)
    spoil, message = FAULTS[fault]
    spoil(labels[1])
    with patch("transformers", mode=mode), pytest.raises(ValueError, match=f"image 1 of the batch, {message}"):
        computed(kind, *outputs_of(kind), labels)


@pytest.mark.parametrize("mode", ["stable", "compat"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["label too large", "negative size"])
def test_annotations_on_a_device_are_reported(
    fault: str, kind: str, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sets, "FakeTensor", Tensor)  # as if there was nothing to look at
    labels = labels_of(2, 3)
    FAULTS[fault][0](labels[1])
    raises = mode == "compat" and installed_quirks().raises
    with patch("transformers", mode=mode) as made:
        if raises:
            with pytest.raises(ValueError, match="image 1 of the batch, target 2"):
                computed(kind, *outputs_of(kind), labels)
            return
        _, losses, _ = computed(kind, *outputs_of(kind), labels)
        assert "image 1, target 2" in (made.report() or "")
    is_matched = mode == "compat" and fault == "negative size"
    assert losses["loss_giou"].isnan() == is_matched
    assert losses["loss_ce"].isfinite()


def test_the_package_takes_the_label_past_the_last_for_no_object() -> None:
    """The difference that the adapter's docstring states."""
    labels = labels_of(2, 3)
    labels[1]["class_labels"][2] = C
    assert computed(KINDS[0], *outputs_of(KINDS[0]), labels)[0].isfinite()


@pytest.mark.parametrize("mode", ["stable", "compat"])
@pytest.mark.parametrize("masks", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_detection_does_not_look_at_masks(kind: str, masks: tuple[bool, bool], mode: Any) -> None:
    labels = labels_of(2, 3)
    expected, _, _ = computed(kind, *outputs_of(kind), labels)
    for own, has_masks in zip(labels, masks, strict=True):
        if has_masks:
            own["masks"] = torch.rand(8, 8) > 0.5  # of the image, not of its objects
    with patch("transformers", mode=mode):
        found, _, _ = computed(kind, *outputs_of(kind), labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_values_leaves_nothing_behind(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "_constants", Constants())
    with patch("transformers"):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            logits, boxes = (mode.from_tensor(x.detach()).requires_grad_() for x in outputs_of(kind))
            labels = [{name: mode.from_tensor(x) for name, x in own.items()} for own in labels_of(2, 3)]
            assert computed(kind, logits, boxes, labels)[0].shape == ()
        found: Tensor = computed(kind, *outputs_of(kind), labels_of(2, 3))[0]
    torch.testing.assert_close(found, computed(kind, *outputs_of(kind), labels_of(2, 3))[0], rtol=1e-5, atol=1e-6)
