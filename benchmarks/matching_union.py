"""Union of the matchings of seven prediction sets, against the loop in Python of D-FINE's criterion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Bar, Benchmark, DisagreementError, Faster, Options, with_graph
from benchmarks.scenes import COST_WEIGHTS, Kind, coco_like_counts, scene
from detr_fast.matcher import Pairs, pairs_of
from detr_fast.ops.matching import match
from detr_fast.ops.matching_union import unite, unite_reference
from detr_fast.structures import Targets

SETS, QUERIES = 7, 300  # six layers of the decoder and one set beside them
FEW, MANY = (4, 11, 7, 6), (60, 60, 60, 60)  # targets of each image
BARS: tuple[Bar, ...] = (Faster("loop", 50),)


def benchmarks(options: Options) -> Iterator[Benchmark]:
    yield union("mid", FEW, options)
    if options.quick:
        return
    yield union("trained", FEW, options)
    for kind in ("trained", "mid"):
        yield union(kind, MANY, options)
    yield union("mid", coco_like_counts(32), options)


def union(kind: Kind, counts: Sequence[int], options: Options) -> Benchmark:
    """Matchings as the matchers leave them: ours on the device, those of the loop as pairs on the CPU."""
    made = scene(kind, counts, QUERIES, layers=SETS)
    packed, predictions = Targets.pack(made.targets), made.predictions
    matched = match(
        predictions.logits, predictions.boxes, packed.labels, packed.boxes, packed.offsets, *COST_WEIGHTS, kind="focal"
    )
    sets = [pairs_of(layer, packed.offsets) for layer in matched]
    on_device, offsets = matched.to(options.device), packed.offsets.to(options.device)
    return Benchmark(
        case=f"union of {SETS} matchings, {QUERIES} queries, {kind}",
        axis="images x targets",
        value=f"{len(counts)}x{sum(counts) / len(counts):.0f}",
        providers={
            **with_graph(lambda: unite(on_device, offsets, QUERIES), options.device),
            "loop": lambda: unite_by_loop(sets),
            "loop over lists": lambda: unite_by_loop(sets, as_lists=True),
        },
        check=partial(_check, matched, packed.offsets),
        bars=BARS,
    )


def unite_by_loop(sets: Sequence[Pairs], as_lists: bool = False) -> Pairs:
    """How it is done today: for each image the distinct pairs by falling count, of which each query takes the first.

    Equal counts in the order of their targets, where D-FINE leaves that open. ``as_lists`` is the loop at its best:
    the pairs are read from the tensor at once instead of one by one.
    """
    united = []
    for image in zip(*sets, strict=True):
        pairs = torch.cat([torch.stack(pair, 1) for pair in image])  # [pairs, 2] query, target
        distinct, counts = pairs.unique(dim=0, return_counts=True)
        ordered = distinct[counts.argsort(descending=True, stable=True)]
        target_of_query: dict[int, int] = {}
        if as_lists:
            for query, target in ordered.tolist():
                target_of_query.setdefault(query, target)
        else:
            for pair in ordered:
                query, target = pair[0].item(), pair[1].item()
                if query not in target_of_query:
                    target_of_query[query] = target
        queries, targets = (torch.tensor(list(x)) for x in (target_of_query.keys(), target_of_query.values()))
        united.append((queries.long(), targets.long()))
    return united


def pairs_of_union(united: Tensor, offsets: Tensor) -> list[list[tuple[int, int]]]:  # [S, T]
    """The pairs (query, target within its image) of each image, sorted."""
    entries = united.tolist()
    return [
        sorted((row[t], t - start) for row in entries for t in range(start, end) if row[t] >= 0)
        for start, end in pairwise(offsets.tolist())
    ]


def _check(matched: Tensor, offsets: Tensor, provider: str, result: Any) -> None:
    expected = pairs_of_union(unite_reference(matched, offsets, QUERIES), offsets)
    if isinstance(result, Tensor):
        found = pairs_of_union(result.cpu(), offsets)
    else:
        found = [sorted(zip(queries.tolist(), targets.tolist(), strict=True)) for queries, targets in result]
    if found != expected:
        raise DisagreementError(f"{provider}: other pairs than the definition's")
