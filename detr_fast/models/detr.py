"""DETR. Source: Carion et al., "End-to-end object detection with transformers", ECCV 2020."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from detr_fast.layers.backbone import Backbone, BasicBlock, ResNet, resnet
from detr_fast.layers.heads import Perceptron
from detr_fast.layers.position import Cells, LearnedPosition, SinePosition
from detr_fast.layers.transformer import Transformer
from detr_fast.models.attention_maps import AttentionMaps, record_attention
from detr_fast.structures import Images, Predictions, Tokens


class DETR(nn.Module):
    """Objects of a batch of images, found by learned queries that look at the images' features.

    ``model(images)`` with ``Images`` returns ``Predictions``; with a list of ``[3, h, w]`` or a tensor ``[B, 3, h, w]``
    it returns the dictionary of facebookresearch/detr: ``pred_logits [B, Q, num_classes + 1]`` (the last is "no
    object"), ``pred_boxes [B, Q, 4]`` (cxcywh in [0, 1] of the unpadded image) and with ``aux_loss``
    ``aux_outputs``, the same of the earlier decoder layers. Pixels are normalised with ImageNet's mean and deviation.
    """

    def __init__(
        self,
        backbone: Backbone,
        transformer: Transformer,
        num_classes: int,
        num_queries: int,
        hidden_dim: int = 256,
        position_embedding: Literal["sine", "learned"] = "sine",
        position_temperature: float = 10000.0,
        position_in_values: bool = False,
        aux_loss: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes, self.num_queries, self.aux_loss = num_classes, num_queries, aux_loss
        self.position_in_values = position_in_values
        self.feature_channels = backbone.channels
        self.transformer = transformer
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.bbox_embed = Perceptron(hidden_dim, hidden_dim, 4, 3)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.input_proj = nn.Conv2d(backbone.channels[-1], hidden_dim, 1)
        self.backbone = nn.ModuleList([backbone, _position(position_embedding, hidden_dim // 2, position_temperature)])

    @overload
    def forward(self, images: Images) -> Predictions: ...
    @overload
    def forward(self, images: Sequence[Tensor] | Tensor) -> dict[str, Any]: ...
    def forward(self, images: Images | Sequence[Tensor] | Tensor) -> Predictions | dict[str, Any]:
        if isinstance(images, Images):
            return self.predictions(images)
        return self.predictions(Images.batch(images)).as_dict()

    def predictions(self, images: Images) -> Predictions:
        """All decoder layers with ``aux_loss``, otherwise the last one."""
        tokens, _ = self.tokens(images)
        decoded, _ = self.transformer(tokens, self.queries(len(images)), self.aux_loss)
        return self.heads(decoded)

    def tokens(self, images: Images) -> tuple[Tokens, Cells]:
        """What the encoder sees of the images, and where it lies in the last feature map."""
        return self.tokens_of_map(self.input_proj(self.backbone[0](images.pixels)[-1]), images)

    def tokens_of_map(self, feature: Tensor, images: Images) -> tuple[Tokens, Cells]:  # feature [B, D, h, w]
        cells = Cells.of(images, *feature.shape[-2:])
        content = cells.gather(feature)
        position = self.backbone[1](cells).to(content.dtype)
        if self.position_in_values:
            content = content + position
        return Tokens(content, position, cells.offsets, cells.max_count), cells

    def queries(self, count: int) -> Tokens:
        """Learned queries of ``count`` images; their content starts at zero."""
        position = self.query_embed.weight.repeat(count, 1)
        starts = torch.arange(count + 1, dtype=torch.int32, device=position.device) * self.num_queries
        return Tokens(torch.zeros_like(position), position, starts, self.num_queries)

    def heads(self, decoded: Tensor) -> Predictions:  # decoded [L, B * Q, D]
        # Logits and boxes are what losses and thresholds are computed from: never in a half type.
        with torch.autocast(decoded.device.type, enabled=False):
            decoded = decoded.unflatten(1, (-1, self.num_queries)).to(self.class_embed.weight.dtype)
            return Predictions(self.class_embed(decoded), self.bbox_embed(decoded).sigmoid())

    def parameter_groups(self, learning_rate: float, backbone_learning_rate: float) -> list[dict[str, Any]]:
        return parameter_groups(self, learning_rate, backbone_learning_rate)

    @torch.no_grad()
    def attention_maps(self, images: Images, encoder: bool = False) -> AttentionMaps:
        """Where the queries look in the last decoder layer; with ``encoder`` also its last self-attention."""
        tokens, cells = self.tokens(images)
        last = {"cross": self.transformer.decoder.layers[-1].get_submodule("multihead_attn")}
        if encoder:
            last["encoder"] = self.transformer.encoder.layers[-1].get_submodule("self_attn")
        with record_attention(last) as weights:
            self.transformer(tokens, self.queries(len(images)))
        return AttentionMaps.of(weights, cells.sizes)


def parameter_groups(model: nn.Module, learning_rate: float, backbone_learning_rate: float) -> list[dict[str, Any]]:
    """AdamW's two groups of the paper: all that is trained, the backbone apart from the rest."""
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["backbone" in name].append(parameter)
    rates = {False: learning_rate, True: backbone_learning_rate}
    return [{"params": groups[part], "lr": rates[part]} for part in (False, True) if groups[part]]


def _position(kind: str, width: int, temperature: float) -> nn.Module:
    if kind == "sine":
        return SinePosition(width, temperature)
    if kind == "learned":
        return LearnedPosition(width)
    raise ValueError(f"position_embedding must be 'sine' or 'learned', got {kind!r}")


def detr(
    backbone: str,
    num_classes: int = 91,
    *,
    num_queries: int = 100,
    hidden_dim: int = 256,
    nheads: int = 8,
    enc_layers: int = 6,
    dec_layers: int = 6,
    dim_feedforward: int = 2048,
    dropout: float = 0.1,
    position_embedding: Literal["sine", "learned"] = "sine",
    position_temperature: float = 10000.0,
    position_in_values: bool = False,
    pre_norm: bool = False,
    dilation: bool = False,
    aux_loss: bool = True,
    train_backbone: bool = True,
) -> DETR:
    """DETR with random weights on a backbone of ``BACKBONES``.

    ``num_classes`` does not count "no object". ``dilation`` doubles the resolution of the last feature map (DC5).
    ``position_temperature`` is the ratio of the longest to the shortest wavelength of sine positions.
    ``position_in_values`` also adds positions to what attention passes on: not published, but a network that learns
    from nothing then knows where things are after hundreds of steps instead of thousands.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {sorted(BACKBONES)}, got {backbone!r}")
    transformer = Transformer(hidden_dim, nheads, enc_layers, dec_layers, dim_feedforward, dropout, pre_norm=pre_norm)
    features = BACKBONES[backbone](dilation, train_backbone)
    return DETR(
        features,
        transformer,
        num_classes,
        num_queries,
        hidden_dim,
        position_embedding,
        position_temperature,
        position_in_values,
        aux_loss,
    )


def _published(name: str, dilation: bool, train: bool) -> Backbone:
    return Backbone(resnet(name, dilation), train)


def _small(blocks: Sequence[int], width: int, strides: Sequence[int], dilation: bool, train: bool) -> Backbone:
    """Learns from nothing, hence with batch norm that learns and with every layer trained."""
    return Backbone(ResNet(BasicBlock, blocks, width, strides, dilation, nn.BatchNorm2d), train, pretrained=False)


BACKBONES = {
    **{name: partial(_published, name) for name in ("resnet18", "resnet34", "resnet50", "resnet101")},
    "small": partial(_small, (1, 1, 2, 1), 32, (1, 2, 2, 1)),
    "tiny": partial(_small, (1, 1, 1, 1), 16, (1, 2, 2, 1)),
}

detr_resnet50 = partial(detr, "resnet50")
detr_resnet101 = partial(detr, "resnet101")
detr_resnet50_dc5 = partial(detr, "resnet50", dilation=True)
detr_resnet101_dc5 = partial(detr, "resnet101", dilation=True)
# Trained from nothing on few, small images: short wavelengths fit their few cells, see also `detr`.
_FROM_NOTHING: dict[str, Any] = {"position_temperature": 20.0, "position_in_values": True, "dropout": 0.0}
# For data sets of a few hundred small images, on a CPU.
SMALL = {
    "num_queries": 50,
    "hidden_dim": 128,
    "nheads": 8,
    "enc_layers": 3,
    "dec_layers": 3,
    "dim_feedforward": 512,
    **_FROM_NOTHING,
}
detr_small = partial(detr, "small", **SMALL)
# For tests and the demo.
TINY = {
    "num_queries": 15,
    "hidden_dim": 64,
    "nheads": 4,
    "enc_layers": 1,
    "dec_layers": 3,
    "dim_feedforward": 256,
    **_FROM_NOTHING,
}
detr_tiny = partial(detr, "tiny", **TINY)
