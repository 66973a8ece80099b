"""Tensors that adapters keep from call to call, but for those of another mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from detr_fast.integrations.constants import Constants
from detr_fast.integrations.edge_distributions import bins_of
from detr_fast.integrations.layer_losses import Entry, LayerLosses
from detr_fast.integrations.transformers.sets import constant


def test_a_tensor_is_made_once_and_the_oldest_make_room() -> None:
    kept, made = Constants(most=2), []

    def value_of(key: int) -> Tensor:
        return kept.get(key, lambda: made.append(key) or torch.tensor(float(key)))

    assert [value_of(key).item() for key in (1, 2, 1, 3, 2, 1)] == [1, 2, 1, 3, 2, 1]
    assert made == [1, 2, 3, 1]


def test_a_call_that_comes_between_keeps_its_own_tensor() -> None:
    """As of DataParallel's replicas, which call from several threads."""
    kept, made = Constants(), []

    def other() -> Tensor:
        return kept.get("other", lambda: made.append("other") or torch.tensor(2.0))

    def one() -> Tensor:
        return kept.get("one", lambda: made.append("one") or other() - 1)

    assert [one().item(), other().item(), one().item()] == [1, 2, 1]
    assert made == ["one", "other"]


def of_sets() -> Tensor:
    return constant((0.5, 0.25, 3.0), torch.device("cpu"))


def of_bins() -> Tensor:
    points, goals = torch.full((1, 4), 0.5), torch.full((1, 4), 0.4)
    return bins_of(points, goals, 8, 4.0, 0.5625).weight


named = LayerLosses([Entry("loss_a", "a")], {"loss_a": 2.0}, terms=("a",))


def of_layers() -> Tensor:
    return named(torch.ones(1, 1), [""])["loss_a"]


@pytest.mark.parametrize("value_of", [of_sets, of_bins, of_layers])
def test_tensors_without_values_are_not_kept(value_of: Callable[[], Tensor]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(value_of(), FakeTensor)
    assert value_of().sum().item() >= 0  # which has a value


@pytest.mark.parametrize("value_of", [of_sets, of_layers])
def test_what_inference_made_may_be_differentiated(value_of: Callable[[], Tensor]) -> None:
    with torch.inference_mode():
        value_of()
    factor = torch.ones((), requires_grad=True)
    (factor * value_of()).sum().backward()
    assert factor.grad is not None
