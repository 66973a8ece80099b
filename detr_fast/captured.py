"""A criterion as a CUDA graph, with targets that change from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detr_fast.structures import Predictions, StaticTargets, Targets

if TYPE_CHECKING:
    from detr_fast.criterion import SetCriterion

_WARM_UPS = 3  # as torch.cuda.make_graphed_callables


class CapturedCriterion:
    """Matching, losses and their gradients for one shape of predictions, replayed as one launch.

    ``captured(outputs, targets)`` takes and returns what ``criterion.weighted_loss`` does: the sum to differentiate,
    and all entries. A call copies the predictions and, from the CPU in one asynchronous copy, the targets into memory
    of its own and replays the graph; ``backward`` is one launch more, because what comes in, a gradient scaler's factor
    for instance, is known only then. Nothing is read back. Entries and gradients lie in memory that the next call
    overwrites, so call ``backward`` before it.

    Made by :meth:`SetCriterion.capture`. On a CPU, where there are no graphs, every call computes the same anew.

    Raises:
        ValueError: predictions or targets do not fit what was captured, or the criterion's weights or buffers are
            others than then; the message says what was expected.
        RuntimeError: backward comes after the next call, or is to be differentiated itself.
    """

    def __init__(
        self, criterion: SetCriterion, example: Predictions, capacity: int, max_count: int | None = None
    ) -> None:
        self._criterion = criterion
        device = example.logits.device
        with torch.inference_mode(False):  # also for training, wherever it is made
            self._logits = torch.empty_like(example.logits).copy_(example.logits.detach()).requires_grad_()
            self._boxes = torch.empty_like(example.boxes).copy_(example.boxes.detach()).requires_grad_()
        self._targets = StaticTargets.with_capacity(example.logits.shape[1], capacity, max_count, device)
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._capture()
        else:
            self._compute()
        # What the graph reads and writes; it must neither be freed nor be replaced.
        self._matched = criterion.latest
        self._options = criterion.options()
        self._buffers = dict(criterion.named_buffers())

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._compute()

    def _compute(self) -> None:
        """Keeps the sum with its way back to the predictions, which holds the gradients that are only to be scaled."""
        with torch.inference_mode(False), torch.enable_grad():
            self._total, self._losses = self._criterion.weighted_loss(
                Predictions(self._logits, self._boxes), self._targets
            )

    def __call__(
        self, outputs: Predictions | Mapping[str, Any], targets: Targets | Sequence[Mapping[str, Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        predictions, packed = self._criterion.structured(outputs, targets)
        self._check(predictions)
        self._targets.copy_(packed)
        total = _Replay.apply(predictions.logits, predictions.boxes, self)
        return total, dict(self._losses)

    def _check(self, predictions: Predictions) -> None:
        for name, given, kept in (
            ("logits", predictions.logits, self._logits),
            ("boxes", predictions.boxes, self._boxes),
        ):
            if given.shape != kept.shape or given.dtype != kept.dtype or given.device != kept.device:
                raise ValueError(
                    f"CapturedCriterion: {name} must be {list(kept.shape)} {kept.dtype} on {kept.device} as captured, "
                    f"got {list(given.shape)} {given.dtype} on {given.device}"
                )
        if self._criterion.options() != self._options:
            raise ValueError(
                "CapturedCriterion: weight_dict and the options of criterion and matcher must be as captured; "
                "capture again after a change"
            )
        for name, buffer in self._criterion.named_buffers():
            if buffer is not self._buffers.get(name):
                raise ValueError(f"CapturedCriterion: {name} must be the tensor captured; capture again after a change")

    def replay(self, logits: Tensor, boxes: Tensor) -> tuple[Tensor, int]:
        """The sum for these predictions and the targets that were copied last, and the number of this call."""
        with torch.no_grad():
            self._logits.copy_(logits)
            self._boxes.copy_(boxes)
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()
            self._criterion.latest = self._matched
        self._calls += 1
        return self._total.detach().clone(), self._calls

    def gradients(self, incoming: Tensor, call: int) -> tuple[Tensor, Tensor]:
        """Gradients of that call's sum in logits and boxes, times what comes in."""
        if call != self._calls:
            raise RuntimeError("CapturedCriterion: call backward before the next call, which overwrites the gradients")
        if torch.is_grad_enabled():
            raise RuntimeError("CapturedCriterion: second derivatives are not available")
        inputs = (self._logits, self._boxes)
        logits, boxes = torch.autograd.grad(self._total, inputs, incoming, retain_graph=True)
        for gradient in (logits, boxes):  # allocated on the stream of the capture
            if gradient.is_cuda:
                gradient.record_stream(torch.cuda.current_stream(gradient.device))
        return logits, boxes


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, boxes: Tensor, captured: CapturedCriterion) -> Tensor:
        ctx.captured = captured
        total, ctx.call = captured.replay(logits, boxes)
        return total

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, Tensor, None]:
        return (*ctx.captured.gradients(incoming, ctx.call), None)
