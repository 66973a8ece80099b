"""Losses of Hugging Face transformers, on what small random models of the installed version give them.

A model is run once, in training, up to its loss; the loss is then computed from the tensors that it was given, so that
times are those of matching, losses and their gradients alone. Layers, queries and classes are as published.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.doctor.code_bases import Case, Result

LABELS, QUERIES, LAYERS = 91, 300, 6
COUNTS = (12, 3)  # objects of each image
SIDE = 160  # pixels: 525 places in strides 8, 16 and 32, from which real-time models choose their queries

_WIDTHS = {"d_model": 32, "num_labels": LABELS, "dropout": 0.0}
_HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
_STEM = {"decoder_layers": LAYERS, "encoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, **_HEADS}


def cases(package: str, device: torch.device) -> Mapping[str, Callable[[], Case]]:
    transformers = _package()
    return {
        name: partial(_case, package, build, device)
        for name, (config, build) in _MODELS.items()
        if config in dir(transformers)  # older versions have fewer
    }


def _package() -> Any:  # its types differ from version to version
    return importlib.import_module("transformers")


def _case(package: str, build: Callable[[], nn.Module], device: torch.device) -> Case:
    torch.manual_seed(0)
    return Case.patched(package, _loss_of(build(), device))


def _detr(name: str, stages: list[str], **options: Any) -> nn.Module:
    transformers = _package()
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=stages,
    )
    config = getattr(transformers, f"{name}Config")(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        auxiliary_loss=True,
        **{**_WIDTHS, **_STEM, **options},
    )
    return getattr(transformers, f"{name}ForObjectDetection")(config)


def _real_time(name: str, backbone: Any) -> nn.Module:
    transformers = _package()
    config = getattr(transformers, f"{name}Config")(
        backbone_config=backbone,
        encoder_in_channels=[16, 16, 16],
        encoder_hidden_dim=32,
        decoder_in_channels=[32, 32, 32],
        num_queries=QUERIES,
        hidden_expansion=0.5,
        anchor_image_size=None,
        **_WIDTHS,
        **_STEM,
    )
    return getattr(transformers, f"{name}ForObjectDetection")(config)


def _rt_detr() -> nn.Module:
    transformers = _package()
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return _real_time("RTDetr", backbone)


def _d_fine() -> nn.Module:
    transformers = _package()
    backbone = transformers.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 16, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 16, 16, 16],
        stage_num_blocks=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 5, 5],
        stage_numb_of_layers=[1, 1, 1, 1],
        embedding_size=8,
        hidden_sizes=[16, 16, 16, 16],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    return _real_time("DFine", backbone)


def _lw_detr() -> nn.Module:
    transformers = _package()
    backbone = transformers.LwDetrViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        pretrain_image_size=SIDE,
        patch_size=8,
        num_windows=4,
        window_block_indices=[0],
        out_indices=[1, 2],
    )
    config = transformers.LwDetrConfig(
        backbone_config=backbone,
        projector_scale_factors=[1.0],
        d_model=32,
        decoder_layers=3,
        decoder_ffn_dim=32,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        num_queries=QUERIES,
        group_detr=13,
        num_labels=LABELS,
    )
    return transformers.LwDetrForObjectDetection(config)


# Name of a case -> configuration that the installed version must have, and the model.
_MODELS: Mapping[str, tuple[str, Callable[[], nn.Module]]] = {
    "DETR": ("DetrConfig", lambda: _detr("Detr", ["stage4"], num_queries=100)),
    "Deformable DETR": (
        "DeformableDetrConfig",
        lambda: _detr(
            "DeformableDetr",
            ["stage2", "stage3", "stage4"],
            num_queries=QUERIES,
            num_feature_levels=4,
            with_box_refine=True,
        ),
    ),
    "RT-DETR": ("RTDetrConfig", _rt_detr),
    "D-FINE": ("DFineConfig", _d_fine),
    "LW-DETR": ("LwDetrConfig", _lw_detr),
}


class _Called(Exception):
    """Ends a forward pass where the loss would be computed."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__()
        self.arguments, self.options = arguments, options


def _loss_of(model: Any, device: torch.device) -> Callable[[], Result]:
    """The loss that the model has, of what it gives it, with the gradients of that."""
    mapping = importlib.import_module("transformers.loss.loss_utils").LOSS_MAPPING
    called = _forward(model, device)
    leaves = _Leaves()
    arguments, options = leaves.of(called.arguments), leaves.of(called.options)

    def run() -> Result:
        loss, losses, _ = mapping[model.loss_type](*arguments, **options)
        given = torch.autograd.grad(loss, leaves.leaves, allow_unused=True, retain_graph=True)
        gradients = [torch.zeros_like(x) if g is None else g for g, x in zip(given, leaves.leaves, strict=True)]
        return Result({"loss": loss.detach(), **{key: value.detach() for key, value in losses.items()}}, gradients)

    return run


def _forward(model: Any, device: torch.device) -> _Called:
    _spread(model)
    generator = torch.Generator().manual_seed(0)
    labels = [
        {
            "class_labels": torch.randint(0, LABELS, (count,), generator=generator).to(device),
            "boxes": (torch.rand(count, 4, generator=generator) * 0.3 + 0.2).to(device),
        }
        for count in COUNTS
    ]
    pixels = torch.randn(len(COUNTS), 3, SIDE, SIDE, generator=generator).to(device)

    def stop(*arguments: Any, **options: Any) -> None:
        raise _Called(*arguments, **options)

    model.to(device).train()
    model.loss_function = stop
    try:
        model(pixel_values=pixels, labels=labels)
    except _Called as called:
        return called
    raise RuntimeError(f"{type(model).__name__} computed no loss")


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Queries begin nearly equal; so near ties may be resolved by rounding, in other ways than the package's."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "quer" in name and "embed" in name:
            parameter.normal_()
        elif parameter.dim() > 1 and ("bbox" in name or "class" in name or not parameter.any()):
            parameter.add_(torch.randn_like(parameter) * 0.1)


class _Leaves:
    """Tensors cut off from the model that computed them; what were views of one tensor stay so."""

    def __init__(self) -> None:
        self.leaves: list[Tensor] = []
        self._leaf_of_base: dict[int, tuple[Tensor, Tensor]] = {}  # by identity; the base is kept so that it stays its

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._of_tensor(value) if value.requires_grad else value.detach()
        if isinstance(value, Mapping):
            return {key: self.of(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self.of(part) for part in value])
        return value

    def _of_tensor(self, value: Tensor) -> Tensor:
        base = value if value._base is None else value._base
        if id(base) not in self._leaf_of_base:
            leaf = base.detach().requires_grad_()
            self.leaves.append(leaf)
            self._leaf_of_base[id(base)] = base, leaf
        leaf = self._leaf_of_base[id(base)][1]
        return leaf if value is base else leaf.as_strided(value.size(), value.stride(), value.storage_offset())
