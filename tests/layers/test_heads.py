"""The perceptron of the box head."""

from __future__ import annotations

import torch

from detr_fast.layers.heads import Perceptron


def test_relu_between_layers_but_not_after_the_last() -> None:
    head = Perceptron(3, 5, 2, 3)
    shapes = [tuple(layer.weight.shape) for layer in head.layers]
    assert shapes == [(5, 3), (5, 5), (2, 5)]
    x = torch.randn(4, 3)
    first, second, third = head.layers
    torch.testing.assert_close(head(x), third(second(first(x).relu()).relu()))
