"""Our DETR against transformers' with the same random weights: an independent implementation on padded batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr_fast.layers.backbone import Backbone, Bottleneck, ResNet
from detr_fast.layers.transformer import Transformer
from detr_fast.models.checkpoint import load_weights
from detr_fast.models.detr import DETR
from detr_fast.structures import Images

transformers = pytest.importorskip("transformers", minversion="5.0", reason="its DETR is what ours is compared with")


def their_model(position: str) -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=[1, 2, 1, 2], out_features=["stage4"]
    )
    options: dict[str, Any] = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    }
    configuration = transformers.DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        num_queries=7,
        num_labels=5,
        position_embedding_type=position,
        **options,
    )
    torch.manual_seed(0)
    model = transformers.DetrForObjectDetection(configuration).eval()
    generator = torch.Generator().manual_seed(3)
    for name, value in model.state_dict().items():  # constants of the frozen norms, and biases, that could hide
        if value.dim() == 1 and value.is_floating_point():
            low = 0.5 if name.endswith(("running_var", "norm.weight", "normalization.weight")) else -0.2
            value.copy_(low + torch.rand(value.shape, generator=generator))
    return model


def our_model(position: Any, path: Path) -> DETR:
    backbone = Backbone(ResNet(Bottleneck, (1, 2, 1, 2), width=8))
    model = DETR(backbone, Transformer(32, 4, 2, 3, 64), 5, 7, 32, position)
    load_weights(model, path)
    return model.eval()


@torch.no_grad()
def their_outputs(model: nn.Module, images: Images, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    outputs = model.to(dtype)(images.pixels.to(dtype), (~images.padding).long())
    return outputs.logits, outputs.pred_boxes


@pytest.mark.parametrize("position", ["sine", "learned"])
def test_logits_and_boxes(position: str, tmp_path: Path) -> None:
    theirs = their_model(position)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = our_model(position, tmp_path / "weights.pth")
    generator = torch.Generator().manual_seed(1)
    sizes = ((250, 130), (96, 310))
    images = Images.batch([torch.randn(3, *size, generator=generator) for size in sizes])
    with torch.no_grad():
        predictions = ours(images)
    eager = their_outputs(theirs, images, torch.float32)
    exact = their_outputs(theirs, images, torch.float64)
    for found, theirs_found, truth in zip((predictions.logits[-1], predictions.boxes[-1]), eager, exact, strict=True):
        assert truth.std() > 0.05  # something to compare
        limit = 2 * (theirs_found - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (found - truth).abs().max() <= limit
