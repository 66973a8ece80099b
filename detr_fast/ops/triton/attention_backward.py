"""Backward kernels of attention between ragged segments: of the queries, then of keys and values.

Two kernels instead of one, so that every sum has one owner and a fixed order: no atomics, the same bits every time.
Weights are computed anew from the saved log-sum-exp. Source: Dao, "FlashAttention-2", 2023, algorithm 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from detr_fast.ops.triton.attention_forward import COUNTS
from detr_fast.ops.triton.tiles import (
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


@triton.jit
def _add_query_gradient(
    q,  # [QUERIES, KEY_PADDED]
    of_output,  # [QUERIES, VALUE_PADDED]
    query,
    gradient,
    key,
    value,
    words,
    mask,
    query_stride,
    gradient_stride,
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
    kept,
    log_sum,  # [QUERIES] in powers of two
    mean,  # [QUERIES] of the gradient of the weights
    sums,  # [QUERIES, KEY_PADDED]
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
    number = start + tl.arange(0, KEYS)
    score = product(
        q, query, query_number, query_end, query_stride, key, number, end, key_stride, KEY_WIDTH, KEY_PADDED, CHUNK,
        PRECISION, True, PART,
    )  # fmt: skip
    if MASK != "none":
        score = masked(
            score * scale, mask, query_number[:, None], query_end, mask_query_stride, number[None, :], end, MASK
        )  # fmt: skip
        weight = tl.exp2(score - log_sum[:, None])
    else:
        if PART:
            score = tl.where((number < end)[None, :], score, -float("inf"))
        weight = tl.exp2(tl.fma(score, scale, -log_sum[:, None]))
    of_weight = product(
        of_output, gradient, query_number, query_end, gradient_stride, value, number, end, value_stride, VALUE_WIDTH,
        VALUE_PADDED, CHUNK, PRECISION, True, PART,
    )  # fmt: skip
    if DROPOUT:
        key_word = load_numbers(words, number, end, 0, PART)
        of_weight = drop(of_weight, query_word[:, None], key_word[None, :], limit)
        of_score = weight * tl.fma(of_weight, 1 / kept, -mean[:, None])
    else:
        of_score = weight * (of_weight - mean[:, None])
    k = load_rows(key, number, end, key_stride, KEY_WIDTH, KEY_PADDED, PART)
    return tl.dot(of_score.to(k.dtype), k, sums, input_precision=PRECISION)


@triton.jit(do_not_specialize=COUNTS)
def backward_of_queries(
    gradient,  # [N, H, VALUE_WIDTH] of the output
    query,  # [N, H, KEY_WIDTH]
    key,  # [M, H, KEY_WIDTH]
    value,  # [M, H, VALUE_WIDTH]
    output,  # [N, H, VALUE_WIDTH]
    log_sum_exp,  # [H, N]
    means,  # [H, N] float32, written here for the other kernel
    query_gradient,  # [splits, N, H, KEY_WIDTH]
    query_offsets,  # [B + 1]
    key_offsets,  # [B + 1]
    query_words,  # [N, H]
    key_words,  # [M]
    mask,  # [B, H, longest queries, longest keys]
    gradient_stride,
    gradient_head_stride,
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
    """A program owns a block of queries and works through the image's keys, as in the forward kernel."""
    before, blocks = first_tiles(query_offsets, key_offsets, images, queries, QUERIES, IMAGES)
    work = tl.program_id(0)
    split, head = work % splits, work // splits % HEADS
    image, block = place_of(work // splits // HEADS, before, blocks, IMAGES)
    if image >= 0:
        start, end = segment_of(image, query_offsets, images, queries)
        if MASK != "none":
            end = tl.where(image < images, tl.minimum(end, start + max_query), end)
        number = block * QUERIES + tl.arange(0, QUERIES)
        inside = number < end - start
        key_start, first_key, last_key = part_of(image, key_offsets, images, keys, max_key, split, splits, KEYS)
        first = start.to(tl.int64)
        q_at = query + first * query_stride + head * query_head_stride
        q = load_rows(q_at, number, end - start, query_stride, KEY_WIDTH, KEY_PADDED, True)
        gradient_at = gradient + first * gradient_stride + head * gradient_head_stride
        of_output = load_rows(gradient_at, number, end - start, gradient_stride, VALUE_WIDTH, VALUE_PADDED, True)
        out = load_rows(
            output + (first * HEADS + head) * VALUE_WIDTH, number, end - start, HEADS * VALUE_WIDTH,
            VALUE_WIDTH, VALUE_PADDED, True,
        )  # fmt: skip
        mean = tl.sum(of_output.to(tl.float32) * out.to(tl.float32), 1)
        row = head.to(tl.int64) * queries + start + number
        tl.store(means + row, mean, mask=inside & (split == 0))
        log_sum = tl.load(log_sum_exp + row, mask=inside, other=-float("inf")) * LOG2_E
        # Rows without keys weigh nothing: neither infinity nor NaN.
        log_sum = tl.where(log_sum == -float("inf"), float("inf"), log_sum)
        k_at = key + key_start.to(tl.int64) * key_stride + head * key_head_stride
        v_at = value + key_start.to(tl.int64) * value_stride + head * value_head_stride
        mask_at = mask + image.to(tl.int64) * mask_image_stride + head.to(tl.int64) * mask_head_stride
        query_word = number
        if DROPOUT:
            query_word = tl.load(query_words + (start + number) * HEADS + head, mask=inside, other=0)
        sums = tl.zeros([QUERIES, KEY_PADDED], tl.float32)
        peeled = first_key + (last_key - first_key) // KEYS * KEYS
        for at in tl.range(first_key, peeled, KEYS, num_stages=STAGES):
            sums = _add_query_gradient(
                q, of_output, q_at, gradient_at, k_at, v_at, key_words + key_start, mask_at, query_stride,
                gradient_stride, key_stride, value_stride, mask_query_stride, at, last_key, number, end - start,
                query_word, limit, scale * LOG2_E, kept, log_sum, mean, sums, KEYS, KEY_WIDTH, KEY_PADDED,
                VALUE_WIDTH, VALUE_PADDED, MASK, DROPOUT, PRECISION, CHUNK, False,
            )  # fmt: skip
        if peeled < last_key:
            sums = _add_query_gradient(
                q, of_output, q_at, gradient_at, k_at, v_at, key_words + key_start, mask_at, query_stride,
                gradient_stride, key_stride, value_stride, mask_query_stride, peeled, last_key, number, end - start,
                query_word, limit, scale * LOG2_E, kept, log_sum, mean, sums, KEYS, KEY_WIDTH, KEY_PADDED,
                VALUE_WIDTH, VALUE_PADDED, MASK, DROPOUT, PRECISION, CHUNK, True,
            )  # fmt: skip
        store_rows(
            query_gradient + ((split * queries + first) * HEADS + head) * KEY_WIDTH, number, end - start,
            HEADS * KEY_WIDTH, sums * scale, KEY_WIDTH, KEY_PADDED,
        )  # fmt: skip


@triton.jit
def _add_key_gradients(
    k,  # [KEYS, KEY_PADDED]
    v,  # [KEYS, VALUE_PADDED]
    key,
    value,
    gradient,
    query,
    log_sum_exp,
    means,
    words,
    mask,
    key_stride,
    value_stride,
    gradient_stride,
    query_stride,
    mask_query_stride,
    start,
    end,
    key_number,  # [KEYS] in the image
    key_end,
    key_word,  # [KEYS]
    limit,
    scale,  # of powers of two
    kept,
    of_key,  # [KEYS, KEY_PADDED]
    of_value,  # [KEYS, VALUE_PADDED]
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
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
    number = start + tl.arange(0, QUERIES)
    # Infinity where there is no query: its weights are 0.
    log_sum = load_numbers(log_sum_exp, number, end, float("inf"), PART) * LOG2_E
    score = product(
        k, key, key_number, key_end, key_stride, query, number, end, query_stride, KEY_WIDTH, KEY_PADDED, CHUNK,
        PRECISION, True, PART,
    )  # fmt: skip
    if MASK != "none":
        score = masked(
            score * scale, mask, number[None, :], end, mask_query_stride, key_number[:, None], key_end, MASK
        )  # fmt: skip
        log_sum = tl.where(log_sum == -float("inf"), float("inf"), log_sum)
        weight = tl.exp2(score - log_sum[None, :])
    else:
        weight = tl.exp2(tl.fma(score, scale, -log_sum[None, :]))
    of_weight = product(
        v, value, key_number, key_end, value_stride, gradient, number, end, gradient_stride, VALUE_WIDTH, VALUE_PADDED,
        CHUNK, PRECISION, True, PART,
    )  # fmt: skip
    mean = load_numbers(means, number, end, 0.0, PART)
    if DROPOUT:
        if PART:
            query_word = tl.load(words + number * HEADS, mask=number < end, other=0)
        else:
            query_word = tl.load(words + number * HEADS)
        dropped = drop(weight, query_word[None, :], key_word[:, None], limit)
        # Times `kept`: kept weights have gradient of_weight / kept - mean, the others -mean.
        of_score = dropped * of_weight - weight * (mean * kept)[None, :]
    else:
        dropped = weight
        of_score = weight * (of_weight - mean[None, :])
    of_output = load_rows(gradient, number, end, gradient_stride, VALUE_WIDTH, VALUE_PADDED, PART)
    of_value = tl.dot(dropped.to(of_output.dtype), of_output, of_value, input_precision=PRECISION)
    q = load_rows(query, number, end, query_stride, KEY_WIDTH, KEY_PADDED, PART)
    of_key = tl.dot(of_score.to(q.dtype), q, of_key, input_precision=PRECISION)
    return of_key, of_value


@triton.jit(do_not_specialize=COUNTS)
def backward_of_keys(
    gradient,  # [N, H, VALUE_WIDTH] of the output
    query,  # [N, H, KEY_WIDTH]
    key,  # [M, H, KEY_WIDTH]
    value,  # [M, H, VALUE_WIDTH]
    log_sum_exp,  # [H, N]
    means,  # [H, N]
    key_gradient,  # [M, H, KEY_WIDTH]
    value_gradient,  # [M, H, VALUE_WIDTH]
    query_offsets,  # [B + 1]
    key_offsets,  # [B + 1]
    query_words,  # [N, H]
    key_words,  # [M]
    mask,  # [B, H, longest queries, longest keys]
    gradient_stride,
    gradient_head_stride,
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
    """A program owns a block of keys and works through the image's queries."""
    before, blocks = first_tiles(key_offsets, query_offsets, images, keys, KEYS, IMAGES)
    work = tl.program_id(0)
    head = work % HEADS
    image, block = place_of(work // HEADS, before, blocks, IMAGES)
    if image >= 0:
        start, end = segment_of(image, key_offsets, images, keys)
        if MASK != "none":
            end = tl.where(image < images, tl.minimum(end, start + max_key), end)
        number = block * KEYS + tl.arange(0, KEYS)
        query_start, _, count = part_of(image, query_offsets, images, queries, max_query, 0, 1, QUERIES)
        first, first_query = start.to(tl.int64), query_start.to(tl.int64)
        k_at = key + first * key_stride + head * key_head_stride
        v_at = value + first * value_stride + head * value_head_stride
        k = load_rows(k_at, number, end - start, key_stride, KEY_WIDTH, KEY_PADDED, True)
        v = load_rows(v_at, number, end - start, value_stride, VALUE_WIDTH, VALUE_PADDED, True)
        q_at = query + first_query * query_stride + head * query_head_stride
        gradient_at = gradient + first_query * gradient_stride + head * gradient_head_stride
        sums_at = log_sum_exp + head.to(tl.int64) * queries + query_start
        means_at = means + head.to(tl.int64) * queries + query_start
        words_at = query_words + first_query * HEADS + head
        mask_at = mask + image.to(tl.int64) * mask_image_stride + head.to(tl.int64) * mask_head_stride
        key_word = number
        if DROPOUT:
            key_word = tl.load(key_words + start + number, mask=number < end - start, other=0)
        of_key = tl.zeros([KEYS, KEY_PADDED], tl.float32)
        of_value = tl.zeros([KEYS, VALUE_PADDED], tl.float32)
        peeled = count // QUERIES * QUERIES
        for at in tl.range(0, peeled, QUERIES, num_stages=STAGES):
            of_key, of_value = _add_key_gradients(
                k, v, k_at, v_at, gradient_at, q_at, sums_at, means_at, words_at, mask_at, key_stride, value_stride,
                gradient_stride, query_stride, mask_query_stride, at, count, number, end - start, key_word, limit,
                scale * LOG2_E, kept, of_key, of_value, HEADS, QUERIES, KEY_WIDTH, KEY_PADDED, VALUE_WIDTH,
                VALUE_PADDED, MASK, DROPOUT, PRECISION, CHUNK, False,
            )  # fmt: skip
        if peeled < count:
            of_key, of_value = _add_key_gradients(
                k, v, k_at, v_at, gradient_at, q_at, sums_at, means_at, words_at, mask_at, key_stride, value_stride,
                gradient_stride, query_stride, mask_query_stride, peeled, count, number, end - start, key_word, limit,
                scale * LOG2_E, kept, of_key, of_value, HEADS, QUERIES, KEY_WIDTH, KEY_PADDED, VALUE_WIDTH,
                VALUE_PADDED, MASK, DROPOUT, PRECISION, CHUNK, True,
            )  # fmt: skip
        store_rows(
            key_gradient + (first * HEADS + head) * KEY_WIDTH, number, end - start, HEADS * KEY_WIDTH,
            of_key * (scale / kept), KEY_WIDTH, KEY_PADDED,
        )  # fmt: skip
        store_rows(
            value_gradient + (first * HEADS + head) * VALUE_WIDTH, number, end - start, HEADS * VALUE_WIDTH,
            of_value / kept, VALUE_WIDTH, VALUE_PADDED,
        )  # fmt: skip
