"""Matching and set loss with gradient, as one training step needs them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.harness import Bar, Benchmark, DisagreementError, Faster, Options, Within, with_graph
from benchmarks.scenes import COST_WEIGHTS, Scene, coco_like_counts, scene
from detr_fast.criterion import SetCriterion
from detr_fast.matcher import HungarianMatcher
from detr_fast.structures import Predictions, Targets

LABELS, LAYERS, EOS = 91, 6, 0.1
LOSS_WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
SIZES = ((4, 100), (16, 300))  # images, queries
BARS = (Faster("transformers", 10), Faster("transformers", 10, "detr_fast, dictionaries"))
DEVICE_BARS = (Within(60, "detr_fast, graph"), Faster("transformers", 100))  # on a GPU, 32 images and 100 queries

Result = tuple[Tensor, Tensor, Tensor]  # weighted loss [], its gradients in logits and boxes


def benchmarks(options: Options) -> Iterator[Benchmark]:
    sizes: list[tuple[int, int, Sequence[Bar]]] = [(images, queries, BARS) for images, queries in SIZES]
    if options.device.type == "cuda":
        sizes = [(32, 100, DEVICE_BARS), *sizes]
    for images, queries, bars in sizes[:1] if options.quick else sizes:
        made = scene("mid", coco_like_counts(images), queries, LAYERS, LABELS).to(options.device)
        yield forward_and_backward(made, options.device, bars)


def forward_and_backward(made: Scene, device: torch.device, bars: Sequence[Bar] = ()) -> Benchmark:
    logits = made.predictions.logits.requires_grad_()
    boxes = made.predictions.boxes.requires_grad_()
    images, queries = logits.shape[1:3]

    def differentiated(loss_of: Callable[[], Tensor]) -> Callable[[], Result]:
        def run() -> Result:
            loss = loss_of()
            logits_gradient, boxes_gradient = torch.autograd.grad(loss, (logits, boxes))
            return loss.detach(), logits_gradient, boxes_gradient

        return run

    losses = {"detr_fast, dictionaries": _dictionaries(logits, boxes, made), "eager": _eager(logits, boxes, made)}
    if importlib.util.find_spec("transformers"):
        losses["transformers"] = _transformers(logits, boxes, made)
    providers = with_graph(differentiated(packed_loss(logits, boxes, made)), device)
    if device.type == "cuda":
        losses["detr_fast, criterion.capture"] = _captured(logits, boxes, made)
    double = Scene(Predictions(logits.detach().double(), boxes.detach().double()), made.targets)
    return Benchmark(
        case=f"criterion with gradient, {LAYERS} layers",
        axis="images x queries",
        value=f"{images}x{queries}",
        providers=providers | {name: differentiated(loss_of) for name, loss_of in losses.items()},
        check=Check(double, differentiated(losses["eager"])),
        bars=bars,
    )


class Check:
    """Loss and gradients within twice the error that the eager definition in float32 has against float64."""

    def __init__(self, double: Scene, eager_result: Callable[[], Result]) -> None:
        logits, boxes = (x.requires_grad_() for x in (double.predictions.logits, double.predictions.boxes))
        loss = _eager(logits, boxes, double)()
        self.exact = (loss.detach(), *torch.autograd.grad(loss, (logits, boxes)))
        self.eager = eager_result()

    def __call__(self, provider: str, result: Result) -> None:
        names = ("loss", "gradient of logits", "gradient of boxes")
        for name, exact, eager_value, found in zip(names, self.exact, self.eager, result, strict=True):
            error, allowed = (float((x.double() - exact).abs().max()) for x in (found.detach(), eager_value.detach()))
            tolerance = 2 * allowed + 4 * torch.finfo(torch.float32).eps * float(exact.abs().max())
            if not error <= tolerance:
                raise DisagreementError(f"{provider}: {name} is off by {error:.3g}, allowed {tolerance:.3g}")


def _criterion() -> SetCriterion:
    weights = LOSS_WEIGHTS | {f"{name}_{layer}": w for name, w in LOSS_WEIGHTS.items() for layer in range(LAYERS - 1)}
    return SetCriterion(LABELS, HungarianMatcher(*COST_WEIGHTS), weights, EOS, ["labels", "boxes", "cardinality"])


def packed_loss(logits: Tensor, boxes: Tensor, made: Scene) -> Callable[[], Tensor]:
    """Weighted loss of Predictions with Targets."""
    criterion = _criterion().to(logits.device)
    targets = Targets.pack(made.targets)
    return lambda: criterion.weighted_loss(Predictions(logits, boxes), targets)[0]


def _captured(logits: Tensor, boxes: Tensor, made: Scene) -> Callable[[], Tensor]:
    """The graph that users have, which copies predictions and targets from where they are."""
    predictions, targets = Predictions(logits, boxes), Targets.pack(made.targets)
    captured = _criterion().to(logits.device).capture(predictions, len(targets.labels), targets.max_count)
    return lambda: captured(predictions, targets)[0]


def _dictionaries(logits: Tensor, boxes: Tensor, made: Scene) -> Callable[[], Tensor]:
    criterion = _criterion().to(logits.device)

    def loss() -> Tensor:
        losses = criterion(Predictions(logits, boxes).as_dict(), made.targets)
        weighted = [losses[name] * weight for name, weight in criterion.weight_dict.items()]
        return torch.stack(weighted).sum()

    return loss


def _transformers(logits: Tensor, boxes: Tensor, made: Scene) -> Callable[[], Tensor]:
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    class_cost, bbox_cost, giou_cost = COST_WEIGHTS
    config = SimpleNamespace(
        class_cost=class_cost,
        bbox_cost=bbox_cost,
        giou_cost=giou_cost,
        num_labels=LABELS,
        eos_coefficient=EOS,
        auxiliary_loss=True,
        decoder_layers=LAYERS,
        bbox_loss_coefficient=LOSS_WEIGHTS["loss_bbox"],
        giou_loss_coefficient=LOSS_WEIGHTS["loss_giou"],
    )
    targets = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in made.targets]

    def loss() -> Tensor:
        found: Any = ForObjectDetectionLoss(logits[-1], targets, logits.device, boxes[-1], config, logits, boxes)
        return found[0]

    return loss


def _eager(logits: Tensor, boxes: Tensor, made: Scene) -> Callable[[], Tensor]:
    class_weight = torch.ones(LABELS + 1, device=logits.device)
    class_weight[-1] = EOS
    term_weights = logits.new_tensor([*LOSS_WEIGHTS.values(), 0, 0])
    return lambda: (eager.losses(Predictions(logits, boxes), made.targets, class_weight) * term_weights).sum()
