"""Prediction heads."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class Perceptron(nn.Module):
    """Linear layers with ReLU between them: ``[..., width_in] -> [..., width_out]``."""

    def __init__(self, width_in: int, hidden: int, width_out: int, count: int) -> None:
        super().__init__()
        widths = [width_in, *[hidden] * (count - 1), width_out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)
