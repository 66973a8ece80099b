"""Criteria of the original repositories: their definition in plain PyTorch and SciPy, and our adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.adapters_losses import (
    CROWDED,
    LABELS,
    LAYERS,
    ONE,
    STABLE,
    USUAL,
    Inputs,
    Loss,
    as_dictionary,
    definition,
    denoising_meta,
    drawn,
    installed_rfdetr,
    loss_and_gradient,
    size,
    weighted,
)
from benchmarks.harness import OURS, Benchmark, Options
from detr_fast.integrations import deformable_detr, detrex, dfine, dino, rfdetr, rtdetr
from detr_fast.integrations.mode import Mode

COSTS = (2.0, 5.0, 2.0)  # class, L1, GIoU
NAMED_COSTS = dict(zip(("cost_class", "cost_bbox", "cost_giou"), COSTS, strict=True))
WEIGHTS = {"loss_ce": 1.0, "loss_class": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
TERMS = ["labels", "boxes", "cardinality"]
ALPHA = 0.25
DEFINITION, PACKAGE = "definition", "rfdetr"
GROUPS, GROUP = 13, 300  # of RF-DETR's queries
BINS, UP, SCALE = 32, 0.5, 4.0  # of D-FINE's distributions of edges

Build = Callable[[Mode], Loss]


def benchmarks(options: Options) -> Iterator[Benchmark]:
    yield deformable_detr_loss(USUAL, 300, options)
    yield dino_loss(USUAL, 900, options)
    yield detrex_loss(USUAL, 900, options)
    yield rtdetr_loss(USUAL, 300, options)
    yield dfine_loss(USUAL, 300, options)
    yield rfdetr_loss(USUAL, GROUP, options)
    if options.quick:
        return
    yield deformable_detr_loss(ONE, 300, options)
    yield dino_loss(CROWDED, 900, options)


def deformable_detr_loss(counts: Sequence[int], queries: int, options: Options) -> Benchmark:
    """Two-stage: with the encoder's proposals, of which there are as many as queries."""

    def ours(mode: Mode) -> Loss:
        matcher = deformable_detr.HungarianMatcher(*COSTS, mode=mode)
        criterion = deformable_detr.SetCriterion(LABELS, matcher, WEIGHTS, TERMS, ALPHA, mode=mode)
        return lambda inputs: weighted(criterion(_two_stages(inputs), inputs.targets), WEIGHTS)

    def theirs(inputs: Inputs) -> Tensor:
        losses = definition("deformable_detr").criterion(_two_stages(inputs), inputs.targets, COSTS, ALPHA)
        return weighted(losses, WEIGHTS)

    inputs = _inputs(counts, drawn(counts, queries), encoder=queries)
    return _compared("Deformable-DETR", size(counts, queries), inputs, ours, theirs, options)


def dino_loss(counts: Sequence[int], queries: int, options: Options) -> Benchmark:
    meta = denoising_meta(counts, queries)

    def outputs(inputs: Inputs) -> dict[str, Any]:
        known, decoder, encoder = _parts(inputs)
        groups, padding = meta["dn_num_group"], meta["dn_num_split"][0]
        own = {"output_known_lbs_bboxes": known, "num_dn_group": groups, "pad_size": padding}
        return {**decoder, "interm_outputs": encoder, "dn_meta": own}

    def ours(mode: Mode) -> Loss:
        matcher = dino.HungarianMatcher(*COSTS, focal_alpha=ALPHA, mode=mode)
        criterion = dino.SetCriterion(LABELS, matcher, WEIGHTS, ALPHA, TERMS, mode=mode)
        return lambda inputs: weighted(criterion(outputs(inputs), inputs.targets), WEIGHTS)

    def theirs(inputs: Inputs) -> Tensor:
        losses, _ = definition("dino").criterion(outputs(inputs), inputs.targets, COSTS, ALPHA)
        return weighted(losses, WEIGHTS)

    inputs = _inputs(counts, drawn(counts, sum(meta["dn_num_split"])), meta, queries)
    return _compared("DINO", size(counts, queries), inputs, ours, theirs, options)


def detrex_loss(counts: Sequence[int], queries: int, options: Options) -> Benchmark:
    meta = denoising_meta(counts, queries)
    groups, stride = meta["dn_num_group"], meta["dn_num_split"][0] // meta["dn_num_group"]

    def outputs(inputs: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
        known, decoder, encoder = _parts(inputs)
        return {**decoder, "enc_outputs": encoder}, known

    def ours(mode: Mode) -> Loss:
        criterion = detrex.DINOCriterion(LABELS, detrex.HungarianMatcher(*COSTS, mode=mode), WEIGHTS, mode=mode)

        def loss(inputs: Inputs) -> Tensor:
            own, known = outputs(inputs)
            metas = {"output_known_lbs_bboxes": known, "dn_num": groups, "single_padding": stride}
            return weighted(criterion(own, inputs.targets, metas), WEIGHTS)

        return loss

    def theirs(inputs: Inputs) -> Tensor:
        own, known = outputs(inputs)
        losses = definition("detrex").two_stage(own, inputs.targets, COSTS, binary=False)
        losses |= definition("detrex").denoising(known, inputs.targets, groups, stride)
        return weighted(losses, WEIGHTS)

    inputs = _inputs(counts, drawn(counts, sum(meta["dn_num_split"])), meta, queries)
    return _compared("DINO of detrex", size(counts, queries), inputs, ours, theirs, options)


def rtdetr_loss(counts: Sequence[int], queries: int, options: Options) -> Benchmark:
    weights = definition("rtdetr").shared_weights()
    settings = (weights, ["vfl", "boxes"], 0.75, 2.0, LABELS)

    def ours(mode: Mode) -> Loss:
        matcher = rtdetr.HungarianMatcherv2(NAMED_COSTS, use_focal_loss=True, mode=mode)
        criterion = rtdetr.RTDETRCriterionv2(matcher, *settings, mode=mode)
        return lambda inputs: _sum(criterion(_real_time(inputs), inputs.targets))

    module = definition("rtdetr")
    theirs = module.Criterion(module.Matcher(NAMED_COSTS), *settings)
    meta = denoising_meta(counts, queries)
    inputs = _inputs(counts, drawn(counts, sum(meta["dn_num_split"])), meta, queries)
    return _compared(
        "RT-DETRv2", size(counts, queries), inputs, ours, lambda x: _sum(theirs(_real_time(x), x.targets)), options
    )


def dfine_loss(counts: Sequence[int], queries: int, options: Options) -> Benchmark:
    """With the union of matchings and distributions of edges, distilled from the last layer."""
    module = definition("dfine")
    weights = definition("rtdetr").shared_weights(loss_fgl=0.15, loss_ddf=1.5)
    settings = (weights, ["vfl", "boxes", "local"], 0.75, 2.0, LABELS)
    meta = denoising_meta(counts, queries)
    every = sum(meta["dn_num_split"])
    generator = torch.Generator().manual_seed(0)

    class Definition(module.Criterion):  # type: ignore[name-defined]
        """Bins are found for all edges at once, as D-FINE does; the definition looks for them one by one."""

        def local(self, layer: Any, pairs: Any, num_boxes: Any, scale: Any, is_denoising: bool) -> Any:
            if is_denoising not in self.bins:
                boxes = module.corners(pairs.boxes, True)
                values = module.weighting(self.reg_max, scale[0], scale[1])
                self.bins[is_denoising] = bins_of(layer["ref_points"][pairs.where], boxes, values, scale[1])
            return super().local(layer, pairs, num_boxes, scale, is_denoising)

    def ours(mode: Mode) -> Loss:
        matcher = dfine.HungarianMatcher(NAMED_COSTS, use_focal_loss=True, mode=mode)
        criterion = dfine.DFINECriterion(matcher, *settings, mode=mode)
        return lambda inputs: _sum(criterion(_distributions(inputs), inputs.targets))

    theirs = Definition(module.Matcher(NAMED_COSTS), *settings)
    inputs = _inputs(counts, drawn(counts, every, LAYERS + 1), meta, queries)
    corners = torch.randn(LAYERS, len(counts), every, 4 * (BINS + 1), generator=generator)
    inputs.tensors["corners"] = corners.requires_grad_()
    inputs.tensors["points"] = torch.rand(len(counts), every, 4, generator=generator) * 0.5 + 0.2
    inputs.tensors["up"], inputs.tensors["scale"] = torch.tensor([UP]), torch.tensor([SCALE])
    value = size(counts, queries)
    loss = lambda inputs: _sum(theirs(_distributions(inputs), inputs.targets))  # noqa: E731
    return _compared("D-FINE", value, inputs, ours, loss, options)


def bins_of(points: Tensor, boxes: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Left bin and weight of the right one, ``[N, 4]``, of corners seen from points (x, y, width, height)."""
    sizes = points[:, [2, 3, 2, 3]] / abs(scale) + 1e-16
    sides = torch.cat([points[:, :2] - boxes[:, :2], boxes[:, 2:] - points[:, :2]], 1)
    distance = sides / sizes - 0.5 * abs(scale)
    values = values.to(distance)
    left = (torch.searchsorted(values, distance, right=True) - 1).clamp(0, len(values) - 2)
    towards, away = (distance - values[left]).abs(), (values[left + 1] - distance).abs()
    weight = (towards / (towards + away)).where(distance >= values[0], 0.0)
    return left, weight.where(distance < values[-1], 1.0)


def rfdetr_loss(counts: Sequence[int], group: int, options: Options) -> Benchmark:
    package = installed_rfdetr()
    settings = {"group_detr": GROUPS, "ia_bce_loss": True}

    def ours(mode: Mode) -> Loss:
        matcher = rfdetr.HungarianMatcher(**NAMED_COSTS, mode=mode)  # type: ignore[arg-type]
        criterion = rfdetr.SetCriterion(LABELS, matcher, WEIGHTS, ALPHA, TERMS, **settings, mode=mode)  # type: ignore[arg-type]
        return lambda inputs: weighted(criterion(_two_stages(inputs), inputs.targets), WEIGHTS)

    def theirs(inputs: Inputs) -> Tensor:
        outputs, module = _two_stages(inputs), definition("rfdetr")
        return weighted(module.criterion(outputs, inputs.targets, NAMED_COSTS, ALPHA, GROUPS), WEIGHTS)

    queries = GROUPS * group
    inputs = _inputs(counts, drawn(counts, queries), encoder=queries)
    others: dict[str, Loss] = {}
    if package is not None:
        matcher = package.models.matcher.HungarianMatcher(**NAMED_COSTS)
        criterion = package.models.criterion.SetCriterion(LABELS, matcher, WEIGHTS, ALPHA, TERMS, **settings)
        others[PACKAGE] = lambda inputs: weighted(criterion(_two_stages(inputs), inputs.targets), WEIGHTS)
    return _compared("RF-DETR", size(counts, queries), inputs, ours, theirs, options, others)


def _compared(
    code_base: str,
    value: str,
    inputs: Inputs,
    ours: Build,
    theirs: Loss,
    options: Options,
    others: dict[str, Loss] | None = None,
) -> Benchmark:
    losses = {OURS: ours("compat"), STABLE: ours("stable"), **(others or {})}
    if options.device.type == "cpu":
        losses[DEFINITION] = theirs
    return loss_and_gradient(code_base, value, inputs, losses, theirs, options.device)


def _inputs(
    counts: Sequence[int],
    made: tuple[Tensor, Tensor, list[dict[str, Tensor]]],
    meta: Any = None,
    encoder: int = 0,  # proposals of an image
) -> Inputs:
    logits, boxes, targets = made
    proposals = drawn(counts, encoder, 1, seed=1)
    named = {"encoder logits": proposals[0], "encoder boxes": proposals[1]}
    return Inputs({"logits": logits, "boxes": boxes, **named}, list(targets), meta)


def _encoder(inputs: Inputs) -> dict[str, Tensor]:
    return {"pred_logits": inputs.tensors["encoder logits"][0], "pred_boxes": inputs.tensors["encoder boxes"][0]}


def _two_stages(inputs: Inputs) -> dict[str, Any]:
    return {**as_dictionary(inputs.tensors["logits"], inputs.tensors["boxes"]), "enc_outputs": _encoder(inputs)}


def _split(inputs: Inputs, name: str) -> tuple[Tensor, ...]:
    """Denoising queries and the others, as the models cut them apart."""
    assert inputs.denoising is not None
    return inputs.tensors[name].split(inputs.denoising["dn_num_split"], dim=2)


def _parts(inputs: Inputs) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Denoising, decoder and encoder."""
    known, decoder = map(as_dictionary, _split(inputs, "logits"), _split(inputs, "boxes"))
    return known, decoder, _encoder(inputs)


def _layers(outputs: dict[str, Any]) -> list[dict[str, Any]]:
    return [*outputs["aux_outputs"], {name: x for name, x in outputs.items() if name != "aux_outputs"}]


def _real_time(inputs: Inputs) -> dict[str, Any]:
    known, decoder, encoder = _parts(inputs)
    proposals = {"enc_aux_outputs": [encoder], "enc_meta": {"class_agnostic": False}}
    return {**decoder, **proposals, "dn_aux_outputs": _layers(known), "dn_meta": inputs.denoising}


def _distributions(inputs: Inputs) -> dict[str, Any]:
    """The first layer of logits and boxes is that before any refinement."""
    known, decoder, encoder = _parts(inputs)
    assert inputs.denoising is not None
    points = inputs.tensors["points"].split(inputs.denoising["dn_num_split"], dim=1)
    refined = []
    for outputs, corners, reference in zip((known, decoder), _split(inputs, "corners"), points, strict=True):
        first, *layers = _layers(outputs)
        layers = [{**x, "pred_corners": y, "ref_points": reference} for x, y in zip(layers, corners, strict=True)]
        teacher = {"teacher_corners": corners[-1], "teacher_logits": layers[-1]["pred_logits"]}
        refined.append((first, layers, teacher))
    (dn_first, dn_layers, dn_teacher), (first, layers, teacher) = refined
    return {
        **layers[-1],
        "up": inputs.tensors["up"],
        "reg_scale": inputs.tensors["scale"],
        "aux_outputs": [layer | teacher for layer in layers[:-1]],
        "pre_outputs": first,
        "enc_aux_outputs": [encoder],
        "enc_meta": {"class_agnostic": False},
        "dn_outputs": [layer | dn_teacher for layer in dn_layers],
        "dn_pre_outputs": dn_first,
        "dn_meta": inputs.denoising,
    }


def _sum(losses: dict[str, Tensor]) -> Tensor:
    """Of entries that have their weights already."""
    total = sum(losses.values())
    assert isinstance(total, Tensor)
    return total
