"""set_loss: losses and gradients equal to the definition in every type; gradcheck, opcheck, compile."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate
from problems import predictions_and_targets
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from detr_fast import _C
from detr_fast.ops import match, set_loss, set_loss_reference, weighted_set_loss
from detr_fast.ops.dialect import Dialect
from detr_fast.ops.set_loss import TERMS

KINDS = ["softmax", "focal", "varifocal", "mal", "ia_bce"]
TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def inputs_of(dtype: torch.dtype = torch.float32, kind: str = "softmax", **options) -> tuple[list, dict]:
    logits, boxes, labels, target_boxes, offsets = predictions_and_targets(dtype=dtype, **options)
    query_of_target = match(logits, boxes, labels, target_boxes, offsets)
    weight = torch.ones(logits.shape[-1])
    weight[-1], weight[0] = 0.1, 1.7
    num_boxes = torch.tensor(float(max(len(labels), 1)))
    arguments = [logits, boxes, query_of_target, labels, target_boxes, offsets, num_boxes]
    return arguments, {"class_weight": weight if kind == "softmax" else None, "kind": kind}


def weights_of(arguments: list) -> Tensor:
    """Weights of all layers and terms; those of one term and of the two errors are 0."""
    weight = torch.rand(len(arguments[0]), len(TERMS), generator=torch.Generator().manual_seed(7)) + 0.5
    weight[:, 3:] = 0
    weight[0, 1] = 0
    return weight


def losses_and_gradients(function, arguments: list, options: dict, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Each term's losses ``[L]``, then the gradients of each term of its own: their sizes differ by orders."""
    logits, boxes = (x.detach().to(dtype or x.dtype).requires_grad_() for x in arguments[:2])
    losses = function(logits, boxes, *arguments[2:], **options)
    incoming = torch.linspace(0.5, 2.0, len(losses), dtype=losses.dtype)
    results = list(losses.detach().unbind(1))
    for term, inputs in ((0, logits), (1, boxes), (2, boxes)):
        results += torch.autograd.grad((losses[:, term] * incoming).sum(), inputs, retain_graph=True)
    return results


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, dtype) for kind in ("softmax", "focal") for dtype in TYPES),
        *((kind, torch.float32) for kind in KINDS[2:]),
    ],
)
def test_losses_and_gradients_are_the_definitions(kind: str, dtype: torch.dtype, backend: str) -> None:
    for classes, counts in ((11, (3, 0, 7, 5)), (92, (1, 4)), (17, (0, 0)), (6, (40, 2))):
        arguments, options = inputs_of(dtype, kind, classes=classes, counts=counts)
        fast = losses_and_gradients(set_loss, arguments, options)
        definition = losses_and_gradients(set_loss_reference, arguments, options)
        exact = losses_and_gradients(set_loss_reference, arguments, options, torch.float64)
        for ours, theirs, best in zip(fast, definition, exact, strict=True):
            assert_as_accurate(ours, theirs, best)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_weighted_sum_and_its_gradient(kind: str, dtype: torch.dtype) -> None:
    arguments, options = inputs_of(dtype, kind)
    weight = weights_of(arguments)
    logits, boxes = (x.clone().requires_grad_() for x in arguments[:2])
    total, losses = weighted_set_loss(logits, boxes, *arguments[2:6], weight, arguments[6], **options)
    assert torch.equal(losses, set_loss(*arguments, **options))
    expected = (losses.detach().double() * weight).sum()
    assert abs(total.item() - expected) <= torch.finfo(total.dtype).eps * expected
    both = torch.autograd.grad((losses * weight).sum() + 3 * total, (logits, boxes), retain_graph=True)
    single = torch.autograd.grad(total, (logits, boxes))
    limits = torch.finfo(dtype)
    for ours, theirs in zip(both, single, strict=True):  # each rounded once, or to a denormal number
        tolerance = {"rtol": 4 * limits.eps, "atol": 4 * limits.tiny * limits.eps}
        torch.testing.assert_close(ours.double(), 4 * theirs.double(), **tolerance)


def test_terms_of_weight_zero_take_no_part() -> None:
    arguments, options = inputs_of()
    boxes, target_boxes = arguments[1].clone(), arguments[4].clone()
    boxes[..., 2:] = 0
    target_boxes[:, 2:] = 0
    boxes.requires_grad_()
    weight = torch.zeros(len(boxes), len(TERMS))
    weight[:, 1] = 1
    given = (arguments[0], boxes, arguments[2], arguments[3], target_boxes, arguments[5])
    total, losses = weighted_set_loss(*given, weight, arguments[6], **options)
    assert losses[:, 2].isnan().all()
    total.backward()
    assert total.isfinite()
    assert boxes.grad.isfinite().all()
    assert (boxes.grad != 0).any()


def test_number_of_boxes_is_that_of_the_batch_and_at_least_one() -> None:
    for counts in ((3, 0, 7), (0, 0)):
        arguments, options = inputs_of(counts=counts)
        given = torch.tensor(float(sum(counts)))
        losses = set_loss(*arguments[:6], None, **options)
        assert torch.equal(losses, set_loss(*arguments[:6], given, **options))
        assert torch.equal(losses, set_loss(*arguments[:6], given.clamp(min=1), **options))
        assert losses.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_underflow_in_float16(kind: str) -> None:
    """A gradient scaler multiplies after the loss; unscaled gradients below 6e-8 must survive until then."""
    arguments, options = inputs_of(torch.float16, kind)
    logits = arguments[0].clone().requires_grad_()
    boxes = arguments[1].clone().requires_grad_()
    (set_loss(logits, boxes, *arguments[2:-1], torch.tensor(1e6), **options)[:, :3].sum() * 65536).backward()
    assert (boxes.grad[boxes.grad != 0].abs() > 0.01).any()
    assert (boxes.grad != 0).any(-1).sum() == (arguments[2] >= 0).sum()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_classes_that_are_masked_by_minus_infinity_cost_nothing(kind: str, backend: str) -> None:
    arguments, options = inputs_of(torch.float32, kind)
    without = arguments[0][..., :-1].contiguous()
    arguments[0][..., -1] = -torch.inf  # no target has the last label
    fast = losses_and_gradients(set_loss, arguments, options)
    expected = losses_and_gradients(set_loss, [without, *arguments[1:]], options)
    for term in range(3):
        torch.testing.assert_close(fast[term], expected[term])
    assert (fast[5][..., -1] == 0).all()
    torch.testing.assert_close(fast[5][..., :-1], expected[5])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("magnitude", [20.0, 90.0])
def test_extreme_logits(kind: str, magnitude: float, backend: str) -> None:
    arguments, options = inputs_of(torch.float32, kind)
    arguments[0] = arguments[0].sign() * magnitude
    fast = losses_and_gradients(set_loss, arguments, options)
    definition = losses_and_gradients(set_loss_reference, arguments, options)
    exact = losses_and_gradients(set_loss_reference, arguments, options, torch.float64)
    for ours, theirs, best in zip(fast, definition, exact, strict=True):
        assert ours.isfinite().all()
        assert_as_accurate(ours, theirs, best)


@pytest.mark.parametrize("classes", [1, 80])
@pytest.mark.parametrize("logit", [1.0, 1.906, 5.0, 12.0, 30.0])
def test_confident_positives_keep_their_digits(classes: int, logit: float, backend: str) -> None:
    """The label's term is far smaller than the negative term of the same logit would be."""
    arguments, options = inputs_of(torch.float32, "focal", classes=classes, counts=(1,), layers=1, queries=3)
    arguments[0] = torch.full_like(arguments[0], -9.0)
    arguments[0][0, 0, arguments[2][0, 0], arguments[3][0]] = logit
    fast = losses_and_gradients(set_loss, arguments, options)
    definition = losses_and_gradients(set_loss_reference, arguments, options)
    exact = losses_and_gradients(set_loss_reference, arguments, options, torch.float64)
    for ours, theirs, best in zip(fast, definition, exact, strict=True):
        assert_as_accurate(ours, theirs, best)


@pytest.mark.parametrize("row", [[0.0, torch.nan, 1.0], [torch.nan, 5.0, 1.0], [0.0, 5.0, torch.nan], [2.0, 2.0, 1.0]])
def test_class_error_is_that_of_argmax(row: list[float], backend: str) -> None:
    for label in (0, 1):
        logits = torch.tensor(row).view(1, 1, 1, 3)
        boxes, pairs = torch.full((1, 1, 1, 4), 0.5), torch.zeros(1, 1, dtype=torch.int32)
        arguments = (logits, boxes, pairs, torch.tensor([label]), boxes[0, 0], torch.tensor([0, 1], dtype=torch.int32))
        assert set_loss(*arguments)[0, 4] == set_loss_reference(*arguments)[0, 4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dialect", [Dialect(giou_floor=0.1), Dialect(giou_epsilon=0.05), Dialect(1e-8, 0.2, 0.01)])
def test_guards_of_giou_are_the_definitions(kind: str, dialect: Dialect, backend: str) -> None:
    arguments, options = inputs_of(torch.float32, kind)
    arguments[1] = arguments[1] * torch.tensor([1.0, 1.0, 0.5, 0.5])
    arguments[1][0, :, ::2, 2:] = 0  # no area
    results = [
        losses_and_gradients(function, arguments, options | {"dialect": dialect}, dtype)
        for function, dtype in ((set_loss, None), (set_loss_reference, None), (set_loss_reference, torch.float64))
    ]
    for ours, theirs, best in zip(*results, strict=True):
        assert ours.isfinite().all()
        assert_as_accurate(ours, theirs, best)
    plain = losses_and_gradients(set_loss, arguments, options)
    assert not torch.equal(plain[2], results[0][2])


@pytest.mark.parametrize("kind", ["varifocal", "mal", "ia_bce"])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.75, 2.0), (0.25, 1.5), (1.0, 1.0)])
def test_goals_follow_the_iou(kind: str, alpha: float, gamma: float, backend: str) -> None:
    arguments, options = inputs_of(torch.float32, kind, classes=5)
    options |= {"alpha": alpha, "gamma": gamma}
    target = torch.arange(len(arguments[3]))
    image = torch.searchsorted(arguments[5], target, right=True) - 1
    # A perfect box, and one that is nowhere near.
    arguments[1][0, image, arguments[2][0].long()] = arguments[4]
    arguments[1][1, image, arguments[2][1].long()] = arguments[4] * torch.tensor([0, 0, 0.01, 0.01])
    fast = losses_and_gradients(set_loss, arguments, options)
    definition = losses_and_gradients(set_loss_reference, arguments, options)
    exact = losses_and_gradients(set_loss_reference, arguments, options, torch.float64)
    for ours, theirs, best in zip(fast, definition, exact, strict=True):
        assert_as_accurate(ours, theirs, best)


@pytest.mark.parametrize("kind", ["varifocal", "mal", "ia_bce"])
def test_an_undefined_iou_makes_the_class_loss_nan(kind: str, backend: str) -> None:
    arguments, options = inputs_of(torch.float32, kind)
    arguments[1][..., 2:] = 0
    arguments[4] = arguments[4] * torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert set_loss(*arguments, **options)[:, 0].isnan().all()
    guarded = set_loss(*arguments, **options, dialect=Dialect(giou_epsilon=1e-6))
    assert guarded.isfinite().all()


def test_second_derivatives_are_refused() -> None:
    arguments, options = inputs_of(torch.float64)
    logits = arguments[0].requires_grad_()
    losses = set_loss(logits, *arguments[1:], **options)
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        torch.autograd.grad(losses[:, 0].sum(), logits, create_graph=True)


@pytest.mark.parametrize("kind", ["softmax", "focal"])  # the others count some of their factors as constants
def test_gradcheck(kind: str) -> None:
    arguments, options = inputs_of(torch.float64, kind, classes=4, queries=5, layers=2, counts=(2, 3))
    logits, boxes = (x.clone().requires_grad_() for x in arguments[:2])
    # Cardinality and class error are step functions.
    torch.autograd.gradcheck(lambda a, b: set_loss(a, b, *arguments[2:], **options)[:, :3], (logits, boxes))


def test_ties_of_box_edges_have_the_gradient_of_the_definition() -> None:
    arguments, options = inputs_of(torch.float64)
    _logits, boxes, _query_of_target, labels, target_boxes, _offsets, _ = arguments
    target_boxes = torch.tensor([0.5, 0.5, 0.25, 0.25]).repeat(len(labels), 1)
    boxes = target_boxes[0].double().expand_as(boxes).clone()
    boxes[:, :, ::3, 0] += 0.25  # touching edges: no overlap, but clamp passes the gradient on
    boxes[:, :, 1::3, 2] = 0.125
    arguments[1], arguments[4] = boxes, target_boxes
    fast = losses_and_gradients(set_loss, arguments, options)
    definition = losses_and_gradients(set_loss_reference, arguments, options)
    for ours, theirs in zip(fast, definition, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("restored_threads")
def test_every_instruction_set_and_thread_count_gives_the_same_bits() -> None:
    best, results = _C.instruction_set(), []
    for kind in KINDS:
        arguments, options = inputs_of(kind=kind, classes=92, queries=100)
        results.append([])
        for name in ("portable", "avx2", "avx512"):
            for threads in (1, 2):
                if _C.use_instruction_set(name):
                    torch.set_num_threads(threads)
                    results[-1].append(losses_and_gradients(set_loss, arguments, options))
    _C.use_instruction_set(best)
    for runs in results:
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    arguments, options = inputs_of(kind=kind)
    weight = weights_of(arguments)
    arguments[0].requires_grad_()
    arguments[1].requires_grad_()
    torch.library.opcheck(
        torch.ops.detr_fast.set_loss.default, (*arguments, options["class_weight"], weight, options["kind"], 0.25, 2.0)
    )
    losses, total, *gradients = torch.ops.detr_fast.set_loss.default(
        *(x.detach() for x in arguments), options["class_weight"], weight, options["kind"], 0.25, 2.0
    )
    for incoming in ((losses, None), (None, total), (losses, total)):
        torch.library.opcheck(
            torch.ops.detr_fast.set_loss_backward.default,
            (*incoming, weight, *gradients, torch.bfloat16, torch.float32),
        )


def test_compiles_whole_with_backward_and_not_again_when_targets_change() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(set_loss, backend=counter, fullgraph=True, dynamic=True)
    for counts in ((3, 4), (5, 2), (9, 20)):
        arguments, options = inputs_of(counts=counts)
        fast = losses_and_gradients(compiled, arguments, options)
        eager = losses_and_gradients(set_loss, arguments, options)
        assert all(torch.equal(a, b) for a, b in zip(fast, eager, strict=True))
    assert counter.frame_count == 1


def test_errors_name_the_argument() -> None:
    arguments, options = inputs_of()
    bad_query = arguments.copy()
    bad_query[2] = arguments[2].clone()
    bad_query[2][1, 4] = 30
    with pytest.raises(
        RuntimeError, match=r"query_of_target must be in \[-1, 30\), got 30 for layer 1, image 2, target 1"
    ):
        set_loss(*bad_query, **options)
    bad_label = arguments.copy()
    bad_label[3] = arguments[3].clone()
    bad_label[3][0] = 10
    with pytest.raises(RuntimeError, match=r"labels must be in \[0, 10\), got 10 for image 0, target 0"):
        set_loss(*bad_label, **options)
    with pytest.raises(RuntimeError, match=r"class_weight must be \[C\] as logits, here \[11\], got \[3\]"):
        set_loss(*arguments, class_weight=torch.ones(3))
    with pytest.raises(RuntimeError, match="num_boxes must have no dimensions"):
        set_loss(*arguments[:-1], torch.ones(1), **options)
    with pytest.raises(RuntimeError, match="num_boxes must be float32, got Double"):
        set_loss(*arguments[:-1], torch.ones((), dtype=torch.float64), **options)
    with pytest.raises(RuntimeError, match=r"loss_weight must be \[L, 5\], here \[3, 5\], got \[5\]"):
        weighted_set_loss(*arguments[:6], torch.ones(5), **options)
    empty = [torch.zeros(2, 0, 5, 4), torch.zeros(2, 0, 5, 4), arguments[2][:2, :0], *(x[:0] for x in arguments[3:5])]
    with pytest.raises(RuntimeError, match="logits must have at least one image and one query"):
        set_loss(*empty, torch.zeros(1, dtype=torch.int32))
