"""mmdetection's assigner against its definition; mmdetection itself is a stand-in here."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from integrations.definitions import mmdetection as definition
from scipy.optimize import linear_sum_assignment

from detr_fast.integrations import mmdetection
from detr_fast.integrations.mmdetection import (
    AssignResult,
    BBoxL1Cost,
    ClassificationCost,
    FocalLossCost,
    HungarianAssigner,
    IoUCost,
)

CLASSES = 6
SHAPES = ((480, 640), (800, 1333), (333, 500))
DINO = [
    {"type": "FocalLossCost", "weight": 2.0},
    {"type": "BBoxL1Cost", "weight": 5.0, "box_format": "xywh"},
    {"type": "IoUCost", "iou_mode": "giou", "weight": 2.0},
]
DETR = [{"type": "ClassificationCost", "weight": 1.0}, *DINO[1:]]
SPARSE = [DINO[0], {"type": "BBoxL1Cost", "weight": 5.0, "box_format": "xyxy"}, DINO[2]]
ALL = {"DINO": DINO, "DETR": DETR, "SPARSE": SPARSE}


def random_boxes(generator, count, shape, dtype=torch.float32):
    """Corners in pixels."""
    height, width = shape
    scale = torch.tensor([width, height, width, height])
    center, size = torch.rand(count, 2, generator=generator), torch.rand(count, 2, generator=generator) * 0.3 + 0.02
    return (torch.cat([center - size / 2, center + size / 2], 1).clamp(0, 1) * scale).to(dtype)


def random_image(queries=20, count=6, shape=SHAPES[0], seed=0):
    generator = torch.Generator().manual_seed(seed)
    predictions = SimpleNamespace(
        scores=torch.randn(queries, CLASSES, generator=generator) * 3, bboxes=random_boxes(generator, queries, shape)
    )
    labels = torch.randint(0, CLASSES - 1, (count,), generator=generator)
    return (
        predictions,
        SimpleNamespace(labels=labels, bboxes=random_boxes(generator, count, shape)),
        {"img_shape": shape},
    )


def cost_of(costs, predictions, targets, shape, dtype=torch.float64):
    """The definition's sum, [Q, T]."""
    scores, boxes, goals = (x.to(dtype) for x in (predictions.scores, predictions.bboxes, targets.bboxes))
    total = 0
    for cost in costs:
        weight = cost["weight"]
        if cost["type"] == "FocalLossCost":
            total = total + definition.focal_loss_cost(scores, targets.labels, weight=weight)
        elif cost["type"] == "ClassificationCost":
            total = total + definition.classification_cost(scores, targets.labels, weight)
        elif cost["type"] == "BBoxL1Cost":
            total = total + definition.bbox_l1_cost(boxes, goals, shape, cost["box_format"], weight)
        else:
            total = total + definition.giou_cost(boxes, goals, weight)
    return total


def assert_assigned(result, cost, labels):
    gt_inds, assigned = definition.assign(cost, labels)
    assert result.num_gts == len(labels)
    assert result.max_overlaps is None
    assert result.gt_inds.dtype == result.labels.dtype == torch.int64
    torch.testing.assert_close(result.gt_inds, gt_inds, rtol=0, atol=0)
    torch.testing.assert_close(result.labels, assigned, rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mode", ["stable", "compat"])
@pytest.mark.parametrize(("queries", "count"), [(20, 6), (20, 0), (5, 9), (0, 3), (1, 1)])
def test_assigns_as_mmdetection(name, mode, queries, count):
    predictions, targets, meta = random_image(queries, count)
    assigner = HungarianAssigner(ALL[name], mode=mode)
    result = assigner.assign(predictions, targets, img_meta=meta)
    assert isinstance(result, AssignResult)
    assert result.num_preds == queries
    assert_assigned(result, cost_of(ALL[name], predictions, targets, meta["img_shape"]), targets.labels)
    assert assigner.report() is None


@pytest.mark.parametrize("cost", [*DINO, DETR[0], SPARSE[1]], ids=lambda cost: cost["type"])
def test_each_cost(cost):
    predictions, targets, meta = random_image()
    options = {name: value for name, value in cost.items() if name != "type"}
    found = getattr(mmdetection, cost["type"])(**options)(predictions, targets, meta)
    exact = cost_of([cost], predictions, targets, meta["img_shape"])
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_compat_has_the_epsilon_and_stable_has_none():
    predictions, targets, meta = random_image(queries=3, count=3)
    predictions.scores[:] = torch.tensor([-40.0, 0.0, 40.0])[:, None]
    exact = definition.focal_loss_cost(predictions.scores, targets.labels)
    compat = HungarianAssigner(FocalLossCost(), mode="compat").cost(predictions, targets, meta).mT
    torch.testing.assert_close(compat, exact, rtol=1e-5, atol=1e-5)
    stable = HungarianAssigner(FocalLossCost()).cost(predictions, targets, meta).mT
    torch.testing.assert_close(stable[0], torch.full((3,), 10.0), rtol=1e-5, atol=0)
    assert (stable[0] - exact[0]).abs().min() > 1


def test_boxes_without_area():
    predictions, targets, meta = random_image()
    predictions.bboxes[3:, 2:] = predictions.bboxes[3:, :2]
    targets.bboxes[:2, 2:] = targets.bboxes[:2, :2]
    predictions.bboxes[0] = targets.bboxes[0]
    predictions.bboxes[1] = targets.bboxes[2] = torch.tensor([0.0, 0.0, 5e-4, 5e-4])  # an area of 2.5e-7
    assigner = HungarianAssigner(DINO, mode="compat")
    exact = cost_of(DINO, predictions, targets, meta["img_shape"])
    assert exact.isfinite().all()
    torch.testing.assert_close(assigner.cost(predictions, targets, meta).mT.double(), exact, rtol=1e-5, atol=1e-4)
    assert_assigned(assigner.assign(predictions, targets, meta), exact, targets.labels)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mode", ["stable", "compat"])
@pytest.mark.parametrize("counts", [(4, 0, 7), (0, 0, 0), (25, 3, 1)])
def test_batch_is_all_images_and_layers(name, mode, counts):
    queries, layers = 20, 3
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(layers, 3, queries, CLASSES, generator=generator) * 3
    corners = torch.stack(
        [torch.stack([random_boxes(generator, queries, shape) for shape in SHAPES]) for _ in range(layers)]
    )
    scale = torch.tensor([[width, height] * 2 for height, width in SHAPES])[:, None]
    center, size = (corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]
    boxes = torch.cat([center, size], -1) / scale
    instances = [random_image(1, count, shape, seed=2 + count)[1] for count, shape in zip(counts, SHAPES, strict=True)]
    metas = [{"img_shape": shape} for shape in SHAPES]
    assigner = HungarianAssigner(ALL[name], mode=mode)
    results = assigner.assign_batch(scores, boxes, instances, metas)
    assert [len(layer) for layer in results] == [3] * layers
    for layer in range(layers):
        for image, targets in enumerate(instances):
            own = SimpleNamespace(scores=scores[layer, image], bboxes=corners[layer, image])
            assert_assigned(results[layer][image], cost_of(ALL[name], own, targets, SHAPES[image]), targets.labels)
            single = assigner.assign(own, targets, metas[image])
            assert torch.equal(single.gt_inds, results[layer][image].gt_inds)
    assigner.assign_batch(scores, boxes, instances, metas)
    assert assigner._matcher.dialect.giou_floor == pytest.approx(1e-6 / (800 * 1333))


def test_invalid_costs():
    predictions, targets, meta = random_image(queries=6, count=6)
    predictions.scores[2] = torch.nan
    with pytest.raises(ValueError, match="query 2"):
        HungarianAssigner(DINO, mode="compat").assign(predictions, targets, meta)
    assigner = HungarianAssigner(DINO)
    result = assigner.assign(predictions, targets, meta)
    assert (result.gt_inds > 0).tolist() == [True, True, False, True, True, True]
    assert result.labels[2] == -1
    assert assigner.report().count == 6
    rows = [0, 1, 3, 4, 5]
    cost = cost_of(DINO, predictions, targets, meta["img_shape"])[rows]
    best = cost[linear_sum_assignment(cost.numpy())].sum()
    torch.testing.assert_close(cost[range(5), result.gt_inds[rows] - 1].sum(), best, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    predictions, targets, meta = random_image()
    predictions.scores, predictions.bboxes = predictions.scores.to(dtype) * 8, predictions.bboxes.to(dtype)
    assigner = HungarianAssigner(DINO)
    result = assigner.assign(predictions, targets, meta)
    assert (result.gt_inds > 0).sum() == 6
    assert assigner.report() is None


@pytest.mark.parametrize("costs", [DINO, SPARSE], ids=["DINO", "SPARSE"])
def test_weights_may_be_changed(costs):
    predictions, targets, meta = random_image(count=9)
    assigner = HungarianAssigner(costs, mode="compat")
    known = [dict(cost) for cost in costs]
    for index, weight in ((0, 0.1), (1, 0.5), (2, 30.0), (0, 40.0)):
        assigner.match_costs[index].weight = known[index]["weight"] = weight
        exact = cost_of(known, predictions, targets, meta["img_shape"])
        assert_assigned(assigner.assign(predictions, targets, meta), exact, targets.labels)
        torch.testing.assert_close(assigner.cost(predictions, targets, meta).mT.double(), exact, rtol=1e-5, atol=1e-4)
    for name, value in (("alpha", 0.6), ("gamma", 1.0), ("eps", 1e-3)):
        setattr(assigner.match_costs[0], name, value)
    options = {name: getattr(assigner.match_costs[0], name) for name in ("alpha", "gamma", "eps", "weight")}
    exact = definition.focal_loss_cost(predictions.scores.double(), targets.labels, **options)
    exact = exact + cost_of(known[1:], predictions, targets, meta["img_shape"])
    torch.testing.assert_close(assigner.cost(predictions, targets, meta).mT.double(), exact, rtol=1e-5, atol=1e-4)


def test_boxes_in_a_structure_and_shape_with_channels():
    predictions, targets, meta = random_image()
    expected = HungarianAssigner(DINO).assign(predictions, targets, meta).gt_inds
    targets.bboxes = SimpleNamespace(tensor=targets.bboxes)
    found = HungarianAssigner(DINO).assign(predictions, targets, {"img_shape": (*meta["img_shape"], 3)})
    assert torch.equal(found.gt_inds, expected)


def test_costs_may_be_objects_or_classes_or_one():
    predictions, targets, meta = random_image()
    expected = HungarianAssigner(DINO).assign(predictions, targets, meta).gt_inds
    objects = [FocalLossCost(weight=2.0), BBoxL1Cost("xywh", 5.0), IoUCost(weight=2.0)]
    classes = [{**cost, "type": getattr(mmdetection, cost["type"])} for cost in DINO]
    for costs in (objects, classes, [{**cost, "type": f"mmdet.{cost['type']}"} for cost in DINO]):
        assert torch.equal(HungarianAssigner(costs).assign(predictions, targets, meta).gt_inds, expected)
    assert HungarianAssigner({"type": "IoUCost"}).assign(predictions, targets, meta).num_gts == 6
    assert repr(ClassificationCost(3.0)) == "ClassificationCost(weight=3.0)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HungarianAssigner([]), "at least one cost"),
        (lambda: HungarianAssigner({"type": "DiceCost"}), "must be of ClassificationCost, .*got 'DiceCost'"),
        (lambda: HungarianAssigner([print]), "match_costs must be of .*got builtin"),
        (lambda: HungarianAssigner([DINO[0], DETR[0]]), "must have one class cost"),
        (lambda: HungarianAssigner(DINO, mode="old"), "mode must be"),
        (lambda: IoUCost("iou"), "iou_mode must be 'giou', got 'iou'"),
        (lambda: BBoxL1Cost("cxcywh"), "box_format must be"),
        (lambda: FocalLossCost(binary_input=True), "binary_input must be False"),
        (lambda: HungarianAssigner(DINO).assign(*random_image()[:2]), "img_meta must have 'img_shape'"),
        (
            lambda: HungarianAssigner(DINO).assign_batch(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), [], []),
            r"must be \[L, B, Q, C\]",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_registers_itself_where_mmdetection_is(monkeypatch):
    """In mmdetection's registry, under its name, and its own AssignResult is returned."""

    class Result(AssignResult):
        pass

    registered = {}
    registry = ModuleType("mmdet.registry")
    registry.TASK_UTILS = SimpleNamespace(register_module=lambda **options: registered.update(options))
    assigners = ModuleType("mmdet.models.task_modules.assigners")
    assigners.AssignResult = Result
    package = ModuleType("mmdet")
    package.__spec__ = importlib.machinery.ModuleSpec("mmdet", None)
    names = ("mmdet", "mmdet.models", "mmdet.models.task_modules", assigners.__name__, registry.__name__)
    parts = (package, ModuleType(names[1]), ModuleType(names[2]), assigners, registry)
    for name, module in zip(names, parts, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    importlib.reload(mmdetection)
    assert registered == {"name": "HungarianAssigner", "module": HungarianAssigner, "force": True}
    predictions, targets, meta = random_image()
    assert type(HungarianAssigner(DINO).assign(predictions, targets, meta)) is Result
