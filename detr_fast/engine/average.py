"""The exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class AveragedModel:
    """A copy of a model whose weights follow it: ``average += (1 - decay) (weights - average)`` after every step.

    The decay of step t is ``min(decay, (1 + t) / (10 + t))``, so that the average soon forgets the initial weights.
    Buffers (statistics of norms) are copied. ``model`` has the names and types of the original and is never trained.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))
        self._buffers = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step ``step``, counted from 0. Waits for nothing."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        trained = [(average, weights.detach()) for average, weights in self._pairs if weights.requires_grad]
        averages, weights = (list(side) for side in zip(*trained, strict=True))
        torch._foreach_lerp_(averages, weights, weight)
        for kept, buffer in self._buffers:
            kept.copy_(buffer)
