"""Our training step against the paper's as benchmarks/reference*.py spell it out: outputs, one step, many steps."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate
from torch import Tensor, nn

from benchmarks.reference import reference_model
from benchmarks.reference_step import ReferenceCriterion, ReferenceStep, dictionaries, reference_optimizer
from benchmarks.scenes import coco_like_batch, shapes_batch
from detr_fast.data.batch import Batch
from detr_fast.engine.build import build_criterion
from detr_fast.engine.config import Config, OptimizerConfig
from detr_fast.engine.optimizer import build_optimizer
from detr_fast.engine.step import TrainingStep
from detr_fast.models import build_model
from detr_fast.structures import Predictions

LABELS = 5
RATE, DECAY, ADAM_EPS = 1e-4, 1e-4, 1e-8  # of both groups; AdamW's own epsilon
SHALLOW: dict[str, Any] = {"enc_layers": 1, "dec_layers": 2, "dropout": 0.0, "num_queries": 20}
LAST_NORM = re.compile(r"layer\d\.\d\.bn3\.weight")
MODELS = {"detr_tiny": {}, "detr_resnet50": SHALLOW}


@pytest.fixture(scope="module", params=["detr_tiny", pytest.param("detr_resnet50", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    return twins(request.param, MODELS[request.param])


@pytest.fixture(scope="module")
def batch() -> Batch:
    return coco_like_batch(3, LABELS, shrink=6)


def twins(name: str, options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Ours and the reference, with the same random weights and constants of norms."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    ours, reference = build_model(name, LABELS, **options), reference_model(name, LABELS, **options)
    for entry, value in ours.state_dict().items():
        if value.is_floating_point() and ("bn" in entry or "downsample.1" in entry):
            # What a block adds is small, as after training, or the maps would grow with every block.
            is_last = LAST_NORM.search(entry) is not None
            value.copy_(torch.empty_like(value).uniform_(0.5, 1.5, generator=generator) * (0.2 if is_last else 1))
    reference.load_state_dict(ours.state_dict())
    return ours.train(), reference.train()


def in_double(batch: Batch) -> Batch:
    images, targets = batch.images, batch.targets
    return replace(
        batch,
        images=replace(images, pixels=images.pixels.double()),
        targets=replace(targets, boxes=targets.boxes.double()),
    )


def test_the_same_parameters_are_trained(pair: tuple[nn.Module, nn.Module]) -> None:
    trained = [{name: p.requires_grad for name, p in model.named_parameters()} for model in pair]
    assert trained[0] == trained[1]


def test_outputs_are_those_of_the_reference(pair: tuple[nn.Module, nn.Module], batch: Batch) -> None:
    ours, reference = (copy.deepcopy(model) for model in pair)
    images = batch.images
    assert len(set(images.sizes)) > 1
    found = ours(images)
    definition = Predictions.from_dict(reference(images.pixels, images.padding))
    exact = Predictions.from_dict(reference.double()(images.pixels.double(), images.padding))
    assert_as_accurate(found.logits, definition.logits, exact.logits)
    assert_as_accurate(found.boxes, definition.boxes, exact.boxes)


class OurStep:
    """As a run of the engine builds it."""

    def __init__(self, model: nn.Module) -> None:
        config = OptimizerConfig(learning_rate=RATE, backbone_learning_rate=RATE, weight_decay=DECAY)
        self.model, self.optimizer = model, build_optimizer(model, config)
        self.step = TrainingStep(model, build_criterion(Config(), LABELS), self.optimizer)

    def __call__(self, batch: Batch) -> float:
        return float(self.step([batch]).losses["loss"])


class TheirStep:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.optimizer = model, reference_optimizer(model, RATE, RATE, DECAY)
        criterion = ReferenceCriterion(LABELS).to(next(model.parameters()).dtype)
        self.step = ReferenceStep(model, criterion, self.optimizer)

    def __call__(self, batch: Batch) -> float:
        return self.step(batch, dictionaries(batch))


@dataclass(frozen=True)
class OneStep:
    """What is found of one step: by ours, by the reference in several draws, and exactly."""

    before: nn.Module
    ours: OurStep
    draws: list[TheirStep]
    exact: TheirStep
    losses: list[float]  # in the same order

    @classmethod
    def of(cls, pair: tuple[nn.Module, nn.Module], batch: Batch) -> OneStep:
        """An image's last bits decide on which side of 0 some inputs of ReLUs fall, and so do orders of sums.

        Where that is so the gradient jumps, in the reference itself: its own error is the largest of some draws, of
        pixels changed in their last bit and of both orders in memory.
        """
        ours, exact = OurStep(copy.deepcopy(pair[0])), TheirStep(copy.deepcopy(pair[1]).double())
        losses, draws = [ours(batch)], []
        for seed in range(6):
            order = torch.channels_last if seed % 2 else torch.contiguous_format
            draws.append(TheirStep(copy.deepcopy(pair[1]).to(memory_format=order)))  # type: ignore[call-overload]
            losses.append(draws[-1](nudged(batch, seed, order)))
        return cls(pair[0], ours, draws, exact, [*losses, exact(in_double(batch))])


def nudged(batch: Batch, seed: int, order: torch.memory_format) -> Batch:
    """Pixels up to a rounding away; for seed 0 themselves."""
    pixels = batch.images.pixels
    places = torch.randint(-1, 2, pixels.shape, generator=torch.Generator().manual_seed(seed))
    pixels = pixels * (1 + torch.finfo(pixels.dtype).eps * places * (seed > 0))
    return replace(batch, images=replace(batch.images, pixels=pixels.contiguous(memory_format=order)))


@pytest.fixture(scope="module")
def one_step(pair: tuple[nn.Module, nn.Module], batch: Batch) -> OneStep:
    return OneStep.of(pair, batch)


def gradient(step: OurStep | TheirStep, name: str) -> Tensor:
    """That the optimizer saw in its first step, clipped: a tenth of it is the first moment."""
    parameter = step.model.get_parameter(name)
    return step.optimizer.state[parameter]["exp_avg"] / 0.1


def gradients(found: OneStep) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Of each trained parameter its name, our gradient, the exact one and the largest error that is allowed."""
    for name, parameter in found.before.named_parameters():
        if not parameter.requires_grad:
            continue
        exact = gradient(found.exact, name)
        own = max(float((gradient(draw, name) - exact).abs().max()) for draw in found.draws)
        rounding = 4 * torch.finfo(torch.float32).eps * float(exact.abs().max())
        yield name, gradient(found.ours, name), exact, 2 * own + rounding


def test_the_loss_of_one_step_is_that_of_the_reference(one_step: OneStep) -> None:
    ours, *draws, exact = (torch.tensor(loss) for loss in one_step.losses)
    assert_as_accurate(ours, max(draws, key=lambda loss: float(abs(loss - exact))), exact.double())


def test_gradients_of_one_step_are_those_of_the_reference(one_step: OneStep) -> None:
    for name, found, exact, allowed in gradients(one_step):
        error = float((found - exact).abs().max())
        assert error <= allowed, f"{name}: {error / float(exact.abs().max()):.2e} of the largest, {error / allowed:.2f}"


def test_weights_after_one_step_are_those_of_the_reference(one_step: OneStep) -> None:
    """AdamW's first step is lr f(g) with f(g) = g / (|g| + eps), almost the sign of g.

    As f is monotone, a gradient known to within e gives a weight known to within the larger distance of f(g - e) and
    f(g + e) from f(g): almost nothing where |g| is well above e, up to 2 lr where the sign itself is in doubt. So each
    weight is judged by the error that its gradient may have; and those in doubt have to be few, or nothing is shown.
    """
    eps = torch.finfo(torch.float32).eps
    in_doubt = count = 0
    for name, _, g, e in gradients(one_step):
        step = [x / (x.abs() + ADAM_EPS) for x in (g - e, g, g + e)]
        spread = RATE * torch.maximum(step[1] - step[0], step[2] - step[1])
        after, exact = (x.model.get_parameter(name).detach() for x in (one_step.ours, one_step.exact))
        # Roundings of the weight, its decay and the step's few operations.
        allowed = spread + 2 * eps * exact.abs() + 16 * eps * RATE
        worst = float(((after - exact).abs() / allowed).max())
        assert worst <= 1, f"{name}: {worst:.2f} of what is allowed"
        assert not g.any() or not torch.equal(after, one_step.before.get_parameter(name)), name
        in_doubt += int((spread > 0.1 * RATE).sum())
        count += g.numel()
    assert in_doubt < 0.01 * count


def continue_from(ours: OurStep, reference: TheirStep) -> None:
    """Takes over weights, statistics of norms and moments."""
    ours.model.load_state_dict(reference.model.state_dict())
    for name, parameter in reference.model.named_parameters():
        own = ours.model.get_parameter(name)
        for entry, value in reference.optimizer.state[parameter].items():
            # Fused AdamW walks through memory, so moments must lie as the parameter does.
            copied = torch.empty_like(own).copy_(value) if value.dim() else value.clone()
            ours.optimizer.state[own][entry] = copied


@pytest.mark.slow
def test_losses_of_many_steps_follow_the_reference() -> None:
    """Clipping, moments, decay and statistics of norms over 200 steps, as the losses show them.

    Training is chaotic: a rounding decides a matching between almost equal queries, and the reference itself, with
    pixels changed in their last bit, is 8 % away from itself before 200 steps are over; left to themselves, both agree
    to 1e-6 for 35 steps. So every 10 steps ours takes over the reference's weights and moments.
    """
    first, second = twins("detr_tiny", {})
    ours, reference = OurStep(first), TheirStep(second)
    losses = []
    for number in range(200):
        if number and number % 10 == 0:
            continue_from(ours, reference)
        batch = shapes_batch(4, 64, seed=number)
        losses.append((ours(batch), reference(batch)))
    deviations = [abs(found - expected) / expected for found, expected in losses]
    print(f"largest relative deviation of the loss: {max(deviations):.1e}")
    assert losses[-1][1] < 0.7 * losses[0][1]  # it does learn
    assert max(deviations) <= 1e-3
