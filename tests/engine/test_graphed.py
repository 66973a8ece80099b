"""Steps in memory that does not move. On a CPU the graph's path computes anew what a GPU replays."""

from __future__ import annotations

import pytest
import torch
from engine.steps import CLASSES, batch_of, model_of, step_of
from torch import Tensor, nn

from detr_fast.data.batch import Batch
from detr_fast.engine.graphed import GraphedSteps
from detr_fast.structures import Images, Targets

SIZES = ((1, 64), (2, 96), (3, 128), (4, 64), (5, 32))  # seeds, and widths of the smaller of two images


def batch_on_canvas(seed: int, width: int) -> Batch:
    """Two images on 128 x 128, of which the second fills a part: rows are spare, and their number changes."""
    generator = torch.Generator().manual_seed(seed)
    pixels = [torch.randn(3, 128, 128, generator=generator), torch.randn(3, 128, width, generator=generator)]
    boxes = torch.rand(2, 4, generator=generator) * 0.4 + 0.1
    targets = [{"labels": torch.tensor([seed % CLASSES]), "boxes": box[None]} for box in boxes]
    return Batch(Images.batch(pixels), Targets.pack(targets, CLASSES), (1, 2), torch.tensor([[128, 128]] * 2))


def assert_equal_models(one: nn.Module, two: nn.Module) -> None:
    for (name, x), y in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize(("name", "dropout"), [("detr_resnet50", 0.1), ("detr_tiny", 0.0)])
def test_graphed_steps_train_as_plain_ones(name: str, dropout: float) -> None:
    """Bit for bit: capturing leaves generators and, of detr_tiny, statistics of norms alone.

    With dropout only where images fill the canvas: it draws for spare rows too.
    """
    plain_model, model = model_of(name, dropout=dropout), model_of(name, dropout=dropout)
    plain, graphed = step_of(plain_model), GraphedSteps(step_of(model), most_targets=4)
    torch.manual_seed(3)
    expected = [float(plain([batch_of(4, seed)]).losses["loss"]) for seed in range(5)]
    torch.manual_seed(3)
    found = [float(graphed([batch_of(4, seed)]).losses["loss"]) for seed in range(5)]
    assert found == expected
    assert_equal_models(plain_model, model)
    assert len(graphed._kept) == 1


def test_sizes_of_images_on_a_canvas_may_change() -> None:
    """Spare rows change the order of sums, so by rounding only: the weights of one step are the next one's input."""
    plain, graphed = step_of(model_of()), GraphedSteps(step_of(model_of()), most_targets=4)
    expected = [plain([batch_on_canvas(*size)]).losses["loss"] for size in SIZES]
    found = [graphed([batch_on_canvas(*size)]).losses["loss"].clone() for size in SIZES]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-5, atol=0)
    assert len(graphed._kept) == 1


def test_a_continued_run_takes_the_same_path() -> None:
    """With dropout, which draws other numbers where rows are spare."""
    found = []
    for stop in (None, 1, 3):  # before and after the canvas has a graph
        step = step_of(model_of("detr_tiny", dropout=0.1))
        graphed = GraphedSteps(step, most_targets=4)
        torch.manual_seed(3)
        losses = []
        for number, size in enumerate(SIZES):
            if number == stop:
                known = graphed.state_dict()
                graphed = GraphedSteps(step, most_targets=4)
                graphed.load_state_dict(known)
            losses.append(float(graphed([batch_on_canvas(*size)]).losses["loss"]))
        found.append(losses)
    assert found[0] == found[1] == found[2]


def test_canvases_that_were_known_count_before_they_come_again() -> None:
    graphed = GraphedSteps(step_of(model_of()), most_targets=4, most_graphs=1)
    graphed.load_state_dict({"seen": [[2, 128, 128, 5]], "kept": [[2, 128, 128]]})
    for _ in range(2):
        graphed([batch_of(2, seed=9)])
    assert not graphed._kept
    graphed([batch_on_canvas(1, 64)])
    assert list(graphed._kept) == [(2, 128, 128)]


def test_capturing_counts_no_pairs() -> None:
    """What the matcher leaves out is of the steps, not of their rehearsals."""
    reports = []
    for graph in (False, True):
        model = model_of()
        model.bbox_embed.register_forward_hook(_spoil_image_1)
        step = step_of(model)
        run = GraphedSteps(step, most_targets=4) if graph else step
        found = []
        for seed in range(3):
            run([batch_of(4, seed)])
            found.append(step.criterion.matcher_report())
        reports.append(found)
    assert None not in reports[0]
    assert reports[0] == reports[1]


def _spoil_image_1(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output.index_fill(1, torch.tensor([1]), torch.nan)  # [L, B, Q, 4]


def test_what_does_not_fit_runs_without_a_graph() -> None:
    graphed = GraphedSteps(step_of(model_of()), most_targets=1, most_graphs=1)
    for seed in range(3):  # two objects in one image
        graphed([batch_of(4, seed)])
    assert not graphed._kept
    for images in (2, 2, 1, 1):  # a second canvas, when one graph is all that may be kept
        graphed([batch_of(images, seed=9)])
    assert list(graphed._kept) == [(2, 64, 64)]


@pytest.mark.gpu
def test_a_replayed_step_equals_a_plain_one_on_a_gpu() -> None:
    from detr_fast.engine.build import build_criterion
    from detr_fast.engine.config import Config, OptimizerConfig
    from detr_fast.engine.optimizer import build_optimizer
    from detr_fast.engine.step import TrainingStep

    losses = {}
    for graph in (False, True):
        model = model_of().cuda()
        optimizer = build_optimizer(model, OptimizerConfig(), capturable=True)
        step = TrainingStep(model, build_criterion(Config(), 3).cuda(), optimizer)
        run = GraphedSteps(step, most_targets=4) if graph else step
        losses[graph] = [float(run([batch_on_canvas(*size).to("cuda")]).losses["loss"]) for size in SIZES]
        assert not graph or len(run._kept) == 1
    torch.testing.assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]))


@pytest.mark.gpu
def test_a_step_waits_for_nothing_on_a_gpu() -> None:
    model = model_of().cuda()
    step = step_of(model)
    step.criterion.cuda()
    batches = [batch_of(4, seed).to("cuda") for seed in range(4)]
    for batch in batches[:2]:
        step([batch])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[2:]:
            step([batch])
    finally:
        torch.cuda.set_sync_debug_mode("default")
