"""Every op on a small random problem against its definition, on one device.

The definition runs on the CPU, in float64 and in the op's own type. An op may be at most four times as far from float64
as its definition, and some roundings: the project's tests allow two, and this must not fail by chance on any machine.
Assignments are judged by the prices that prove them.
"""

from __future__ import annotations

import contextlib
import itertools
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr_fast import ops
from detr_fast.doctor.report import first_line
from detr_fast.ops.matching_cost import ClassKind
from detr_fast.ops.set_loss import LossKind
from detr_fast.structures import offsets_of

COUNTS, LAYERS, QUERIES, CLASSES = (3, 0, 7, 25), 2, 20, 11  # the last image has more targets than queries
GROUPS = 2
WEIGHTS: dict[str, Any] = {"class_weight": 2.0, "box_weight": 5.0, "giou_weight": 2.0}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Check:
    """What was found of one op on one device."""

    name: str
    device: str
    ok: bool
    error: float | None  # the one that uses most of what is allowed
    allowed: float | None
    message: str | None  # why it failed


class Comparison(NamedTuple):
    what: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # not so if it is NaN

    @property
    def used(self) -> float:
        return 0.0 if self.error == 0 else self.error / self.allowed if self.allowed else float("inf")


def run_checks(device: torch.device) -> Iterator[Check]:
    """All checks that `device` can do, in a fixed order. Leaves the random numbers of the process as they were."""
    for name, compare in CHECKS.items():
        if name in _ONLY_CPU and device.type != "cpu":
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = list(compare(device))
        except Exception as error:  # whatever it is, the others are still of interest
            yield Check(name, str(device), False, None, None, first_line(error))
            continue
        bad = [x for x in found if not x.ok]
        worst = (bad or [max(found, key=lambda x: x.used)])[0]
        message = f"{worst.what}: error {worst.error:.2g}, allowed {worst.allowed:.2g}" if bad else None
        yield Check(name, str(device), not bad, worst.error, worst.allowed, message)


def _compared(what: str, actual: Tensor, definition: Tensor, exact: Tensor) -> Comparison:
    """`definition` has the type of `actual`, `exact` is the definition in float64."""
    if actual.shape != exact.shape or actual.dtype != definition.dtype:
        raise ValueError(f"{what}: {list(actual.shape)} {actual.dtype}, not {list(exact.shape)} {definition.dtype}")
    if exact.numel() == 0:
        return Comparison(what, 0.0, 0.0)
    compute_type = torch.float64 if actual.dtype == torch.float64 else torch.float32
    stored = max(torch.finfo(actual.dtype).eps / 2, torch.finfo(torch.float64).eps * 32)
    rounding = (2 * torch.finfo(compute_type).eps + stored) * exact.abs().max().item()
    own = (definition.double() - exact).abs().max().item()
    return Comparison(what, (actual.detach().cpu().double() - exact).abs().max().item(), 4 * own + rounding)


def _problem() -> Inputs:
    """logits [L, B, Q, C] and boxes [L, B, Q, 4] float32, labels [T], target_boxes [T, 4], offsets [B + 1]."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LAYERS, len(COUNTS), QUERIES, CLASSES, generator=generator)
    boxes = 0.2 + 0.5 * torch.rand(LAYERS, len(COUNTS), QUERIES, 4, generator=generator)
    labels = torch.randint(0, CLASSES - 1, (sum(COUNTS),), generator=generator)
    target_boxes = 0.2 + 0.5 * torch.rand(sum(COUNTS), 4, generator=generator)
    return logits, boxes, labels, target_boxes, offsets_of(COUNTS)


def _on(device: torch.device, inputs: Inputs) -> Inputs:
    logits, boxes, labels, target_boxes, offsets = (x.to(device) for x in inputs)
    return logits, boxes, labels, target_boxes, offsets


def _matching_cost(device: torch.device) -> Iterator[Comparison]:
    inputs = _problem()
    logits, boxes, labels, target_boxes, offsets = inputs
    exactly = (logits.double(), boxes.double(), labels, target_boxes, offsets)
    for kind in typing.get_args(ClassKind):
        found = ops.matching_cost(*_on(device, inputs), kind=kind, **WEIGHTS)
        definition = ops.matching_cost_reference(*inputs, kind=kind, **WEIGHTS)
        exact = ops.matching_cost_reference(*exactly, kind=kind, **WEIGHTS)
        yield _compared(kind, found, definition, exact)


def _cost() -> Tensor:  # [L, T, Q]
    return torch.randn(LAYERS, sum(COUNTS), QUERIES, generator=torch.Generator().manual_seed(1))


def _rounding(cost: Tensor) -> float:
    """By how much totals of float32 may differ: 4 T eps max|cost| of the largest image."""
    return 4 * max(COUNTS) * torch.finfo(torch.float32).eps * float(cost.abs().max())


def _totals(cost: Tensor, query_of_target: Tensor, what: str) -> Tensor:  # [L, B] float64
    """Of a matching; raises a ValueError if it is none, or not of as many pairs as there can be."""
    rows = []
    for layer, (start, end) in itertools.product(range(LAYERS), itertools.pairwise(offsets_of(COUNTS).tolist())):
        query = query_of_target[layer, start:end].cpu().long()
        target = torch.nonzero(query >= 0).flatten()
        matched = query[target]
        if (
            len(target) != min(end - start, QUERIES)
            or len(matched.unique()) != len(matched)
            or (matched >= QUERIES).any()
        ):
            raise ValueError(f"{what}: no matching of {end - start} targets with {QUERIES} queries: {query.tolist()}")
        rows.append(cost[layer, start:end].double()[target, matched].sum())
    return torch.stack(rows).view(LAYERS, -1)


def _assign(device: torch.device) -> Iterator[Comparison]:
    cost, offsets = _cost(), offsets_of(COUNTS)
    allowed = _rounding(cost)
    found = ops.assign_with_prices(cost.to(device), offsets.to(device), max(COUNTS))
    plain = ops.assign(cost.to(device), offsets.to(device), max(COUNTS))
    yield Comparison("assign beside assign_with_prices", float((plain != found.query_of_target).sum()), 0)
    grouped = ops.assign(cost.to(device), offsets.to(device), max(COUNTS), GROUPS)
    yield Comparison("groups beside each alone", float((grouped.cpu() != _groups_alone(cost, offsets)).sum()), 0)
    totals = _totals(cost, plain, "assign")
    best = _totals(cost, ops.assign_reference(cost, offsets), "assign_reference")
    yield Comparison("total cost", float((totals - best).abs().max()), allowed)
    target_price, query_price = (x.cpu().double() for x in (found.target_price, found.query_price))
    for image, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        prices = target_price[:, start:end, None] + query_price[:, image, None]  # [L, t, Q]
        above = (prices - cost[:, start:end]).flatten().clamp(min=0)
        yield Comparison(f"prices above costs in image {image}", float(above.max()) if len(above) else 0.0, allowed)
        proved = target_price[:, start:end].sum(1) + query_price[:, image].sum(1)
        yield Comparison(f"sum of prices in image {image}", float((proved - totals[:, image]).abs().max()), allowed)


def _groups_alone(cost: Tensor, offsets: Tensor) -> Tensor:  # [L, T * GROUPS]
    width, parts = QUERIES // GROUPS, []
    found = [ops.assign(own.contiguous(), offsets) for own in cost.split(width, 2)]  # GROUPS x [L, T]
    for start, end in itertools.pairwise(offsets.tolist()):
        for group, queries in enumerate(own[:, start:end] for own in found):
            parts.append(queries.where(queries < 0, queries + group * width))
    return torch.cat(parts, 1)


def _match(device: torch.device) -> Iterator[Comparison]:
    inputs = _problem()
    logits, boxes, labels, target_boxes, offsets = inputs
    exactly = (logits.double(), boxes.double(), labels, target_boxes, offsets)
    there = _on(device, inputs)
    for kind in typing.get_args(ClassKind):
        found = ops.match(*there, kind=kind, **WEIGHTS)
        cost = ops.matching_cost(*there, kind=kind, **WEIGHTS)
        yield Comparison(f"{kind}: beside cost and assignment", float((found != ops.assign(cost, there[-1])).sum()), 0)
        of_groups = ops.match(*there, kind=kind, groups=GROUPS, **WEIGHTS)
        apart = ops.assign(cost, there[-1], groups=GROUPS)
        yield Comparison(f"{kind}: groups beside cost and assignment", float((of_groups != apart).sum()), 0)
        exact = ops.matching_cost_reference(*exactly, kind=kind, **WEIGHTS)
        best = ops.match_reference(*exactly, kind=kind, **WEIGHTS)
        difference = _totals(exact, found, kind) - _totals(exact, best, "match_reference")
        yield Comparison(f"{kind}: total cost", float(difference.abs().max()), 2 * _rounding(exact))


def _set_loss(kind: LossKind) -> Callable[[torch.device], Iterator[Comparison]]:
    def compare(device: torch.device) -> Iterator[Comparison]:
        logits, boxes, labels, target_boxes, offsets = _problem()
        others = (ops.assign_reference(_cost(), offsets), labels, target_boxes, offsets)
        weight = torch.rand(LAYERS, 3, generator=torch.Generator().manual_seed(2)) + 0.5
        eos = torch.ones(CLASSES)
        eos[-1] = 0.1
        options = {"class_weight": eos} if kind == "softmax" else {}

        def losses_and_gradients(
            function: Callable[..., Tensor], place: torch.device, dtype: torch.dtype
        ) -> list[Tensor]:
            leaves = [x.to(place, dtype, copy=True).requires_grad_() for x in (logits, boxes)]
            there = {name: value.to(place) for name, value in options.items()}
            losses = function(*leaves, *(x.to(place) for x in others), kind=kind, **there)
            gradients = torch.autograd.grad((losses[:, :3] * weight.to(place, dtype)).sum(), leaves)
            return [losses.detach()[:, :3], losses.detach()[:, 3:], *gradients]

        cpu = torch.device("cpu")
        found = losses_and_gradients(ops.set_loss, device, torch.float32)
        definition = losses_and_gradients(ops.set_loss_reference, cpu, torch.float32)
        exact = losses_and_gradients(ops.set_loss_reference, cpu, torch.float64)
        names = ("losses", "errors of classes", "gradient in logits", "gradient in boxes")
        for name, *values in zip(names, found, definition, exact, strict=True):
            yield _compared(name, *values)

    return compare


def _unite(device: torch.device) -> Iterator[Comparison]:
    offsets, generator = offsets_of(COUNTS), torch.Generator().manual_seed(3)
    orders = [[torch.randperm(QUERIES + 10, generator=generator)[:count] for count in COUNTS] for _ in range(5)]
    sets = torch.stack([torch.cat(order) for order in orders]).int()
    sets[1:3] = sets[0]  # so that some pairs count more than others
    sets = sets.where(sets < QUERIES, -1)
    found = ops.unite(sets.to(device), offsets.to(device), QUERIES).cpu()
    yield Comparison("pairs", float((found != ops.unite_reference(sets, offsets, QUERIES)).sum()), 0)


def _attention(device: torch.device) -> Iterator[Comparison]:
    generator = torch.Generator().manual_seed(4)
    queries, keys = offsets_of((5, 0, 12, 7)), offsets_of((40, 3, 0, 21))
    inputs = [torch.randn(count, 2, 16, generator=generator) for count in (24, 64, 64)]
    incoming = torch.randn(24, 2, 16, generator=generator)

    def ours(*tensors: Tensor) -> Tensor:
        query, key, value, *offsets = tensors
        return ops.attention(query, key, value, offsets[0], offsets[1], max_query=12, max_key=40)

    def reference(*tensors: Tensor) -> Tensor:
        query, key, value, *offsets = tensors
        return ops.attention_reference(query, key, value, offsets[0], offsets[1])[0]

    def outputs(function: Callable[..., Tensor], place: torch.device, dtype: torch.dtype, exact: bool) -> list[Tensor]:
        leaves = [x.to(dtype).to(place, torch.float64 if exact else dtype, copy=True).requires_grad_() for x in inputs]
        output = function(*leaves, queries.to(place), keys.to(place))
        gradient = incoming.to(dtype).to(output)
        return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]

    cpu = torch.device("cpu")
    # Else the first call on a GPU times its block sizes. It takes seconds to switch, which the CPU need not spend.
    with _deterministic() if device.type == "cuda" else contextlib.nullcontext():
        for dtype in (torch.float32, torch.bfloat16):
            found = outputs(ours, device, dtype, False)
            definition = outputs(reference, cpu, dtype, False)
            exact = outputs(reference, cpu, dtype, True)
            for name, *values in zip(
                ("output", "gradient of query", "of key", "of value"), found, definition, exact, strict=True
            ):
                yield _compared(f"{str(dtype).removeprefix('torch.')} {name}", *values)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _numpy(device: torch.device) -> Iterator[Comparison]:
    from detr_fast.numpy import linear_sum_assignment

    cost = _cost()
    best = _totals(cost, ops.assign_reference(cost, offsets_of(COUNTS)), "assign_reference")
    for image, (start, end) in enumerate(itertools.pairwise(offsets_of(COUNTS).tolist())):
        rows, columns = linear_sum_assignment(cost[0, start:end].double().numpy())
        total = float(cost[0, start:end].double().numpy()[rows, columns].sum())
        missing = len(rows) != min(end - start, QUERIES) or len(set(columns.tolist())) != len(rows)
        error = float("inf") if missing else abs(total - float(best[0, image]))
        yield Comparison(f"total cost of image {image}", error, _rounding(cost))


CHECKS: dict[str, Callable[[torch.device], Iterator[Comparison]]] = {
    "assign, its prices": _assign,
    "matching_cost": _matching_cost,
    "match": _match,
    **{f"set_loss {kind}, gradient": _set_loss(kind) for kind in typing.get_args(LossKind)},
    "unite": _unite,
    "attention, gradient": _attention,
    "numpy linear_sum_assignment": _numpy,
}
_ONLY_CPU = ("numpy linear_sum_assignment",)
