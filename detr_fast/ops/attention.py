"""Softmax attention between ragged segments: contract, definition, registration and autograd.

Segment b is one image: its queries attend to its own keys only, so that nothing is padded. Kernels:
`triton/attention.py` for CUDA, `attention_by_segment.py` for the CPU.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from detr_fast.ops import attention_by_segment
from detr_fast.ops.attention_by_segment import MASK_FORBIDS, type_of_sums
from detr_fast.ops.dropout import dropout_keeps


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
    seed: Tensor | None = None,  # [] int64
    mask: Tensor | None = None,  # [B or 1, H or 1, max_query, max_key] bool or floating point
) -> Tensor:  # [N, H, value width]
    """Attention of every image's queries to the same image's keys, ``softmax(scale q k^T) v`` for each head.

    Image b owns queries ``query_offsets[b]:query_offsets[b + 1]`` and keys ``key_offsets[b]:key_offsets[b + 1]``; both
    may be empty. Queries without keys give 0, as do rows past the last offset. ``max_query`` and ``max_key`` are upper
    bounds of the segment lengths, known on the host. ``scale``, which must be positive, is ``key width ** -0.5`` unless
    given. On CUDA offsets are not looked at: what they say beyond the tokens or the upper bounds is left out.

    ``mask`` applies to query i and key j of an image, counted from the image's first: a boolean says which pairs
    attend (True, as in ``scaled_dot_product_attention``), a floating point number is added to the scaled score, or
    forbids the pair if it is at most -50000. A query that may attend to nothing gives 0. The mask has no gradient.

    With ``dropout`` each weight is dropped with that probability and the others are divided by ``1 - dropout``. Which
    ones is a function of ``seed`` and the place of query, head and key alone (`detr_fast.ops.dropout`), the same
    on every device and in backward; unless given, the seed is drawn from the device's default generator, hence
    reproducible with ``torch.manual_seed``.

    Scores and sums are kept in float32 (float64 for float64 inputs), products of float32 in full precision unless
    ``torch.backends.cuda.matmul`` allows TF32; the result has the inputs' type, which must be one, under
    autocast too. First derivatives in reverse mode only; ``torch.func`` is not supported.
    Inputs are read where they are as long as their last dimension is contiguous.

    The same call gives the same bits, forward and backward. Without dropout the result for one image does not depend on
    the others; to the bit on the CPU with one thread in float32 and half types without a mask, elsewhere to rounding.

    On CUDA the kernels are Triton's for head widths up to 128. Nothing is read back, and the first call of a class of
    shapes on a machine times a few block sizes; with ``torch.use_deterministic_algorithms`` a fixed one is taken, so
    that other processes get the same bits too. Float64 and wider heads are computed by plain operators, which do read
    the offsets back.

    Raises:
        ValueError: a shape, type, scale or probability is wrong, or offsets (CPU) are no segments of the tokens; the
            message names the argument.

    Sources: Vaswani et al., "Attention is all you need", 2017; Dao et al., "FlashAttention", 2022.
    """
    _check(query, key, value, query_offsets, key_offsets, max_query, max_key, scale, dropout, seed, mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if dropout == 0:
        seed = None
    elif seed is None:  # on the device, so that drawing it needs no synchronisation
        seed = torch.randint(2**63 - 1, (), device=query.device)
    return torch.ops.detr_fast.attention(
        query, key, value, query_offsets, key_offsets, max_query, max_key, scale, dropout, seed, mask
    )[0]


def attention_reference(
    query: Tensor,  # [N, H, key width]
    key: Tensor,  # [M, H, key width]
    value: Tensor,  # [M, H, value width]
    query_offsets: Tensor,  # [B + 1] int32
    key_offsets: Tensor,  # [B + 1] int32
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,  # [] int64
    mask: Tensor | None = None,  # [B or 1, H or 1, at least the longest segments] bool or floating point
) -> tuple[Tensor, Tensor]:  # [N, H, value width], [H, N]
    """The definition: output and log-sum-exp of the scaled scores, one image after the other."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    (count, heads, _), images = query.shape, len(query_offsets) - 1
    output, sums = value.new_zeros((count, heads, value.shape[2])), query.new_full((heads, count), -torch.inf)
    kept = None if seed is None else dropout_keeps(seed, dropout, count, heads, len(key))  # [H, N, M]
    for image in range(images):
        queries = slice(int(query_offsets[image]), int(query_offsets[image + 1]))
        keys = slice(int(key_offsets[image]), int(key_offsets[image + 1]))
        scores = torch.einsum("nhw,mhw->hnm", query[queries], key[keys]) * scale
        if mask is not None:
            part = mask.expand(images, heads, -1, -1)[image, :, : scores.shape[1], : scores.shape[2]]
            forbidden = ~part if part.dtype == torch.bool else part <= MASK_FORBIDS
            scores = scores if part.dtype == torch.bool else scores + part.to(scores.dtype)
            scores = scores.masked_fill(forbidden, -torch.inf)
        alone = (scores == -torch.inf).all(-1, keepdim=True)  # queries that may attend to nothing
        weights = scores.masked_fill(alone, 0).softmax(-1).masked_fill(alone, 0)
        if kept is not None:
            weights = weights * kept[:, queries, keys] / (1 - dropout)
        output[queries] = torch.einsum("hnm,mhw->nhw", weights, value[keys])
        sums[:, queries] = scores.logsumexp(-1)
    return output, sums


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_query: int,
    max_key: int,
    scale: float | None,
    dropout: float,
    seed: Tensor | None,
    mask: Tensor | None,
) -> None:
    tensors = {"query": query, "key": key, "value": value, "query_offsets": query_offsets, "key_offsets": key_offsets}
    optional = {name: tensor for name, tensor in (("seed", seed), ("mask", mask)) if tensor is not None}
    for name, tensor in {**tensors, **optional}.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"attention: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != query.device:
            raise ValueError(f"attention: {name} must be on query's device {query.device}, got {tensor.device}")
    if query.dtype not in _TYPES:
        raise ValueError(f"attention: query must be float16, bfloat16, float32 or float64, got {query.dtype}")
    for name, rows, x in (("query", "N", query), ("key", "M", key), ("value", "M", value)):
        if x.dim() != 3 or 0 in x.shape[1:]:
            raise ValueError(
                f"attention: {name} must be [{rows}, H, W] with at least one head and column, got {list(x.shape)}"
            )
        if x.dtype != query.dtype:
            raise ValueError(f"attention: {name} must be of query's type {query.dtype}, got {x.dtype}")
    if query.shape[1:] != key.shape[1:]:
        heads = list(query.shape[1:])
        raise ValueError(f"attention: key must have query's heads and width {heads}, got {list(key.shape[1:])}")
    if value.shape[:2] != key.shape[:2]:
        tokens = list(key.shape[:2])
        raise ValueError(f"attention: value must have key's tokens and heads {tokens}, got {list(value.shape[:2])}")
    for name, offsets in (("query_offsets", query_offsets), ("key_offsets", key_offsets)):
        if offsets.dim() != 1 or offsets.dtype != torch.int32 or len(offsets) == 0:
            got = f"{list(offsets.shape)} {offsets.dtype}"
            raise ValueError(f"attention: {name} must be [B + 1] int32, got {got}")
    if len(key_offsets) != len(query_offsets):
        counts = f"{len(query_offsets)}, got {len(key_offsets)}"
        raise ValueError(f"attention: key_offsets must be as many as query_offsets, {counts}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"attention: scale must be positive and finite, got {scale}")
    if not 0 <= dropout < 1:
        raise ValueError(f"attention: dropout must be in [0, 1), got {dropout}")
    if seed is not None and (seed.dim() != 0 or seed.dtype != torch.int64):
        raise ValueError(f"attention: seed must be [] int64, got {list(seed.shape)} {seed.dtype}")
    if mask is not None:
        _check_mask(mask, len(query_offsets) - 1, query.shape[1], max_query, max_key)


def _check_mask(mask: Tensor, images: int, heads: int, max_query: int, max_key: int) -> None:
    fits = mask.dim() == 4 and mask.shape[0] in (1, images) and mask.shape[1] in (1, heads)
    if not fits or mask.shape[2] != max_query or mask.shape[3] != max_key:
        expected = f"[{images} or 1, {heads} or 1, {max_query}, {max_key}]"
        raise ValueError(f"attention: mask must be {expected}, got {list(mask.shape)}")
    if max_query * max_key >= 2**31:
        raise ValueError(f"attention: mask must have fewer than 2^31 elements an image, got {max_query} x {max_key}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attention: mask must be bool or floating point, got {mask.dtype}")
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("attention: mask must not require a gradient, got requires_grad=True")


_ARGUMENTS = (
    "Tensor query_offsets, Tensor key_offsets, SymInt max_query, SymInt max_key, float scale, float dropout, "
    "Tensor? seed, Tensor? mask"
)
torch.library.define(
    "detr_fast::attention",
    f"(Tensor query, Tensor key, Tensor value, {_ARGUMENTS}) -> (Tensor output, Tensor log_sum_exp)",
)
torch.library.define(
    "detr_fast::attention_backward",
    "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor output, Tensor log_sum_exp, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_WIDTH = 128  # of a head, in the Triton kernels


def _by_segment(query: Tensor, value: Tensor) -> bool:
    return query.dtype == torch.float64 or max(query.shape[2], value.shape[2]) > _MOST_WIDTH


@torch.library.impl("detr_fast::attention", "cuda")
def _forward_on_cuda(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if _by_segment(query, value):
        return attention_by_segment.forward(query, key, value, *rest)
    from detr_fast.ops.triton import attention as kernels  # not needed, and often not installed, on a CPU

    with torch.cuda.device(query.device):  # Triton launches on the current one
        return kernels.forward(query, key, value, *rest)


@torch.library.impl("detr_fast::attention_backward", "cuda")
def _backward_on_cuda(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if _by_segment(query, value):
        return attention_by_segment.backward(gradient, query, key, value, *rest)
    from detr_fast.ops.triton import attention as kernels

    with torch.cuda.device(query.device):
        return kernels.backward(gradient, query, key, value, *rest)


torch.library.impl("detr_fast::attention", "cpu", partial(attention_by_segment.forward, fused=True))
torch.library.impl("detr_fast::attention_backward", "cpu", partial(attention_by_segment.backward, fused=True))


@torch.library.register_fake("detr_fast::attention")
def _fake(query: Tensor, key: Tensor, value: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    output = value.new_empty((*query.shape[:2], value.shape[2]))
    return output, query.new_empty((query.shape[1], query.shape[0]), dtype=type_of_sums(query.dtype))


@torch.library.register_fake("detr_fast::attention_backward")
def _fake_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *arguments: object
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, query_offsets, key_offsets, *numbers, seed, mask = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, query_offsets, key_offsets, seed, mask)
    ctx.numbers = numbers  # type: ignore[attr-defined]


def _derive(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed, mask = ctx.saved_tensors  # type: ignore[attr-defined]
    gradients = torch.ops.detr_fast.attention_backward(gradient, *tensors, *ctx.numbers, seed, mask)  # type: ignore[attr-defined]
    return (*gradients, *[None] * 8)


def _refuse(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> None:
    raise RuntimeError("attention: has first derivatives only")


torch.library.register_autograd("detr_fast::attention", _derive, setup_context=_setup_context)
torch.library.register_autograd("detr_fast::attention_backward", _refuse)
