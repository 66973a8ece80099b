"""Matching as training loops call it: dictionaries in, pairs of indices out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks import eager
from benchmarks.assignment import require_optimal
from benchmarks.harness import Bar, Benchmark, DisagreementError, Faster, Options, Within, with_graph
from benchmarks.scenes import COST_WEIGHTS, KINDS, Kind, Scene, coco_like_counts, scene
from detr_fast.matcher import HungarianMatcher, Pairs, pairs_of
from detr_fast.ops.matching_cost import matching_cost_reference
from detr_fast.structures import Targets

# Images, queries, and how many times faster than transformers' the matcher must be.
SIZES = ((2, 100, 5), (16, 100, 20), (16, 300, 30), (64, 300, 100))
# On a GPU, microseconds that six layers may take: images and queries in the order of KINDS.
DEVICE_LIMITS = {(32, 100): (15, 60, 150), (32, 300): (15, 60, 150), (16, 900): (400, 400, 400)}


def benchmarks(options: Options) -> Iterator[Benchmark]:
    for images, queries, ratio in SIZES[:2] if options.quick else SIZES:
        made = scene("mid", coco_like_counts(images), queries).to(options.device)
        yield matcher(made, Faster("transformers", ratio))
    if options.quick:
        return
    if options.device.type != "cuda":
        for kind in KINDS[:3]:
            yield all_layers(kind, coco_like_counts(32), 100, options)
        return
    for (images, queries), limits in DEVICE_LIMITS.items():
        counts = coco_like_counts(images) if queries < 900 else [100] * images
        for kind, limit in zip(KINDS[:3], limits, strict=True):
            yield all_layers(kind, counts, queries, options, [Within(limit, "detr_fast, graph")])


def transformers_matcher() -> Callable[..., Pairs] | None:
    """The matcher of transformers, where that is installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers.loss.loss_for_object_detection import HungarianMatcher as TransformersMatcher

    return TransformersMatcher(*COST_WEIGHTS)


def matcher(made: Scene, bar: Faster) -> Benchmark:
    """One decoder layer through the interface of facebookresearch/detr."""
    logits, boxes = made.predictions.logits[0], made.predictions.boxes[0]
    images, queries = logits.shape[:2]
    ours, theirs = HungarianMatcher(*COST_WEIGHTS), transformers_matcher()
    outputs = {"pred_logits": logits, "pred_boxes": boxes}
    their_outputs = {"logits": logits, "pred_boxes": boxes}
    their_targets = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in made.targets]
    providers: dict[str, Callable[[], object]] = {"detr_fast": lambda: ours(outputs, made.targets)}
    if theirs is not None:
        providers["transformers"] = lambda: theirs(their_outputs, their_targets)
    providers["eager"] = lambda: eager.match(logits, boxes, made.targets)
    return Benchmark(
        case="matcher",
        axis="images x queries",
        value=f"{images}x{queries}",
        providers=providers,
        check=partial(_check_layer, made, 0),
        bars=[bar],
    )


def all_layers(
    kind: Kind, counts: Sequence[int], queries: int, options: Options, bars: Sequence[Bar] = ()
) -> Benchmark:
    """Six decoder layers in one call, against one call for each layer."""
    made = scene(kind, counts, queries, layers=6).to(options.device)
    predictions, packed = made.predictions, Targets.pack(made.targets).to(options.device)
    ours, theirs = HungarianMatcher(*COST_WEIGHTS), transformers_matcher()
    their_targets = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in made.targets]
    layers = list(zip(predictions.logits, predictions.boxes, strict=True))
    providers: dict[str, Callable[[], object]] = with_graph(lambda: ours(predictions, packed), options.device)
    if theirs is not None:
        providers["transformers"] = lambda: [theirs({"logits": x, "pred_boxes": y}, their_targets) for x, y in layers]

    def check(provider: str, result: Any) -> None:
        for layer in range(len(layers)):
            is_ours = provider.startswith("detr_fast")
            pairs = pairs_of(result[layer], packed.offsets) if is_ours else result[layer]
            _check_layer(made, layer, provider, pairs)

    return Benchmark(
        case=f"match, 6 layers, {kind}",
        axis="images x queries",
        value=f"{len(counts)}x{queries}",
        providers=providers,
        check=check,
        bars=bars,
    )


def _check_layer(made: Scene, layer: int, provider: str, pairs: Pairs) -> None:
    """Every image's pairs must be of least cost, where the definition's float64 costs say what that is."""
    packed = Targets.pack([{name: x.cpu() for name, x in target.items()} for target in made.targets])
    logits, boxes = (x[layer : layer + 1].double().cpu() for x in (made.predictions.logits, made.predictions.boxes))
    cost = matching_cost_reference(logits, boxes, packed.labels, packed.boxes, packed.offsets, *COST_WEIGHTS)[0]
    bounds = packed.offsets.tolist()
    if len(pairs) != len(bounds) - 1:
        raise DisagreementError(f"{provider}: pairs of {len(pairs)} images instead of {len(bounds) - 1}")
    for (start, end), (queries, targets) in zip(pairwise(bounds), pairs, strict=True):
        if not torch.equal(queries, queries.sort().values):
            raise DisagreementError(f"{provider}: queries are not ascending")
        require_optimal(provider, cost[start:end].numpy(), np.asarray(targets), np.asarray(queries))
