"""A whole training step, from a batch on the host to new weights: ours, the paper's and transformers'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import data_parallel, training
from benchmarks.harness import OURS, Bar, Benchmark, DisagreementError, Faster, Options
from benchmarks.scenes import coco_like_batch, shapes_batch
from benchmarks.steps import Lazy, Start, eager_step, our_step, their_step
from detr_fast.engine.config import SpeedConfig

SHAPES = 3  # labels of the generated shapes
DROPOUT = 0.1  # as published; without it where losses are compared closely
# Of the loss of a first step, relative: rounding in each of over a hundred layers; on a GPU bf16 and what dropout draws
# as well (0.4 % together, at 2 images of 100 to 160 pixels).
TOLERANCE, DEVICE_TOLERANCE = 1e4 * torch.finfo(torch.float32).eps, 0.02
COMPILED, GRAPH, FULL, HALF = f"{OURS}, compile", f"{OURS}, graph", f"{OURS}, float32", f"{OURS}, bf16"
THEIRS, THEIR_HALF, THEIR_BEST = "transformers", "transformers, bf16", "transformers, bf16, sdpa, compile"
DEVICE_BARS: dict[int, Sequence[Bar]] = {
    16: (Faster(THEIRS, 3), Faster(THEIR_HALF, 2), Faster(THEIR_BEST, 1.4, COMPILED)),
    2: (Faster(THEIRS, 4), Faster(THEIRS, 4, GRAPH)),
}


def benchmarks(options: Options) -> Iterator[Benchmark]:
    if options.device.type == "cuda":
        yield from on_device(options)
    else:
        yield from on_host(options)


def on_host(options: Options) -> Iterator[Benchmark]:
    images, side = (2, 64) if options.quick else (8, 128)
    shapes = Start.random("detr_small", SHAPES, shapes_batch(images, side), options.device)
    compiled = {} if options.quick else {COMPILED: our_step(shapes, speed=SpeedConfig(compile=True))}
    providers = {OURS: our_step(shapes), **_half(shapes), **compiled, "eager": eager_step(shapes)}
    value = f"{images}x{side}"
    bars = [Faster("eager", 1.5, provider) for provider in (OURS, HALF) if provider in providers]
    yield _benchmark("detr_small on shapes, training step", value, providers, shapes, bars)
    published = Start.of_twins(coco_like_batch(2, shrink=12 if options.quick else 5), options.device, dropout=0.0)
    others = {THEIRS: their_step(published), "eager": eager_step(published)}
    providers = {OURS: our_step(published), **_half(published), **others}
    yield _benchmark("DETR-R50, training step", _sides(published), providers, published, (Faster(THEIRS, 1),))
    yield _benchmark("detr_small on shapes, switches of a training step", value, _switches(shapes, options), shapes)
    if not options.quick:
        switches = _switches(published, options)
        yield _benchmark("DETR-R50, switches of a training step", _sides(published), switches, published)
    yield training.benchmark(options)
    yield data_parallel.benchmark(options)


def on_device(options: Options) -> Iterator[Benchmark]:
    half = torch.bfloat16
    for images in (2,) if options.quick else (16, 2):
        batch = coco_like_batch(images, shrink=6 if options.quick else 1)
        start = Start.of_twins(batch, options.device, DROPOUT)
        providers = {
            OURS: our_step(start, half),
            COMPILED: our_step(start, half, SpeedConfig(compile=True)),
            GRAPH: our_step(start, half, SpeedConfig(graph=True)),
            FULL: our_step(start),
            THEIRS: their_step(start),
            THEIR_HALF: their_step(start, half),
            THEIR_BEST: their_step(start, half, "sdpa", compiles=True),
            "eager": eager_step(start),
        }
        yield _benchmark("DETR-R50, training step", _sides(start), providers, start, DEVICE_BARS[images])
        del providers  # and with them the device's memory
        yield _benchmark("DETR-R50, switches of a training step", _sides(start), _switches(start, options), start)


def _half(start: Start) -> dict[str, Lazy]:
    """Where the processor multiplies bf16; elsewhere it is slower than float32, in which the others compute."""
    is_native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return {HALF: our_step(start, torch.bfloat16)} if is_native else {}


def _switches(start: Start, options: Options) -> dict[str, Lazy]:
    """The defaults, and each switch turned. What takes long to compile is left out of a quick run."""
    on_gpu = start.device.type == "cuda"
    precision = torch.bfloat16 if on_gpu else torch.float32
    names = ["channels_last"]
    names += ["fold_norms"] if "resnet" in start.name else []  # others have norms that learn
    names += [] if options.quick else ["compile"]
    names += ["graph"] if on_gpu else []
    found = {OURS: our_step(start, precision)}
    for name in names:
        value = not getattr(SpeedConfig(), name)
        speed = replace(SpeedConfig(), **{name: value})
        found[f"{OURS}, {name} {'on' if value else 'off'}"] = our_step(start, precision, speed)
    found[f"{OURS}, fused AdamW off"] = our_step(start, precision, fused=False)
    if on_gpu:
        found[FULL] = our_step(start)
        found[f"{FULL}, tf32 off"] = our_step(start, speed=SpeedConfig(tf32=False))
    return found


def _benchmark(case: str, value: str, providers: dict[str, Lazy], start: Start, bars: Sequence[Bar] = ()) -> Benchmark:
    def check(provider: str, loss: Tensor | float) -> None:
        """Only the first step of each provider is checked, as it starts from known weights."""
        tolerance = DEVICE_TOLERANCE if start.device.type == "cuda" or provider == HALF else TOLERANCE
        if not abs(float(loss) - start.loss) <= tolerance * start.loss:
            raise DisagreementError(f"{provider}: the loss of the first step is {float(loss)}, not {start.loss}")

    steps: dict[str, Callable[[], object]] = dict(providers)
    return Benchmark(case, "images x side" if "shapes" in case else "images", value, steps, check, bars)


def _sides(start: Start) -> str:
    """Images, shortest and longest side, as "2 x 100-160"."""
    sides = [side for size in start.batch.images.sizes for side in size]
    return f"{len(start.batch)} x {min(sides)}-{max(sides)}"
