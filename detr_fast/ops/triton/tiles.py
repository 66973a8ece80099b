"""What the attention kernels share: where a tile lies, how its rows are read, and which weights dropout keeps.

A program computes one tile: a block of one image's rows for one head. Tiles are listed longest work first; the list is
never stored, each program finds its own from the offsets, which stay on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from detr_fast.ops.attention_by_segment import MASK_FORBIDS

# The interpreter knows no assembly; `drop` says what it means.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FORBIDDEN = tl.constexpr(MASK_FORBIDS)

# Ordering compares every image with every other, which for 64 of them costs a quarter of a typical program. From there
# on tiles come in the order of the images.
MOST_ORDERED = tl.constexpr(32)


@triton.jit
def first_tiles(
    offsets,  # [B + 1] of the rows that are cut into blocks
    other_offsets,  # [B + 1] of the rows that each block works through
    images,  # B
    rows,  # all rows; those past the last offset are image B, which has no others
    BLOCK: tl.constexpr,
    IMAGES: tl.constexpr,  # power of two above B
):
    """Of each image its first tile and its number of tiles, both ``[IMAGES]``."""
    image = tl.arange(0, IMAGES)
    inside = image < images
    start = tl.load(offsets + image, mask=image <= images, other=0)
    end = tl.load(offsets + image + 1, mask=inside, other=0)
    end = tl.where(image == images, rows, end)
    blocks = tl.cdiv(tl.maximum(tl.minimum(end, rows) - tl.maximum(start, 0), 0), BLOCK)
    if IMAGES <= MOST_ORDERED:
        other_end = tl.load(other_offsets + image + 1, mask=inside, other=0)
        work = tl.where(inside, other_end - tl.load(other_offsets + image, mask=inside, other=0), 0)
        longer = work[:, None] > work[None, :]
        tie = (work[:, None] == work[None, :]) & (image[:, None] < image[None, :])
        before = tl.sum(tl.where(longer | tie, blocks[:, None], 0), 0)
    else:
        before = tl.cumsum(blocks, 0) - blocks
    return before, blocks


@triton.jit
def place_of(tile, before, blocks, IMAGES: tl.constexpr):
    """Image of a tile and its block there; -1 for a tile past the last one."""
    own = (before <= tile) & (tile < before + blocks)
    image = tl.sum(tl.where(own, tl.arange(0, IMAGES) + 1, 0), 0) - 1
    return image, tile - tl.sum(tl.where(own, before, 0), 0)


@triton.jit
def segment_of(image, offsets, images, rows):
    """First row of an image and the one past its last; wild offsets do not lead out of the rows."""
    start = tl.maximum(tl.load(offsets + image), 0)
    end = tl.load(offsets + image + 1, mask=image < images, other=rows)
    return start, tl.maximum(tl.minimum(end, rows), start)


@triton.jit
def part_of(image, offsets, images, rows, most, split, splits, BLOCK: tl.constexpr):
    """First row of an image, and counted from it where a split begins and ends: whole blocks, as even as can be.

    Image `images`, which holds what lies past the last offset, has none.
    """
    start, end = segment_of(image, offsets, images, rows)
    count = tl.where(image < images, tl.minimum(end - start, most), 0)
    share = tl.cdiv(tl.cdiv(count, BLOCK), splits) * BLOCK
    first = tl.minimum(split * share, count)
    return start, first, tl.minimum(first + share, count)


@triton.jit
def load_rows(at, row, end, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr):
    """``[row, PADDED]``, zero past WIDTH and, if only PART of the rows exists, from `end` on."""
    column = tl.arange(0, PADDED)
    pointer = at + row[:, None] * stride + column[None, :]
    if PART and WIDTH < PADDED:
        return tl.load(pointer, mask=(row[:, None] < end) & (column[None, :] < WIDTH), other=0.0)
    if PART:
        return tl.load(pointer, mask=row[:, None] < end, other=0.0)
    if WIDTH < PADDED:
        return tl.load(pointer, mask=column[None, :] < WIDTH, other=0.0)
    return tl.load(pointer)


@triton.jit
def product(
    a,  # [rows, PADDED]
    a_at,
    a_row,  # [rows] of a in memory
    a_end,
    a_stride,
    b_at,
    b_row,  # [columns] of b in memory
    b_end,
    b_stride,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    A_PART: tl.constexpr,
    B_PART: tl.constexpr,
):
    """``a b^T``. With CHUNK below PADDED, a few columns at a time of both, read where they are needed.

    That is for float32 in full precision, where a thread holds whole rows of both operands and wide ones do not fit.
    """
    if CHUNK >= PADDED:
        b = load_rows(b_at, b_row, b_end, b_stride, WIDTH, PADDED, B_PART)
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)
    sums = tl.zeros([a_row.shape[0], b_row.shape[0]], tl.float32)
    for start in tl.range(0, PADDED, CHUNK, num_stages=1, loop_unroll_factor=1):
        left = load_columns(a_at, a_row, a_end, a_stride, start, WIDTH, CHUNK, A_PART)
        right = load_columns(b_at, b_row, b_end, b_stride, start, WIDTH, CHUNK, B_PART)
        sums = tl.dot(left, tl.trans(right), sums, input_precision=PRECISION)
    return sums


@triton.jit
def load_columns(at, row, end, stride, start, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr):
    """``[row, CHUNK]`` from column `start` on; zero as in `load_rows`."""
    column = start + tl.arange(0, CHUNK)
    pointer = at + row[:, None] * stride + column[None, :]
    if PART:
        return tl.load(pointer, mask=(row[:, None] < end) & (column[None, :] < WIDTH), other=0.0)
    return tl.load(pointer, mask=column[None, :] < WIDTH, other=0.0)


@triton.jit
def store_rows(at, row, end, stride, x, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)
    inside = (row[:, None] < end) & (column[None, :] < WIDTH)
    tl.store(at + row[:, None] * stride + column[None, :], x.to(at.dtype.element_ty), mask=inside)


@triton.jit
def load_numbers(at, row, end, other, PART: tl.constexpr):
    if PART:
        return tl.load(at + row, mask=row < end, other=other)
    return tl.load(at + row)


@triton.jit
def masked(score, mask, row, row_end, row_stride, column, column_end, KIND: tl.constexpr):
    """Scores (in powers of two) of pairs that may attend, minus infinity for the others."""
    inside = (row < row_end) & (column < column_end)
    pointer = mask + row * row_stride + column
    if KIND == "boolean":
        return tl.where(tl.load(pointer, mask=inside, other=0) != 0, score, -float("inf"))
    added = tl.load(pointer, mask=inside, other=-float("inf")).to(tl.float32)
    return tl.where(added <= FORBIDDEN, -float("inf"), score + added * LOG2_E)


@triton.jit
def drop(x, query_word, key_word, limit):
    """x where the product of the two words, a signed 32 bit number, is at least `limit`, elsewhere zero.

    In assembly, because LLVM packs the 64 comparisons of a thread into bit fields and unpacks them again: about 14
    instead of 10.5 instructions a score in the forward kernel.
    """
    if INTERPRETED:
        return tl.where(query_word * key_word >= limit, x, 0.0)
    return tl.inline_asm_elementwise(
        "{ .reg .s32 draw; .reg .pred kept; mul.lo.s32 draw, $2, $3; setp.ge.s32 kept, draw, $4;"
        " selp.f32 $0, $1, 0f00000000, kept; }",
        "=r,r,r,r,r",
        [x, query_word, key_word, limit],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def mixed(x):
    """A bijection of 32 bit numbers in which every bit of the result depends on every bit of x."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["query_count", "count"])
def dropout_words(
    seed,  # [] int64
    words,  # [count] int32: of `query_count` pairs of a query and a head, then of keys
    query_count,
    count,
    BLOCK: tl.constexpr,
):
    """`detr_fast.ops.dropout.dropout_words`, for all at once."""
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_key = number >= query_count
    whole = tl.load(seed)
    low, high = whole.to(tl.uint32), (whole >> 32).to(tl.uint32)
    index = tl.where(is_key, 2 * (number - query_count) + 1, 2 * number).to(tl.uint32)
    word = mixed(mixed(index + mixed(low)) ^ high) | 1
    tl.store(words + number, word.to(tl.int32, bitcast=True), mask=number < count)
