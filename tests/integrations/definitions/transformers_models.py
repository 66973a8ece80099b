"""Tiny models of transformers with random weights: of every kind whose loss is replaced, in every known version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

LABELS, QUERIES, LAYERS = 6, 14, 3
_SMALL = {"d_model": 32, "num_labels": LABELS, "dropout": 0.1}
_HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
_STEM = {"decoder_layers": LAYERS, "encoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, **_HEADS}
_DETR = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "num_queries": QUERIES}

_ALL_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_MASK_HEADS = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}  # with d_model a multiple of 8


def _resnet(stages: list[str]) -> Any:
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=stages,
        num_labels=LABELS,
    )


def _detr(name: str, head: str, stages: list[str] | None = None, **options: Any) -> nn.Module:
    backbone = _resnet(stages or ["stage4"])
    config = getattr(transformers, f"{name}Config")(
        backbone_config=backbone, auxiliary_loss=True, **{**_DETR, **_SMALL, **_STEM, **options}
    )
    return getattr(transformers, f"{name}For{head}")(config)


def _real_time(name: str, **options: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(
        backbone_config=_hgnet() if name in ("DFine", "Deimv2") else _rt_resnet(),
        encoder_in_channels=[16, 16, 16],
        encoder_hidden_dim=32,
        decoder_in_channels=[32, 32, 32],
        num_queries=QUERIES,
        hidden_expansion=0.5,
        anchor_image_size=None,
        **{**_SMALL, **_STEM, "dropout": 0.0, "num_denoising": 12, **options},
    )
    return getattr(transformers, f"{name}ForObjectDetection")(config)


def _rt_resnet() -> Any:
    return transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def _hgnet() -> Any:
    return transformers.HGNetV2Config(
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


def _yolos() -> nn.Module:
    config = transformers.YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[64, 64],
        patch_size=16,
        num_detection_tokens=QUERIES,
        num_labels=LABELS,
    )
    return transformers.YolosForObjectDetection(config)


def _lw_detr() -> nn.Module:
    backbone = transformers.LwDetrViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        pretrain_image_size=64,
        num_windows=4,
        window_block_indices=[0],
        out_indices=[1, 2],
    )
    config = transformers.LwDetrConfig(
        backbone_config=backbone,
        projector_scale_factors=[1.0],
        d_model=32,
        decoder_layers=LAYERS,
        decoder_ffn_dim=32,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        num_queries=8,
        group_detr=3,
        num_labels=LABELS,
    )
    return transformers.LwDetrForObjectDetection(config)


def _rf_detr() -> nn.Module:
    backbone = transformers.RfDetrDinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        num_windows=2,
        out_features=["stage1", "stage2"],
    )
    config = transformers.RfDetrConfig(
        backbone_config=backbone,
        d_model=32,
        decoder_layers=LAYERS,
        decoder_ffn_dim=32,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        num_queries=8,
        group_detr=3,
        num_labels=LABELS,
    )
    return transformers.RfDetrForObjectDetection(config)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "detr": lambda: _detr("Detr", "ObjectDetection"),
    "detr_segmentation": lambda: _detr("Detr", "Segmentation", _ALL_STAGES, **_MASK_HEADS),
    "table_transformer": lambda: _detr("TableTransformer", "ObjectDetection"),
    "conditional_detr": lambda: _detr("ConditionalDetr", "ObjectDetection"),
    "conditional_segmentation": lambda: _detr("ConditionalDetr", "Segmentation", _ALL_STAGES, **_MASK_HEADS),
    "dab_detr": lambda: _detr("DabDetr", "ObjectDetection", hidden_size=32),
    "deformable_detr": lambda: _detr(
        "DeformableDetr", "ObjectDetection", ["stage2", "stage3", "stage4"], num_feature_levels=4
    ),
    "deformable_two_stage": lambda: _detr(
        "DeformableDetr",
        "ObjectDetection",
        ["stage2", "stage3", "stage4"],
        num_feature_levels=4,
        two_stage=True,
        two_stage_num_proposals=QUERIES,
        with_box_refine=True,
    ),
    "yolos": _yolos,
    "rt_detr": lambda: _real_time("RTDetr"),
    "rt_detr_v2": lambda: _real_time("RTDetrV2"),
    "rt_detr_softmax_matching": lambda: _real_time("RTDetr", use_focal_loss=False),
    "rt_detr_without_denoising": lambda: _real_time("RTDetr", num_denoising=0),
    "rt_detr_last_layer": lambda: _real_time("RTDetr", auxiliary_loss=False),
    "d_fine": lambda: _real_time("DFine"),
    "d_fine_without_denoising": lambda: _real_time("DFine", num_denoising=0),
    "deimv2": lambda: _real_time("Deimv2"),
    "deimv2_one_to_one": lambda: _real_time("Deimv2", use_dense_one_to_one=False),
    "lw_detr": _lw_detr,
    "rf_detr": _rf_detr,
}
_CLASS_OF = {"deimv2": "Deimv2Config", "lw_detr": "LwDetrConfig", "rf_detr": "RfDetrConfig"}


def is_available(name: str) -> bool:
    needed = [found for prefix, found in _CLASS_OF.items() if name.startswith(prefix)]
    return all(hasattr(transformers, found) for found in needed)


def build(name: str) -> nn.Module:
    """In training mode, the same weights in every call; what begins at zero is drawn, too."""
    torch.manual_seed(0)
    model = BUILDERS[name]()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_head = "bbox" in parameter_name or "class" in parameter_name
            if parameter.dim() > 1 and (is_head or not parameter.any()):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # over so few values its gradient is noise
            module.eval()
    return model
