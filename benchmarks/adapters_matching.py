"""Matchers and solvers as other code bases call them: RF-DETR's, mmdetection's, and the interfaces of solvers.

The suite ``assignment`` has more sizes of the solvers themselves.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.adapters_losses import (
    CROWDED,
    FULL,
    LAYERS,
    ONE,
    STABLE,
    USUAL,
    Inputs,
    definition,
    drawn,
    installed_rfdetr,
    size,
)
from benchmarks.assignment import require_optimal
from benchmarks.harness import OURS, Bar, Benchmark, Faster, Options
from benchmarks.scenes import costs
from detr_fast.boxes import box_cxcywh_to_xyxy
from detr_fast.integrations import mmdetection, rfdetr, solvers
from detr_fast.matcher import Pairs

GROUPS, GROUP = 13, 300  # of RF-DETR's queries
DEFINITION = "definition"
RFDETR_BARS: tuple[Bar, ...] = (Faster("rfdetr", 20), Faster(DEFINITION, 20))
NAMED_COSTS: dict[str, Any] = {"cost_class": 2, "cost_bbox": 5, "cost_giou": 2}
MATCH_COSTS = [
    {"type": "FocalLossCost", "weight": 2.0},
    {"type": "BBoxL1Cost", "weight": 5.0, "box_format": "xywh"},
    {"type": "IoUCost", "iou_mode": "giou", "weight": 2.0},
]
SHAPE = (800, 1216)  # height and width of mmdetection's images


def benchmarks(options: Options) -> Iterator[Benchmark]:
    for counts in (USUAL,) if options.quick else (USUAL, ONE, CROWDED):
        yield rfdetr_groups(counts, options, RFDETR_BARS if counts == USUAL else ())
    yield mmdetection_assigner(USUAL, 300, options)
    if not options.quick:
        yield mmdetection_assigner(FULL, 900, options)
    for problems, queries, targets in ((24, 300, 60),) if options.quick else ((24, 300, 60), (8, 300, 300)):
        yield batch_solver(problems, queries, targets, options)
    if options.device.type == "cuda":
        return
    for queries, targets in ((4, 3), (300, 60)) if options.quick else ((4, 3), (300, 60), (900, 150)):
        yield single_solver(queries, targets)


def rfdetr_groups(counts: Sequence[int], options: Options, bars: Sequence[Bar] = ()) -> Benchmark:
    """One decoder layer, from dictionaries to pairs."""
    logits, boxes, targets = drawn(counts, GROUPS * GROUP, layers=1)
    moved = Inputs({"logits": logits.detach(), "boxes": boxes.detach()}, list(targets)).to(options.device)
    outputs = {"pred_logits": moved.tensors["logits"][0], "pred_boxes": moved.tensors["boxes"][0]}
    module, package = definition("rfdetr"), installed_rfdetr()
    made: dict[str, Callable[..., Any]] = {
        OURS: rfdetr.HungarianMatcher(**NAMED_COSTS, mode="compat"),
        STABLE: rfdetr.HungarianMatcher(**NAMED_COSTS),
    }
    if package is not None:
        made["rfdetr"] = package.models.matcher.HungarianMatcher(**NAMED_COSTS)
    providers: dict[str, Callable[[], object]] = {
        name: partial(matcher, outputs, moved.targets, group_detr=GROUPS) for name, matcher in made.items()
    }
    providers[DEFINITION] = lambda: module.match(outputs, moved.targets, GROUPS, **NAMED_COSTS)

    def check(provider: str, pairs: Pairs) -> None:
        for image, (target, found) in enumerate(zip(targets, pairs, strict=True)):
            cost = module.cost_of_image(
                *(x.detach()[0, image].double() for x in (logits, boxes)), target, **NAMED_COSTS
            )
            for queries, own in zip(*(side.chunk(GROUPS) for side in found), strict=True):
                first = int(queries.min()) // GROUP * GROUP
                part = cost[first : first + GROUP].mT.numpy()
                require_optimal(provider, part, own.numpy(), queries.numpy() - first)

    return Benchmark(
        case=f"match, RF-DETR, {GROUPS} groups",
        axis="images x queries x targets",
        value=size(counts, GROUPS * GROUP),
        providers=providers,
        check=check,
        bars=bars,
    )


def mmdetection_assigner(counts: Sequence[int], queries: int, options: Options) -> Benchmark:
    """All layers: "detr_fast" in one call, "detr_fast, assign" image by image as the definition."""
    logits, boxes, targets = drawn(counts, queries)
    moved = Inputs({"logits": logits.detach(), "boxes": boxes.detach()}, list(targets)).to(options.device)
    scores, centres = moved.tensors["logits"], moved.tensors["boxes"]
    scale = torch.tensor(SHAPE[::-1], device=options.device).repeat(2)
    images = [
        SimpleNamespace(labels=target["labels"], bboxes=box_cxcywh_to_xyxy(target["boxes"]) * scale)
        for target in moved.targets
    ]
    meta = {"img_shape": SHAPE}
    own = {mode: mmdetection.HungarianAssigner(MATCH_COSTS, mode=mode) for mode in ("compat", "stable")}

    def by_image(assign: Callable[[Any, Any], Tensor]) -> list[list[Tensor]]:
        """Boxes become corners in pixels in here, as in mmdetection's heads."""
        return [
            [
                assign(SimpleNamespace(scores=x, bboxes=box_cxcywh_to_xyxy(y) * scale), image)
                for x, y, image in zip(*layer, images, strict=True)
            ]
            for layer in zip(scores, centres, strict=True)
        ]

    def together(mode: str) -> list[list[Tensor]]:
        results = own[mode].assign_batch(scores, centres, images, [meta] * len(images))
        return [[result.gt_inds for result in layer] for layer in results]

    providers: dict[str, Callable[[], object]] = {
        OURS: partial(together, "compat"),
        STABLE: partial(together, "stable"),
        f"{OURS}, assign": lambda: by_image(lambda x, y: own["compat"].assign(x, y, meta).gt_inds),
    }
    module = definition("mmdetection")
    if options.device.type == "cpu":
        providers[DEFINITION] = lambda: by_image(lambda x, y: module.assign(_cost(x, y), y.labels)[0])

    def check(provider: str, result: list[list[Tensor]]) -> None:
        pixels = torch.tensor(SHAPE[::-1]).repeat(2).double()
        for layer, of_layer in enumerate(result):
            for image, gt_inds in enumerate(of_layer):
                known = (logits.detach()[layer, image].double(), boxes.detach()[layer, image].double())
                predictions = SimpleNamespace(scores=known[0], bboxes=box_cxcywh_to_xyxy(known[1]) * pixels)
                goals = box_cxcywh_to_xyxy(targets[image]["boxes"].double()) * pixels
                cost = _cost(predictions, SimpleNamespace(labels=targets[image]["labels"], bboxes=goals))
                found = gt_inds.cpu().numpy()
                matched = np.flatnonzero(found)
                require_optimal(provider, cost.mT.numpy(), found[matched] - 1, matched)

    return Benchmark(
        case=f"match, assigner of mmdetection, {LAYERS} layers",
        axis="images x queries x targets",
        value=size(counts, queries),
        providers=providers,
        check=check,
    )


def _cost(predictions: Any, targets: Any) -> Tensor:  # [Q, T]
    module = definition("mmdetection")
    return (
        module.focal_loss_cost(predictions.scores, targets.labels, weight=2.0)
        + module.bbox_l1_cost(predictions.bboxes, targets.bboxes, SHAPE, "xywh", 5.0)
        + module.giou_cost(predictions.bboxes, targets.bboxes, 2.0)
    )


def batch_solver(problems: int, queries: int, targets: int, options: Options) -> Benchmark:
    """torch-linear-assignment's interface, tensors in and out. On the CPU that package is a loop over SciPy."""
    cost = costs("mid", problems, queries, targets)  # [N, T, Q]
    on_device = cost.to(options.device)
    providers: dict[str, Callable[[], Any]] = {
        OURS: lambda: solvers.batch_linear_assignment(on_device, mode="compat"),
        STABLE: lambda: solvers.batch_linear_assignment(on_device),
    }
    if importlib.util.find_spec("torch_linear_assignment"):
        from torch_linear_assignment import batch_linear_assignment

        providers["torch-linear-assignment"] = lambda: batch_linear_assignment(on_device)
    providers["scipy"] = lambda: torch.stack(
        [torch.from_numpy(linear_sum_assignment(matrix)[1]) for matrix in on_device.cpu().numpy()]
    )

    def check(provider: str, found: Tensor) -> None:
        for matrix, columns in zip(cost.numpy(), found.cpu().numpy(), strict=True):
            require_optimal(provider, matrix, np.arange(targets), columns)

    return Benchmark(
        case=f"solver, batch_linear_assignment, {problems} problems",
        axis="queries x targets",
        value=f"{queries}x{targets}",
        providers=providers,
        check=check,
    )


def single_solver(queries: int, targets: int) -> Benchmark:
    """One float64 matrix a call."""
    cost = costs("mid", 1, queries, targets)[0].double().numpy()  # [T, Q]
    providers: dict[str, Callable[[], Any]] = {
        OURS: lambda: solvers.linear_sum_assignment(cost)[1],
        f"{OURS}, lapjv": lambda: solvers.lapjv(cost, extend_cost=True)[1],
        "scipy": lambda: linear_sum_assignment(cost)[1],
    }
    if importlib.util.find_spec("lap"):
        import lap

        providers["lap.lapjv"] = lambda: lap.lapjv(cost, extend_cost=True)[1]

    def check(provider: str, columns: np.ndarray) -> None:
        require_optimal(provider, cost, np.arange(targets), columns)

    return Benchmark(
        case="solver, linear_sum_assignment and lapjv",
        axis="queries x targets",
        value=f"{queries}x{targets}",
        providers=providers,
        check=check,
    )
