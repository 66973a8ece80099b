"""Which attention weights dropout keeps: a function of a seed and of places alone, the same on every device.

Each query of each head and each key has a pseudo-random odd word of 32 bits. A weight is kept if the product of its two
words, modulo 2^32 and read as signed, is at least a limit. With independent words such products are uniform, and those
of any three weights independent. Three corners of a rectangle of queries and keys decide the product of the fourth, but
comparing products with a limit does not show it (tested). The price is a multiplication, a comparison and a selection
for each weight, a sixteenth of a generator of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF  # the low 32 bits; products of int64 wrap, which leaves those right


def dropout_keeps(
    seed: Tensor,  # [] int64
    dropout: float,
    queries: int,
    heads: int,
    keys: int,
) -> Tensor:  # [H, N, M] bool
    """Which weights are kept, from their words: what the kernels compute where they meet a weight."""
    query_words, key_words = dropout_words(seed, queries, heads, keys)
    return query_words.mT[:, :, None] * key_words >= dropout_limit(dropout)


def dropout_limit(dropout: float) -> int:
    """The signed 32 bit number below which the share `dropout` of all numbers lies."""
    return min(round(dropout * 2**32), 2**32 - 1) - 2**31


def dropout_words(
    seed: Tensor,  # [] int64
    queries: int,
    heads: int,
    keys: int,
) -> tuple[Tensor, Tensor]:  # [N, H] and [M] int32, odd
    """The words of queries and heads, and of keys, which seed and place determine."""
    low, high = seed & _LOW, seed >> 32 & _LOW
    found = []
    for count, parity in ((queries * heads, 0), (keys, 1)):  # so that queries and keys never share a word
        index = 2 * torch.arange(count, device=seed.device) + parity
        word = _mixed(_mixed((index + _mixed(low)) & _LOW) ^ high) | 1
        found.append(torch.where(word >= 2**31, word - 2**32, word).int())
    return found[0].view(queries, heads), found[1]


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32 bit numbers in which every bit of the result depends on every bit of x (lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _LOW
    x = (x ^ (x >> 15)) * 0x846CA68B & _LOW
    return x ^ (x >> 16)
