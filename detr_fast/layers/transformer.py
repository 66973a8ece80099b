"""The encoder and decoder of DETR over packed tokens, with the published parameter names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.layers.attention import MultiheadAttention
from detr_fast.structures import Tokens

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class _Layer(nn.Module):
    """What encoder and decoder layers share: the two-layer perceptron, its dropout and where norms stand."""

    def __init__(self, width: int, hidden: int, dropout: float, activation: str, pre_norm: bool) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        self.pre_norm = pre_norm
        self.activation = ACTIVATIONS[activation]
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def perceptron(self, x: Tensor) -> Tensor:  # [N, D] -> [N, D]
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class EncoderLayer(_Layer):
    """Self-attention of image locations and a perceptron, each with a residual connection and a layer norm."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        dropout: float = 0.1,
        activation: str = "relu",
        pre_norm: bool = False,
    ) -> None:
        super().__init__(width, hidden, dropout, activation, pre_norm)
        self.self_attn = MultiheadAttention(width, heads, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, tokens: Tokens) -> Tokens:
        x = tokens.content
        if self.pre_norm:
            normed = replace(tokens, content=self.norm1(x))
            x = x + self.dropout1(self.self_attn(normed, normed))
            x = x + self.dropout2(self.perceptron(self.norm2(x)))
        else:
            x = self.norm1(x + self.dropout1(self.self_attn(tokens, tokens)))
            x = self.norm2(x + self.dropout2(self.perceptron(x)))
        return replace(tokens, content=x)


class DecoderLayer(_Layer):
    """Self-attention of queries, their attention to the memory, and a perceptron."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        dropout: float = 0.1,
        activation: str = "relu",
        pre_norm: bool = False,
    ) -> None:
        super().__init__(width, hidden, dropout, activation, pre_norm)
        self.self_attn = MultiheadAttention(width, heads, dropout)
        self.multihead_attn = MultiheadAttention(width, heads, dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout1, self.dropout2, self.dropout3 = nn.Dropout(dropout), nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, queries: Tokens, memory: Tokens, keys: Tensor) -> Tokens:  # keys [M, D]
        x = queries.content
        if self.pre_norm:
            normed = replace(queries, content=self.norm1(x))
            x = x + self.dropout1(self.self_attn(normed, normed))
            normed = replace(queries, content=self.norm2(x))
            x = x + self.dropout2(self.multihead_attn(normed, memory, keys))
            x = x + self.dropout3(self.perceptron(self.norm3(x)))
        else:
            x = self.norm1(x + self.dropout1(self.self_attn(queries, queries)))
            attended = self.multihead_attn(replace(queries, content=x), memory, keys)
            x = self.norm2(x + self.dropout2(attended))
            x = self.norm3(x + self.dropout3(self.perceptron(x)))
        return replace(queries, content=x)


class Encoder(nn.Module):
    def __init__(self, layer: EncoderLayer, count: int, norm: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(count))
        self.norm = norm

    def forward(self, tokens: Tokens) -> Tokens:
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens if self.norm is None else replace(tokens, content=self.norm(tokens.content))


class Decoder(nn.Module):
    """One norm, shared by the outputs of all layers, as published."""

    def __init__(self, layer: DecoderLayer, count: int, norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(count))
        self.norm = norm

    def forward(self, queries: Tokens, memory: Tokens, every_layer: bool) -> Tensor:
        """Normed outputs ``[L, N, D]`` of all layers, or ``[1, N, D]`` of the last one."""
        keys = memory.content + memory.position  # the same for all layers
        outputs = []
        for layer in self.layers:
            queries = layer(queries, memory, keys)
            outputs.append(queries.content)
        return self.norm(torch.stack(outputs if every_layer else outputs[-1:]))


class Transformer(nn.Module):
    """Encoder and decoder. Source: Carion et al., 2020; initial weights as in its code (Xavier for all matrices)."""

    def __init__(
        self,
        width: int = 256,
        heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        hidden: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        arguments = (width, heads, hidden, dropout, activation, pre_norm)
        norm = nn.LayerNorm(width) if pre_norm else None
        self.encoder = Encoder(EncoderLayer(*arguments), encoder_layers, norm)
        self.decoder = Decoder(DecoderLayer(*arguments), decoder_layers, nn.LayerNorm(width))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, tokens: Tokens, queries: Tokens, every_layer: bool = True) -> tuple[Tensor, Tokens]:
        """Decoded queries ``[L, N, D]`` (``[1, N, D]`` unless ``every_layer``) and the memory they looked at."""
        memory = self.encoder(tokens)
        return self.decoder(queries, memory, every_layer), memory
