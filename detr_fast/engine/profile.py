"""Profile of some steps: a trace for Perfetto or chrome://tracing, and a table of what each part of a step costs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from detr_fast.engine.run import Run
from detr_fast.files import write_atomically

WAIT, WARM_UP = 2, 3  # steps: compilation and the allocator's first blocks are not what a step costs
# Parts of a step as they are annotated; indented is what lies inside the one above.
PARTS = {
    "data": "data",
    "forward": "forward",
    "backbone": "  backbone",
    "transformer": "  transformer",
    "loss": "loss",
    "backward": "backward",
    "optimizer": "optimizer",
}
SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")


@dataclass
class Part:
    """Sums over the steps that were profiled."""

    host_us: float = 0.0
    device_us: float = 0.0  # of the kernels that were launched in it
    launches: int = 0
    synchronisations: int = 0
    operators: int = 0


class Profile(contextlib.AbstractContextManager["Profile"]):
    """Profiles ``steps`` steps of the main process and writes ``profile/trace.json`` and ``profile/table.txt``.

    With 0 steps it does nothing. The run goes on afterwards; if it ends before, the steps until then are profiled.
    """

    def __init__(self, run: Run, steps: int) -> None:
        self.run, self.steps = run, steps
        self._done = 0
        self._profile: profile | None = None
        self._hooks: list[Any] = []
        if steps and run.processes.is_main:
            self._start()

    def _start(self) -> None:
        for name, module in (("backbone.0", "backbone"), ("transformer", "transformer")):
            self._annotate(self.run.model.get_submodule(name), module)
        activities = [ProfilerActivity.CPU]
        if self.run.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARM_UP, active=self.steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def _annotate(self, module: nn.Module, name: str) -> None:
        ranges: list[record_function] = []

        def enter(module: nn.Module, inputs: Any) -> None:
            ranges.append(record_function(name))
            ranges[-1].__enter__()

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            ranges.pop().__exit__(None, None, None)

        self._hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def step(self) -> None:
        """After each step."""
        if self._profile is not None:
            self._done += 1
            self._profile.step()

    @property
    def _recorded(self) -> int:
        return min(self.steps, max(0, self._done - WAIT - WARM_UP))

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
            if not self._recorded:
                first = WAIT + WARM_UP
                self.run.log.say(
                    f"profile    none: the run ended after {self._done} steps, the first {first} are not profiled"
                )

    def _write(self, found: profile) -> None:
        if not self._recorded:
            return
        folder = self.run.folder / "profile"
        folder.mkdir(exist_ok=True)
        trace = folder / "trace.json"
        found.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        text = table(parts_of(events), self._recorded)
        write_atomically(folder / "table.txt", text + "\n")
        self.run.log.say(f"profile    {trace}, {folder / 'table.txt'}\n{text}")


@dataclass
class _Range:
    name: str
    start: float
    end: float
    correlations: set[int] = field(default_factory=set)


def parts_of(events: Sequence[Mapping[str, Any]]) -> dict[str, Part]:
    """What the events of a Chrome trace add up to in each part of the steps.

    A launch or synchronisation belongs to every part in whose time it lies, whatever its thread: backward launches from
    threads of its own. Device time is that of the kernels and copies which those launches started.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    kinds = {id(event): str(event.get("cat", "")) for event in complete}
    parts = {name: Part() for name in PARTS}
    ranges = [
        _Range(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in complete
        if event["name"] in PARTS and kinds[id(event)] in ("user_annotation", "cpu_op")
    ]
    for found in ranges:
        parts[found.name].host_us += found.end - found.start
    for event in complete:
        kind = kinds[id(event)]
        if kind not in ("cuda_runtime", "cuda_driver", "cpu_op") or event["name"] in PARTS:
            continue
        for found in ranges:
            if found.start <= event["ts"] < found.end:
                _count(parts[found.name], found, event, kind)
    correlated = {
        event["args"]["correlation"]: event["dur"]
        for event in complete
        if kinds[id(event)] in ("kernel", "gpu_memcpy", "gpu_memset")
    }
    for found in ranges:
        parts[found.name].device_us += sum(correlated.get(number, 0.0) for number in found.correlations)
    return parts


def _count(part: Part, found: _Range, event: Mapping[str, Any], kind: str) -> None:
    name = event["name"]
    if kind == "cpu_op":
        part.operators += 1
        return
    part.launches += "LaunchKernel" in name or "GraphLaunch" in name
    part.synchronisations += name in SYNCHRONISATIONS
    correlation = event.get("args", {}).get("correlation")
    if correlation is not None:
        found.correlations.add(correlation)


def table(parts: Mapping[str, Part], steps: int) -> str:
    """Means of a step."""
    lines = [f"{'part':<16}{'host ms':>10}{'device ms':>11}{'launches':>10}{'syncs':>8}{'operators':>11}"]
    for name, shown in PARTS.items():
        part = parts[name]
        lines.append(
            f"{shown:<16}{part.host_us / steps / 1e3:>10.2f}{part.device_us / steps / 1e3:>11.2f}"
            f"{part.launches / steps:>10.1f}{part.synchronisations / steps:>8.1f}{part.operators / steps:>11.1f}"
        )
    return "\n".join(lines)
