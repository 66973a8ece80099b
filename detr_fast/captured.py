"""A criterion's forward and backward as one CUDA graph, with targets that change from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detr_fast.structures import Predictions, Targets

WeightedLoss = Callable[[Predictions, Targets], tuple[Tensor, dict[str, Tensor]]]

_WARM_UPS = 3  # as torch.cuda.make_graphed_callables


class CapturedCriterion:
    """Matching, losses and their gradients of one shape of predictions, replayed without a launch of their own.

    ``captured(predictions, targets)`` returns the same as ``criterion.weighted_loss(predictions, targets)``: the sum to
    differentiate, and all entries. The entries and the gradients live in memory that the next call overwrites, so call
    ``backward`` before it. Targets may be on the CPU (one asynchronous copy) or on the device. Nothing is read back.

    Made by :meth:`SetCriterion.capture`. On a CPU, where there are no graphs, every call computes the same anew.

    Raises:
        ValueError: predictions or targets do not fit what was captured; the message says what was expected.
    """

    def __init__(self, loss: WeightedLoss, example: Predictions, capacity: int, max_count: int | None = None) -> None:
        self._loss = loss
        self._logits = example.logits.detach().clone().requires_grad_()
        self._boxes = example.boxes.detach().clone().requires_grad_()
        images, device = example.logits.shape[1], example.logits.device
        self.targets = Targets.with_capacity(images, capacity, max_count, device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._capture()

    def _capture(self) -> None:
        stream = torch.cuda.Stream(self._logits.device)
        stream.wait_stream(torch.cuda.current_stream(self._logits.device))
        with torch.cuda.device(self._logits.device), torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._compute()
        torch.cuda.current_stream(self._logits.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._logits.device), torch.cuda.graph(graph):
            self._compute()
        self._graph = graph

    def _compute(self) -> None:
        with torch.enable_grad():
            total, losses = self._loss(Predictions(self._logits, self._boxes), self.targets)
            logits, boxes = torch.autograd.grad(total, (self._logits, self._boxes))
        self._gradients = (logits, boxes)
        self._total = total.detach()
        self._losses = losses

    def __call__(self, predictions: Predictions, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        for name, given, kept in (
            ("logits", predictions.logits, self._logits),
            ("boxes", predictions.boxes, self._boxes),
        ):
            if given.shape != kept.shape or given.dtype != kept.dtype or given.device != kept.device:
                raise ValueError(
                    f"CapturedCriterion: {name} must be {list(kept.shape)} {kept.dtype} on {kept.device} as captured, "
                    f"got {list(given.shape)} {given.dtype} on {given.device}"
                )
        self.targets.copy_(targets)
        total = _Replay.apply(predictions.logits, predictions.boxes, self)
        return total, dict(self._losses)

    def replay(self, logits: Tensor, boxes: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Total and gradients for these predictions and the targets that were copied last."""
        with torch.no_grad():
            self._logits.copy_(logits)
            self._boxes.copy_(boxes)
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()
        return self._total, self._gradients


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, boxes: Tensor, captured: CapturedCriterion) -> Tensor:
        total, ctx.gradients = captured.replay(logits, boxes)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, Tensor, None]:
        logits, boxes = ctx.gradients
        return logits * incoming.to(logits.dtype), boxes * incoming.to(boxes.dtype), None
