"""Forward kernel of attention between ragged segments, and the sum over its splits.

A program owns a block of queries of one image and one head and works through that image's keys: running maximum and
sum, exponentials in base 2 with the scale folded in. No mask in the main loop; the last, partial block is peeled.
Source: Dao, "FlashAttention-2", 2023, algorithm 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from detr_fast.ops.triton.tiles import (
    LN_2,
    LOG2_E,
    drop,
    first_tiles,
    load_numbers,
    load_rows,
    masked,
    part_of,
    place_of,
    product,
    segment_of,
    store_rows,
)

# Numbers that change from batch to batch: a kernel is not compiled anew for them.
COUNTS = [
    "images",
    "queries",
    "keys",
    "max_query",
    "max_key",
    "splits",
    "limit",
    "mask_image_stride",
    "mask_head_stride",
    "mask_query_stride",
]


@triton.jit
def _attend(
    q,  # [QUERIES, KEY_PADDED]
    query,
    key,
    value,
    words,
    mask,
    query_stride,
    key_stride,
    value_stride,
    mask_query_stride,
    start,
    end,
    query_number,  # [QUERIES] in the image
    query_end,
    query_word,  # [QUERIES]
    limit,
    scale,  # of powers of two
    top,
    total,
    output,
    KEYS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    KEY_PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
):
    """Running maximum, sum of weights and unnormalised output after one more block of keys."""
    number = start + tl.arange(0, KEYS)
    score = product(
        q, query, query_number, query_end, query_stride, key, number, end, key_stride, KEY_WIDTH, KEY_PADDED, CHUNK,
        PRECISION, True, PART,
    )  # fmt: skip
    if MASK != "none":
        score = masked(
            score * scale, mask, query_number[:, None], query_end, mask_query_stride, number[None, :], end, MASK
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(score, 1))
        # A row without any key so far: its weights are 0, not NaN.
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = tl.exp2(score - shift[:, None])
        rescale = tl.exp2(top - shift)
    else:
        if PART:
            score = tl.where((number < end)[None, :], score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 1) * scale)
        weight = tl.exp2(tl.fma(score, scale, -new_top[:, None]))
        rescale = tl.exp2(top - new_top)
    total = total * rescale + tl.sum(weight, 1)
    output = output * rescale[:, None]
    if DROPOUT:
        key_word = load_numbers(words, number, end, 0, PART)
        weight = drop(weight, query_word[:, None], key_word[None, :], limit)
    v = load_rows(value, number, end, value_stride, VALUE_WIDTH, VALUE_PADDED, PART)
    output = tl.dot(weight.to(v.dtype), v, output, input_precision=PRECISION)
    return new_top, total, output


@triton.jit(do_not_specialize=COUNTS)
def forward(
    query,  # [N, H, KEY_WIDTH]
    key,  # [M, H, KEY_WIDTH]
    value,  # [M, H, VALUE_WIDTH]
    output,  # [splits, N, H, VALUE_WIDTH]
    log_sum_exp,  # [splits, H, N]
    query_offsets,  # [B + 1]
    key_offsets,  # [B + 1]
    query_words,  # [N, H]
    key_words,  # [M]
    mask,  # [B, H, longest queries, longest keys]
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    mask_image_stride,
    mask_head_stride,
    mask_query_stride,
    images,
    queries,  # N
    keys,  # M
    max_query,  # of one image: what the mask has room for
    max_key,
    splits,
    scale,
    limit,
    kept,  # share of weights that dropout keeps
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    KEY_PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    IMAGES: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    power = scale * LOG2_E
    before, blocks = first_tiles(query_offsets, key_offsets, images, queries, QUERIES, IMAGES)
    work = tl.program_id(0)
    split, head = work % splits, work // splits % HEADS
    image, block = place_of(work // splits // HEADS, before, blocks, IMAGES)
    if image >= 0:
        start, end = segment_of(image, query_offsets, images, queries)
        if MASK != "none":
            end = tl.where(image < images, tl.minimum(end, start + max_query), end)
        number = block * QUERIES + tl.arange(0, QUERIES)
        key_start, first_key, last_key = part_of(image, key_offsets, images, keys, max_key, split, splits, KEYS)
        q_at = query + start.to(tl.int64) * query_stride + head * query_head_stride
        q = load_rows(q_at, number, end - start, query_stride, KEY_WIDTH, KEY_PADDED, True)
        k_at = key + key_start.to(tl.int64) * key_stride + head * key_head_stride
        v_at = value + key_start.to(tl.int64) * value_stride + head * value_head_stride
        mask_at = mask + image.to(tl.int64) * mask_image_stride + head.to(tl.int64) * mask_head_stride
        query_word = number
        if DROPOUT:
            query_word = tl.load(query_words + (start + number) * HEADS + head, mask=number < end - start, other=0)
        top = tl.full([QUERIES], -float("inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        sums = tl.zeros([QUERIES, VALUE_PADDED], tl.float32)
        peeled = first_key + (last_key - first_key) // KEYS * KEYS
        for at in tl.range(first_key, peeled, KEYS, num_stages=STAGES):
            top, total, sums = _attend(
                q, q_at, k_at, v_at, key_words + key_start, mask_at, query_stride, key_stride, value_stride,
                mask_query_stride, at, last_key, number, end - start, query_word, limit, power, top, total, sums,
                KEYS, KEY_WIDTH, KEY_PADDED, VALUE_WIDTH, VALUE_PADDED, MASK, DROPOUT, PRECISION, CHUNK, False,
            )  # fmt: skip
        if peeled < last_key:
            top, total, sums = _attend(
                q, q_at, k_at, v_at, key_words + key_start, mask_at, query_stride, key_stride, value_stride,
                mask_query_stride, peeled, last_key, number, end - start, query_word, limit, power, top, total, sums,
                KEYS, KEY_WIDTH, KEY_PADDED, VALUE_WIDTH, VALUE_PADDED, MASK, DROPOUT, PRECISION, CHUNK, True,
            )  # fmt: skip
        sums = tl.where(total[:, None] == 0, 0.0, sums / (total * kept)[:, None])
        row = split * queries + start
        store_rows(
            output + (row.to(tl.int64) * HEADS + head) * VALUE_WIDTH, number, end - start, HEADS * VALUE_WIDTH,
            sums, VALUE_WIDTH, VALUE_PADDED,
        )  # fmt: skip
        row = (split * HEADS + head).to(tl.int64) * queries + start
        tl.store(log_sum_exp + row + number, (top + tl.log2(total)) * LN_2, mask=number < end - start)


@triton.jit(do_not_specialize=["queries", "splits"])
def add_splits(
    partial,  # [splits, N, H, WIDTH] float32
    partial_sums,  # [splits, H, N] log-sum-exp of each; unused unless WEIGHTED
    output,  # [N, H, WIDTH]
    log_sum_exp,  # [H, N]
    queries,
    splits,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Sum over the splits; WEIGHTED by each split's share of the softmax."""
    head = tl.program_id(1)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < queries
    row = head.to(tl.int64) * queries + number
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    if WEIGHTED:
        sums_at = partial_sums + row
        for _ in range(splits):
            top = tl.maximum(top, tl.load(sums_at, mask=inside, other=-float("inf")))
            sums_at += queries * HEADS
        top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, PADDED], tl.float32)
    at = partial + head * WIDTH
    sums_at = partial_sums + row
    for _ in range(splits):
        x = load_rows(at, number, queries, HEADS * WIDTH, WIDTH, PADDED, True)
        if WEIGHTED:
            share = tl.exp2((tl.load(sums_at, mask=inside, other=-float("inf")) - top) * LOG2_E)
            total += share
            x = x * share[:, None]
        sums += x
        at += queries * HEADS * WIDTH
        sums_at += queries * HEADS
    if WEIGHTED:
        sums = tl.where(total[:, None] == 0, 0.0, sums / total[:, None])
        tl.store(log_sum_exp + row, top + tl.log2(total) * LN_2, mask=inside)
    store_rows(output + head * WIDTH, number, queries, HEADS * WIDTH, sums, WIDTH, PADDED)
