"""A whole training step, images to gradients: DETR with its criterion against transformers' model with its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.criterion import EOS, LABELS, LOSS_WEIGHTS
from benchmarks.harness import Benchmark, DisagreementError, Faster, Options
from benchmarks.model import batch_of, twins
from benchmarks.scenes import COST_WEIGHTS, coco_like_counts, scene
from detr_fast.criterion import SetCriterion
from detr_fast.matcher import HungarianMatcher
from detr_fast.models import build_model
from detr_fast.structures import Images, Targets

SIZES = ((160, 128), (128, 160))
BARS = (Faster("transformers", 1),)


def benchmarks(options: Options) -> Iterator[Benchmark]:
    torch.manual_seed(0)
    images = batch_of(((96, 64), (64, 96)) if options.quick else SIZES).to(options.device)
    targets = scene("mid", coco_like_counts(len(images)), 1).to(options.device).targets
    tiny = build_model("detr_tiny", LABELS).to(options.device)
    yield _benchmark("detr_tiny", images, {"detr_fast": step_of(tiny, our_loss(tiny, images, targets))})
    ours, theirs = (model.to(options.device) for model in twins())
    losses = {"detr_fast": our_loss(ours, images, targets), "transformers": their_loss(theirs, images, targets)}
    with torch.no_grad():
        expected = losses["transformers"]()
    steps = {"detr_fast": step_of(ours, losses["detr_fast"]), "transformers": step_of(theirs, losses["transformers"])}
    yield _benchmark("DETR-R50", images, steps, expected)


def _benchmark(
    model: str, images: Images, steps: dict[str, Callable[[], Tensor]], expected: Tensor | None = None
) -> Benchmark:
    """Only the first step of each provider is checked, as it starts from known weights."""

    def check(provider: str, loss: Tensor) -> None:
        found = float(loss)
        exact = found if expected is None else float(expected)
        # Both sum thousands of products in each of over a hundred layers, in different orders.
        if not abs(found - exact) <= 1e4 * torch.finfo(torch.float32).eps * abs(exact):
            raise DisagreementError(f"{provider}: the loss of the first step is {found}, not {exact}")

    return Benchmark(
        case=f"{model}, training step",
        axis="images",
        value=" + ".join(f"{height}x{width}" for height, width in images.sizes),
        providers=dict(steps),
        check=check,
        bars=BARS,
    )


def our_loss(model: nn.Module, images: Images, targets: list[dict[str, Tensor]]) -> Callable[[], Tensor]:
    device = images.pixels.device
    layers = range(len(model.train()(images).logits) - 1)
    weights = LOSS_WEIGHTS | {f"{name}_{layer}": w for name, w in LOSS_WEIGHTS.items() for layer in layers}
    matcher = HungarianMatcher(*COST_WEIGHTS)
    criterion = SetCriterion(LABELS, matcher, weights, EOS, ["labels", "boxes", "cardinality"]).to(device)
    packed = Targets.pack(targets).to(device)

    def loss() -> Tensor:
        return criterion.weighted_loss(model(images), packed)[0]

    return loss


def their_loss(model: nn.Module, images: Images, targets: list[dict[str, Tensor]]) -> Callable[[], Tensor]:
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    present = (~images.padding).long()
    model.train()
    return lambda: model(pixel_values=images.pixels, pixel_mask=present, labels=labels).loss


def step_of(model: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return loss.detach()

    return step
