"""Steps in memory that does not move. On a CPU the graph's path computes anew what a GPU replays."""

from __future__ import annotations

import pytest
import torch
from engine.steps import batch_of, model_of, step_of
from torch import nn

from detr_fast.engine.graphed import GraphedSteps


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
        losses[graph] = [float(run([batch_of(4, seed).to("cuda")]).losses["loss"]) for seed in range(6)]
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
