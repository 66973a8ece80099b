"""Losses of Hugging Face transformers: its own functions and what :func:`detr_fast.patch` puts in their place."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.adapters_losses import (
    CROWDED,
    FULL,
    LABELS,
    LAYERS,
    ONE,
    STABLE,
    USUAL,
    Inputs,
    Loss,
    Target,
    denoising_meta,
    drawn,
    loss_and_gradient,
    size,
)
from benchmarks.harness import OURS, Bar, Benchmark, Faster, Options
from benchmarks.scenes import coco_like_counts
from detr_fast.integrations.mode import Mode
from detr_fast.integrations.transformers.versions import installed_quirks

PACKAGE, COMPILED = "transformers", "transformers, compile"
BARS: tuple[Bar, ...] = (Faster(PACKAGE, 10), Faster(PACKAGE, 10, STABLE))
REAL_TIME_LABELS = 80
BINS = 32  # of D-FINE's distributions of edges
GROUPS, GROUP = 13, 300  # of queries

Function = Callable[..., Any]


class Model(NamedTuple):
    """Inputs of a loss function, and how its model calls it."""

    config: Any
    inputs: Inputs
    call: Callable[[Function, Any, Inputs], Any]


def benchmarks(options: Options) -> Iterator[Benchmark]:
    if importlib.util.find_spec("transformers") is None:
        return
    grouped = GROUPS * GROUP
    quick: list[tuple[str, Sequence[int], int, Sequence[Bar]]] = [
        ("DETR", USUAL, 100, BARS),
        ("Deformable DETR", USUAL, 300, BARS),
        ("RT-DETR", USUAL, 300, BARS),
        ("D-FINE", USUAL, 300, ()),
        ("LW-DETR and RF-DETR", USUAL, grouped, ()),
    ]
    others: list[tuple[str, Sequence[int], int, Sequence[Bar]]] = [
        ("DETR", coco_like_counts(16), 300, BARS),
        ("DETR", ONE, 100, ()),
        ("DETR", CROWDED, 100, ()),
        ("Deformable DETR", USUAL, 900, ()),
        ("Deformable DETR", FULL, 900, ()),
        ("RT-DETR", ONE, 300, ()),
        ("RT-DETR", CROWDED, 300, ()),
        ("LW-DETR and RF-DETR", ONE, grouped, ()),
    ]
    for name, counts, queries, bars in quick if options.quick else [*quick, *others]:
        if is_installed(name):
            yield of_model(name, counts, queries, options, bars)


def is_installed(name: str) -> bool:
    """Whether this version of transformers has the model."""
    from transformers.loss import loss_utils

    return hasattr(loss_utils, MODELS[name][0])


def of_model(name: str, counts: Sequence[int], queries: int, options: Options, bars: Sequence[Bar] = ()) -> Benchmark:
    from transformers.loss import loss_utils

    function_name, build = MODELS[name]
    model, theirs = build(counts, queries), getattr(loss_utils, function_name)

    def loss_of(function: Function) -> Loss:
        return lambda inputs: model.call(function, model.config, inputs)[0]

    losses = {OURS: loss_of(_replacement(function_name, "compat"))}
    if model.inputs.denoising is None or not installed_quirks().result_with_denoising:  # else it is another loss
        losses[STABLE] = loss_of(_replacement(function_name, "stable"))
    losses[PACKAGE] = loss_of(theirs)
    if (name, counts) == ("DETR", USUAL) and not options.quick:  # once: it takes half a minute
        losses[COMPILED] = loss_of(torch.compile(theirs))
    exact_type = torch.float32 if name == "D-FINE" else torch.float64  # its distributions are in float32 only
    return loss_and_gradient(
        f"{name} of transformers",
        size(counts, queries),
        model.inputs,
        losses,
        losses[PACKAGE],
        options.device,
        bars,
        exact_type,
    )


def _replacement(function: str, mode: Mode) -> Function:
    from transformers.loss import loss_utils

    from detr_fast.integrations.transformers import replacements

    found = {x.attribute: x.value for x in replacements(mode) if x.owner is loss_utils}
    return found[function]


def _config(name: str, **options: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**options)


def _detr(counts: Sequence[int], queries: int) -> Model:
    config = _config("DetrConfig", num_labels=LABELS, auxiliary_loss=True)
    return Model(config, _inputs(*drawn(counts, queries, softmax=True)), _of_layers)


def _deformable_detr(counts: Sequence[int], queries: int) -> Model:
    config = _config("DeformableDetrConfig", num_labels=LABELS, auxiliary_loss=True)
    return Model(config, _inputs(*drawn(counts, queries)), _of_layers)


def _lw_detr(counts: Sequence[int], queries: int) -> Model:
    """`queries` of all groups. The model of RF-DETR has the same loss."""
    config = _config(
        "LwDetrConfig", num_labels=LABELS, decoder_layers=LAYERS, group_detr=GROUPS, num_queries=queries // GROUPS
    )
    inputs = _inputs(*drawn(counts, queries), encoder=drawn(counts, queries, 1, seed=1))
    return Model(config, inputs, _of_groups)


def _rt_detr(counts: Sequence[int], queries: int) -> Model:
    """With the encoder's proposals and about 200 denoising queries an image."""
    meta = denoising_meta(counts, queries)
    made = drawn(counts, sum(meta["dn_num_split"]), labels=REAL_TIME_LABELS)
    encoder = drawn(counts, queries, 1, REAL_TIME_LABELS, seed=1)
    config = _config("RTDetrConfig", num_labels=REAL_TIME_LABELS)
    return Model(config, _inputs(*made, encoder, meta), _of_images)


def _d_fine(counts: Sequence[int], queries: int) -> Model:
    """As RT-DETR's, with distributions of edges; boxes begin with those that the first layer starts from."""
    meta = denoising_meta(counts, queries)
    every = sum(meta["dn_num_split"])
    made = drawn(counts, every, LAYERS + 1, REAL_TIME_LABELS)
    inputs = _inputs(*made, drawn(counts, queries, 1, REAL_TIME_LABELS, seed=1), meta)
    generator = torch.Generator().manual_seed(0)
    corners = torch.randn(len(counts), LAYERS, every, 4 * (BINS + 1), generator=generator)
    inputs.tensors["corners"] = corners.requires_grad_()
    inputs.tensors["points"] = torch.rand(len(counts), LAYERS, every, 4, generator=generator) * 0.5 + 0.2
    config = _config("DFineConfig", num_labels=REAL_TIME_LABELS)
    return Model(config, inputs, _of_distributions)


def _inputs(
    logits: Tensor,  # [L, B, Q, C]
    boxes: Tensor,  # [L, B, Q, 4]
    targets: Sequence[dict[str, Tensor]],
    encoder: tuple[Tensor, Tensor, Any] | None = None,  # logits [1, B, P, C], boxes [1, B, P, 4]
    meta: Any = None,
) -> Inputs:
    leaves = {"logits": logits, "boxes": boxes}
    if meta is not None:  # the real-time models stack layers after images
        leaves = {name: x.detach().transpose(0, 1).contiguous() for name, x in leaves.items()}
    if encoder is not None:
        leaves |= {"encoder logits": encoder[0].detach()[0], "encoder boxes": encoder[1].detach()[0]}
    named: list[Target] = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    return Inputs({name: x.requires_grad_() for name, x in leaves.items()}, named, meta)


def _of_layers(function: Function, config: Any, inputs: Inputs) -> Any:
    logits, boxes = inputs.tensors["logits"], inputs.tensors["boxes"]
    return function(logits[-1], inputs.targets, inputs.device, boxes[-1], config, logits, boxes)


def _of_groups(function: Function, config: Any, inputs: Inputs) -> Any:
    logits, boxes, *encoder = inputs.tensors.values()
    return function(logits[-1], inputs.targets, inputs.device, boxes[-1], config, logits, boxes, *encoder)


def _of_images(function: Function, config: Any, inputs: Inputs, **more: Tensor) -> Any:
    names = ("logits", "boxes", "encoder logits", "encoder boxes")
    logits, boxes, *encoder = (inputs.tensors[name] for name in names)
    layers = (logits, boxes, *encoder, inputs.denoising)
    return function(logits[:, -1], inputs.targets, inputs.device, boxes[:, -1], config, *layers, **more)


def _of_distributions(function: Function, config: Any, inputs: Inputs) -> Any:
    corners, points = inputs.tensors["corners"], inputs.tensors["points"]
    return _of_images(function, config, inputs, predicted_corners=corners, initial_reference_points=points)


MODELS: dict[str, tuple[str, Callable[[Sequence[int], int], Model]]] = {  # the loss function's name, its inputs
    "DETR": ("ForObjectDetectionLoss", _detr),
    "Deformable DETR": ("DeformableDetrForObjectDetectionLoss", _deformable_detr),
    "RT-DETR": ("RTDetrForObjectDetectionLoss", _rt_detr),
    "D-FINE": ("DFineForObjectDetectionLoss", _d_fine),
    "LW-DETR and RF-DETR": ("LwDetrForObjectDetectionLoss", _lw_detr),
}
