"""The learning rate as a function of step and epoch, and the optimizer's groups."""

from __future__ import annotations

import pytest
import torch

from detr_fast.engine.config import OptimizerConfig, ScheduleConfig
from detr_fast.engine.optimizer import build_optimizer, learning_rate_factor, load_optimizer, set_learning_rates
from detr_fast.models import build_model


def test_drops_are_those_of_step_lr() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    for epoch in range(8):
        factor = learning_rate_factor(ScheduleConfig(drop_epoch=3), step=epoch * 10, epoch=epoch)
        assert factor == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        reference.step()


def test_warm_up_is_linear_and_no_drop_is_possible() -> None:
    schedule = ScheduleConfig(drop_epoch=0, warmup_steps=4)
    assert [learning_rate_factor(schedule, step, epoch=500) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_groups_of_the_paper() -> None:
    optimizer = build_optimizer(build_model("detr_tiny", 3), OptimizerConfig())
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"transformer": 1e-4, "backbone": 1e-5}
    set_learning_rates(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-5, 5e-6]


def test_a_continued_run_takes_its_rates_from_the_settings() -> None:
    model = build_model("detr_tiny", 3)
    state = build_optimizer(model, OptimizerConfig(learning_rate=1.0, weight_decay=1.0)).state_dict()
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=2.0, weight_decay=3.0))
    load_optimizer(optimizer, state)
    set_learning_rates(optimizer, 1.0)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (2.0, 3.0)


def test_rates_follow_the_size_of_the_step() -> None:
    model = build_model("detr_tiny", 3)
    rates = [group["lr"] for group in build_optimizer(model, OptimizerConfig(reference_batch=16), 64).param_groups]
    assert rates == [4e-4, 4e-5]
    assert build_optimizer(model, OptimizerConfig(), 64).param_groups[0]["lr"] == 1e-4


def test_rates_of_a_captured_optimizer_are_tensors_that_stay() -> None:
    optimizer = build_optimizer(build_model("detr_tiny", 3), OptimizerConfig(), capturable=True)
    kept = optimizer.param_groups[0]["lr"]
    state = build_optimizer(build_model("detr_tiny", 3), OptimizerConfig()).state_dict()
    load_optimizer(optimizer, state)
    set_learning_rates(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] is kept
    assert float(kept) == pytest.approx(5e-5)
    assert optimizer.param_groups[0]["capturable"]


def test_moments_take_the_order_of_their_parameters_in_memory() -> None:
    """Else the fused kernel, which walks memory, would pair them with other weights."""
    torch.manual_seed(0)
    models = [build_model("detr_tiny", 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].backbone[0].body.arrange(torch.contiguous_format)
    optimizers = [build_optimizer(model, OptimizerConfig()) for model in models]

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step()

    step(models[0], optimizers[0], 1)
    models[1].load_state_dict(models[0].state_dict())
    load_optimizer(optimizers[1], optimizers[0].state_dict())
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer, 2)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)
