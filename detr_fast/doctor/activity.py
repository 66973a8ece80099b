"""What a call costs: time, launches, and how often the host waits for a device.

On a CUDA device launches and waits are those that PyTorch's profiler records. Without one they are estimated from the
operators that a call dispatches: each that computes something would be a launch, each whose result the host has to know
a wait. Copies to the host cannot be seen there, so that the estimate of waits is a lower bound.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What the profiler calls a wait. It waits for the device itself when it ends, by cudaDeviceSynchronize.
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")

# Operators without a kernel of their own: memory, and other names for the same tensor.
_WITHOUT_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "_unsafe_view"),
    *("_reshape_alias", "lift_fresh_copy", "_local_scalar_dense", "is_same_size"),
}
# Operators whose result has a shape or a value that the host must wait for.
_READS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "_unique", "unique_dim", "unique_consecutive"),
    *("unique_dim_consecutive", "equal", "bincount"),
}
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
_LAUNCHES_OF = {"detr_fast::match": 2}  # our ops are one launch each but for this


class Activity(NamedTuple):
    """Of one call."""

    launches: int
    waits: int


class OperatorCount(TorchDispatchMode):
    """Counts what a call on the CPU would be on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.waits = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = function._schema.name.split("::")
        if namespace in ("aten", "detr_fast"):
            if name not in _WITHOUT_KERNEL and not function.is_view:
                self.launches += _LAUNCHES_OF.get(f"{namespace}::{name}", 1)
            self.waits += _is_read(name, args, kwargs)
        return function(*args, **kwargs)


def _is_read(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if name in _INDEXED:  # a boolean mask becomes indices first
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name == "_to_copy":
        target = kwargs.get("device")
        return target is not None and torch.device(target).type == "cpu" and args[0].device.type != "cpu"
    return name in _READS


def activity_of(call: Callable[[], object], device: torch.device) -> Activity:
    """Launches and waits of one call, which should have been called before."""
    if device.type != "cuda":
        with OperatorCount() as count:
            call()
        return Activity(count.launches, count.waits)
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=kinds) as profile:
        call()
    return activity_in({event.key: event.count for event in profile.key_averages()})


def activity_in(counts: Mapping[str, int]) -> Activity:
    """From the names of the profiler's events and how often each occurred."""
    launches = sum(n for name, n in counts.items() if "LaunchKernel" in name or "GraphLaunch" in name)
    return Activity(launches, sum(n for name, n in counts.items() if name in _WAITS))


def milliseconds(
    calls: Sequence[
        tuple[Callable[[], object], Callable[[], AbstractContextManager[object]]]
    ],  # call, what is around it
    device: torch.device,
    seconds: float,
) -> list[float]:
    """Median time of each call. They take turns, so that what else the machine does hits them alike.

    At least two rounds are run, and no more are begun when the time is up.
    """
    times: list[list[float]] = [[] for _ in calls]
    deadline = time.perf_counter() + seconds
    while len(times[0]) < 2 or time.perf_counter() < deadline:
        for own, (call, around) in zip(times, calls, strict=True):
            with around():
                _wait_for(device)
                start = time.perf_counter()
                call()
                _wait_for(device)
                own.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
