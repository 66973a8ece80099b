"""Every way of waiting for a device is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from integrations.reading import assert_reads_nothing
from torch import Tensor

from detr_fast.structures import Targets

WAYS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "to, with a name": lambda x: x.to(device="cpu"),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
}


def run(forward: Callable[[Tensor], object], backward: Callable[[Tensor], object]) -> None:
    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(context: object, x: Tensor) -> Tensor:
            context.save_for_backward(x)
            return x.sum()

        @staticmethod
        def backward(context: object, gradient: Tensor) -> Tensor:
            (x,) = context.saved_tensors
            backward(x)
            return gradient.expand(x.shape)

    def criterion(outputs: dict[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        forward(outputs["pred_boxes"])
        return {"loss": Loss.apply(outputs["pred_boxes"])}

    outputs = {"pred_boxes": torch.rand(2, 4, requires_grad=True)}
    assert_reads_nothing(criterion, outputs, [{"labels": torch.tensor([1]), "boxes": torch.rand(1, 4)}])


def nothing(x: Tensor) -> None: ...


def test_nothing_is_read() -> None:
    run(nothing, nothing)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_is_read_is_noticed(way: Callable[[Tensor], object]) -> None:
    with pytest.raises(Exception):  # noqa: B017  each fails in its own way
        run(way, nothing)
    with pytest.raises(Exception):  # noqa: B017
        run(nothing, way)
