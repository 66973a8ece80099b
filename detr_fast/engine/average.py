"""The exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class AveragedModel:
    """A copy of a model whose weights follow it: ``average += (1 - decay) (weights - average)`` after every step.

    The decay of step t is ``min(decay, (1 + t) / (10 + t))``, so that the average soon forgets the initial weights.
    Buffers (statistics of norms) are copied. ``model`` has the names and types of the original and is never trained.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        self._weights = [pair for pair in pairs if pair[1].requires_grad]
        self._buffers = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(
        self,
        step: int,  # counted from 0
        was_skipped: Tensor,  # [] bool on the device: the step changed nothing, and the average stays too
    ) -> None:
        """After a step. Waits for nothing."""
        weight = (1 - min(self.decay, (1 + step) / (10 + step))) * (~was_skipped).to(torch.float32)
        averages, weights = (list(side) for side in zip(*self._weights, strict=True))
        # Not a lerp, whose weight is a number of the host.
        change = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(averages, change)
        if self._buffers:
            kept, buffers = (list(side) for side in zip(*self._buffers, strict=True))
            torch._foreach_copy_(kept, buffers)
