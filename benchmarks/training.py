"""Training as it runs, files to weights: loader and step together, on generated shapes of many sizes.

With sizes and crops drawn as the paper draws them, half of a random batch is padding, which a step on ready batches
does not show: here ours makes batches of like shape, and the paper's code takes images as they come.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from itertools import count, islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from benchmarks.harness import OURS, Benchmark, DisagreementError, Faster, Options
from benchmarks.input_pipeline import ReferenceItems, loader_of, padded, valid_share
from benchmarks.reference import reference_model
from benchmarks.reference_step import ReferenceCriterion, ReferenceStep, Target, dictionaries, reference_optimizer
from benchmarks.steps import Start, our_model
from detr_fast.data.batch import Batch, collate
from detr_fast.data.coco import CocoDetection
from detr_fast.data.layouts import find_split
from detr_fast.data.shapes import NAMES, write_shapes
from detr_fast.data.transforms import Sample, train_transform
from detr_fast.engine.build import build_criterion
from detr_fast.engine.config import Config, OptimizerConfig, SpeedConfig
from detr_fast.engine.optimizer import build_optimizer
from detr_fast.engine.step import TrainingStep

BATCH, WORKERS = 8, 1
BARS = (Faster("eager", 1.5),)


def benchmark(options: Options) -> Benchmark:
    images, side, steps = (2 * BATCH, 48, 2) if options.quick else (1024, 128, 16)
    dataset = data_set(images, side)
    model = "detr_tiny" if options.quick else "detr_small"
    start = Start.random(model, len(NAMES), collate([dataset[0]]), options.device)
    providers: dict[str, Callable[[], object]] = {
        OURS: our_steps(start, dataset, steps),
        "eager": reference_steps(start, dataset, steps),
    }

    def check(provider: str, losses: Sequence[float]) -> None:
        """Batches differ, hence losses as well; that single steps agree is checked by the other cases."""
        if len(losses) != steps or not all(map(math.isfinite, losses)):
            raise DisagreementError(f"{provider}: there must be {steps} finite losses, got {losses}")

    share, without = (valid_share(dataset, BATCH, images) for images in (images, 0))
    return Benchmark(
        case=f"{model} on shapes, training from files",
        axis="images",
        value=f"{steps * BATCH} of up to {side} pixels in batches of {BATCH}, {share:.0%} of the pixels valid "
        f"(eager: {without:.0%})",
        providers=providers,
        check=check,
        bars=BARS,
    )


def data_set(images: int, side: int) -> CocoDetection:
    """The paper's sizes and crops in proportion; the folder is removed when Python ends."""
    folder = tempfile.TemporaryDirectory(prefix="detr-fast-training-")
    root = write_shapes(Path(folder.name) / "shapes", {"train": images}, side)
    scales = [side * scale // 800 for scale in range(480, 801, 32)]
    found = CocoDetection(find_split(root, "train"), train_transform(scales, side * 1333 // 800))
    found.folder = folder  # type: ignore[attr-defined]  # lives as long as the data set
    return found


def our_steps(start: Start, dataset: CocoDetection, steps: int) -> Callable[[], list[float]]:
    """The first steps of another epoch in every call."""
    loader = loader_of(dataset, BATCH, start.device, "auto", WORKERS)
    model = our_model(start, SpeedConfig())
    criterion = build_criterion(Config(), start.labels).to(start.device)
    step = TrainingStep(model, criterion, build_optimizer(model, OptimizerConfig()))

    epochs = count()

    def train() -> list[float]:
        batches = islice(loader.start(next(epochs)), steps)
        return torch.stack([step([batch]).losses["loss"] for batch in batches]).tolist()

    return train


def reference_steps(start: Start, dataset: CocoDetection, steps: int) -> Callable[[], list[float]]:
    loader = DataLoader(
        ReferenceItems(dataset),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
        collate_fn=_with_targets,
    )
    model = reference_model(start.name, start.labels, **start.options)
    model.load_state_dict(start.state)
    step = ReferenceStep(model, ReferenceCriterion(start.labels), reference_optimizer(model))
    return lambda: [step(batch, targets) for batch, targets in islice(loader, steps)]


def _with_targets(samples: Sequence[Sample]) -> tuple[Batch, list[Target]]:
    made = padded(samples)
    ready = [(image, {**target, "labels": target["labels"] - 1}) for image, target in samples]  # ids are 1, 2, 3
    batch = collate(ready)
    assert torch.equal(batch.images.padding, made.padding)
    return batch, dictionaries(batch)
