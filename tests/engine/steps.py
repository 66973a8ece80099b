"""Small batches and models for tests of single steps."""

from __future__ import annotations

import torch
from torch import nn

from detr_fast.data.batch import Batch
from detr_fast.engine.build import build_criterion
from detr_fast.engine.config import Config, OptimizerConfig
from detr_fast.engine.optimizer import build_optimizer
from detr_fast.engine.step import TrainingStep
from detr_fast.models import build_model
from detr_fast.structures import Images, Targets

CLASSES = 3
OPTIONS = {"num_queries": 6, "hidden_dim": 32, "nheads": 2, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 32}


def batch_of(images: int, seed: int = 0, *, empty: bool = False) -> Batch:
    """Images of 48 to 64 pixels with 0 to 2 objects; ids are ``seed * 100`` and on."""
    generator = torch.Generator().manual_seed(seed)
    pixels = [torch.randn(3, 64, 48 + 16 * (image % 2), generator=generator) for image in range(images)]
    targets = []
    for image in range(images):
        count = 0 if empty else image % 3
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        targets.append({"labels": labels, "boxes": torch.rand(count, 4, generator=generator) * 0.4 + 0.1})
    ids = tuple(range(seed * 100, seed * 100 + images))
    return Batch(Images.batch(pixels), Targets.pack(targets, CLASSES), ids, torch.tensor([[64, 64]] * images))


def part_of(batch: Batch, first: int, last: int) -> Batch:
    """Images ``first:last`` on the same canvas."""
    images, targets = batch.images, batch.targets
    rows = slice(int(targets.offsets[first]), int(targets.offsets[last]))
    offsets = (targets.offsets[first : last + 1] - targets.offsets[first]).int()
    own = slice(first, last)
    return Batch(
        Images(images.pixels[own], images.padding[own], images.sizes[own]),
        Targets(targets.labels[rows], targets.boxes[rows], offsets, targets.max_count),
        batch.image_ids[own],
        batch.original_sizes[own],
    )


def model_of(name: str = "detr_resnet50", dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    """Constant norms by default, so that an image's result does not depend on the others of its batch."""
    torch.manual_seed(0)
    return build_model(name, CLASSES, dropout=dropout, **OPTIONS).to(dtype).train()


def step_of(model: nn.Module, clip_norm: float = 0.1, precision: torch.dtype = torch.float32) -> TrainingStep:
    optimizer = build_optimizer(model, OptimizerConfig())
    return TrainingStep(model, build_criterion(Config(), CLASSES), optimizer, clip_norm, precision)


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
