"""A step: the joint batch of micro-batches, and steps that are not finite."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from accuracy import assert_as_accurate
from engine.steps import batch_of, gradients_of, model_of, part_of, step_of
from torch import Tensor, nn

from detr_fast.criterion import SetCriterion
from detr_fast.engine.distributed import Processes
from detr_fast.engine.skipped import SkippedSteps
from detr_fast.engine.step import PIXELS, PREDICTIONS, TrainingStep
from detr_fast.matcher import HungarianMatcher
from detr_fast.structures import Predictions, Targets

WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
LOSSES = ["labels", "boxes", "cardinality"]


def state_of(model: nn.Module, step: TrainingStep) -> list[Tensor]:
    """Weights, statistics of norms and moments."""
    moments = [value for state in step.optimizer.state.values() for value in state.values()]
    return [x.detach().clone() for x in (*model.state_dict().values(), *moments)]


def assert_unchanged(before: list[Tensor], after: list[Tensor]) -> None:
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize("split", [(2, 4), (1, 3, 4), (1, 2, 3, 4)])
def test_micro_batches_make_the_gradient_of_the_joint_batch(split: tuple[int, ...]) -> None:
    whole = batch_of(4, seed=1)
    losses, gradient = _found([part_of(whole, first, last) for first, last in zip((0, *split), split, strict=False)])
    whole_losses, whole_gradient = _of_whole_batch(torch.float32)
    exact_losses, exact_gradient = _of_whole_batch(torch.float64)
    for name, value in losses.items():
        assert_as_accurate(value, whole_losses[name].float(), exact_losses[name].double())
    assert_as_accurate(gradient, whole_gradient, exact_gradient)


@functools.cache
def _of_whole_batch(dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    whole = batch_of(4, seed=1)
    return _found([_doubled(whole) if dtype == torch.float64 else whole], dtype)


def _found(batches: list, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor]:
    model = model_of(dtype=dtype)
    losses = step_of(model, clip_norm=0)(batches).losses
    return losses, torch.cat([gradient.flatten() for gradient in gradients_of(model).values()])


def test_bf16_is_near_float32() -> None:
    batch = batch_of(4, seed=1)
    found = []
    for precision in (torch.float32, torch.bfloat16):
        model = model_of()
        result = step_of(model, clip_norm=0, precision=precision)([batch])
        assert not result.was_skipped
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        found.append((result.losses["loss"], gradients_of(model)))
    (loss, gradients), (half_loss, half_gradients) = found
    assert half_loss.dtype == torch.float32
    assert half_loss != loss
    torch.testing.assert_close(half_loss, loss, rtol=4 * torch.finfo(torch.bfloat16).eps, atol=0)
    assert half_gradients.keys() == gradients.keys()
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        difference = half_gradients[name] - gradient
        assert difference.norm() <= 0.25 * gradient.norm() + 0.01 * largest, name


def _doubled(batch):
    images = batch.images
    return type(batch)(
        type(images)(images.pixels.double(), images.padding, images.sizes),
        batch.targets,
        batch.image_ids,
        batch.original_sizes,
    )


def test_normalisers_of_parts_add_up() -> None:
    """Also with more targets than queries, class weights, and rows past the last offset."""
    generator = torch.Generator().manual_seed(0)
    counts = [0, 3, 9, 1]
    targets = [
        {"labels": torch.randint(0, 3, (n,), generator=generator), "boxes": torch.rand(n, 4, generator=generator)}
        for n in counts
    ]
    criterion = SetCriterion(3, HungarianMatcher(1, 5, 2), WEIGHTS, 0.1, LOSSES)
    predictions = Predictions(
        torch.randn(2, 4, 6, 4, generator=generator), torch.rand(2, 4, 6, 4, generator=generator).clamp(min=0.05)
    )
    whole = criterion.weighted_loss(predictions, Targets.pack(targets))
    joint = sum(criterion.normalisers(Targets.pack(targets[i : i + 1]), 6) for i in range(4))
    torch.testing.assert_close(joint, criterion.normalisers(Targets.pack(targets), 6))
    assert joint.tolist() == pytest.approx([13, (3 + 6 + 1) + 0.1 * (24 - 10)])
    parts = [
        criterion.weighted_loss(
            Predictions(predictions.logits[:, i : i + 1], predictions.boxes[:, i : i + 1]),
            Targets.pack(targets[i : i + 1]),
            joint,
        )
        for i in range(4)
    ]
    torch.testing.assert_close(sum(total for total, _ in parts), whole[0])
    for name in ("loss_ce", "loss_bbox_0", "loss_giou"):
        torch.testing.assert_close(sum(losses[name] for _, losses in parts), whole[1][name])


def test_spare_rows_do_not_count_as_targets() -> None:
    criterion = SetCriterion(3, HungarianMatcher(1, 5, 2), WEIGHTS, 0.1, LOSSES)
    packed = Targets.pack([{"labels": torch.tensor([1]), "boxes": torch.rand(1, 4)}])
    spare = Targets(
        torch.cat([packed.labels, torch.tensor([77, -5])]),
        torch.cat([packed.boxes, torch.full((2, 4), torch.nan)]),
        packed.offsets,
        3,
    )
    assert torch.equal(criterion.normalisers(spare, 6), criterion.normalisers(packed, 6))


def test_a_batch_without_objects_trains_the_classes_only() -> None:
    model = model_of()
    result = step_of(model)([batch_of(2, seed=1, empty=True), batch_of(2, seed=2, empty=True)])
    assert not result.was_skipped
    assert (float(result.losses["loss_bbox"]), float(result.losses["loss_giou"])) == (0, 0)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_clipping_is_that_of_pytorch() -> None:
    ours, theirs = model_of(), model_of()
    norm = step_of(ours, clip_norm=0.1)([batch_of(2, seed=1)]).losses["gradient_norm"]
    step_of(theirs, clip_norm=0)([batch_of(2, seed=1)])
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
    assert torch.equal(norm, expected)
    assert expected > 0.2
    eps = torch.finfo(torch.float32).eps
    for name, gradient in gradients_of(ours).items():  # a division in place of a product: one rounding each
        torch.testing.assert_close(gradient, gradients_of(theirs)[name], rtol=3 * eps, atol=0)


@pytest.mark.parametrize("name", ["detr_resnet50", "detr_tiny"])
@pytest.mark.parametrize("where", ["pixels", "loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(where: str, name: str) -> None:
    model = model_of(name)
    step, skipped = step_of(model), SkippedSteps(torch.device("cpu"))
    good, bad = batch_of(4, seed=1), batch_of(4, seed=2)
    skipped.add(step([good]), 0)
    before = state_of(model, step)
    handles = []
    if where == "pixels":
        bad.images.pixels[2, 0, 5, 5] = torch.nan
    elif where == "loss":
        handles.append(model.bbox_embed.register_forward_hook(_spoil_image_1))
    else:
        handles.append(model.query_embed.weight.register_hook(lambda gradient: gradient * torch.inf))
    result = step([bad])
    skipped.add(result, 1)
    for handle in handles:
        handle.remove()
    assert result.was_skipped
    assert_unchanged(before, state_of(model, step))
    report = skipped.read({0: good.image_ids, 1: bad.image_ids}, Processes())
    assert report is not None
    assert (report.count, report.longest, skipped.total) == (1, 1, 1)
    (reason,) = report.reasons
    assert reason.startswith(
        {
            "pixels": "step 2: pixels of image id 202 are not finite",
            "loss": "step 2: predictions of image id 201 are not finite",
            "gradient": "step 2, image ids 200, 201, 202, 203: gradient_norm = ",
        }[where]
    )
    expected = {"pixels": [0, 0, PIXELS | PREDICTIONS, 0], "loss": [0, PREDICTIONS, 0, 0], "gradient": [0, 0, 0, 0]}
    if name == "detr_tiny" and where == "pixels":  # norms that learn spread it over the batch
        expected["pixels"] = [PREDICTIONS, PREDICTIONS, PIXELS | PREDICTIONS, PREDICTIONS]
    assert result.flags.tolist() == expected[where]
    assert skipped.read({}, Processes()) is None
    assert not step([good]).was_skipped
    assert not all(torch.equal(one, two) for one, two in zip(before, state_of(model, step), strict=True))


def _spoil_image_1(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output.index_fill(1, torch.tensor([1]), torch.nan)  # [L, B, Q, 4]


@pytest.mark.parametrize("name", ["detr_resnet50", "detr_tiny"])
def test_a_skipped_micro_batch_skips_the_whole_step(name: str) -> None:
    model = model_of(name)
    step = step_of(model)
    step([batch_of(2, seed=1), batch_of(2, seed=2)])
    before = state_of(model, step)
    bad = batch_of(2, seed=3)
    bad.images.pixels[0] = torch.inf
    result = step([bad, batch_of(2, seed=4)])
    assert result.was_skipped
    spread = PREDICTIONS if name == "detr_tiny" else 0  # by norms that learn, over the micro-batch
    assert result.flags.tolist() == [PIXELS | PREDICTIONS, spread, 0, 0]
    assert_unchanged(before, state_of(model, step))


def test_skipped_steps_are_counted_in_a_row_and_in_all() -> None:
    model = model_of("detr_tiny")
    step, skipped = step_of(model), SkippedSteps(torch.device("cpu"))
    good, bad = batch_of(2, seed=1), batch_of(2, seed=2)
    bad.images.pixels[:] = torch.nan
    good_result, bad_result = step([good]), step([bad])
    pattern = [bad_result] * 3 + [good_result] + [bad_result] * 12
    for number, result in enumerate(pattern):
        skipped.add(result, number)
    restored = SkippedSteps(torch.device("cpu"))
    restored.load_state_dict(skipped.state_dict())
    report = skipped.read({}, Processes())
    assert report is not None
    assert (report.count, report.longest, len(report.reasons)) == (15, 12, SkippedSteps.KEPT)
    assert [reason.split(":")[0] for reason in report.reasons[:4]] == [
        *("step 1, unknown images", "step 2, unknown images", "step 3, unknown images", "step 5, unknown images")
    ]
    skipped.add(bad_result, 16)
    after = skipped.read({16: bad.image_ids}, Processes())
    assert after is not None
    assert (after.count, after.longest) == (1, 13)  # a row goes on across a look
    assert (skipped.total, restored.total) == (16, 15)


@pytest.mark.parametrize("name", ["detr_resnet50", "detr_tiny"])
def test_statistics_of_norms_and_weights_stay_with_a_rehearsal(name: str) -> None:
    model = model_of(name)
    step = step_of(model)
    before = copy.deepcopy(model.state_dict())
    step.rehearses.fill_(1)
    assert not step([batch_of(2, seed=1)]).was_skipped
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    step.rehearses.fill_(0)
    step([batch_of(2, seed=1)])
    learned = [key for key, value in model.state_dict().items() if not torch.equal(before[key], value)]
    assert any("running_var" in key for key in learned) == (name == "detr_tiny")
