"""Whole training steps as CUDA graphs, one for each canvas: what the host does in a step is one launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detr_fast.data.batch import Batch
from detr_fast.engine.step import StepResult, TrainingStep
from detr_fast.layers.position import StaticImages
from detr_fast.matcher import HungarianMatcher
from detr_fast.structures import StaticTargets

WARM_UPS = 3  # as torch.cuda.make_graphed_callables
Shape = tuple[int, ...]  # images, height and width of the canvas


@dataclass
class _Kept:
    """A graph with what it reads and writes."""

    batch: Batch  # of StaticImages and StaticTargets
    result: StepResult
    graph: torch.cuda.CUDAGraph | None = None  # None on a CPU, where every call computes the same anew
    matched: Any = None  # what the criterion keeps of the batch, for its diagnostics


class GraphedSteps:
    """A :class:`TrainingStep` that is captured when a canvas comes for the second time, and then replayed.

    Takes one batch, on one device, and returns what the step returns, in memory that the next call overwrites. Batches
    that do not fit (a new canvas after ``most_graphs``, an image with more targets than ``most_targets``) run without
    a graph. Capturing computes the step a few times without changing weights, statistics of norms, counts of pairs or
    random states. Learning rates must be tensors on the device.

    Dropout draws other numbers in a graph, for spare rows too. So that a continued run draws what an undisturbed one
    does, its state says which canvases have a graph: those have it from their first batch on.
    """

    def __init__(self, step: TrainingStep, most_targets: int, most_graphs: int = 16) -> None:
        self.step, self.most_targets, self.most_graphs = step, max(most_targets, 1), most_graphs
        self._seen: Counter[Shape] = Counter()
        self._known: dict[Shape, None] = {}  # canvases that have a graph, or had one before the run was continued
        self._kept: dict[Shape, _Kept] = {}
        self._pool: Any = None  # memory that all graphs share: they are replayed one after the other

    def __call__(self, batches: Sequence[Batch]) -> StepResult:
        (batch,) = batches
        shape = (len(batch), *batch.images.pixels.shape[-2:])
        self._seen[shape] += 1
        if batch.targets.max_count > self.most_targets:
            return self.step(batches)
        if shape not in self._known:
            if self._seen[shape] < 2 or len(self._known) >= self.most_graphs:
                return self.step(batches)
            self._known[shape] = None
        if shape not in self._kept:
            self._kept[shape] = self._captured(batch)
        kept = self._kept[shape]
        _fill(kept.batch, batch)
        if kept.graph is None:
            kept.result = self.step([kept.batch])
        else:
            kept.graph.replay()
            self.step.criterion.latest = kept.matched
        return kept.result

    def state_dict(self) -> dict[str, Any]:
        """Which canvases were seen how often, and which have a graph; lists of numbers."""
        seen = [[*shape, count] for shape, count in self._seen.items()]
        return {"seen": seen, "kept": [list(shape) for shape in self._known]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen = Counter({tuple(shape): count for *shape, count in state["seen"]})
        self._known = dict.fromkeys(tuple(shape) for shape in state["kept"])

    def _captured(self, batch: Batch) -> _Kept:
        static = self._static(batch)
        _fill(static, batch)
        device = batch.images.pixels.device
        with self._rehearsal():
            if device.type != "cuda":
                return _Kept(static, self.step([static]))
            return self._capture(static, device)

    def _capture(self, static: Batch, device: torch.device) -> _Kept:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.step([static])
        torch.cuda.current_stream(device).wait_stream(stream)
        # Inside the capture nothing rehearses: the graph reads the tensor, which is 0 again when it is replayed.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            result = self.step([static])
        self._pool = graph.pool()
        return _Kept(static, result, graph, self.step.criterion.latest)

    def _static(self, batch: Batch) -> Batch:
        device = batch.images.pixels.device
        targets = StaticTargets.with_capacity(len(batch), len(batch) * self.most_targets, self.most_targets, device)
        return Batch(StaticImages.like(batch.images), targets, batch.image_ids, batch.original_sizes)

    @contextmanager
    def _rehearsal(self) -> Iterator[None]:
        """Steps in here leave weights, statistics of norms, counts of pairs and random states as they were."""
        criterion = self.step.criterion
        counts = criterion.matcher.statuses() if isinstance(criterion.matcher, HungarianMatcher) else []
        buffers = [(buffer, buffer.clone()) for buffer in (*criterion.buffers(), *counts)]
        restore_random = _random_states(self.step.rehearses.device)
        self.step.rehearses.fill_(1)
        try:
            yield
        finally:
            self.step.rehearses.zero_()
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            restore_random()


def _fill(static: Batch, batch: Batch) -> None:
    images, targets = static.images, static.targets
    assert isinstance(images, StaticImages)
    assert isinstance(targets, StaticTargets)
    images.copy_(batch.images)
    targets.copy_(batch.targets)


def _random_states(device: torch.device) -> Callable[[], None]:
    """What sets the generators back to where they stand now."""
    on_host: Tensor = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore() -> None:
        torch.set_rng_state(on_host)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)

    return restore
