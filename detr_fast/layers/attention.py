"""Multi-head attention of DETR over packed tokens, with the parameter names of ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.ops.attention import attention
from detr_fast.structures import Tokens


class MultiheadAttention(nn.Module):
    """Every image's queries look at the same image's memory; positions are added to queries and keys, not to values.

    Source: Carion et al., "End-to-end object detection with transformers", 2020, appendix A.1.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"MultiheadAttention: width must be a multiple of heads {heads}, got {width}")
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))  # rows of query, key and value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, queries: Tokens, memory: Tokens, keys: Tensor | None = None) -> Tensor:  # [N, D]
        """``keys`` is ``memory.content + memory.position`` [M, D] where the caller has it already."""
        query, key = self._query_and_key(queries, memory, keys)
        width = self.in_proj_weight.shape[1]
        value = F.linear(memory.content, self.in_proj_weight[2 * width :], self.in_proj_bias[2 * width :])
        attended = attention(
            query,
            key,
            value.unflatten(-1, (self.heads, -1)),
            queries.offsets,
            memory.offsets,
            queries.max_count,
            memory.max_count,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.out_proj(attended.flatten(1))

    def _query_and_key(self, queries: Tokens, memory: Tokens, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both ``[N, H, D / H]``."""
        width = self.in_proj_weight.shape[1]
        located = queries.content + queries.position
        if queries is memory:  # self-attention: one product
            both = F.linear(located, self.in_proj_weight[: 2 * width], self.in_proj_bias[: 2 * width])
            query, key = both.unflatten(-1, (2, self.heads, -1)).unbind(1)
            return query, key
        if keys is None:
            keys = memory.content + memory.position
        query = F.linear(located, self.in_proj_weight[:width], self.in_proj_bias[:width])
        key = F.linear(keys, self.in_proj_weight[width : 2 * width], self.in_proj_bias[width : 2 * width])
        return query.unflatten(-1, (self.heads, -1)), key.unflatten(-1, (self.heads, -1))

    def weights(self, queries: Tokens, memory: Tokens, keys: Tensor | None = None) -> list[Tensor]:
        """Attention weights of each image averaged over the heads, ``[n_b, m_b]``: for pictures, not for speed."""
        query, key = self._query_and_key(queries, memory, keys)
        parts = (query.split(queries.offsets.diff().tolist()), key.split(memory.offsets.diff().tolist()))
        scale = query.shape[-1] ** -0.5
        return [
            (torch.einsum("nhw,mhw->hnm", q.float(), k.float()) * scale).softmax(-1).mean(0)
            for q, k in zip(*parts, strict=True)
        ]
