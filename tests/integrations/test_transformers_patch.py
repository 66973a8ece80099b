"""Patching transformers: what is replaced, undone and refused."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

import pytest
import transformers
from transformers.loss import loss_deformable_detr, loss_for_object_detection, loss_utils

from detr_fast.integrations import patching
from detr_fast.integrations.patching import Patch, Replacement, patch

REPLACED = {
    "ForObjectDetection",
    "ForSegmentation",
    "DeformableDetrForObjectDetection",
    "ConditionalDetrForObjectDetection",
    "ConditionalDetrForSegmentation",
    "DabDetrForObjectDetection",
    "RTDetrForObjectDetection",
    "RTDetrV2ForObjectDetection",
    "DFineForObjectDetection",
    "Deimv2ForObjectDetection",
    "LwDetrForObjectDetection",
    "RfDetrForObjectDetection",
}


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    before = dict(loss_utils.LOSS_MAPPING)
    yield
    try:
        for active in [*patching._active.values()]:
            active.undo()
        assert before == loss_utils.LOSS_MAPPING
    finally:  # whatever failed, other tests find the package
        loss_utils.LOSS_MAPPING.update(before)


def changed(before: dict[str, object]) -> set[str]:
    return {key for key, value in loss_utils.LOSS_MAPPING.items() if value is not before[key]}


def test_all_detection_losses_are_replaced_and_put_back() -> None:
    before = dict(loss_utils.LOSS_MAPPING)
    function = loss_for_object_detection.ForObjectDetectionLoss
    made = patch("transformers")
    assert changed(before) == REPLACED & set(before)
    assert loss_for_object_detection.ForObjectDetectionLoss is not function
    assert loss_deformable_detr.DeformableDetrForSegmentationLoss is not before["ConditionalDetrForSegmentation"]
    made.undo()
    assert not changed(before)
    assert loss_for_object_detection.ForObjectDetectionLoss is function
    made.undo()  # a second time does nothing
    assert not made.is_active


def test_a_block_undoes_at_its_end_even_after_an_error() -> None:
    before = dict(loss_utils.LOSS_MAPPING)

    def fail() -> None:
        with patch("transformers"):
            assert changed(before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not changed(before)


def test_patching_again_changes_nothing_and_the_first_decides() -> None:
    before = dict(loss_utils.LOSS_MAPPING)
    with patch("transformers") as outer:
        value = loss_utils.LOSS_MAPPING["ForObjectDetection"]
        with patch("transformers") as inner:
            assert loss_utils.LOSS_MAPPING["ForObjectDetection"] is value
            assert inner.report() is None
        assert outer.is_active
        assert loss_utils.LOSS_MAPPING["ForObjectDetection"] is value
        with pytest.raises(RuntimeError, match="patched with mode='stable'; undo that patch before mode='compat'"):
            patch("transformers", mode="compat")
    assert not changed(before)


def test_what_others_replaced_since_stays_theirs() -> None:
    def other() -> None: ...

    original = loss_utils.LOSS_MAPPING["ForObjectDetection"]
    made = patch("transformers")
    loss_utils.LOSS_MAPPING["ForObjectDetection"] = other
    made.undo()
    assert loss_utils.LOSS_MAPPING["ForObjectDetection"] is other
    loss_utils.LOSS_MAPPING["ForObjectDetection"] = original


def test_what_others_deleted_since_stays_away() -> None:
    before = dict(loss_utils.LOSS_MAPPING)
    original, made = loss_utils.ForObjectDetectionLoss, patch("transformers")
    del loss_utils.LOSS_MAPPING["ForSegmentation"]
    del loss_utils.ForSegmentationLoss
    made.undo()
    assert "ForSegmentation" not in loss_utils.LOSS_MAPPING
    assert not hasattr(loss_utils, "ForSegmentationLoss")
    assert loss_utils.ForObjectDetectionLoss is original
    assert not made.is_active
    loss_utils.LOSS_MAPPING.update(before)
    loss_utils.ForSegmentationLoss = before["ForSegmentation"]
    with patch("transformers"):  # whose originals are not ours
        assert changed(before) == REPLACED & set(before)
    assert not changed(before)


def test_an_error_while_undoing_leaves_the_patch_active() -> None:
    class Owner(dict):  # type: ignore[type-arg]
        is_locked = False

        def __setitem__(self, name: str, value: object) -> None:
            if self.is_locked:
                raise OSError(f"{name} is locked")
            super().__setitem__(name, value)

    owner = Owner(first=1, second=2)
    made = Patch("nothing", "stable", [Replacement(owner, "first", 3), Replacement(owner, "second", 4)])
    owner.is_locked = True
    with pytest.raises(OSError, match="first is locked"):
        made.undo()
    assert made.is_active
    owner.is_locked = False
    made.undo()
    assert owner == {"first": 1, "second": 2}
    assert not made.is_active


def test_a_nested_patch_ends_with_the_outer_one() -> None:
    outer, inner = patch("transformers"), patch("transformers")
    assert inner.is_active
    outer.undo()
    assert not inner.is_active
    assert "undone" in repr(inner)
    with patch("transformers"):
        assert not inner.is_active
        inner.undo()
        assert patching._active["transformers"].is_active


def test_a_place_that_is_not_there_is_refused() -> None:
    mapping = {"first": 1}
    with pytest.raises(ImportError, match="must have 'second'"):
        Patch("nothing", "stable", [Replacement(mapping, "first", 3), Replacement(mapping, "second", 4)])
    assert mapping == {"first": 1}


def test_a_model_that_has_its_own_loss_keeps_it() -> None:
    model = transformers.YolosForObjectDetection(
        transformers.YolosConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            image_size=[32, 32],
            num_detection_tokens=2,
        )
    )
    with patch("transformers"):
        assert model.loss_function is loss_utils.LOSS_MAPPING["ForObjectDetection"]
        model.loss_function = loss_utils.ForCausalLMLoss
        assert model.loss_function is loss_utils.ForCausalLMLoss


def test_unknown_names_and_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="code_base must be 'transformers' or 'rfdetr', got 'transformer'"):
        patch("transformer")
    with pytest.raises(ValueError, match="mode must be 'stable' or 'compat', got 'exact'"):
        patch("transformers", mode="exact")  # type: ignore[arg-type]


def test_a_package_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="transformers must be installed"):
        patch("transformers")


@pytest.mark.parametrize("version", ["4.56.2", "4.570.0", "6.0.0", "50.1"])
def test_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    before = dict(loss_utils.LOSS_MAPPING)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)  # which the package may replace
    with pytest.raises(ImportError, match=rf"transformers must be of version 4.57.\*, 5.\*, found {version}"):
        patch("transformers")
    assert not changed(before)


def test_a_loss_with_other_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(logits: object, labels: object, masks: object) -> None: ...

    monkeypatch.setattr(loss_utils, "ForObjectDetectionLoss", other)
    with pytest.raises(ImportError, match="ForObjectDetectionLoss of transformers must have the parameters logits, "):
        patch("transformers")


@pytest.mark.parametrize("name", ["ForObjectDetectionLoss", "DFineForObjectDetectionLoss"])
def test_a_loss_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = dict(loss_utils.LOSS_MAPPING)
    monkeypatch.delattr(loss_utils, name)
    with pytest.raises(ImportError, match=f"loss_utils must have {name}, found none in version"):
        patch("transformers")
    assert not changed(before)


@pytest.mark.parametrize("name", ["Deimv2ForObjectDetectionLoss", "LwDetrForObjectDetectionLoss"])
def test_losses_of_newer_versions_may_be_missing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delattr(loss_utils, name, raising=False)
    with patch("transformers") as made:
        assert made.is_active


def test_a_loss_that_no_model_reaches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForSegmentation", lambda: None)
    with pytest.raises(ImportError, match="LOSS_MAPPING of transformers must lead to ForSegmentationLoss"):
        patch("transformers")


def test_replacements_of_mappings_and_attributes() -> None:
    class Owner:
        name = 1

    mapping = {"key": 2}
    made = Patch("nothing", "stable", [Replacement(Owner, "name", 3), Replacement(mapping, "key", 4, lambda: "found")])
    assert (Owner.name, mapping["key"]) == (3, 4)
    assert made.report() == "found"
    assert repr(made) == "Patch('nothing', mode='stable', 2 places)"
    made.undo()
    assert (Owner.name, mapping["key"]) == (1, 2)
    assert repr(made) == "Patch('nothing', mode='stable', undone)"
