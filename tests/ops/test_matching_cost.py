"""matching_cost and match: equal to their definition, in every type and instruction set; faults are reported."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate
from problems import predictions_and_targets
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from detr_fast import _C
from detr_fast.ops import ForbiddenPairs, assign, match, match_reference, matching_cost, matching_cost_reference
from detr_fast.ops.dialect import Dialect
from detr_fast.structures import offsets_of

KINDS = ["softmax", "focal", "focal_stable"]
TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
WEIGHTS = (1.0, 5.0, 2.0)


def with_status(op, *arguments: object, **options: object) -> tuple[Tensor, Tensor]:
    status = ForbiddenPairs.new_status()
    return op(*arguments, status=status, **options), status


def in_float64(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].double(), inputs[1].double(), *inputs[2:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_cost_is_the_definition(kind: str, dtype: torch.dtype, backend: str) -> None:
    for classes, queries in ((11, 30), (92, 100), (1, 3), (16, 16)):
        if kind == "softmax" and classes == 1:
            continue
        inputs = predictions_and_targets(queries=queries, classes=classes, dtype=dtype)
        for alpha, gamma in ((0.25, 2.0), (0.4, 1.5)):
            cost, status = with_status(matching_cost, *inputs, *WEIGHTS, kind, alpha, gamma)
            definition = matching_cost_reference(*inputs, *WEIGHTS, kind, alpha, gamma)
            exact = matching_cost_reference(*in_float64(inputs), *WEIGHTS, kind, alpha, gamma)
            for ours, theirs, best in zip(
                cost.flatten(0, 1), definition.flatten(0, 1), exact.flatten(0, 1), strict=True
            ):
                assert_as_accurate(ours, theirs, best)
            assert ForbiddenPairs.read(status) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dialect", [Dialect(1e-5, 0.0, 1e-6), Dialect(1e-3, 0.1), Dialect(1e-12, 0.2, 0.05)])
def test_dialects_are_the_definitions(kind: str, dialect: Dialect, backend: str) -> None:
    inputs = predictions_and_targets(dtype=torch.float32)
    inputs[1][:, :, ::3, 2:] = 0
    cost = matching_cost(*inputs, *WEIGHTS, kind, dialect=dialect)
    definition = matching_cost_reference(*inputs, *WEIGHTS, kind, dialect=dialect)
    assert_as_accurate(cost, definition, matching_cost_reference(*in_float64(inputs), *WEIGHTS, kind, dialect=dialect))
    assert not torch.equal(cost, matching_cost(*inputs, *WEIGHTS, kind))
    assert torch.equal(match(*inputs, *WEIGHTS, kind, dialect=dialect), assign(cost, inputs[-1]))


def test_negative_guards_are_refused(backend: str) -> None:
    with pytest.raises(RuntimeError, match="giou_floor and giou_epsilon must be at least 0, got 0 and -1"):
        matching_cost(*predictions_and_targets(), dialect=Dialect(giou_epsilon=-1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_right(kind: str, backend: str) -> None:
    logits, *rest = predictions_and_targets(dtype=torch.float32)
    logits = logits.sign() * torch.tensor([0.0, 8.5, 17.5, 40.0, 88.0, 100.0])[
        torch.arange(logits.numel()) % 6
    ].view_as(logits)
    cost, status = with_status(matching_cost, logits, *rest, *WEIGHTS, kind)
    exact = matching_cost_reference(logits.double(), *rest, *WEIGHTS, kind)
    definition = matching_cost_reference(logits, *rest, *WEIGHTS, kind)
    assert ForbiddenPairs.read(status) is None
    assert_as_accurate(cost, definition, exact)


@pytest.mark.parametrize("kind", ["focal", "focal_stable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_logits_are_the_limits(kind: str, dtype: torch.dtype, backend: str) -> None:
    logits, *rest = predictions_and_targets(dtype=dtype)
    logits[0, 0, 3] = torch.inf
    logits[1, 2, 4] = -torch.inf
    cost, status = with_status(matching_cost, logits, *rest, *WEIGHTS, kind)
    exact = matching_cost_reference(logits.double(), *rest, *WEIGHTS, kind)
    definition = matching_cost_reference(logits, *rest, *WEIGHTS, kind)
    assert_as_accurate(cost, definition, exact)
    assert exact.isinf().sum() == (0 if kind == "focal" else 3 + 7)
    found = ForbiddenPairs.read(status)
    assert (found is None) if kind == "focal" else (found is not None and found.count == 3 + 7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_match_is_assign_of_matching_cost(kind: str, dtype: torch.dtype, backend: str) -> None:
    inputs = predictions_and_targets(counts=(9, 0, 40, 2), queries=33, dtype=dtype)
    inputs[0][1, 2, 30] = torch.nan
    cost, cost_status = with_status(matching_cost, *inputs, *WEIGHTS, kind)
    for groups in (1, 3):
        query_of_target, status = with_status(match, *inputs, *WEIGHTS, kind, groups=groups)
        assert torch.equal(query_of_target, assign(cost, inputs[-1], groups=groups))
        assert torch.equal(status, cost_status)


@pytest.mark.parametrize("groups", [1, 3])
def test_match_is_the_definition(groups: int) -> None:
    inputs = predictions_and_targets(dtype=torch.float64)
    found = match(*inputs, *WEIGHTS, groups=groups)
    assert torch.equal(found, match_reference(*inputs, *WEIGHTS, groups=groups))
    with pytest.raises(RuntimeError, match="match: groups must divide the 30 queries, got 4"):
        match(*inputs, groups=4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_gives_the_same_bits(kind: str) -> None:
    inputs = predictions_and_targets(queries=100, classes=92)
    best, costs = _C.instruction_set(), []
    for name in ("portable", "avx2", "avx512"):
        if _C.use_instruction_set(name):
            costs.append(matching_cost(*inputs, *WEIGHTS, kind, 0.3, 1.7))
    _C.use_instruction_set(best)
    assert all(torch.equal(cost, costs[0]) for cost in costs)


def test_strided_inputs_are_read_right() -> None:
    logits, boxes, *rest = predictions_and_targets()
    apart = logits.transpose(0, 2).contiguous().transpose(0, 2)
    wide = torch.cat([boxes, boxes], -1)[..., :4]
    assert torch.equal(matching_cost(apart, wide, *rest), matching_cost(logits, boxes, *rest))


def test_rows_past_the_last_offset_are_zero() -> None:
    logits, boxes, labels, target_boxes, offsets = predictions_and_targets()
    spare = (torch.cat([labels, labels[:2]]), torch.cat([target_boxes, target_boxes[:2]]), offsets)
    cost = matching_cost(logits, boxes, *spare)
    assert (cost[:, -2:] == 0).all()
    query_of_target = match(logits, boxes, *spare)
    assert (query_of_target[:, -2:] == -1).all()


FAULTS = {
    "NaN logit": (lambda x: x["logits"][1, 2, 4].fill_(torch.nan), 4, ("class",), 7),
    "infinite logit": (lambda x: x["logits"][1, 2, 4, 0].fill_(torch.inf), 4, ("class",), 7),
    "NaN box": (lambda x: x["boxes"][1, 2, 4, 3].fill_(torch.nan), 4, ("box", "GIoU"), 7),
    "negative width": (lambda x: x["boxes"][1, 2, 4, 2].fill_(-0.1), 4, ("GIoU",), 7),
    "label": (lambda x: x["labels"][5].fill_(10), 0, ("label",), 90),  # "no object" of 11 classes
    "target box": (lambda x: x["target_boxes"][5].fill_(torch.inf), 0, ("box", "GIoU"), 90),
}


@pytest.mark.parametrize("name", FAULTS)
def test_status_names_the_first_forbidden_pair(name: str, backend: str) -> None:
    keys = ("logits", "boxes", "labels", "target_boxes", "offsets")
    inputs = dict(zip(keys, predictions_and_targets(), strict=True))
    change, query, terms, count = FAULTS[name]
    change(inputs)
    for op in (match, matching_cost):
        found = ForbiddenPairs.read(with_status(op, *inputs.values())[1])
        assert found is not None
        one_layer = name in ("label", "target box")
        target = 2 if one_layer else 0
        assert (found.layer, found.image, found.target, found.query) == (0 if one_layer else 1, 2, target, query)
        assert (found.terms, found.count) == (terms, count)
        assert f"image 2, target {target}, query {query}" in str(found)
    rest = match(*inputs.values())
    if one_layer:
        assert (rest[:, 5] == -1).all()
    else:
        assert not (rest[1, 3:10] == 4).any()
    assert (rest >= 0).sum() == rest.numel() - (len(rest) if one_layer else 0)


def test_boxes_without_area_on_both_sides_have_no_cost() -> None:
    logits, boxes, labels, target_boxes, offsets = predictions_and_targets()
    target_boxes[5, 2:] = 0
    assert ForbiddenPairs.read(with_status(match, logits, boxes, labels, target_boxes, offsets)[1]) is None
    boxes[2, 2, 9, 2:] = 0
    found = ForbiddenPairs.read(with_status(match, logits, boxes, labels, target_boxes, offsets)[1])
    assert found is not None
    assert (found.layer, found.target, found.query, found.terms) == (2, 2, 9, ("GIoU",))


@pytest.mark.parametrize("op", ["match", "matching_cost"])
def test_opcheck(op: str) -> None:
    numbers = (-1, 3) if op == "match" else (-1,)
    inputs = (*predictions_and_targets(), ForbiddenPairs.new_status(), *numbers)
    arguments = (*inputs, *WEIGHTS, "softmax", 0.25, 2.0)
    torch.library.opcheck(getattr(torch.ops.detr_fast, op).default, arguments)


def test_compiles_whole_and_not_again_when_targets_change() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(match, backend=counter, fullgraph=True, dynamic=True)
    for counts in ((3, 4), (5, 2), (9, 20)):
        inputs = predictions_and_targets(counts)
        assert torch.equal(compiled(*inputs), match(*inputs))
    assert counter.frame_count == 1


def test_compiles_with_groups_that_change() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(match, backend="eager", fullgraph=True, dynamic=True)
    inputs = predictions_and_targets()
    for groups in (1, 2, 3, 5):
        assert torch.equal(compiled(*inputs, groups=groups), match(*inputs, groups=groups))


@pytest.mark.parametrize(("counts", "queries"), [((), 6), ((0, 0), 6), ((2, 0, 1), 0)])
def test_groups_of_nothing(counts: tuple[int, ...], queries: int, backend: str) -> None:
    inputs = predictions_and_targets(counts, queries=queries)
    groups = 3 if queries else 1
    found = match(*inputs, groups=groups)
    assert found.tolist() == [[-1] * sum(counts) * groups] * 3


def test_errors_name_the_argument() -> None:
    logits, boxes, labels, target_boxes, offsets = predictions_and_targets()
    cases = [
        ((logits[0], boxes, labels, target_boxes, offsets), r"match: logits must be \[L, B, Q, C\]"),
        ((logits, boxes[..., :3], labels, target_boxes, offsets), r"match: boxes must be \[L, B, Q, 4\]"),
        ((logits.int(), boxes, labels, target_boxes, offsets), "match: logits must be float64, .* got Int"),
        ((logits, boxes, labels.int(), target_boxes, offsets), "match: labels must be int64, got Int"),
        ((logits, boxes, labels, target_boxes[:3], offsets), r"match: target_boxes must be \[T, 4\] as labels"),
        ((logits, boxes, labels, target_boxes, offsets[:3]), r"match: offsets must be \[B \+ 1\]"),
        ((logits, boxes, labels, target_boxes.double(), offsets), "match: target_boxes must be float32"),
    ]
    for inputs, message in cases:
        with pytest.raises(RuntimeError, match=message):
            match(*inputs)
    with pytest.raises(RuntimeError, match="kind must be softmax, focal or focal_stable, got other"):
        match(logits, boxes, labels, target_boxes, offsets, kind="other")  # type: ignore[arg-type]


def test_status_adds_up_and_keeps_the_first_position() -> None:
    logits, *rest = predictions_and_targets()
    status = ForbiddenPairs.new_status()
    for layer in (1, 2):
        damaged = logits.clone()
        damaged[layer, 2, 4] = torch.nan
        match(damaged, *rest, status=status)
    match(logits, *rest, status=status)
    found = ForbiddenPairs.read(status)
    assert found is not None
    assert (found.count, found.layer) == (14, 1)


def test_limits_of_the_packed_position() -> None:
    boxes = torch.zeros(300, 1, 1, 4)
    with pytest.raises(RuntimeError, match="match: at most 255 layers, got 300"):
        match(boxes, boxes, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), offsets_of([0]))


def test_no_targets_and_no_images() -> None:
    inputs = predictions_and_targets(counts=(0, 0))
    query_of_target, status = with_status(match, *inputs)
    assert query_of_target.shape == (3, 0)
    assert ForbiddenPairs.read(status) is None
    empty = (torch.zeros(2, 0, 5, 4), torch.zeros(2, 0, 5, 4), inputs[2], inputs[3], offsets_of([]))
    assert matching_cost(*empty).shape == (2, 0, 5)
