"""Small tensors that are computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Constants:
    """Tensors by key; the oldest make room for more than `most`.

    Safe for several threads, such as DataParallel's replicas, and for inference mode, whose tensors no later step could
    differentiate. Tensors without values (FakeTensorMode) and those of a graph that is being compiled are not kept.
    """

    def __init__(self, most: int = 1024) -> None:
        self._most = most
        self._kept: dict[Hashable, Tensor] = {}

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of that key; `make` computes it the first time and may wait for a device."""
        if torch.compiler.is_compiling():
            return make()
        found = self._kept.get(key)
        if found is None:
            with torch.inference_mode(False):
                found = make()
            if not isinstance(found, FakeTensor):
                latest = list(self._kept.items())[1 - self._most :]
                self._kept = {**dict(latest), key: found}  # replaced at once, never changed
        return found
