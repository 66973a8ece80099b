"""Residual networks with torchvision's parameter names, and the wrapper that gives DETR its feature maps.

Source: He et al., "Deep residual learning", 2016, in the variant that strides in the 3 x 3 convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine terms are constants of the checkpoint."""

    eps = 1e-5
    is_folded = True  # into the convolution before it; False: a pass over the map of its own

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def convolve(
    x: Tensor,
    convolution: Any,  # nn.Conv2d
    norm: Any,  # FrozenBatchNorm2d or nn.BatchNorm2d
) -> Tensor:
    """Convolution and batch norm in one pass: constant statistics are folded into the weights.

    The fold is repeated in every call, so that it can never be older than the weights.
    """
    if isinstance(norm, nn.BatchNorm2d) and norm.training:
        return norm(convolution(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    if not getattr(norm, "is_folded", True):
        return convolution(x) * scale[:, None, None] + shift[:, None, None]
    return F.conv2d(
        x,
        convolution.weight * scale[:, None, None, None],
        shift,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
    )


def _convolution(channels_in: int, channels: int, size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (size // 2)
    return nn.Conv2d(channels_in, channels, size, stride, padding, dilation, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(
        self, channels_in: int, channels: int, stride: int, dilation: int, norm: type[nn.Module], downsample: bool
    ) -> None:
        super().__init__()
        if dilation > 1:
            raise ValueError("a ResNet of basic blocks (18 or 34 layers) has no dilated form: use dilation=False")
        self.conv1, self.bn1 = _convolution(channels_in, channels, 3, stride), norm(channels)
        self.conv2, self.bn2 = _convolution(channels, channels, 3), norm(channels)
        self.downsample = _shortcut(channels_in, channels, stride, norm) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else convolve(x, self.downsample[0], self.downsample[1])
        x = F.relu_(convolve(x, self.conv1, self.bn1))
        return F.relu_(convolve(x, self.conv2, self.bn2).add_(shortcut))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(
        self, channels_in: int, channels: int, stride: int, dilation: int, norm: type[nn.Module], downsample: bool
    ) -> None:
        super().__init__()
        wide = channels * self.expansion
        self.conv1, self.bn1 = _convolution(channels_in, channels, 1), norm(channels)
        self.conv2, self.bn2 = _convolution(channels, channels, 3, stride, dilation), norm(channels)
        self.conv3, self.bn3 = _convolution(channels, wide, 1), norm(wide)
        self.downsample = _shortcut(channels_in, wide, stride, norm) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else convolve(x, self.downsample[0], self.downsample[1])
        x = F.relu_(convolve(x, self.conv1, self.bn1))
        x = F.relu_(convolve(x, self.conv2, self.bn2))
        return F.relu_(convolve(x, self.conv3, self.bn3).add_(shortcut))


def _shortcut(channels_in: int, channels: int, stride: int, norm: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(_convolution(channels_in, channels, 1, stride), norm(channels))


class ResNet(nn.Module):
    """Stem and four stages of blocks; ``dilation`` replaces the last stage's stride (DC5).

    ``norm`` is constant (``FrozenBatchNorm2d``) where weights come from a checkpoint, and learned
    (``nn.BatchNorm2d``) where a network learns from nothing.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],  # of each stage
        width: int = 64,
        strides: Sequence[int] = (1, 2, 2, 2),  # of each stage, after the stem's 4
        dilation: bool = False,
        norm: type[nn.Module] = FrozenBatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), norm(width)
        self.channels = tuple(width * 2**stage * block.expansion for stage in range(4))
        channels_in = width
        for stage in range(4):
            dilated = dilation and stage == 3
            stride = 1 if dilated else strides[stage]
            channels, members = width * 2**stage, []
            for index in range(blocks[stage]):
                shrinks = index == 0 and (stride > 1 or channels_in != channels * block.expansion)
                spread = strides[stage] if dilated and index > 0 else 1
                members.append(block(channels_in, channels, stride if index == 0 else 1, spread, norm, shrinks))
                channels_in = channels * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*members))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # Channels last is 10-15 % faster on a CPU (ResNet-50, 320 x 320) and what tensor cores want.
        self.arrange(torch.channels_last)

    def arrange(self, memory_format: torch.memory_format) -> None:
        """Order of channels and pixels in memory, of weights and maps: ``channels_last`` or ``contiguous_format``."""
        self.memory_format = memory_format
        self.to(memory_format=memory_format)  # type: ignore[call-overload]

    def forward(self, pixels: Tensor) -> list[Tensor]:  # [B, 3, height, width] -> four maps [B, channels, h, w]
        pixels = pixels.contiguous(memory_format=self.memory_format)
        x = F.max_pool2d(F.relu_(convolve(pixels, self.conv1, self.bn1)), 3, 2, 1)
        maps = []
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
            maps.append(x)
        return maps


def resnet(name: str, dilation: bool = False) -> ResNet:
    """A published ResNet by name, with constant batch norm and random weights.

    Raises:
        ValueError: the name is unknown, or ``dilation`` is asked of a network of basic blocks.
    """
    blocks: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
        "resnet18": (BasicBlock, (2, 2, 2, 2)),
        "resnet34": (BasicBlock, (3, 4, 6, 3)),
        "resnet50": (Bottleneck, (3, 4, 6, 3)),
        "resnet101": (Bottleneck, (3, 4, 23, 3)),
    }
    if name not in blocks:
        raise ValueError(f"backbone must be one of {sorted(blocks)}, got {name!r}")
    block, counts = blocks[name]
    return ResNet(block, counts, dilation=dilation)


class Backbone(nn.Module):
    """Feature maps of a ResNet (``body``); what is not fine-tuned collects no gradient.

    With ``pretrained`` the stem and the first stage always stay as they are, as published.
    """

    def __init__(self, body: ResNet, train: bool = True, pretrained: bool = True) -> None:
        super().__init__()
        self.body = body
        self.is_trained = train
        self.train()
        for name, parameter in body.named_parameters():
            is_early = name.startswith(("conv1", "bn1", "layer1"))
            parameter.requires_grad_(train and not (pretrained and is_early))

    @property
    def channels(self) -> tuple[int, ...]:
        return self.body.channels

    def train(self, mode: bool = True) -> Backbone:
        """Sets the mode; a body that is not trained stays in evaluation mode, so that its norms do not drift."""
        super().train(mode)
        self.body.train(mode and self.is_trained)
        return self

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return self.body(pixels)
