"""SetCriterion: keys, values, normalisers, foreign matchers, ranks."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from detr_fast import HungarianMatcher, Predictions, SetCriterion, Targets

LOSSES = ["labels", "boxes", "cardinality"]
WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0, "loss_ce_0": 1.0, "loss_bbox_0": 5.0, "loss_giou_0": 2.0}


def batch(counts: tuple[int, ...] = (3, 0, 5), seed: int = 0) -> tuple[Predictions, list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, len(counts), 9, 8, generator=generator)
    boxes = 0.2 + 0.5 * torch.rand(2, len(counts), 9, 4, generator=generator)
    targets = [
        {
            "labels": torch.randint(0, 7, (count,), generator=generator),
            "boxes": 0.2 + 0.5 * torch.rand(count, 4, generator=generator),
        }
        for count in counts
    ]
    return Predictions(logits, boxes), targets


def criterion_of(losses: list[str] = LOSSES, invalid=None, weights=WEIGHTS, **options) -> SetCriterion:
    return SetCriterion(7, HungarianMatcher(1, 5, 2, invalid=invalid), weights, 0.1, losses, **options)


def test_dictionaries_and_structures_give_the_same() -> None:
    predictions, targets = batch()
    criterion = criterion_of()
    old, new = criterion(predictions.as_dict(), targets), criterion(predictions, Targets.pack(targets))
    assert list(old) == [
        *("loss_ce", "class_error", "loss_bbox", "loss_giou", "cardinality_error"),
        *("loss_ce_0", "loss_bbox_0", "loss_giou_0", "cardinality_error_0"),
    ]
    assert list(old) == list(new)
    assert all(torch.equal(old[key], new[key]) for key in old)
    assert all(value.dim() == 0 for value in old.values())


def test_only_the_losses_asked_for() -> None:
    predictions, targets = batch()
    assert list(criterion_of(["boxes"])(predictions.as_dict(), targets)) == [
        *("loss_bbox", "loss_giou", "loss_bbox_0", "loss_giou_0")
    ]


def test_weighted_sum_uses_the_weights_that_are_named() -> None:
    predictions, targets = batch()
    criterion = criterion_of()
    losses = criterion(predictions, Targets.pack(targets))
    expected = sum(losses[key] * weight for key, weight in WEIGHTS.items())
    torch.testing.assert_close(criterion.weighted_sum(losses), expected)
    with pytest.raises(ValueError, match="weight_dict names none of the losses class_error"):
        criterion.weighted_sum({"class_error": losses["class_error"]})


def test_a_misspelt_weight_is_refused_and_a_loss_of_the_callers_is_not() -> None:
    criterion_of(weights={**WEIGHTS, "loss_mine": 1.0, "loss_ce_7": 1.0, "loss_dice": 1.0})
    criterion_of(weights={"loss_dice": 1.0, "loss_bbox": 5.0})
    for right, wrong in (("loss_bbox", "loss_bboxes"), ("loss_giou", "loss_giu"), ("loss_ce", "los_ce")):
        weights = {wrong if name == right else name: weight for name, weight in WEIGHTS.items()}
        with pytest.raises(ValueError, match=f"weight_dict must have '{right}', got '{wrong}'"):
            criterion_of(weights=weights)


def gradients_of(total: torch.Tensor, predictions: Predictions) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(total, (predictions.logits, predictions.boxes), retain_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("losses", [LOSSES, ["boxes"], ["labels"]])
def test_weighted_loss_is_the_weighted_sum(losses: list[str], dtype: torch.dtype) -> None:
    predictions, targets = batch()
    predictions = Predictions(*(x.to(dtype).requires_grad_() for x in (predictions.logits, predictions.boxes)))
    criterion = criterion_of(losses)
    entries = criterion(predictions, Targets.pack(targets))
    total, logged = criterion.weighted_loss(predictions, Targets.pack(targets))
    assert list(logged) == list(entries)
    assert all(torch.equal(logged[name], entries[name]) and not logged[name].requires_grad for name in entries)
    expected = criterion.weighted_sum(entries)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(total, expected, rtol=8 * torch.finfo(total.dtype).eps, atol=0)
    for ours, theirs in zip(gradients_of(total, predictions), gradients_of(expected, predictions), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4 * eps, atol=4 * eps * float(theirs.abs().max()))


def test_weighted_loss_follows_weights_that_change() -> None:
    predictions, targets = batch()
    criterion, packed = criterion_of(), Targets.pack(targets)
    criterion.weight_dict = dict(WEIGHTS)
    before = criterion.weighted_loss(predictions, packed)[0]
    for factor in range(2, 9):
        criterion.weight_dict = {name: factor * weight for name, weight in WEIGHTS.items()}
        torch.testing.assert_close(criterion.weighted_loss(predictions, packed)[0], factor * before)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Operators that compute something; views and allocations are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and not function.name().startswith(("aten::empty", "aten::detach", "aten::new_empty")):
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_weighted_loss_is_two_operators_and_its_gradient_one() -> None:
    predictions, targets = batch()
    predictions = Predictions(*(x.requires_grad_() for x in (predictions.logits, predictions.boxes)))
    criterion, packed = criterion_of(invalid="skip"), Targets.pack(targets)
    criterion.weighted_loss(predictions, packed)  # keeps the weights
    with Calls() as forward:
        total, _ = criterion.weighted_loss(predictions, packed)
    assert forward.names == ["detr_fast::match", "detr_fast::set_loss"]
    with Calls() as backward:
        total.backward()
    assert [name for name in backward.names if name != "aten::ones_like"] == ["detr_fast::set_loss_backward"]


def test_entries_cost_no_operator_each() -> None:
    predictions, targets = batch()
    criterion, packed = criterion_of(invalid="skip"), Targets.pack(targets)
    with Calls() as calls:
        criterion(predictions, packed)
    assert calls.names == ["detr_fast::match", "detr_fast::set_loss"]


def test_captured_criterion_follows_changing_targets() -> None:
    criterion = criterion_of(invalid="skip")
    captured = criterion.capture(batch()[0], capacity=20, max_count=9)
    for seed, counts in enumerate([(3, 0, 5), (9, 9, 2), (0, 0, 0), (1, 2, 3)]):
        predictions, targets = batch(counts, seed)
        predictions = Predictions(*(x.requires_grad_() for x in (predictions.logits, predictions.boxes)))
        packed = Targets.pack(targets)
        total, entries = captured(predictions, packed)
        expected, expected_entries = criterion.weighted_loss(predictions, packed)
        assert torch.equal(total, expected)
        assert all(torch.equal(entries[name], expected_entries[name]) for name in expected_entries)
        ours, theirs = gradients_of(3 * total, predictions), gradients_of(3 * expected, predictions)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_captured_gradients_survive_a_gradient_scaler(dtype: torch.dtype) -> None:
    """The factor is applied before the gradient is rounded to the predictions' type."""
    predictions, targets = batch()
    predictions = Predictions(
        *((30 * x).to(dtype) if x.shape[-1] == 8 else x.to(dtype) for x in (predictions.logits, predictions.boxes))
    )
    predictions = Predictions(*(x.requires_grad_() for x in (predictions.logits, predictions.boxes)))
    criterion, packed = criterion_of(invalid="skip"), Targets.pack(targets)
    ours = gradients_of(criterion.capture(predictions, 20)(predictions, packed)[0] * 65536, predictions)
    theirs = gradients_of(criterion.weighted_loss(predictions, packed)[0] * 65536, predictions)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert (ours[0] != 0).any()


def test_a_captured_step_is_differentiated_before_the_next_and_once() -> None:
    predictions, targets = batch()
    predictions = Predictions(*(x.requires_grad_() for x in (predictions.logits, predictions.boxes)))
    captured = criterion_of().capture(predictions, 20)
    first, _ = captured(predictions, targets)
    second, _ = captured(predictions.as_dict(), targets)
    with pytest.raises(RuntimeError, match="call backward before the next call"):
        gradients_of(first, predictions)
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        torch.autograd.grad(second, predictions.logits, create_graph=True)
    gradients_of(second, predictions)
    with torch.inference_mode():
        assert torch.equal(captured(predictions, targets)[0], second)


def test_a_capture_made_in_inference_mode_trains() -> None:
    predictions, targets = batch()
    with torch.inference_mode():
        captured = criterion_of().capture(predictions, 20)
        captured(predictions, targets)
    logits = predictions.logits.clone().requires_grad_()
    captured(Predictions(logits, predictions.boxes), targets)[0].backward()
    assert (logits.grad != 0).any()


def test_a_capture_keeps_what_it_was_made_of() -> None:
    predictions, targets = batch()
    criterion = criterion_of()
    captured = criterion.capture(predictions, 20)
    criterion.weight_dict = {**WEIGHTS, "loss_ce": 3.0}
    with pytest.raises(ValueError, match=r"weight_dict and the options .* must be as captured"):
        captured(predictions, targets)
    criterion.weight_dict = dict(WEIGHTS)
    criterion.matcher.cost_bbox = 7
    with pytest.raises(ValueError, match="options of criterion and matcher must be as captured"):
        captured(predictions, targets)
    criterion.matcher.cost_bbox = 5
    captured(predictions, targets)
    criterion.double()
    with pytest.raises(ValueError, match="empty_weight must be the tensor captured"):
        captured(predictions, targets)


def test_a_weight_dict_without_a_loss_is_an_error() -> None:
    predictions, targets = batch()
    criterion = SetCriterion(7, HungarianMatcher(), {"ce": 1.0}, 0.1, LOSSES)
    with pytest.raises(ValueError, match="weight_dict names none of the losses loss_ce, class_error"):
        criterion.weighted_loss(predictions, targets)


def test_masks_without_a_weight_take_no_part() -> None:
    predictions, targets = batch()
    for target in targets:
        target["masks"] = torch.ones(len(target["labels"]), 4, 4, dtype=torch.bool)
    masks = torch.full((3, 9, 4, 4), torch.nan)
    total, losses = criterion_of([*LOSSES, "masks"]).weighted_loss(
        Predictions(predictions.logits, predictions.boxes, masks), targets
    )
    assert losses["loss_mask"].isnan()
    assert total.isfinite()


def test_what_does_not_fit_the_capture_is_refused() -> None:
    predictions, targets = batch()
    captured = criterion_of().capture(predictions, capacity=8, max_count=5)
    with pytest.raises(ValueError, match=r"logits must be \[2, 3, 9, 8\] torch.float32 on cpu as captured, got \[1,"):
        captured(Predictions(predictions.logits[:1], predictions.boxes[:1]), Targets.pack(targets))
    with pytest.raises(ValueError, match="targets must be at most 8, 5 in one image, got 9 and 3"):
        captured(predictions, Targets.pack(batch((3, 3, 3))[1]))
    with pytest.raises(ValueError, match="targets must be at most 8, 5 in one image, got 6 and 6"):
        captured(predictions, Targets.pack(batch((6, 0, 0))[1]))
    with pytest.raises(ValueError, match="targets must have one entry for each of 3 images, got 2"):
        captured(predictions, Targets.pack(batch((1, 1))[1]))
    with pytest.raises(ValueError, match="losses must not have 'masks'"):
        criterion_of([*LOSSES, "masks"]).capture(predictions, 8)
    with pytest.raises(ValueError, match="matcher must be a HungarianMatcher, got <class"):
        SetCriterion(7, nn.Identity(), WEIGHTS, 0.1, LOSSES).capture(predictions, 8)


def test_gradient_of_errors_is_absent() -> None:
    predictions, targets = batch()
    logits = predictions.logits.requires_grad_()
    losses = criterion_of()(Predictions(logits, predictions.boxes), Targets.pack(targets))
    assert not losses["class_error"].requires_grad
    assert not losses["cardinality_error"].requires_grad
    assert losses["loss_ce"].requires_grad


def test_images_without_objects_have_finite_losses() -> None:
    predictions, targets = batch(counts=(0, 0))
    boxes = predictions.boxes.requires_grad_()
    criterion = criterion_of()
    losses = criterion(Predictions(predictions.logits, boxes), Targets.pack(targets))
    assert losses["loss_bbox"] == losses["loss_giou"] == 0
    assert losses["class_error"] == 100
    criterion.weighted_sum(losses).backward()
    assert (boxes.grad == 0).all()


def test_spare_capacity_changes_nothing() -> None:
    predictions, targets = batch()
    packed = Targets.pack(targets)
    spare = Targets(
        torch.cat([packed.labels, torch.full((4,), 99)]),
        torch.cat([packed.boxes, torch.full((4, 4), torch.nan)]),
        packed.offsets,
        packed.max_count,
    )
    criterion = criterion_of()
    plain, roomy = criterion(predictions, packed), criterion(predictions, spare)
    assert all(torch.equal(plain[key], roomy[key]) for key in plain)


class ScipyStyleMatcher(nn.Module):
    """A matcher that knows nothing of this package: query t for target t."""

    def forward(self, outputs, targets):
        counts = [min(len(t["labels"]), outputs["pred_logits"].shape[1]) for t in targets]
        return [(torch.arange(count), torch.arange(count)) for count in counts]


def test_foreign_matchers_are_used() -> None:
    predictions, targets = batch()
    criterion = SetCriterion(7, ScipyStyleMatcher(), WEIGHTS, 0.1, LOSSES)
    losses = criterion(predictions.as_dict(), targets)
    pairs = [(predictions.boxes[1, i, : len(t["boxes"])], t["boxes"]) for i, t in enumerate(targets)]
    expected = sum((box - goal).abs().sum() for box, goal in pairs) / 8
    torch.testing.assert_close(losses["loss_bbox"], expected)
    fast = criterion(predictions, Targets.pack(targets))
    assert all(torch.equal(losses[key], fast[key]) for key in losses)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([([0, 1], [0, 0]), ([], []), ([], [])], r"image 0 must use no target twice, got \[0, 0\]"),
        ([([1, 1], [0, 1]), ([], []), ([], [])], r"image 0 must use no query twice, got \[1, 1\]"),
        ([([0], [3]), ([], []), ([], [])], r"target indices of image 0 must be in \[0, 3\), got \[3\]"),
        ([([], []), ([], []), ([9], [0])], r"query indices of image 2 must be in \[0, 9\), got \[9\]"),
        ([([], []), ([], [])], "must return a pair for each of 3 images, got 2"),
    ],
)
def test_pairs_that_are_no_matching_are_refused(pairs: list[tuple[list[int], list[int]]], message: str) -> None:
    class Faulty(nn.Module):
        def forward(self, outputs, targets):
            return [(torch.tensor(a, dtype=torch.int64), torch.tensor(b, dtype=torch.int64)) for a, b in pairs]

    predictions, targets = batch()
    with pytest.raises(ValueError, match=message):
        SetCriterion(7, Faulty(), WEIGHTS, 0.1, LOSSES)(predictions.as_dict(), targets)


def test_entries_may_be_weighted_in_place() -> None:
    predictions, targets = batch()
    logits = predictions.logits.requires_grad_()
    criterion = criterion_of()
    losses = criterion(Predictions(logits, predictions.boxes).as_dict(), targets)
    expected = torch.autograd.grad(criterion.weighted_sum(losses), logits, retain_graph=True)[0]
    for name in losses:
        losses[name] *= WEIGHTS.get(name, 0.0)
    torch.testing.assert_close(torch.autograd.grad(sum(losses.values()), logits)[0], expected)


def test_evaluation_in_inference_mode_does_not_spoil_training() -> None:
    predictions, targets = batch()
    criterion, packed = criterion_of(), Targets.pack(targets)
    with torch.inference_mode():
        criterion.weighted_sum(criterion(predictions, packed))
    logits = predictions.logits.clone().requires_grad_()
    criterion.weighted_sum(criterion(Predictions(logits, predictions.boxes), packed)).backward()
    assert logits.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_criterion_may_be_converted(dtype: torch.dtype) -> None:
    predictions, targets = batch()
    before = criterion_of()(predictions.as_dict(), targets)
    after = criterion_of().to(dtype)(predictions.as_dict(), targets)
    # The weight of "no object", 0.1, is rounded with the buffer.
    assert abs(after["loss_ce"] / before["loss_ce"] - 1) <= max(torch.finfo(dtype).eps, 1e-6)
    assert torch.equal(after["loss_bbox"], before["loss_bbox"])


def test_replaced_methods_are_refused() -> None:
    with pytest.raises(TypeError, match="does not use loss_labels"):

        class Replaced(SetCriterion):
            def loss_labels(self, outputs, targets, indices, num_boxes):
                return {}


def test_class_weights_may_be_changed() -> None:
    predictions, targets = batch()
    criterion = criterion_of()
    before = criterion(predictions.as_dict(), targets)["loss_ce"]
    criterion.empty_weight[targets[0]["labels"][0]] = 9
    assert criterion(predictions.as_dict(), targets)["loss_ce"] != before
    assert list(criterion.state_dict()) == ["empty_weight"]


def test_arguments_are_checked() -> None:
    predictions, targets = batch()
    with pytest.raises(ValueError, match="losses must be of labels, cardinality, boxes, masks, got 'label'"):
        criterion_of(["label"])
    with pytest.raises(ValueError, match=r"logits must have 12 classes \(num_classes=11, kind='softmax'\), got 8"):
        SetCriterion(11, HungarianMatcher(), {}, 0.1, LOSSES)(predictions.as_dict(), targets)
    with pytest.raises(
        ValueError, match=r"logits must be \[L, B, Q, C\] \(pred_logits: \[B, Q, C\]\), got \[3, 9, 8\]"
    ):
        criterion_of()(Predictions(predictions.logits[0], predictions.boxes[0]), targets)
    with pytest.raises(ValueError, match="losses has 'masks', but outputs has no 'pred_masks'"):
        criterion_of([*LOSSES, "masks"])(predictions.as_dict(), targets)
    targets[1]["labels"], targets[1]["boxes"] = torch.tensor([7]), torch.rand(1, 4)
    with pytest.raises(ValueError, match=r"image 1 of the batch, target 0: label must be in \[0, 7\), got 7"):
        criterion_of()(predictions.as_dict(), targets)


@pytest.mark.parametrize("eager_before", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_compiles_whole_and_not_again_when_targets_change(fused: bool, eager_before: bool) -> None:
    criterion = criterion_of(invalid="skip")

    def total(criterion: SetCriterion, logits: torch.Tensor, boxes: torch.Tensor, targets: Targets) -> torch.Tensor:
        if fused:
            return criterion.weighted_loss(Predictions(logits, boxes), targets)[0]
        return criterion.weighted_sum(criterion(Predictions(logits, boxes), targets))

    if eager_before:
        predictions, targets = batch()
        total(criterion, predictions.logits, predictions.boxes, Targets.pack(targets))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(total, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for counts in ((3, 0, 7), (4, 4, 11), (2, 2, 2)):
        predictions, targets = batch(counts)
        gradients = []
        for function, given in ((compiled, criterion), (total, criterion_of(invalid="skip"))):
            logits = predictions.logits.clone().requires_grad_()
            function(given, logits, predictions.boxes, Targets.pack(targets)).backward()
            gradients.append(logits.grad)
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def losses_of_rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    predictions, targets = batch(counts=(3, 0, 5) if rank == 0 else (0, 0, 0), seed=rank)
    torch.save(criterion_of()(predictions.as_dict(), targets), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_boxes_are_counted_across_ranks(tmp_path) -> None:
    multiprocessing.spawn(losses_of_rank, (free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    predictions, targets = batch()
    alone = criterion_of()(predictions.as_dict(), targets)
    # 8 boxes on one rank of two: the mean is 4, and averaging gradients over ranks restores 8.
    torch.testing.assert_close(first["loss_bbox"], 2 * alone["loss_bbox"])
    torch.testing.assert_close(first["loss_ce"], alone["loss_ce"])
    assert second["loss_bbox"] == 0


def test_masks_are_left_alone_where_no_loss_wants_them() -> None:
    outputs = {"pred_logits": torch.zeros(2, 5, 4), "pred_boxes": torch.full((2, 5, 4), 0.5)}
    plain = [{"labels": torch.tensor([label]), "boxes": torch.full((1, 4), 0.3)} for label in (0, 2)]
    odd = [plain[0] | {"masks": torch.zeros(7, 7)}, plain[1]]  # of no form that a loss could use
    criterion = SetCriterion(3, HungarianMatcher(1, 5, 2), {"loss_ce": 1.0}, 0.1, ["labels", "boxes"])
    assert criterion(outputs, odd) == criterion(outputs, plain)
    whole = Targets.pack([target | {"masks": torch.zeros(1, 7, 7)} for target in plain])
    assert criterion(outputs, whole) == criterion(outputs, plain)
    assert criterion.latest is not None
    assert criterion.latest.targets.masks is None
