"""RF-DETR's adapter against its definition, and against the package where it is installed (with_rfdetr.sh)."""

from __future__ import annotations

import copy
import pickle
import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from integrations.definitions import mask_cost as mask_definition
from integrations.definitions import rfdetr as definition
from integrations.reading import assert_reads_nothing
from scipy.optimize import linear_sum_assignment
from torch.utils._python_dispatch import TorchDispatchMode

from detr_fast.integrations.patching import patch
from detr_fast.integrations.rfdetr import HungarianMatcher, SetCriterion, assign_many_bucketed
from detr_fast.structures import Predictions, Targets

WEIGHTS = {"cost_class": 2, "cost_bbox": 5, "cost_giou": 2}
CLASSES = 7
LOSSES = ["labels", "boxes", "cardinality"]


def random_layer(generator, images, queries, dtype=torch.float64):
    logits = torch.randn(images, queries, CLASSES, generator=generator, dtype=torch.float64) * 2 - 1
    boxes = torch.rand(images, queries, 4, generator=generator, dtype=torch.float64) * 0.5 + 0.1
    return {"pred_logits": logits.to(dtype), "pred_boxes": boxes.to(dtype)}


def random_batch(counts=(3, 0, 5), queries=24, layers=3, encoder_queries=None, seed=0, dtype=torch.float64):
    """Outputs as RF-DETR's: layers are slices of one tensor."""
    generator = torch.Generator().manual_seed(seed)
    parts = [random_layer(generator, len(counts), queries, dtype) for _ in range(layers)]
    logits, boxes = (torch.stack([part[name] for part in parts]) for name in ("pred_logits", "pred_boxes"))
    rows = [{"pred_logits": x, "pred_boxes": y} for x, y in zip(logits, boxes, strict=True)]
    outputs = {**rows[-1], "aux_outputs": rows[:-1]}
    if encoder_queries is not None:
        outputs["enc_outputs"] = random_layer(generator, len(counts), encoder_queries, dtype)
    targets = [
        {
            "labels": torch.randint(0, CLASSES, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.5 + 0.1,
        }
        for count in counts
    ]
    return outputs, targets


def leaves_of(outputs):
    for part in (
        outputs,
        *outputs.get("aux_outputs", ()),
        *([outputs["enc_outputs"]] if "enc_outputs" in outputs else ()),
    ):
        yield part["pred_logits"]
        yield part["pred_boxes"]


def as_type(outputs, dtype, requires_grad=False):
    """A copy whose tensors are leaves."""
    if isinstance(outputs, dict):
        return {name: as_type(part, dtype, requires_grad) for name, part in outputs.items()}
    if isinstance(outputs, list):
        return [as_type(part, dtype, requires_grad) for part in outputs]
    return outputs.detach().to(dtype).clone().requires_grad_(requires_grad)


def assert_pairs(actual, expected):
    assert len(actual) == len(expected)
    for found, wanted in zip(actual, expected, strict=True):
        for side, other in zip(found, wanted, strict=True):
            assert side.dtype == torch.int64
            assert side.device.type == "cpu"
            torch.testing.assert_close(side, other, rtol=0, atol=0)


def make(groups=3, mode="stable", ia_bce=True, **options):
    matcher = HungarianMatcher(**WEIGHTS, mode=mode)
    options = {"group_detr": groups, "ia_bce_loss": ia_bce, "mode": mode, **options}
    return SetCriterion(CLASSES, matcher, {"loss_ce": 1}, 0.25, LOSSES, **options)


@pytest.mark.parametrize("mode", ["stable", "compat"])
@pytest.mark.parametrize(("groups", "queries"), [(1, 24), (3, 24), (13, 39)])
@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0), (1,), (9, 2)])
def test_pairs_are_those_of_scipy(mode, groups, queries, counts):
    outputs, targets = random_batch(counts, queries, layers=1)
    matcher = HungarianMatcher(**WEIGHTS, mode=mode)
    expected = definition.match(outputs, targets, groups, **WEIGHTS)
    assert_pairs(matcher(as_type(outputs, torch.float32), targets, group_detr=groups), expected)
    assert matcher.report() is None


def test_alpha_is_that_of_the_cost():
    outputs, targets = random_batch((6, 6), layers=1)
    weights = {"cost_class": 2, "cost_bbox": 5, "cost_giou": 0}
    found = [HungarianMatcher(**weights, focal_alpha=alpha)(outputs, targets) for alpha in (0.25, 0.9)]
    for alpha, pairs in zip((0.25, 0.9), found, strict=True):
        assert_pairs(pairs, definition.match(outputs, targets, alpha=alpha, **weights))
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("ia_bce", [True, False])
@pytest.mark.parametrize("encoder_queries", [None, 24, 12])
@pytest.mark.parametrize("mode", ["stable", "compat"])
def test_losses_and_gradients(groups, ia_bce, encoder_queries, mode):
    outputs, targets = random_batch(encoder_queries=encoder_queries)
    exact, ours = as_type(outputs, torch.float64, True), as_type(outputs, torch.float32, True)
    wanted = definition.criterion(exact, targets, WEIGHTS, groups=groups, ia_bce=ia_bce)
    found = make(groups, mode, ia_bce)(ours, targets)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].shape == ()
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-5, atol=1e-6, msg=name)
    assert not found["class_error"].requires_grad
    weights = {name: 1 + 0.1 * index for index, name in enumerate(wanted) if "loss" in name}
    sum(weights[name] * wanted[name] for name in weights).backward()
    sum(weights[name] * found[name] for name in weights).backward()
    for a, b in zip(leaves_of(ours), leaves_of(exact), strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad.double() - b.grad).abs().max() <= 1e-5 * b.grad.abs().max()


def test_decoder_layers_that_are_slices_get_their_gradient():
    outputs, targets = random_batch(dtype=torch.float32)
    logits = outputs["pred_logits"]._base.clone().requires_grad_()
    boxes = outputs["pred_boxes"]._base.clone().requires_grad_()
    rows = [{"pred_logits": x, "pred_boxes": y} for x, y in zip(logits, boxes, strict=True)]
    losses = make()({**rows[-1], "aux_outputs": rows[:-1]}, targets)
    sum(value for name, value in losses.items() if "loss" in name).backward()
    exact = as_type(outputs, torch.float64, True)
    wanted = definition.criterion(exact, targets, WEIGHTS, groups=3)
    sum(value for name, value in wanted.items() if "loss" in name).backward()
    expected = torch.stack([*(part["pred_logits"].grad for part in exact["aux_outputs"]), exact["pred_logits"].grad])
    assert (logits.grad.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_evaluation_has_one_group():
    outputs, targets = random_batch()
    criterion = make(groups=3).eval()
    wanted = definition.criterion(outputs, targets, WEIGHTS, groups=1)
    for name, value in criterion(as_type(outputs, torch.float32), targets).items():
        torch.testing.assert_close(value.double(), wanted[name].double(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0)])
def test_normaliser(sums, training, counts):
    outputs, targets = random_batch(counts)
    criterion = make(groups=4, sum_group_losses=sums).train(training)
    expected = max(sum(counts) * (4 if training and not sums else 1), 1)
    found = criterion.num_boxes_for_targets(outputs, targets)
    assert found.shape == ()
    assert found.dtype == torch.float32
    assert found == expected
    wanted = definition.criterion(outputs, targets, WEIGHTS, groups=4 if training else 1, num_boxes=expected)
    for name, value in criterion(outputs, targets).items():
        torch.testing.assert_close(value.double(), wanted[name].double(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_normaliser_is_the_mean_over_ranks(monkeypatch, training):
    """The other rank has 10 targets."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count: count.add_(10 * groups))
    outputs, targets = random_batch((3, 1, 0))
    groups = 3 if training else 1
    criterion = make(groups=3).train(training)
    assert criterion.num_boxes_for_targets(outputs, targets) == 7 * groups
    wanted = definition.criterion(outputs, targets, WEIGHTS, groups=groups, num_boxes=7 * groups)
    for name, value in criterion(outputs, targets).items():
        torch.testing.assert_close(value.double(), wanted[name].double(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("given", [0.5, 1.0, 40, torch.tensor(7.0), torch.tensor(0.25, dtype=torch.float64)])
def test_given_normaliser_is_taken_as_it_is(given):
    outputs, targets = random_batch()
    wanted = definition.criterion(outputs, targets, WEIGHTS, groups=3, num_boxes=float(given))
    for name, value in make()(outputs, targets, num_boxes=given).items():
        torch.testing.assert_close(value.double(), wanted[name].double(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("counts", [(0, 0), (0, 4), (30, 2)])
def test_few_and_many_targets(counts):
    """(30, 2): more targets than the 8 queries of a group."""
    outputs, targets = random_batch(counts, encoder_queries=24)
    exact, ours = as_type(outputs, torch.float64, True), as_type(outputs, torch.float32, True)
    wanted = definition.criterion(exact, targets, WEIGHTS, groups=3)
    found = make()(ours, targets)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-5, atol=1e-6, msg=name)
    sum(value for name, value in found.items() if "loss" in name).backward()
    sum(value for name, value in wanted.items() if "loss" in name).backward()
    for a, b in zip(leaves_of(ours), leaves_of(exact), strict=True):
        grad = torch.zeros_like(b) if b.grad is None else b.grad
        assert (a.grad.double() - grad).abs().max() <= 1e-5 * grad.abs().max()


def test_boxes_without_area_count_as_the_smallest():
    outputs, targets = random_batch(layers=2)
    outputs["pred_boxes"][0, :, 2:] = 0
    targets[0]["boxes"][0, 2:] = 0
    targets[2]["boxes"][:, 2:] = 2e-4  # areas of 4e-8
    outputs["pred_boxes"][2, :5] = targets[2]["boxes"]
    wanted = definition.criterion(outputs, targets, WEIGHTS, groups=3)
    criterion = make(mode="compat")
    for name, value in criterion(outputs, targets).items():
        torch.testing.assert_close(value.double(), wanted[name].double(), rtol=1e-5, atol=1e-6, msg=name)
    assert criterion.matcher_report() is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_invalid_costs(value):
    """One image with as many targets as queries, so that no choice is left."""
    outputs, targets = random_batch((4,), queries=4, layers=1, dtype=torch.float32)
    outputs["pred_boxes"][0, 1] = value
    outputs["pred_logits"][0, 1, 2] = torch.nan
    matcher = HungarianMatcher(**WEIGHTS, mode="compat")
    assert_pairs(matcher(outputs, targets), definition.match(outputs, targets, **WEIGHTS))
    assert matcher.report().count == 4
    stable = HungarianMatcher(**WEIGHTS)
    ((queries, _),) = stable(outputs, targets)
    assert queries.tolist() == [0, 2, 3]  # query 1 has no finite cost
    report = stable.report()
    assert (report.count, report.layer, report.image, report.target, report.query) == (4, 0, 0, 0, 1)
    assert stable.report() is None


def tempting_nan():
    """Three queries and targets; without a number above NaN's cost, the best pairs would be the diagonal's."""
    logits = torch.full((1, 3, 3), -10.0)
    logits[0, range(3), range(3)] = 10.0
    logits[0, 2, 2] = torch.nan
    outputs = {"pred_logits": logits, "pred_boxes": torch.full((1, 3, 4), 0.5)}
    return outputs, [{"labels": torch.arange(3), "boxes": torch.full((3, 4), 0.5)}]


def test_number_that_replaces_invalid_costs():
    """RF-DETR's is so small that it takes an invalid pair rather than two dear ones; "stable" never does."""
    outputs, targets = tempting_nan()
    weights = {"cost_class": 1, "cost_bbox": 0, "cost_giou": 1}
    expected = definition.match(outputs, targets, **weights)
    assert [side.tolist() for side in expected[0]] == [[0, 1, 2], [0, 1, 2]]
    assert_pairs(HungarianMatcher(**weights, mode="compat")(outputs, targets), expected)
    ((queries, own),) = HungarianMatcher(**weights)(outputs, targets)
    assert queries.tolist() == [0, 1, 2]
    assert own.tolist() in ([0, 2, 1], [2, 1, 0])


def test_invalid_costs_in_groups_are_reported_with_their_image():
    outputs, targets = random_batch((2, 3), queries=12, layers=1, dtype=torch.float32)
    outputs["pred_logits"][1, 5] = torch.nan
    criterion = make()
    losses = criterion(outputs, targets)
    assert losses["loss_bbox"].isfinite()
    assert "image 1" in criterion.matcher_report()
    assert criterion.matcher_report() is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    outputs, targets = random_batch(encoder_queries=24)
    outputs["pred_logits"][0] *= 50
    ours = as_type(outputs, dtype, True)
    wanted = definition.criterion(as_type(ours, torch.float64), targets, WEIGHTS, groups=3)
    found = make(mode="compat")(ours, targets)
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), wanted[name].double(), rtol=1e-4, atol=1e-4, msg=name)
    sum(value for name, value in found.items() if "loss" in name).backward()
    for leaf in leaves_of(ours):
        assert leaf.grad.dtype == dtype
        assert leaf.grad.isfinite().all()


class Calls(TorchDispatchMode):
    """Names of this package's ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith("detr_fast"):
            self.names.append(name.split(".")[1])
        return function(*args, **(kwargs or {}))


def test_one_call_for_all_layers_and_groups():
    outputs, targets = random_batch(encoder_queries=24)
    with Calls() as calls:
        make()(outputs, targets)
    assert calls.names == ["match", "set_loss"]
    outputs, targets = random_batch(encoder_queries=12)
    with Calls() as calls:
        make()(outputs, targets)
    assert calls.names == ["match", "set_loss"] * 2


@pytest.mark.parametrize("encoder_queries", [None, 24, 12])
def test_nothing_is_read_back(encoder_queries):
    outputs, targets = random_batch(dtype=torch.float32, encoder_queries=encoder_queries)
    for ia_bce in (True, False):
        assert_reads_nothing(make(ia_bce=ia_bce), as_type(outputs, torch.float32, True), targets)
    with_divisor = partial(make(), num_boxes=7.0)
    assert_reads_nothing(with_divisor, as_type(outputs, torch.float32, True), targets)


def test_packed_targets():
    outputs, targets = random_batch(dtype=torch.float32)
    expected = make()(outputs, targets)
    for name, value in make()(outputs, Targets.pack(targets)).items():
        assert value == expected[name]


@pytest.mark.parametrize("groups", [1, 3])
def test_weights_may_be_changed(groups):
    outputs, targets = random_batch((6, 6), dtype=torch.float32)
    matcher = HungarianMatcher(**WEIGHTS)
    criterion = make(groups)
    for changes in ({"cost_bbox": 0.1}, {"cost_class": 9}, {"cost_giou": 0.5}, {"focal_alpha": 0.9}):
        for name, value in changes.items():
            setattr(matcher, name, value)
            setattr(criterion.matcher, name, value)
        known = {name: getattr(matcher, name) for name in WEIGHTS} | {"alpha": matcher.focal_alpha}
        expected = definition.match(outputs, targets, groups, **known)
        assert_pairs(matcher(outputs, targets, group_detr=groups), expected)
        structures = as_structures(outputs, targets)
        found = matcher.match_layers(*structures, groups)
        assert (found >= 0).sum() == 12 * groups
        fresh = HungarianMatcher(*(known[name] for name in WEIGHTS), known["alpha"])
        assert torch.equal(found, fresh.match_layers(*structures, groups))
        own = SetCriterion(CLASSES, fresh, {}, 0.25, LOSSES, group_detr=groups, ia_bce_loss=True)
        assert criterion(outputs, targets)["loss_bbox"] == own(outputs, targets)["loss_bbox"]


def test_foreign_matcher():
    class Foreign(torch.nn.Module):
        def forward(self, outputs, targets, group_detr=1):
            return definition.match(outputs, targets, group_detr, **WEIGHTS)

    outputs, targets = random_batch(encoder_queries=12)
    criterion = SetCriterion(CLASSES, Foreign(), {}, 0.25, LOSSES, group_detr=3, ia_bce_loss=True)
    wanted = definition.criterion(outputs, targets, WEIGHTS, groups=3)
    for name, value in criterion(outputs, targets).items():
        torch.testing.assert_close(value.double(), wanted[name].double(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("mode", ["stable", "compat"])
def test_this_package_computes_for_the_matcher_of_rfdetr(monkeypatch, mode):
    """With its weights of now and the criterion's mode; a stand-in, which fails where it is asked itself."""
    module = ModuleType("rfdetr.models.matcher")

    class Published(torch.nn.Module):
        def __init__(self, cost_class, cost_bbox, cost_giou):
            super().__init__()
            self.cost_class, self.cost_bbox, self.cost_giou, self.focal_alpha = cost_class, cost_bbox, cost_giou, 0.25

        def forward(self, outputs, targets, group_detr=1):
            raise LookupError("asked")

    module.HungarianMatcher = Published
    monkeypatch.setitem(sys.modules, "rfdetr.models.matcher", module)
    outputs, targets = random_batch()
    matcher = Published(1, 1, 1)
    criterion = SetCriterion(CLASSES, matcher, {}, 0.25, LOSSES, group_detr=3, ia_bce_loss=True, mode=mode)
    criterion(outputs, targets)
    for name, value in WEIGHTS.items():
        setattr(matcher, name, value)
    wanted = definition.criterion(outputs, targets, WEIGHTS, groups=3)
    for name, value in criterion(outputs, targets).items():
        torch.testing.assert_close(value.double(), wanted[name].double(), rtol=1e-5, atol=1e-6, msg=name)
    assert criterion.matcher_report() is None
    assert dict(criterion.state_dict()) == {}

    invalid, targets = tempting_nan()
    matcher.cost_class, matcher.cost_bbox, matcher.cost_giou = 1, 0, 1
    criterion = SetCriterion(3, matcher, {}, 0.25, ["boxes"], mode=mode)
    losses = criterion(invalid, targets)
    assert losses["loss_bbox"].isfinite()
    assert "query 2" in criterion.matcher_report()
    structures = as_structures(invalid, targets)
    expected = HungarianMatcher(1, 0, 1, mode=mode).match_layers(*structures)
    assert torch.equal(criterion._match(*structures, 1), expected)
    assert (expected.tolist() == [[0, 1, 2]]) == (mode == "compat")

    matcher.register_forward_hook(lambda *_: None)
    with pytest.raises(LookupError, match="asked"):
        criterion(invalid, targets)


def as_structures(outputs, targets):
    return Predictions(outputs["pred_logits"][None], outputs["pred_boxes"][None]), Targets.pack(targets)


def test_losses_may_be_left_out():
    outputs, targets = random_batch()
    criterion = make()
    criterion.losses = ["boxes"]
    wanted = definition.criterion(outputs, targets, WEIGHTS, groups=3, losses=["boxes"])
    found = criterion(outputs, targets)
    assert list(found) == list(wanted)
    torch.testing.assert_close(found["loss_giou"].double(), wanted["loss_giou"].double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sizes", [[2, 0, 3], [9, 1], [0, 0]])
@pytest.mark.parametrize("widths", [[8, 8], [8, 12]])
def test_assignment_of_given_costs(groups, sizes, widths):
    generator = torch.Generator().manual_seed(1)
    costs = [torch.randn(width, sum(sizes), generator=generator) for width in widths]
    found = assign_many_bucketed(costs, sizes, groups)
    for cost, pairs in zip(costs, found, strict=True):
        expected = [definition.pairs_of_groups(block, groups) for block in cost.split(sizes, 1)]
        assert_pairs(pairs, expected)


def with_masks(targets, height=20, width=28, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        {**target, "masks": torch.rand(len(target["labels"]), height, width, generator=generator) > 0.5}
        for target in targets
    ]


def mask_outputs(kind, images, queries):
    generator = torch.Generator().manual_seed(4)
    if kind == "tensor":
        return torch.randn(images, queries, 10, 14, generator=generator) * 3
    features = torch.randn(images, 5, 10, 14, generator=generator)
    return {
        "spatial_features": features,
        "query_features": torch.randn(images, queries, 5, generator=generator),
        "bias": torch.randn(1, generator=generator),
    }


@pytest.mark.parametrize("kind", ["tensor", "product"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mode", ["stable", "compat"])
def test_masks(kind, groups, mode):
    outputs, targets = random_batch((4, 0, 6), layers=1, dtype=torch.float32)
    outputs["pred_masks"], targets = mask_outputs(kind, 3, 24), with_masks(targets)
    matcher = HungarianMatcher(**WEIGHTS, mask_point_sample_ratio=2, cost_mask_ce=5, cost_mask_dice=3, mode=mode)
    torch.manual_seed(0)
    found = matcher(outputs, targets, group_detr=groups)
    torch.manual_seed(0)
    costs = mask_definition.rfdetr_mask_costs(outputs["pred_masks"], targets, 2)
    expected = []
    for image, (target, (entropy, dice)) in enumerate(zip(targets, costs, strict=True)):
        cost = definition.cost_of_image(outputs["pred_logits"][image], outputs["pred_boxes"][image], target, **WEIGHTS)
        expected.append(definition.pairs_of_groups(cost + 5 * entropy + 3 * dice, groups))
    assert_pairs(found, expected)
    without = HungarianMatcher(**WEIGHTS)(
        {name: outputs[name] for name in ("pred_logits", "pred_boxes")},
        [{name: target[name] for name in ("labels", "boxes")} for target in targets],
        group_detr=groups,
    )
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(found, without, strict=True))


def test_state_and_copies():
    criterion = make()
    assert dict(criterion.state_dict()) == {}
    outputs, targets = random_batch()
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert other(outputs, targets)["loss_ce"] == criterion(outputs, targets)["loss_ce"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HungarianMatcher(0, 0, 0), "at least one of"),
        (lambda: HungarianMatcher(mode="fast"), "mode must be"),
        (lambda: make(use_varifocal_loss=True, ia_bce=False), "use_varifocal_loss must be False"),
        (lambda: make(use_position_supervised_loss=True, ia_bce=False), "use_position_supervised_loss must be False"),
        (lambda: SetCriterion(7, HungarianMatcher(), {}, 0.25, ["labels", "masks"]), "got 'masks'"),
        (lambda: HungarianMatcher()(*random_batch(layers=1), group_detr=5), "group_detr must divide 24 queries, got 5"),
        (lambda: make(groups=5)(*random_batch()), "group_detr must divide 24 queries, got 5"),
    ],
)
def test_what_is_not_computed_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_padded_targets_and_keypoints_are_refused():
    outputs, targets = random_batch(layers=1)
    padded = [{**target, "valid": torch.ones(len(target["labels"]), dtype=torch.bool)} for target in targets]
    with pytest.raises(ValueError, match=r"image 0 of the batch must have no padded rows"):
        HungarianMatcher()(outputs, padded)
    outputs["pred_keypoints"] = torch.zeros(3, 24, 1, 3)
    with pytest.raises(ValueError, match="must have no keypoints"):
        make()(outputs, [{**target, "keypoints": torch.zeros(0)} for target in targets])


@pytest.fixture(scope="module")
def package() -> ModuleType:
    try:
        import rfdetr.models.criterion
        import rfdetr.models.matcher
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"rfdetr cannot be imported: {error}; tests/integrations/with_rfdetr.sh installs it")
    return rfdetr


def package_criterion(package, groups=3, **options):
    matcher = package.models.matcher.HungarianMatcher(**WEIGHTS)
    options = {"group_detr": groups, "ia_bce_loss": True, **options}
    return package.models.criterion.SetCriterion(CLASSES, matcher, {"loss_ce": 1}, 0.25, LOSSES, **options)


def cases():
    yield random_batch(dtype=torch.float32)
    yield random_batch(dtype=torch.float32, encoder_queries=24)
    yield random_batch((5,), dtype=torch.float32, encoder_queries=12)
    yield random_batch((0, 0), dtype=torch.float32, encoder_queries=24)
    yield random_batch((30, 2), dtype=torch.float32)


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("ia_bce", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_package_computes_the_same(package, case, ia_bce, training):
    outputs, targets = list(cases())[case]
    theirs = package_criterion(package, ia_bce_loss=ia_bce).train(training)
    ours = make(ia_bce=ia_bce, mode="compat").train(training)
    exact = as_type(outputs, torch.float32, True), as_type(outputs, torch.float32, True)
    wanted, found = theirs(exact[0], targets), ours(exact[1], targets)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value.float(), rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(
        ours.num_boxes_for_targets(outputs, targets), theirs.num_boxes_for_targets(outputs, targets)
    )
    sum(value for name, value in wanted.items() if "loss" in name).backward()
    sum(value for name, value in found.items() if "loss" in name).backward()
    for b, a in zip(leaves_of(exact[0]), leaves_of(exact[1]), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * b.grad.abs().max()


def test_package_has_the_same_signatures(package):
    from inspect import signature

    for ours, theirs in (
        (HungarianMatcher, package.models.matcher.HungarianMatcher),
        (SetCriterion, package.models.criterion.SetCriterion),
    ):
        for method in ("__init__", "forward"):
            known, wanted = (signature(getattr(c, method)).parameters for c in (ours, theirs))
            assert [name for name in known if name != "mode"] == list(wanted)
            for name, parameter in wanted.items():
                assert known[name].default == parameter.default


@pytest.mark.parametrize("kind", ["tensor", "product"])
def test_package_draws_the_same_points(package, kind):
    outputs, targets = random_batch((4, 0, 6), layers=1, dtype=torch.float32)
    outputs["pred_masks"], targets = mask_outputs(kind, 3, 24), with_masks(targets)
    options = {**WEIGHTS, "mask_point_sample_ratio": 2, "cost_mask_ce": 5, "cost_mask_dice": 5}
    pairs = []
    for module in (package.models.matcher.HungarianMatcher, HungarianMatcher):
        torch.manual_seed(0)
        pairs.append(module(**options)(outputs, targets, group_detr=3))
    assert_pairs(pairs[1], pairs[0])


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("mode", ["stable", "compat"])
def test_patched_package_computes_what_it_did(package, case, mode):
    outputs, targets = list(cases())[case]
    criterion = package_criterion(package)
    before = criterion(outputs, targets), criterion.matcher(outputs, targets, group_detr=3)
    with patch("rfdetr", mode) as active, Calls() as calls:
        losses = criterion(outputs, targets)
        pairs = criterion.matcher(outputs, targets, group_detr=3)
        assert active.report() is None
    assert "set_loss" in calls.names
    assert list(losses) == list(before[0])
    for name, value in losses.items():
        torch.testing.assert_close(value, before[0][name].float(), rtol=1e-5, atol=1e-5, msg=name)
    assert_pairs(pairs, before[1])
    with Calls() as calls:
        criterion(outputs, targets)
    assert calls.names == []


def test_patched_package_leaves_other_losses_to_itself(package):
    outputs, targets = random_batch(dtype=torch.float32, encoder_queries=24)
    criterion = package_criterion(package, ia_bce_loss=False, use_varifocal_loss=True)
    before = criterion(outputs, targets)
    with patch("rfdetr"), Calls() as calls:
        after = criterion(outputs, targets)
    assert calls.names == ["match"]  # of all layers
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_patched_package_says_what_it_left_out(package, caplog):
    outputs, targets = random_batch(dtype=torch.float32)
    outputs["pred_logits"][0, 2] = torch.nan
    criterion = package_criterion(package)
    with patch("rfdetr") as active:
        assert criterion(outputs, targets)["loss_bbox"].isfinite()
        assert "image 0" in active.report()
        assert active.report() is None
        criterion.matcher(outputs, targets, group_detr=3)
        criterion.matcher(outputs, targets, group_detr=3)
    assert caplog.text.count("pair(s) without a finite cost") == 1


def test_patched_assignment_of_given_costs(package):
    """As on a CUDA device, and for padded targets, whose costs RF-DETR computes itself."""
    generator = torch.Generator().manual_seed(2)
    cost = torch.randn(24, 7, generator=generator)
    matcher = package.models.matcher.HungarianMatcher
    expected = matcher._assign_compact_cost_matrix(cost, [3, 0, 4], 3)
    with patch("rfdetr"):
        assert_pairs(package.models._assignment.assign_many_bucketed([cost], [3, 0, 4], 3)[0], expected)
        assert_pairs(matcher._assign_compact_cost_matrix(cost, [3, 0, 4], 3), expected)
    outputs, targets = random_batch((4, 4, 4), layers=2, dtype=torch.float32)
    padded = [{**target, "valid": torch.arange(len(target["labels"])) < 2} for target in targets]
    criterion = package_criterion(package)
    before = criterion(outputs, padded)
    with patch("rfdetr"):
        after = criterion(outputs, padded)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_definition_agrees_with_scipy_on_a_known_case():
    cost = torch.tensor([[4.0, 1.0], [2.0, 0.0], [3.0, 2.0]])
    queries, targets = definition.pairs_of_groups(cost, 1)
    rows, columns = linear_sum_assignment(cost.numpy())
    assert (queries.tolist(), targets.tolist()) == (rows.tolist(), columns.tolist())
