"""Matching as training loops call it: dictionaries in, pairs of indices out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers.loss.loss_for_object_detection import HungarianMatcher as TransformersMatcher

from benchmarks import eager
from benchmarks.assignment import require_optimal
from benchmarks.harness import Benchmark, DisagreementError, Faster, Options
from benchmarks.scenes import COST_WEIGHTS, KINDS, Kind, Scene, coco_like_counts, scene
from detr_fast.matcher import HungarianMatcher, Pairs, pairs_of
from detr_fast.ops.matching_cost import matching_cost_reference
from detr_fast.structures import Targets

# Images, queries, and how many times faster than transformers' the matcher must be.
SIZES = ((2, 100, 5), (16, 100, 20), (16, 300, 30), (64, 300, 100))


def benchmarks(options: Options) -> Iterator[Benchmark]:
    for images, queries, ratio in SIZES[:2] if options.quick else SIZES:
        made = scene("mid", coco_like_counts(images), queries).to(options.device)
        yield matcher(made, Faster("transformers", ratio))
    if options.quick:
        return
    for kind in KINDS[:3]:
        yield all_layers(kind, options)


def matcher(made: Scene, bar: Faster) -> Benchmark:
    """One decoder layer through the interface of facebookresearch/detr."""
    logits, boxes = made.predictions.logits[0], made.predictions.boxes[0]
    images, queries = logits.shape[:2]
    ours, theirs = HungarianMatcher(*COST_WEIGHTS), TransformersMatcher(*COST_WEIGHTS)
    outputs = {"pred_logits": logits, "pred_boxes": boxes}
    their_outputs = {"logits": logits, "pred_boxes": boxes}
    their_targets = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in made.targets]
    return Benchmark(
        case="matcher",
        axis="images x queries",
        value=f"{images}x{queries}",
        providers={
            "detr_fast": lambda: ours(outputs, made.targets),
            "transformers": lambda: theirs(their_outputs, their_targets),
            "eager": lambda: eager.match(logits, boxes, made.targets),
        },
        check=partial(_check_layer, made, 0),
        bars=[bar],
    )


def all_layers(kind: Kind, options: Options) -> Benchmark:
    """Six decoder layers of 32 images in one call, against one call for each layer."""
    made = scene(kind, coco_like_counts(32), 100, layers=6).to(options.device)
    predictions, packed = made.predictions, Targets.pack(made.targets).to(options.device)
    ours, theirs = HungarianMatcher(*COST_WEIGHTS), TransformersMatcher(*COST_WEIGHTS)
    their_targets = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in made.targets]
    layers = list(zip(predictions.logits, predictions.boxes, strict=True))

    def check(provider: str, result: Any) -> None:
        for layer in range(len(layers)):
            pairs = pairs_of(result[layer], packed.offsets) if provider == "detr_fast" else result[layer]
            _check_layer(made, layer, provider, pairs)

    return Benchmark(
        case=f"match, 6 layers, {kind}",
        axis="images x queries",
        value="32x100",
        providers={
            "detr_fast": lambda: ours(predictions, packed),
            "transformers": lambda: [theirs({"logits": x, "pred_boxes": y}, their_targets) for x, y in layers],
        },
        check=check,
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
