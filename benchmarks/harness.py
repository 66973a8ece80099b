"""What a benchmark is, and how it is timed: every provider is checked first, then all take turns until time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.machine import peak_memory

OURS = "detr_fast"


class DisagreementError(Exception):
    """A provider's result is not what the definition says, so its time means nothing."""


@dataclass(frozen=True)
class Options:
    """What the benchmark files may depend on."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    quick: bool = False  # few repetitions of the small sizes, for tests and a first look

    @property
    def seconds(self) -> float:
        """Time that all providers of one benchmark share."""
        return 0.2 if self.quick else 4.0


@dataclass(frozen=True)
class Faster:
    """Ours must be at least `by` times as fast as another provider."""

    than: str
    by: float
    ours: str = OURS

    def judge(self, microseconds: dict[str, float]) -> tuple[str, bool] | None:
        """What was found and whether it holds; None if a provider was not timed."""
        if not {self.than, self.ours} <= set(microseconds):
            return None
        ratio = microseconds[self.than] / microseconds[self.ours]
        return f"{self.ours} >= {self.by:g}x {self.than}: {ratio:.3g}x", ratio >= self.by


@dataclass(frozen=True)
class Within:
    """Ours must take at most so long."""

    microseconds: float
    ours: str = OURS

    def judge(self, microseconds: dict[str, float]) -> tuple[str, bool] | None:
        if self.ours not in microseconds:
            return None
        found = microseconds[self.ours]
        return f"{self.ours} <= {self.microseconds:g} us: {found:.4g} us", found <= self.microseconds


@dataclass(frozen=True)
class Smaller:
    """Ours must need at most a `by`-th of another provider's memory."""

    than: str
    by: float
    ours: str = OURS

    def judge(self, megabytes: dict[str, float]) -> tuple[str, bool] | None:
        if not {self.than, self.ours} <= set(megabytes):
            return None
        ours, theirs = megabytes[self.ours], megabytes[self.than]
        found = f"{ours:.4g} MB, {theirs:.4g} MB"
        return f"memory of {self.ours} <= 1/{self.by:g} of {self.than}: {found}", ours * self.by <= theirs


Bar = Faster | Within | Smaller


@dataclass(frozen=True)
class Benchmark:
    """Several ways to compute the same thing. The first of `providers` is the one that ratios refer to."""

    case: str
    axis: str  # what `value` means, as "queries x targets"
    value: str
    providers: dict[str, Callable[[], object]]
    check: Callable[[str, Any], None]  # name and result of a provider; raises DisagreementError
    bars: Sequence[Bar] = ()


class Replayed:
    """A CUDA graph of `run`: what the device needs, without the launches' cost on the host."""

    def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
        self.run = run
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._result = run()

    def __call__(self) -> Any:
        self._graph.replay()
        return self._result


def with_graph(run: Callable[[], Any], device: torch.device, name: str = OURS) -> dict[str, Callable[[], Any]]:
    """A provider, and on CUDA its graph as another: "detr_fast" and "detr_fast, graph"."""
    return {name: run} | ({f"{name}, graph": Replayed(run, device)} if device.type == "cuda" else {})


class Sampler(Protocol):
    """Something that can be timed, here or in another process."""

    name: str

    def warm_up(self) -> None:
        """Runs once and checks the result; raises DisagreementError."""

    def sample(self, calls: int) -> float:
        """Seconds for so many calls."""

    def peak_mb(self) -> float | None:
        """Memory that one call needs at most, beyond what was there before; None where that is unknown."""

    def device_activity(self) -> tuple[int, int] | None:
        """Launches and synchronisations of one call; None on the CPU."""


@dataclass
class LocalSampler:
    benchmark: Benchmark
    name: str
    device: torch.device

    def warm_up(self) -> None:
        self.benchmark.check(self.name, self._run())

    def sample(self, calls: int) -> float:
        run = self._run
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak_mb(self) -> float | None:
        run = self._run
        return peak_memory(run.run if isinstance(run, Replayed) else run, self.device)

    def device_activity(self) -> tuple[int, int] | None:
        if self.device.type != "cuda":
            return None
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize(self.device)
        with torch.profiler.profile(activities=kinds) as profile:
            self._run()
        counts = {event.key: event.count for event in profile.key_averages()}
        launches = sum(n for key, n in counts.items() if "LaunchKernel" in key or "GraphLaunch" in key)
        waits = sum(n for key, n in counts.items() if key in ("cudaStreamSynchronize", "cudaEventSynchronize"))
        return launches, waits

    @property
    def _run(self) -> Callable[[], object]:
        return self.benchmark.providers[self.name]


@dataclass
class Timing:
    """Microseconds of a call: one entry for each sample."""

    samples: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    device_activity: tuple[int, int] | None = None  # launches, synchronisations

    def quantile(self, percent: float) -> float:
        return float(np.percentile(self.samples, percent))

    @property
    def median(self) -> float:
        return self.quantile(50)


def measure(samplers: Sequence[Sampler], seconds: float, rounds: int = 20) -> dict[str, Timing]:
    """Times all samplers in turns, so that what else the machine does hits them alike.

    Every round gives each sampler the same time, or one call if that takes longer; at least three rounds are run, and
    no more are begun when the time is up. Calls much shorter than a clock reading are timed in groups.
    """
    timings = {sampler.name: Timing() for sampler in samplers}
    calls = {}
    for sampler in samplers:
        sampler.warm_up()
        single = min(sampler.sample(1) for _ in range(2))
        calls[sampler.name] = max(1, round(2e-4 / max(single, 1e-7)))
    turn = seconds / rounds / len(samplers)
    deadline = time.perf_counter() + seconds
    for number in range(rounds):
        if number >= 3 and time.perf_counter() > deadline:
            break
        for sampler in samplers:
            timings[sampler.name].samples += _samples(sampler, calls[sampler.name], turn)
    for sampler in samplers:
        timings[sampler.name].peak_mb = sampler.peak_mb()
        timings[sampler.name].device_activity = sampler.device_activity()
    return timings


def _samples(sampler: Sampler, calls: int, turn: float) -> Iterator[float]:
    used = 0.0
    while used == 0.0 or used < turn:
        elapsed = sampler.sample(calls)
        used += elapsed
        yield elapsed / calls * 1e6
