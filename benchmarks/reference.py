"""DETR as the paper's code base computes it: the plain padded PyTorch model to compare with.

Every module and parameter has the published name, so a state dictionary of ours loads strictly. Nothing here is made
fast: images and tokens are padded, sequences come first, every attention returns its weights, convolution and constant
norm are operators of their own. Source: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.models.detr import SMALL, TINY


class FrozenBatchNorm2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        self.running_mean: Tensor
        self.running_var: Tensor
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:  # [B, channels, height, width]
        weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        mean, variance = self.running_mean.reshape(1, -1, 1, 1), self.running_var.reshape(1, -1, 1, 1)
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class Block(nn.Module):
    """Two 3 x 3 convolutions, or with `wide` a 3 x 3 between two 1 x 1 that end in four times the channels."""

    def __init__(self, before: int, channels: int, stride: int, norm: type[nn.Module], wide: bool) -> None:
        super().__init__()
        after = 4 * channels if wide else channels
        shapes = [(before, channels, 3, stride), (channels, channels, 3, 1)]
        if wide:
            shapes = [(before, channels, 1, 1), (channels, channels, 3, stride), (channels, after, 1, 1)]
        self.count = len(shapes)
        for number, shape in enumerate(shapes, start=1):
            self.add_module(f"conv{number}", _convolution(*shape))
            self.add_module(f"bn{number}", norm(shape[1]))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or before != after:
            self.downsample = nn.Sequential(_convolution(before, after, 1, stride), norm(after))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        for number in range(1, self.count + 1):
            x = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(x))
            if number < self.count:
                x = self.relu(x)
        x += shortcut
        return self.relu(x)


def _convolution(before: int, after: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride, size // 2, bias=False)


class ResNet(nn.Module):
    def __init__(
        self,
        blocks: Sequence[int],  # of each stage
        wide: bool = False,
        width: int = 64,
        strides: Sequence[int] = (1, 2, 2, 2),  # of each stage
        norm: type[nn.Module] = FrozenBatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), norm(width)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        before = width
        for stage, (count, stride) in enumerate(zip(blocks, strides, strict=True)):
            channels, members = width * 2**stage, []
            for index in range(count):
                members.append(Block(before, channels, stride if index == 0 else 1, norm, wide))
                before = 4 * channels if wide else channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*members))
        self.channels = before
        if norm is FrozenBatchNorm2d:  # made for a checkpoint, of which the first layers stay as they are
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))

    def forward(self, pixels: Tensor) -> Tensor:  # [B, 3, height, width] -> [B, channels, h, w]
        x = self.maxpool(self.relu(self.bn1(self.conv1(pixels))))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return x


class Backbone(nn.Module):
    def __init__(self, body: ResNet) -> None:
        super().__init__()
        self.body = body

    def forward(self, pixels: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:  # [B, 3, H, W], [B, H, W] bool
        feature = self.body(pixels)
        return feature, F.interpolate(padding[None].float(), size=feature.shape[-2:]).to(torch.bool)[0]


class SinePosition(nn.Module):
    def __init__(self, width: int, temperature: float) -> None:
        super().__init__()
        self.width, self.temperature = width, temperature

    def forward(self, padding: Tensor, dtype: torch.dtype) -> Tensor:  # [B, h, w] bool -> [B, 2 * width, h, w]
        inside = ~padding
        y, x = inside.cumsum(1, dtype=dtype), inside.cumsum(2, dtype=dtype)
        y = y / (y[:, -1:, :] + 1e-6) * 2 * math.pi
        x = x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
        channel = torch.arange(self.width, dtype=dtype, device=padding.device)
        wavelength = self.temperature ** (2 * torch.div(channel, 2, rounding_mode="floor") / self.width)
        parts = [axis[:, :, :, None] / wavelength for axis in (y, x)]
        parts = [torch.stack((a[..., 0::2].sin(), a[..., 1::2].cos()), dim=4).flatten(3) for a in parts]
        return torch.cat(parts, dim=3).permute(0, 3, 1, 2)


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout, self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor, padding: Tensor, position: Tensor) -> Tensor:  # [hw, B, D], [B, hw] bool, [hw, B, D]
        query = key = x + position
        attended = self.self_attn(query, key, value=x, attn_mask=None, key_padding_mask=padding)[0]
        x = self.norm1(x + self.dropout1(attended))
        return self.norm2(x + self.dropout2(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class DecoderLayer(EncoderLayer):
    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__(width, heads, hidden, dropout)
        self.multihead_attn = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.norm3, self.dropout3 = nn.LayerNorm(width), nn.Dropout(dropout)

    def decode(
        self,
        x: Tensor,  # [Q, B, D]
        memory: Tensor,  # [hw, B, D]
        padding: Tensor,  # [B, hw] bool
        position: Tensor,  # [hw, B, D]
        query_position: Tensor,  # [Q, B, D]
    ) -> Tensor:
        query = key = x + query_position
        x = self.norm1(x + self.dropout1(self.self_attn(query, key, value=x, attn_mask=None)[0]))
        query, key = x + query_position, memory + position
        attended = self.multihead_attn(query, key, value=memory, attn_mask=None, key_padding_mask=padding)[0]
        x = self.norm2(x + self.dropout2(attended))
        return self.norm3(x + self.dropout3(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class Stack(nn.Module):
    """Equal layers, after those of a decoder one norm."""

    def __init__(self, layer: nn.Module, count: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(count))
        self.norm = norm


class Transformer(nn.Module):
    def __init__(
        self, width: int, heads: int, encoder_layers: int, decoder_layers: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        arguments = (width, heads, hidden, dropout)
        self.encoder = Stack(EncoderLayer(*arguments), encoder_layers)
        self.decoder = Stack(DecoderLayer(*arguments), decoder_layers, nn.LayerNorm(width))

    def forward(
        self,
        feature: Tensor,  # [B, D, h, w]
        padding: Tensor,  # [B, h, w] bool
        queries: Tensor,  # [Q, D]
        position: Tensor,  # [B, D, h, w]
    ) -> Tensor:  # [L, B, Q, D]
        memory, position = (x.flatten(2).permute(2, 0, 1) for x in (feature, position))
        padding = padding.flatten(1)
        query_position = queries.unsqueeze(1).repeat(1, len(feature), 1)
        for layer in self.encoder.layers:
            memory = layer(memory, padding, position)
        x, outputs = torch.zeros_like(query_position), []
        for layer in self.decoder.layers:
            x = layer.decode(x, memory, padding, position, query_position)  # type: ignore[operator]
            outputs.append(self.decoder.norm(x))  # type: ignore[misc]
        return torch.stack(outputs).transpose(1, 2)


class Perceptron(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, after) for after in (width, width, 4))

    def forward(self, x: Tensor) -> Tensor:  # [..., width] -> [..., 4]
        for index, layer in enumerate(self.layers):
            x = F.relu(layer(x)) if index < len(self.layers) - 1 else layer(x)
        return x


class ReferenceDETR(nn.Module):
    """Options as those of :func:`detr_fast.models.detr.detr`."""

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        num_queries: int = 100,
        hidden_dim: int = 256,
        nheads: int = 8,
        enc_layers: int = 6,
        dec_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        position_temperature: float = 10000.0,
        position_in_values: bool = False,
    ) -> None:
        super().__init__()
        body = BODIES[backbone]()
        self.position_in_values = position_in_values
        self.transformer = Transformer(hidden_dim, nheads, enc_layers, dec_layers, dim_feedforward, dropout)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.bbox_embed = Perceptron(hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.input_proj = nn.Conv2d(body.channels, hidden_dim, kernel_size=1)
        self.backbone = nn.ModuleList([Backbone(body), SinePosition(hidden_dim // 2, position_temperature)])

    def forward(self, pixels: Tensor, padding: Tensor) -> dict[str, Any]:  # [B, 3, H, W], [B, H, W] bool
        """``pred_logits [B, Q, C]``, ``pred_boxes [B, Q, 4]`` and ``aux_outputs`` of the earlier layers."""
        feature, padding = self.backbone[0](pixels, padding)
        # In float32, but for the judge in float64.
        position = self.backbone[1](padding, torch.promote_types(pixels.dtype, torch.float32)).to(feature.dtype)
        content = self.input_proj(feature)
        if self.position_in_values:
            content = content + position
        decoded = self.transformer(content, padding, self.query_embed.weight, position)
        logits, boxes = self.class_embed(decoded), self.bbox_embed(decoded).sigmoid()
        earlier = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits[:-1], boxes[:-1], strict=True)]
        return {"pred_logits": logits[-1], "pred_boxes": boxes[-1], "aux_outputs": earlier}


BODIES = {
    "resnet18": partial(ResNet, (2, 2, 2, 2)),
    "resnet50": partial(ResNet, (3, 4, 6, 3), wide=True),
    "small": partial(ResNet, (1, 1, 2, 1), width=32, strides=(1, 2, 2, 1), norm=nn.BatchNorm2d),
    "tiny": partial(ResNet, (1, 1, 1, 1), width=16, strides=(1, 2, 2, 1), norm=nn.BatchNorm2d),
}


def reference_model(name: str, num_classes: int, **options: Any) -> ReferenceDETR:
    """The counterpart of ``build_model``: ``detr_resnet50``, ``detr_small`` or ``detr_tiny``, with random weights."""
    own: dict[str, Any] = {"detr_small": SMALL, "detr_tiny": TINY}.get(name, {})
    return ReferenceDETR(name.removeprefix("detr_"), num_classes, **{**own, **options})
