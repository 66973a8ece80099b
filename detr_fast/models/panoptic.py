"""DETR with a mask for every query. Source: Carion et al., 2020, section 4.4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.models.attention_maps import AttentionMaps
from detr_fast.models.detr import DETR, SMALL, detr, parameter_groups
from detr_fast.structures import Images, Predictions

GROUPS = 8  # of the group norms


class QueryMaps(nn.Module):
    """Where each query looks, one map a head; heads and places share one softmax, as published."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear, self.k_linear = nn.Linear(width, width), nn.Linear(width, width)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        queries: Tensor,  # [B, Q, D]
        memory: Tensor,  # [B, D, h, w]
        padding: Tensor,  # [B, h, w] True = padding
    ) -> Tensor:  # [B, Q, H, h, w]
        query = self.q_linear(queries).unflatten(-1, (self.heads, -1))
        key = self.k_linear(memory.permute(0, 2, 3, 1)).unflatten(-1, (self.heads, -1))
        scores = torch.einsum("bqnc,bhwnc->bqnhw", query * query.shape[-1] ** -0.5, key)
        scores = scores.masked_fill(padding[:, None, None], -torch.inf)
        return scores.flatten(2).softmax(-1).view_as(scores)


class MaskHead(nn.Module):
    """Convolutions that turn features and query maps into mask logits, with finer features added on the way."""

    def __init__(self, width: int, heads: int, feature_channels: Sequence[int]) -> None:
        """``feature_channels``: of the finer maps, coarse to fine."""
        super().__init__()
        if width % (16 * GROUPS) or heads % GROUPS:
            raise ValueError(
                f"masks need hidden_dim to be a multiple of {16 * GROUPS} and nheads of {GROUPS} "
                f"(group norms of {GROUPS} groups), got hidden_dim={width}, nheads={heads}"
            )
        channels = [width + heads, width // 2, width // 4, width // 8, width // 16]
        self.width = width
        for index, (before, after) in enumerate(zip([channels[0], *channels], channels, strict=False), 1):
            self.add_module(f"lay{index}", nn.Conv2d(before, after, 3, padding=1))
            self.add_module(f"gn{index}", nn.GroupNorm(GROUPS, after))
        self.out_lay = nn.Conv2d(channels[-1], 1, 3, padding=1)
        for index, (feature, after) in enumerate(zip(feature_channels, channels[1:], strict=False), 1):
            self.add_module(f"adapter{index}", nn.Conv2d(feature, after, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(
        self,
        feature: Tensor,  # [B, D, h, w] what the encoder was given
        maps: Tensor,  # [B, Q, H, h, w]
        finer: Sequence[Tensor],  # [B, channels, h_i, w_i], coarse to fine
    ) -> Tensor:  # [B, Q, height, width]
        count = maps.shape[1]
        x = self._normed(1, self._first(feature, maps))
        x = self._normed(2, self.get_submodule("lay2")(x))
        for index, level in enumerate(finer, 1):
            added = self.get_submodule(f"adapter{index}")(level)
            x = F.interpolate(x, size=added.shape[-2:], mode="nearest")
            x = (x.unflatten(0, (-1, count)) + added[:, None]).flatten(0, 1)
            x = self._normed(index + 2, self.get_submodule(f"lay{index + 2}")(x))
        return self.out_lay(x).squeeze(1).unflatten(0, (-1, count))

    def _first(self, feature: Tensor, maps: Tensor) -> Tensor:  # [B * Q, D + H, h, w]
        """The first convolution of features beside maps. Features are the same for all queries: convolved once."""
        layer = self.get_submodule("lay1")
        assert isinstance(layer, nn.Conv2d)
        shared = F.conv2d(feature, layer.weight[:, : self.width], layer.bias, padding=1)
        own = F.conv2d(maps.flatten(0, 1), layer.weight[:, self.width :], padding=1)
        return (own.unflatten(0, maps.shape[:2]) + shared[:, None]).flatten(0, 1)

    def _normed(self, index: int, x: Tensor) -> Tensor:
        return F.relu(self.get_submodule(f"gn{index}")(x))


class PanopticDETR(nn.Module):
    """A DETR and its masks: the same inputs and outputs, and ``pred_masks [B, Q, height / 4, width / 4]`` (logits).

    Masks cover the padded canvas and belong to the last decoder layer. With ``freeze_detr`` only the mask head is
    trained, and the detector runs without dropout; its weights come from a detection checkpoint
    (``load_weights(model.detr, path)``).
    """

    def __init__(self, detector: DETR, freeze_detr: bool = False) -> None:
        super().__init__()
        self.detr, self.freeze_detr = detector, freeze_detr
        if freeze_detr:
            detector.requires_grad_(False)
        width, heads = detector.transformer.width, detector.transformer.heads
        self.bbox_attention = QueryMaps(width, heads)
        self.mask_head = MaskHead(width, heads, detector.feature_channels[2::-1])

    @property
    def num_classes(self) -> int:
        return self.detr.num_classes

    @property
    def num_queries(self) -> int:
        return self.detr.num_queries

    def train(self, mode: bool = True) -> PanopticDETR:
        super().train(mode)
        if self.freeze_detr:
            self.detr.eval()
        return self

    @overload
    def forward(self, images: Images) -> Predictions: ...
    @overload
    def forward(self, images: Sequence[Tensor] | Tensor) -> dict[str, Any]: ...
    def forward(self, images: Images | Sequence[Tensor] | Tensor) -> Predictions | dict[str, Any]:
        if isinstance(images, Images):
            return self.predictions(images)
        return self.predictions(Images.batch(images)).as_dict()

    def predictions(self, images: Images) -> Predictions:
        *finer, last = self.detr.backbone[0](images.pixels)
        feature = self.detr.input_proj(last)
        tokens, cells = self.detr.tokens_of_map(feature, images)
        decoded, memory = self.detr.transformer(tokens, self.detr.queries(len(images)), self.detr.aux_loss)
        queries = decoded[-1].unflatten(0, (-1, self.num_queries))
        inside = cells.scatter(torch.ones_like(memory.content[:, :1]))[:, 0]
        maps = self.bbox_attention(queries, cells.scatter(memory.content), inside == 0)
        masks = self.mask_head(feature, maps, finer[::-1])
        return replace(self.detr.heads(decoded), masks=masks)

    def parameter_groups(self, learning_rate: float, backbone_learning_rate: float) -> list[dict[str, Any]]:
        return parameter_groups(self, learning_rate, backbone_learning_rate)

    def attention_maps(self, images: Images, encoder: bool = False) -> AttentionMaps:
        return self.detr.attention_maps(images, encoder)


def detr_panoptic(backbone: str, num_classes: int = 250, *, freeze_detr: bool = False, **options: Any) -> PanopticDETR:
    """DETR with masks and random weights; ``options`` are those of ``detr``."""
    return PanopticDETR(detr(backbone, num_classes, **options), freeze_detr)


detr_resnet50_panoptic = partial(detr_panoptic, "resnet50")
detr_resnet50_dc5_panoptic = partial(detr_panoptic, "resnet50", dilation=True)
detr_resnet101_panoptic = partial(detr_panoptic, "resnet101")
detr_small_panoptic = partial(detr_panoptic, "small", **SMALL)
