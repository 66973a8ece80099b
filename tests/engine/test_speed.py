"""Switches of how a step is computed change rounding only, and compile a bounded number of times."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import assert_as_accurate
from engine.steps import CLASSES, batch_of, gradients_of, model_of, step_of
from torch import nn

from detr_fast.data.batch import Batch
from detr_fast.engine.average import AveragedModel
from detr_fast.engine.config import SpeedConfig
from detr_fast.engine.speed import apply_speed, arithmetic, compilations
from detr_fast.structures import Images, Targets


@pytest.mark.parametrize("switch", ["channels_last", "fold_norms"])
def test_a_switch_changes_rounding_only(switch: str) -> None:
    found = {}
    for dtype, value in ((torch.float32, True), (torch.float32, False), (torch.float64, True)):
        model = model_of(dtype=dtype)
        for buffer in (module for name, module in model.named_buffers() if "running_var" in name):
            buffer.mul_(1.7)  # norms that do something
        apply_speed(model, SpeedConfig(**{switch: value}))
        batch = batch_of(2, seed=1)
        images = Images(batch.images.pixels.to(dtype), batch.images.padding, batch.images.sizes)
        found[dtype, value] = model(images).logits.detach()
    on, off, exact = found.values()
    assert not torch.equal(on, off) or switch == "channels_last"
    assert_as_accurate(on, off, exact)


def test_the_order_in_memory_is_what_was_asked_for() -> None:
    for is_last in (True, False):
        model = model_of()
        apply_speed(model, SpeedConfig(channels_last=is_last))
        maps = model.backbone[0](batch_of(2).images.pixels)
        assert maps[-1].is_contiguous(memory_format=torch.channels_last) == is_last
        assert maps[-1].is_contiguous() != is_last


def test_pytorchs_switches_are_put_back() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with arithmetic(tf32=True, deterministic=True):
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.are_deterministic_algorithms_enabled()
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def compiled_graphs() -> Callable[[], int]:
    """Graphs that this test has compiled until now. (`reset` leaves the counters as the tests before left them.)"""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    return lambda: counters["stats"]["unique_graphs"] - before


@pytest.fixture
def graphs(compiled_graphs: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """As `compiled_graphs`. Compiling stops where what is slow would begin."""
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: original(self, backend="eager", **options))
    return compiled_graphs


@pytest.mark.slow
def test_no_more_canvases_are_compiled_than_asked_for(graphs: Callable[[], int]) -> None:
    model = model_of("detr_tiny")
    apply_speed(model, SpeedConfig(compile=True, most_canvases=2))
    step, found = step_of(model), [graphs()]
    for canvas in (64, 96, 64, 128, 160):
        step([batch_on(canvas)])
        found.append(graphs())
    assert found[0] < found[1] < found[2]
    assert len(set(found[2:])) == 1


def test_evaluation_is_not_compiled_and_uses_up_no_canvas(graphs: Callable[[], int]) -> None:
    model = model_of("detr_tiny")
    apply_speed(model, SpeedConfig(compile=True, most_canvases=2))
    step = step_of(model)
    step([batch_on(64)])
    before = graphs()
    model.eval()
    with torch.no_grad():
        for canvas in (64, 96, 128, 160, 192, 224, 256, 288, 320, 352):
            model(batch_on(canvas).images)
    assert graphs() == before
    step.model.train()
    step([batch_on(96)])
    assert graphs() > before


def test_an_average_of_a_compiled_model_is_one_of_its_own(graphs: Callable[[], int]) -> None:
    model = model_of("detr_tiny")
    apply_speed(model, SpeedConfig(compile=True))
    average, batch, before = AveragedModel(model, decay=0.9).model, batch_on(64), graphs()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        assert average(batch.images).logits.abs().sum() > 0
    assert graphs() == before


def test_the_limit_of_compilations_is_put_back() -> None:
    before = torch._dynamo.config.recompile_limit
    with compilations(SpeedConfig(compile=True, most_canvases=20)):
        assert torch._dynamo.config.recompile_limit == 20
    with compilations(SpeedConfig(compile=True, most_canvases=2)):
        assert torch._dynamo.config.recompile_limit == before
    assert torch._dynamo.config.recompile_limit == before


def batch_on(width: int) -> Batch:
    """Two images of 64 pixels' height, one as wide as the canvas."""
    generator = torch.Generator().manual_seed(width)
    images = Images.batch([torch.randn(3, 64, own, generator=generator) for own in (width, 64)])
    target = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    return Batch(images, Targets.pack([target, target], CLASSES), (1, 2), torch.tensor([[64, width], [64, 64]]))


@pytest.mark.slow
def test_compiled_once_for_each_canvas_and_once_for_all_numbers_of_tokens(compiled_graphs: Callable[[], int]) -> None:
    plain, compiled = model_of(), model_of()
    apply_speed(compiled, SpeedConfig(compile=True))
    ours, theirs = step_of(plain), step_of(compiled)
    graphs = []
    # Two canvases, 64 x 64 of four images and 64 x 48 of one, which come again; numbers of tokens differ.
    for images, seed in ((4, 1), (1, 2), (4, 3), (1, 4), (4, 5), (1, 6)):
        batch = batch_of(images, seed)
        expected, found = ours([batch]), theirs([batch])
        torch.testing.assert_close(found.losses["loss"], expected.losses["loss"], rtol=1e-3, atol=0)
        graphs.append(compiled_graphs())
    assert graphs[-1] == graphs[2], "compiled again for a canvas that was there before"
    assert graphs[-1] <= 5
    assert gradients_of(compiled).keys() == gradients_of(plain).keys()
