"""Attention weights for pictures, computed apart from the fast path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from detr_fast.layers.attention import MultiheadAttention


@dataclass(frozen=True)
class AttentionMaps:
    """Weights averaged over the heads, one entry an image; each map sums to 1 and covers the unpadded image."""

    cross: tuple[Tensor, ...]  # [Q, h, w]: where each query looks
    encoder: tuple[Tensor, ...] | None = None  # [h, w, h, w]: where each location looks

    @classmethod
    def of(cls, weights: Mapping[str, Sequence[Tensor]], sizes: Sequence[tuple[int, int]]) -> AttentionMaps:
        """``weights``: of each image ``[queries, h * w]`` as ``cross`` and, where asked for, as ``encoder``."""
        cross = tuple(x.unflatten(1, size) for x, size in zip(weights["cross"], sizes, strict=True))
        if "encoder" not in weights:
            return cls(cross)
        pairs = zip(weights["encoder"], sizes, strict=True)
        return cls(cross, tuple(x.unflatten(1, size).unflatten(0, size) for x, size in pairs))


@contextmanager
def record_attention(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Weights of the next forward pass of each ``MultiheadAttention``, under its name."""
    weights: dict[str, list[Tensor]] = {}

    def record(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, MultiheadAttention)
        weights[name] = module.weights(*arguments)

    handles = [module.register_forward_pre_hook(partial(record, name)) for name, module in modules.items()]
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()
