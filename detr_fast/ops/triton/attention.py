"""Attention between ragged segments on a CUDA device: launches of the Triton kernels and the choice of their tiles.

Registered by `detr_fast.ops.attention`, which holds the contract and the definition. Reads query, key and value where
they are, whatever their strides. Nothing is read back: the tiles are found on the device from the offsets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from detr_fast.ops.dropout import dropout_limit
from detr_fast.ops.triton import attention_backward, attention_forward, tiles
from detr_fast.ops.triton.choice import ShapeClass, Tiles, candidates, choose

_WORDS = 4  # the words of the keys begin at a multiple of so many, so that their alignment never changes
_MOST_SPLITS = 16


@dataclass(frozen=True)
class Problem:
    """The inputs that both directions share, as the kernels take them."""

    query: Tensor  # [N, H, key width]
    key: Tensor  # [M, H, key width]
    value: Tensor  # [M, H, value width]
    query_offsets: Tensor  # [B + 1]
    key_offsets: Tensor  # [B + 1]
    max_query: int
    max_key: int
    scale: float
    dropout: float
    seed: Tensor | None
    mask: Tensor | None  # [B, H, longest queries, longest keys]

    @classmethod
    def of(cls, *inputs: Any) -> Problem:
        """From the arguments of ``torch.ops.detr_fast.attention``, in memory that the kernels can read."""
        given = cls(*inputs)
        mask = given.mask
        if mask is not None:
            mask = mask.float() if mask.dtype == torch.float64 else mask
            mask = _rows(mask.view(torch.uint8) if mask.dtype == torch.bool else mask)
            mask = mask.expand(given.images, given.query.shape[1], -1, -1)
        return replace(
            given,
            query=_rows(given.query),
            key=_rows(given.key),
            value=_rows(given.value),
            query_offsets=given.query_offsets.contiguous(),
            key_offsets=given.key_offsets.contiguous(),
            mask=mask,
        )

    @property
    def images(self) -> int:
        return len(self.query_offsets) - 1

    def words(self) -> tuple[Tensor, Tensor]:
        """Of each query and head ``[N, H]`` and of each key ``[M]``; without dropout something that is never read."""
        if self.seed is None:
            return self.query_offsets, self.key_offsets
        pairs = triton.cdiv(self.query.shape[0] * self.query.shape[1], _WORDS) * _WORDS
        words = torch.empty(pairs + len(self.key), dtype=torch.int32, device=self.query.device)
        tiles.dropout_words[(triton.cdiv(len(words), 1024),)](self.seed, words, pairs, len(words), BLOCK=1024)
        return words[:pairs], words[pairs:]

    def arguments(self) -> dict[str, Any]:
        """Of all kernels alike."""
        mask = self.query if self.mask is None else self.mask
        kind = "none" if self.mask is None else "boolean" if self.mask.dtype == torch.uint8 else "additive"
        strides = (0, 0, 0) if self.mask is None else self.mask.stride()[:3]
        key_width, value_width = self.key.shape[2], self.value.shape[2]
        names = ("image", "head", "query")
        return {
            "query_offsets": self.query_offsets,
            "key_offsets": self.key_offsets,
            "mask": mask,
            **{f"mask_{name}_stride": stride for name, stride in zip(names, strides, strict=True)},
            **_strides(query=self.query, key=self.key, value=self.value),
            "images": self.images,
            "queries": len(self.query),
            "keys": len(self.key),
            "max_query": self.max_query,
            "max_key": self.max_key,
            "scale": self.scale,
            "limit": dropout_limit(self.dropout),
            "kept": 1 - self.dropout,
            "HEADS": self.query.shape[1],
            "KEY_WIDTH": key_width,
            "KEY_PADDED": max(16, triton.next_power_of_2(key_width)),
            "VALUE_WIDTH": value_width,
            "VALUE_PADDED": max(16, triton.next_power_of_2(value_width)),
            "IMAGES": max(16, triton.next_power_of_2(self.images + 1)),
            "MASK": kind,
            "DROPOUT": self.seed is not None,
            "PRECISION": "tf32" if self.query.dtype == torch.float32 and _allows_tf32() else "ieee",
        }

    def chosen(self, kernel: str, arguments: dict[str, Any], run: Callable[[Tiles], object]) -> Tiles:
        products = "half" if self.mask is None else "masked"
        if self.query.dtype == torch.float32:  # tiles for full precision are small enough for a mask too
            products = arguments["PRECISION"] if self.mask is None else "ieee"
        shape = ShapeClass(
            kernel,
            str(self.query.dtype).removeprefix("torch."),
            arguments["KEY_WIDTH"],
            arguments["VALUE_WIDTH"],
            arguments["HEADS"],
            arguments["MASK"],
            arguments["DROPOUT"],
            products,
            triton.next_power_of_2(self.images),
            triton.next_power_of_2(self.max_query),
            triton.next_power_of_2(self.max_key),
        )
        options = candidates(kernel, products, max(shape.key_width, shape.value_width))
        return choose(shape, options, run, self.query.device)

    def splits(self, cut: Tiles) -> int:
        """Parts of the keys, more than one where blocks of queries fill less than half of the multiprocessors."""
        blocks = self.images * triton.cdiv(self.max_query, cut.queries) * self.query.shape[1]
        wanted = _multiprocessors(self.query.device) // max(blocks, 1)
        return max(1, min(wanted, self.max_key // (2 * cut.keys), _MOST_SPLITS))


def forward(*inputs: Any, cut: Tiles | None = None, splits: int | None = None) -> tuple[Tensor, Tensor]:
    """Output ``[N, H, value width]`` and log-sum-exp ``[H, N]``. Arguments as of ``torch.ops.detr_fast.attention``.

    `cut` and `splits` are chosen unless they are given.
    """
    problem = Problem.of(*inputs)
    (count, heads, _), width = problem.query.shape, problem.value.shape[2]
    output = problem.value.new_empty((count, heads, width))
    log_sum_exp = problem.query.new_empty((heads, count), dtype=torch.float32)
    if output.numel() == 0:
        return output, log_sum_exp.fill_(-torch.inf)
    arguments = problem.arguments()
    query_words, key_words = problem.words()

    def run(cut: Tiles) -> None:
        parts = splits or problem.splits(cut)
        partial = (output, log_sum_exp)
        if parts > 1:
            partial = (
                output.new_empty((parts, *output.shape), dtype=torch.float32),
                log_sum_exp.new_empty(parts, heads, count),
            )
        _launch(
            attention_forward.forward, cut, count, cut.queries, problem, parts,
            query=problem.query, key=problem.key, value=problem.value, output=partial[0], log_sum_exp=partial[1],
            query_words=query_words, key_words=key_words, **arguments,
        )  # fmt: skip
        if parts > 1:
            _add(*partial, output, log_sum_exp, weighted=True)

    run(cut or problem.chosen("forward", arguments, run))
    return output, log_sum_exp


def backward(
    gradient: Tensor,  # [N, H, value width]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    *rest: Any,
    cuts: tuple[Tiles | None, Tiles | None] = (None, None),
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. Arguments as of ``torch.ops.detr_fast.attention_backward``."""
    problem = Problem.of(query, key, value, *rest)
    gradients = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    if query.numel() == 0 or key.numel() == 0:
        for x in gradients:
            x.zero_()
        return gradients
    gradient = _rows(gradient)
    count = len(query)
    means = torch.empty_like(log_sum_exp)
    query_words, key_words = problem.words()
    arguments = {
        **problem.arguments(),
        **_strides(gradient=gradient),
        "gradient": gradient,
        "query": problem.query,
        "key": problem.key,
        "value": problem.value,
        "log_sum_exp": log_sum_exp,
        "means": means,
        "query_words": query_words,
        "key_words": key_words,
    }

    def of_queries(cut: Tiles) -> None:
        parts = splits or problem.splits(cut)
        partial = gradients[0]
        if parts > 1:
            partial = partial.new_empty((parts, *partial.shape), dtype=torch.float32)
        _launch(
            attention_backward.backward_of_queries, cut, count, cut.queries, problem, parts,
            output=output, query_gradient=partial, **arguments,
        )  # fmt: skip
        if parts > 1:
            _add(partial, means, gradients[0], means, weighted=False)

    def of_keys(cut: Tiles) -> None:
        _launch(
            attention_backward.backward_of_keys, cut, len(key), cut.keys, problem, None,
            key_gradient=gradients[1], value_gradient=gradients[2], **arguments,
        )  # fmt: skip

    of_queries(cuts[0] or problem.chosen("backward_of_queries", arguments, of_queries))
    of_keys(cuts[1] or problem.chosen("backward_of_keys", arguments, of_keys))
    return gradients


def _launch(
    kernel: Any, cut: Tiles, rows: int, block: int, problem: Problem, splits: int | None, **arguments: Any
) -> None:
    tiles = rows // block + problem.images + 1  # at least as many as there are
    programs = tiles * problem.query.shape[1] * (splits or 1)
    if splits is not None:
        arguments["splits"] = splits
    kernel[(programs,)](
        QUERIES=cut.queries, KEYS=cut.keys, CHUNK=cut.chunk, STAGES=cut.stages, num_warps=cut.warps,
        num_stages=cut.stages, enable_fp_fusion=True, **arguments,
    )  # fmt: skip


def _add(partial: Tensor, partial_sums: Tensor, output: Tensor, log_sum_exp: Tensor, weighted: bool) -> None:
    splits, count, heads, width = partial.shape
    block = 32
    attention_forward.add_splits[(triton.cdiv(count, block), heads)](
        partial, partial_sums, output, log_sum_exp, count, splits, HEADS=heads, BLOCK=block, WIDTH=width,
        PADDED=triton.next_power_of_2(width), WEIGHTED=weighted,
    )  # fmt: skip


def _allows_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _rows(x: Tensor) -> Tensor:
    """With a contiguous last dimension, as the kernels read it; almost always x itself."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(**tensors: Tensor) -> dict[str, int]:
    found = {}
    for name, x in tensors.items():
        found[f"{name}_stride"], found[f"{name}_head_stride"] = x.stride(0), x.stride(1)
    return found


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    # Tensors of the CPU are computed by the interpreter, one program after the other.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
