"""The moving average of weights against its definition."""

from __future__ import annotations

import torch
from torch import nn

from detr_fast.engine.average import AveragedModel


def test_the_average_follows_its_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    average = AveragedModel(model, decay=0.9)
    expected = model[0].weight.detach().double().clone()
    for step in range(200):
        with torch.no_grad():
            model[0].weight += torch.randn(2, 3)
            model[1].running_mean += 1
        average.update(step, torch.tensor(False))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight.detach().double()
    # Each step rounds once or twice what the decay then forgets: a geometric series of ten terms.
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(average.model[0].weight.double(), expected, rtol=0, atol=20 * eps * 30)
    assert torch.equal(average.model[1].running_mean, model[1].running_mean)
    assert torch.equal(average.model[0].bias, model[0].bias)
    assert not any(p.requires_grad for p in average.model.parameters())


def test_the_average_stays_with_a_step_that_was_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = AveragedModel(model, decay=0.9)
    with torch.no_grad():
        model[0].weight += 1
    average.update(0, torch.tensor(False))
    before = {name: value.clone() for name, value in average.model.state_dict().items()}
    average.update(1, torch.tensor(True))
    assert all(torch.equal(before[name], value) for name, value in average.model.state_dict().items())
    average.update(1, torch.tensor(False))
    assert not torch.equal(before["0.weight"], average.model[0].weight)
