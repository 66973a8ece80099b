"""Running statistics of norms, as they were before a step: every forward pass changes them, also of a step left out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class NormStatistics:
    """The running statistics of a model's norms that are learning, kept and put back on the device.

    ``keep`` before the forward passes, ``restore`` after them. A handful of launches, whatever the number of norms.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = [module for module in model.modules() if isinstance(module, _NormBase)]
        self._kept: list[tuple[list[Tensor], Tensor]] = []  # of each type: buffers, and their values one after another

    @torch.no_grad()
    def keep(self) -> None:
        of_type: dict[torch.dtype, list[Tensor]] = {}
        for norm in self._norms:
            for buffer in norm.buffers() if norm.training else ():
                of_type.setdefault(buffer.dtype, []).append(buffer)
        self._kept = [(buffers, _flat(buffers)) for buffers in of_type.values()]

    @torch.no_grad()
    def restore(self, is_left_out: Tensor) -> None:  # [] bool; where it is False nothing changes
        for buffers, before in self._kept:
            # A choice, not a product: what is not finite must not come through.
            values = torch.where(is_left_out, before, _flat(buffers)).split([buffer.numel() for buffer in buffers])
            pairs = zip(values, buffers, strict=True)
            torch._foreach_copy_(buffers, [value.view_as(buffer) for value, buffer in pairs])
        self._kept = []


def _flat(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.flatten() for buffer in buffers])
