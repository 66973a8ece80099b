"""What shows that nobody waits for a device: tensors without values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from detr_fast.structures import Targets


@contextmanager
def _copies_fail() -> Iterator[None]:
    """Copies between host and device that wait are errors; tensors without values would allow them."""
    make, move = torch.tensor, Tensor.to

    def forbidden(*arguments: Any, **options: Any) -> None:
        raise AssertionError("this copy waits for a device")

    def tensor(*arguments: Any, **options: Any) -> Tensor:
        return make(*arguments, **options) if options.get("device") is None else forbidden()

    def to(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        is_to_host = any(isinstance(x, str) and x == "cpu" for x in (*arguments, *options.values()))
        return forbidden() if is_to_host else move(self, *arguments, **options)

    with (
        patch.object(Tensor, "cpu", forbidden),
        patch.object(Tensor, "new_tensor", forbidden),
        patch.object(Tensor, "to", to),
        patch.object(torch, "tensor", tensor),
        patch.object(Targets, "check_values", lambda *arguments, **options: None),  # which it does on the CPU only
    ):
        yield


def assert_reads_nothing(
    criterion: Callable[..., Mapping[str, Tensor]], outputs: Any, targets: list[dict[str, Tensor]], *more: Any
) -> None:
    """Losses and gradients are computed from tensors that have no values, so that nobody can wait for them."""
    packed = Targets.pack(targets)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _copies_fail():
        outputs, *more = tree_map_only(Tensor, mode.from_tensor, [outputs, *more])
        empty = (mode.from_tensor(x) for x in (packed.labels, packed.boxes, packed.offsets))
        losses = criterion(outputs, Targets(*empty, packed.max_count), *more)
        assert all(value.shape == () for value in losses.values())
        leaves = list(_leaves_of([outputs, *more]))
        assert leaves
        total = sum(losses[name] for name in losses if losses[name].requires_grad)
        torch.autograd.grad(total, leaves, allow_unused=True)


def _leaves_of(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield from [outputs] if outputs.requires_grad else []
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _leaves_of(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from _leaves_of(value)
