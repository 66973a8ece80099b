"""Softmax attention between ragged segments: contract, definition, CPU kernel and autograd.

Segment b is one image: its queries attend to its own keys only, so that nothing is padded and nothing is masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby, pairwise

import torch
from torch import Tensor


def attention(
    query: Tensor,  # [N, H, key width]
    key: Tensor,  # [M, H, key width]
    value: Tensor,  # [M, H, value width]
    query_offsets: Tensor,  # [B + 1] int32
    key_offsets: Tensor,  # [B + 1] int32
    max_query: int,
    max_key: int,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:  # [N, H, value width]
    """Attention of every image's queries to the same image's keys, ``softmax(scale q k^T) v`` for each head.

    Image b owns queries ``query_offsets[b]:query_offsets[b + 1]`` and keys ``key_offsets[b]:key_offsets[b + 1]``; both
    may be empty, and queries without keys give 0, as do rows past the last offset. ``max_query`` and ``max_key`` are
    upper bounds of the segment lengths, known on the host. ``scale`` is ``key width ** -0.5`` unless given. The softmax
    is computed in float32 (float64 for float64 inputs); the result has the type of the inputs. With ``dropout`` each
    weight is dropped with that probability and the others are divided by ``1 - dropout``; the mask is drawn from the
    default generator of the device, hence reproducible with ``torch.manual_seed``. First derivatives only. Without
    dropout the result for one image does not depend on the others. CUDA tensors are computed by the same plain PyTorch
    operators as here, which read the offsets back.

    Raises:
        ValueError: a shape, type or probability is wrong, or offsets (CPU) are no segments of the tokens; the message
            names the argument.

    Sources: Vaswani et al., "Attention is all you need", 2017; Dao et al., "FlashAttention", 2022.
    """
    _check(query, key, value, query_offsets, key_offsets, dropout)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    # On the device, so that drawing it needs no synchronisation.
    seed = torch.randint(2**63 - 1, (), device=query.device) if dropout > 0 else None
    return torch.ops.detr_fast.attention(
        query, key, value, query_offsets, key_offsets, max_query, max_key, scale, dropout, seed
    )[0]


def attention_reference(
    query: Tensor,  # [N, H, key width]
    key: Tensor,  # [M, H, key width]
    value: Tensor,  # [M, H, value width]
    query_offsets: Tensor,  # [B + 1] int32
    key_offsets: Tensor,  # [B + 1] int32
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # [N, H, value width], [H, N]
    """The definition, without dropout: output and log-sum-exp of the scaled scores, one image after the other."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs, sums = [], []
    lengths = (query_offsets.diff().tolist(), key_offsets.diff().tolist())
    used = slice(0, int(query_offsets[-1])), slice(0, int(key_offsets[-1]))
    parts = (query[used[0]].split(lengths[0]), key[used[1]].split(lengths[1]), value[used[1]].split(lengths[1]))
    for q, k, v in zip(*parts, strict=True):
        scores = torch.einsum("nhw,mhw->hnm", q, k) * scale
        outputs.append(torch.einsum("hnm,mhw->nhw", scores.softmax(-1), v))
        sums.append(scores.logsumexp(-1))
    unused = len(query) - used[0].stop
    outputs.append(value.new_zeros((unused, *value.shape[1:])))
    sums.append(query.new_full((query.shape[1], unused), -torch.inf))
    return torch.cat(outputs), torch.cat(sums, 1)


def _check(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor, dropout: float
) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 3:
            raise ValueError(f"attention: {name} must be [N, H, W], got {list(x.shape)}")
        if not x.is_floating_point() or x.dtype != query.dtype:
            raise ValueError(f"attention: {name} must be of query's floating point type, got {x.dtype}")
    if query.shape[1:] != key.shape[1:]:
        heads = list(query.shape[1:])
        raise ValueError(f"attention: key must have query's heads and width {heads}, got {list(key.shape[1:])}")
    if value.shape[:2] != key.shape[:2]:
        tokens = list(key.shape[:2])
        raise ValueError(f"attention: value must have key's tokens and heads {tokens}, got {list(value.shape[:2])}")
    for name, offsets in (("query_offsets", query_offsets), ("key_offsets", key_offsets)):
        if offsets.dim() != 1 or offsets.dtype != torch.int32 or offsets.shape != query_offsets.shape:
            got = f"{list(offsets.shape)} {offsets.dtype}"
            raise ValueError(f"attention: {name} must be [B + 1] int32 of one length, got {got}")
    if not 0 <= dropout < 1:
        raise ValueError(f"attention: dropout must be in [0, 1), got {dropout}")


def _check_segments(offsets: Tensor, tokens: int, most: int, name: str) -> None:
    bounds = offsets.tolist()
    counts = [end - start for start, end in pairwise(bounds)]
    if not bounds or bounds[0] != 0 or bounds[-1] > tokens or min(counts, default=0) < 0:
        raise ValueError(f"attention: {name}_offsets must ascend from 0 to at most {tokens}, got {bounds}")
    if max(counts, default=0) > most:
        raise ValueError(f"attention: max_{name} must be at least {max(counts)}, got {most}")


_ARGUMENTS = "Tensor query_offsets, Tensor key_offsets, SymInt max_query, SymInt max_key, float scale, float dropout, "
torch.library.define(
    "detr_fast::attention",
    f"(Tensor query, Tensor key, Tensor value, {_ARGUMENTS} Tensor? seed) -> (Tensor output, Tensor log_sum_exp)",
)
torch.library.define(
    "detr_fast::attention_backward",
    "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor output, Tensor log_sum_exp, "
    f"{_ARGUMENTS} Tensor? seed) -> (Tensor, Tensor, Tensor)",
)


def _forward(
    fused: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_query: int,
    max_key: int,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    output = value.new_zeros((*query.shape[:2], value.shape[2]))
    log_sum_exp = torch.full(query.shape[1::-1], -torch.inf, dtype=_wide(query.dtype), device=query.device)
    _check_segments(query_offsets, len(query), max_query, "query")
    _check_segments(key_offsets, len(key), max_key, "key")
    for group in _groups(query_offsets, key_offsets):
        q, k, v = group.queries(query), group.keys(key), group.keys(value)
        if fused and dropout == 0 and q.shape[-1] == v.shape[-1]:
            out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        else:
            q, k, v = (x.to(log_sum_exp.dtype) for x in (q, k, v))
            weights = (q * scale) @ k.mT  # one buffer throughout: 20 % less time with dropout
            sums = weights.logsumexp(-1)
            weights.sub_(sums[..., None]).exp_()
            if seed is not None:
                weights.mul_(group.keep(weights, dropout, seed))
            out = weights @ v
        group.queries(output).copy_(out)
        group.queries(log_sum_exp.mT[..., None])[..., 0].copy_(sums)
    return output, log_sum_exp


def _backward(
    fused: bool,
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_query: int,
    max_key: int,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = tuple(x.new_zeros(x.shape) for x in (query, key, value))
    for group in _groups(query_offsets, key_offsets):
        q, k, v = group.queries(query), group.keys(key), group.keys(value)
        out, sums = group.queries(output), group.queries(log_sum_exp.mT[..., None])[..., 0]
        grad = group.queries(gradient)
        if fused and dropout == 0 and q.shape[-1] == v.shape[-1]:
            backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            parts = backward(grad, q, k, v, out, sums, 0.0, False, scale=scale)
        else:
            q, k, v, out, grad = (x.to(log_sum_exp.dtype) for x in (q, k, v, out, grad))
            weights = ((q * scale) @ k.mT).sub_(sums[..., None]).exp_()
            grad_scores = grad @ v.mT
            kept = weights
            if seed is not None:
                keep = group.keep(weights, dropout, seed)
                grad_scores.mul_(keep)
                kept = keep.mul_(weights)
            grad_scores.sub_((grad * out).sum(-1, keepdim=True)).mul_(weights)
            parts = (grad_scores @ k * scale, grad_scores.mT @ (q * scale), kept.mT @ grad)
        group.queries(gradients[0]).copy_(parts[0])
        group.keys(gradients[1]).copy_(parts[1])
        group.keys(gradients[2]).copy_(parts[2])
    return gradients  # type: ignore[return-value]


class _Group:
    """Neighbouring segments of equal lengths, seen as one batch ``[count, H, tokens, width]`` without a copy."""

    def __init__(self, count: int, query_start: int, query_count: int, key_start: int, key_count: int) -> None:
        self.count = count
        self.query_start, self.query_count = query_start, query_count
        self.key_start, self.key_count = key_start, key_count

    def queries(self, x: Tensor) -> Tensor:  # [N, H, W] -> [count, H, tokens, W]
        return self._view(x, self.query_start, self.query_count)

    def keys(self, x: Tensor) -> Tensor:  # [M, H, W] -> [count, H, tokens, W]
        return self._view(x, self.key_start, self.key_count)

    def _view(self, x: Tensor, start: int, length: int) -> Tensor:
        x = x[start : start + self.count * length]
        if x.stride(-1) != 1:  # as PyTorch's fused kernel needs it
            x = x.contiguous()
        return x.unflatten(0, (self.count, length)).transpose(1, 2)

    def keep(self, weights: Tensor, dropout: float, seed: Tensor) -> Tensor:
        """1 / (1 - dropout) where a weight is kept and 0 elsewhere, a function of the seed and the place alone."""
        generator = torch.Generator(weights.device).manual_seed(int(seed) + self.query_start)
        return torch.empty_like(weights).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


def _groups(query_offsets: Tensor, key_offsets: Tensor) -> Iterator[_Group]:
    """Runs of images with equal segment lengths; images without queries or without keys are left out."""
    lengths = list(zip(query_offsets.diff().tolist(), key_offsets.diff().tolist(), strict=True))
    query_start = key_start = 0
    for (query_count, key_count), run in groupby(lengths):
        count = len(list(run))
        if query_count > 0 and key_count > 0:
            yield _Group(count, query_start, query_count, key_start, key_count)
        query_start += count * query_count
        key_start += count * key_count


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


for _device, _fused in (("cpu", True), ("cuda", False)):
    torch.library.impl("detr_fast::attention", _device, partial(_forward, _fused))
    torch.library.impl("detr_fast::attention_backward", _device, partial(_backward, _fused))


@torch.library.register_fake("detr_fast::attention")
def _fake(query: Tensor, key: Tensor, value: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    output = value.new_empty((*query.shape[:2], value.shape[2]))
    return output, query.new_empty((query.shape[1], query.shape[0]), dtype=_wide(query.dtype))


@torch.library.register_fake("detr_fast::attention_backward")
def _fake_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *arguments: object
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, query_offsets, key_offsets, *numbers, seed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, query_offsets, key_offsets, seed)
    ctx.numbers = numbers  # type: ignore[attr-defined]


def _derive(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors  # type: ignore[attr-defined]
    gradients = torch.ops.detr_fast.attention_backward(gradient, *tensors, *ctx.numbers, seed)  # type: ignore[attr-defined]
    return (*gradients, *[None] * 7)


torch.library.register_autograd("detr_fast::attention", _derive, setup_context=_setup_context)
