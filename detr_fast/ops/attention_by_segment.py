"""Attention between ragged segments by PyTorch's own operators, one run of equal segments after the other.

The CPU's kernel. On CUDA it serves what the Triton kernels do not, and reads the offsets back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from detr_fast.ops.dropout import dropout_limit, dropout_words

# Additive masks that "forbid" by a large number mean minus infinity, beside which float32 forgets the scores.
MASK_FORBIDS = -5e4


def forward(
    query: Tensor,  # [N, H, key width]
    key: Tensor,  # [M, H, key width]
    value: Tensor,  # [M, H, value width]
    query_offsets: Tensor,  # [B + 1]
    key_offsets: Tensor,  # [B + 1]
    max_query: int,
    max_key: int,
    scale: float,
    dropout: float,
    seed: Tensor | None,  # [] int64
    mask: Tensor | None,  # [B or 1, H or 1, max_query, max_key]
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output ``[N, H, value width]`` and log-sum-exp ``[H, N]``; see `detr_fast.ops.attention` for the contract.

    `fused` takes PyTorch's fused kernel, which only the CPU has, where it can.
    """
    output = value.new_zeros((*query.shape[:2], value.shape[2]))
    log_sum_exp = torch.full(query.shape[1::-1], -torch.inf, dtype=type_of_sums(query.dtype), device=query.device)
    runs = _Runs(query, key, query_offsets, key_offsets, max_query, max_key, dropout, seed, mask)
    fused = fused and seed is None and mask is None and value.shape[2] == key.shape[2]
    for run in runs:
        q, k, v = run.queries(query), run.keys(key), run.keys(value)
        if fused:
            out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        else:
            q, k, v = (x.to(log_sum_exp.dtype) for x in (q, k, v))
            weights = runs.mask_scores(run, (q * scale) @ k.mT)  # one buffer throughout: 20 % less time with dropout
            sums = weights.logsumexp(-1)
            weights.sub_(_finite(sums)[..., None]).exp_()
            if seed is not None:
                weights.masked_fill_(runs.dropped(run), 0)
            out = (weights @ v).div_(1 - dropout)
        run.queries(output).copy_(out)
        run.queries(log_sum_exp.mT[..., None])[..., 0].copy_(sums)
    return output, log_sum_exp


def backward(
    gradient: Tensor,  # [N, H, value width]
    query: Tensor,  # [N, H, key width]
    key: Tensor,  # [M, H, key width]
    value: Tensor,  # [M, H, value width]
    output: Tensor,  # [N, H, value width]
    log_sum_exp: Tensor,  # [H, N]
    query_offsets: Tensor,  # [B + 1]
    key_offsets: Tensor,  # [B + 1]
    max_query: int,
    max_key: int,
    scale: float,
    dropout: float,
    seed: Tensor | None,  # [] int64
    mask: Tensor | None,  # [B or 1, H or 1, max_query, max_key]
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    gradients = query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    runs = _Runs(query, key, query_offsets, key_offsets, max_query, max_key, dropout, seed, mask)
    fused = fused and seed is None and mask is None and value.shape[2] == key.shape[2]
    for run in runs:
        q, k, v = run.queries(query), run.keys(key), run.keys(value)
        out, sums = run.queries(output), run.queries(log_sum_exp.mT[..., None])[..., 0]
        grad = run.queries(gradient)
        # Half types in float32: PyTorch's kernel takes longer for them, up to 8 times where segments are short.
        q, k, v, out, grad = (x.to(log_sum_exp.dtype) for x in (q, k, v, out, grad))
        if fused:
            of_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            parts = of_cpu(grad, q, k, v, out, sums, 0.0, False, scale=scale)
        else:
            weights = runs.mask_scores(run, (q * scale) @ k.mT).sub_(_finite(sums)[..., None]).exp_()
            of_weights = (grad @ v.mT).div_(1 - dropout)
            kept = weights
            if seed is not None:
                dropped = runs.dropped(run)
                of_weights.masked_fill_(dropped, 0)
                kept = weights.masked_fill(dropped, 0)
            of_scores = of_weights.sub_((grad * out).sum(-1, keepdim=True)).mul_(weights)
            parts = (of_scores @ k * scale, of_scores.mT @ (q * scale), (kept.mT @ grad).div_(1 - dropout))
        run.queries(gradients[0]).copy_(parts[0])
        run.keys(gradients[1]).copy_(parts[1])
        run.keys(gradients[2]).copy_(parts[2])
    return gradients


def type_of_sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _finite(sums: Tensor) -> Tensor:
    """What is subtracted from scores: 0 where a query may attend to nothing, so that its weights are 0."""
    return sums.masked_fill(sums == -torch.inf, 0)


@dataclass(frozen=True)
class _Run:
    """Neighbouring images of equal segment lengths, seen as one batch ``[count, H, tokens, width]`` without a copy."""

    image: int  # the first
    count: int
    query_start: int
    query_count: int
    key_start: int
    key_count: int

    def queries(self, x: Tensor) -> Tensor:  # [N, H, W] -> [count, H, tokens, W]
        return self._view(x, self.query_start, self.query_count)

    def keys(self, x: Tensor) -> Tensor:  # [M, H, W] -> [count, H, tokens, W]
        return self._view(x, self.key_start, self.key_count)

    def _view(self, x: Tensor, start: int, length: int) -> Tensor:
        x = x[start : start + self.count * length]
        if x.stride(-1) != 1:  # as PyTorch's fused kernel needs it
            x = x.contiguous()
        return x.unflatten(0, (self.count, length)).transpose(1, 2)


class _Runs:
    """The runs of a batch, without images that have no queries or no keys, and which of their weights count."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        query_offsets: Tensor,
        key_offsets: Tensor,
        max_query: int,
        max_key: int,
        dropout: float,
        seed: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        self.query_counts = _lengths(query_offsets, len(query), max_query, "query")
        self.key_counts = _lengths(key_offsets, len(key), max_key, "key")
        self.heads = query.shape[1]
        self.limit, self.mask = dropout_limit(dropout), mask
        self.words = None if seed is None else dropout_words(seed, len(query), self.heads, len(key))

    def __iter__(self) -> Iterator[_Run]:
        image = query_start = key_start = 0
        for (query_count, key_count), images in groupby(zip(self.query_counts, self.key_counts, strict=True)):
            count = len(list(images))
            if query_count > 0 and key_count > 0:
                yield _Run(image, count, query_start, query_count, key_start, key_count)
            image += count
            query_start += count * query_count
            key_start += count * key_count

    def mask_scores(self, run: _Run, scores: Tensor) -> Tensor:
        if self.mask is None:
            return scores
        part = self.mask.expand(len(self.query_counts), self.heads, -1, -1)[run.image : run.image + run.count]
        part = part[:, :, : run.query_count, : run.key_count]
        if part.dtype == torch.bool:
            return scores.masked_fill_(~part, -torch.inf)
        return scores.add_(part).masked_fill_(part <= MASK_FORBIDS, -torch.inf)

    def dropped(self, run: _Run) -> Tensor:  # [count, H, queries, keys] bool
        assert self.words is not None
        query_words, key_words = self.words
        return run.queries(query_words[..., None]) * run.keys(key_words[:, None, None]).mT < self.limit


def _lengths(offsets: Tensor, tokens: int, most: int, name: str) -> list[int]:
    bounds = offsets.tolist()
    counts = [end - start for start, end in pairwise(bounds)]
    if not bounds or bounds[0] != 0 or bounds[-1] > tokens or min(counts, default=0) < 0:
        raise ValueError(f"attention: {name}_offsets must ascend from 0 to at most {tokens}, got {bounds}")
    if max(counts, default=0) > most:
        raise ValueError(f"attention: max_{name} must be at least {max(counts)}, got {most}")
    return counts
