"""DETR with a ResNet-50, forward, against transformers' eager model with the same random weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from benchmarks.harness import Benchmark, DisagreementError, Faster, Options
from detr_fast.models import build_model
from detr_fast.models.checkpoint import from_hugging_face
from detr_fast.structures import Images

LABELS = 91
BATCHES = (((320, 240), (256, 320)),)  # height and width of each image
QUICK_BATCHES = (((96, 64), (64, 96)),)
BARS = (Faster("transformers", 1),)


def benchmarks(options: Options) -> Iterator[Benchmark]:
    ours, theirs = twins()
    ours, theirs = ours.to(options.device).eval(), theirs.to(options.device).eval()
    for sizes in QUICK_BATCHES if options.quick else BATCHES:
        yield forward(ours, theirs, batch_of(sizes).to(options.device))


def twins(dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """Our DETR and transformers', with the same random weights, of which the same are trained."""
    torch.manual_seed(0)
    resnet: dict[str, Any] = {"layer_type": "bottleneck", "depths": [3, 4, 6, 3], "out_features": ["stage4"]}
    settings: dict[str, Any] = {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": ResNetConfig(**resnet),
        "num_labels": LABELS,
        "auxiliary_loss": True,
        "dropout": dropout,
        "attn_implementation": "eager",
    }
    theirs = DetrForObjectDetection(DetrConfig(**settings))
    for name, parameter in theirs.named_parameters():  # with this backbone transformers freezes all of it
        if any(f"stages.{stage}" in name for stage in (1, 2, 3)):
            parameter.requires_grad_()
    ours = build_model("detr_resnet50", LABELS, dropout=dropout)
    state = from_hugging_face(theirs.state_dict())
    ours.load_state_dict({name: value for name, value in state.items() if not name.endswith("num_batches_tracked")})
    return ours, theirs


def batch_of(sizes: tuple[tuple[int, int], ...]) -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images.batch([torch.randn(3, *size, generator=generator) for size in sizes])


def forward(ours: nn.Module, theirs: nn.Module, images: Images) -> Benchmark:
    present = (~images.padding).long()
    outputs = {
        "detr_fast": lambda: _last(ours(images).as_dict(), "pred_logits"),
        "transformers": lambda: _last(theirs(pixel_values=images.pixels, pixel_mask=present), "logits"),
    }
    with torch.no_grad():
        expected = outputs["transformers"]()

    def check(provider: str, result: tuple[Tensor, Tensor]) -> None:
        for name, found, exact in zip(("logits", "boxes"), result, expected, strict=True):
            # Both sum thousands of products in each of over a hundred layers, in different orders.
            tolerance = 1e4 * torch.finfo(torch.float32).eps * float(exact.abs().max())
            error = float((found - exact).abs().max())
            if not error <= tolerance:
                raise DisagreementError(f"{provider}: {name} are off by {error:.3g}, allowed {tolerance:.3g}")

    def without_gradient(name: str) -> object:
        with torch.inference_mode():
            return outputs[name]()

    return Benchmark(
        case="DETR-R50, forward",
        axis="images",
        value=" + ".join(f"{height}x{width}" for height, width in images.sizes),
        providers={
            "detr_fast": lambda: without_gradient("detr_fast"),
            "transformers": lambda: without_gradient("transformers"),
        },
        check=check,
        bars=BARS,
    )


def _last(outputs: Any, logits: str) -> tuple[Tensor, Tensor]:
    return outputs[logits], outputs["pred_boxes"]
