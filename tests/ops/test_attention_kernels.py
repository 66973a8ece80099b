"""The Triton kernels of attention against the definition: on a GPU where there is one, else in Triton's interpreter.

The interpreter does not support matrices of bfloat16, so that type is for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from accuracy import assert_as_accurate
from torch import Tensor

from detr_fast.layers.transformer import Transformer
from detr_fast.ops.attention import attention, attention_reference
from detr_fast.ops.dropout import dropout_words
from detr_fast.structures import Tokens, offsets_of

pytest.importorskip("triton")

from detr_fast.ops.triton import attention as kernels
from detr_fast.ops.triton.choice import Tiles, candidates

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
SMALL = Tiles(32, 32, 4, 1)  # several blocks of few rows
# (queries, keys) of each image: whole and partial blocks, one row, none.
RAGGED = [(40, 70), (0, 3), (4, 0), (1, 1), (32, 64)]
SPARE = 3  # rows past the last offset
INPUTS = ("query", "key", "value", "gradient")


@pytest.fixture(autouse=True)
def _quiet_interpreter() -> Iterator[None]:
    """Rows without keys divide by zero on purpose; NumPy would say so."""
    with np.errstate(divide="ignore", invalid="ignore"):
        yield


@dataclass
class Problem:
    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor
    offsets: tuple[Tensor, Tensor]
    most: tuple[int, int]
    dropout: float = 0.0
    seed: Tensor | None = None
    mask: Tensor | None = None
    scale: float = 0.3

    @classmethod
    def of(
        cls,
        lengths: list[tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        widths: tuple[int, int] = (32, 32),
        heads: int = 2,
        dropout: float = 0.0,
        mask: str = "none",
        fill: float | None = None,
    ) -> Problem:
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator)
        queries, keys = [q for q, _ in lengths], [k for _, k in lengths]
        most = max(queries), max(keys)
        masks = {
            "none": None,
            "boolean": torch.rand(len(lengths), 1, *most, generator=generator) < 0.7,
            "additive": draw(1, heads, *most),
        }
        masks["boolean"][:, :, :1] = False  # a query that may attend to nothing
        if fill is not None:
            masks["additive"] = masks["additive"].masked_fill(~masks["boolean"], fill)
        made = cls(
            draw(sum(queries) + SPARE, heads, widths[0]).to(DEVICE, dtype),
            draw(sum(keys) + SPARE, heads, widths[0]).to(DEVICE, dtype),
            draw(sum(keys) + SPARE, heads, widths[1]).to(DEVICE, dtype),
            draw(sum(queries) + SPARE, heads, widths[1]).to(DEVICE, dtype),
            (offsets_of(queries, DEVICE), offsets_of(keys, DEVICE)),
            most,
            dropout,
            torch.tensor(2**40 + 5, device=DEVICE) if dropout else None,
            None if masks[mask] is None else masks[mask].to(DEVICE),
        )
        return made

    @property
    def rest(self) -> tuple:
        return *self.offsets, *self.most, self.scale, self.dropout, self.seed, self.mask

    def defined(self, dtype: torch.dtype) -> list[Tensor]:
        """Output, log-sum-exp and the three gradients of the definition, computed in this type."""
        leaves = [x.to(dtype).requires_grad_() for x in (self.query, self.key, self.value)]
        mask = self.mask if self.mask is None or self.mask.dtype == torch.bool else self.mask.to(dtype)
        output, sums = attention_reference(*leaves, *self.offsets, self.scale, self.dropout, self.seed, mask)
        return [output, sums, *torch.autograd.grad(output, leaves, self.gradient.to(dtype))]

    def computed(self, cut: Tiles | None = SMALL, splits: int | None = None) -> list[Tensor]:
        inputs = self.query, self.key, self.value
        output, sums = kernels.forward(*inputs, *self.rest, cut=cut, splits=splits)
        gradients = kernels.backward(self.gradient, *inputs, output, sums, *self.rest, cuts=(cut, cut), splits=splits)
        return [output, sums, *gradients]


def assert_is_the_definition(problem: Problem, computed: list[Tensor]) -> None:
    own, exact = problem.defined(problem.query.dtype), problem.defined(torch.float64)
    own[1] = problem.defined(torch.float32)[1]  # sums are kept in float32
    for found, definition, truth in zip(computed, own, exact, strict=True):
        if truth.numel() > 0 and truth.eq(0).all():  # a single key: terms cancel, what remains is their rounding
            size = 32 * problem.scale * (problem.gradient.abs().max() * problem.value.abs().max() * 3)
            assert found.abs().max() <= torch.finfo(torch.float32).eps * size
        else:
            assert_as_accurate(found, definition.detach(), truth.detach())


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["plain", "dropout"])
@pytest.mark.parametrize(
    "widths", [(32, 32), pytest.param((64, 32), marks=pytest.mark.slow), (16, 16), (8, 24)], ids=str
)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_output_sums_and_gradients_are_the_definition(
    dtype: torch.dtype, widths: tuple[int, int], dropout: float
) -> None:
    problem = Problem.of(RAGGED, dtype, widths, dropout=dropout)
    assert_is_the_definition(problem, problem.computed())


@pytest.mark.parametrize("mask", ["boolean", "additive"])
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["plain", "dropout"])
@pytest.mark.parametrize("splits", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_masks(mask: str, dropout: float, splits: int) -> None:
    problem = Problem.of(RAGGED, dropout=dropout, mask=mask)
    computed = problem.computed(splits=splits)
    assert_is_the_definition(problem, computed)
    if mask == "boolean":
        assert computed[0][0].eq(0).all()
        assert computed[1][:, 0].eq(-torch.inf).all()


@pytest.mark.parametrize("fill", [-torch.inf, -1e9, torch.finfo(torch.float32).min, torch.finfo(torch.float16).min])
def test_numbers_that_forbid(fill: float) -> None:
    """All that code bases fill masks with means minus infinity, in rows without any other key too."""
    problem = Problem.of(RAGGED, mask="additive", fill=fill)
    computed = problem.computed()
    assert_is_the_definition(problem, computed)
    assert computed[0][0].eq(0).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("splits", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_keys_in_parts(splits: int, dtype: torch.dtype) -> None:
    """More parts than an image has blocks of keys among them."""
    problem = Problem.of(RAGGED, dtype, dropout=0.2)
    assert_is_the_definition(problem, problem.computed(splits=splits))


@pytest.mark.parametrize("width", [32, 64, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("products", ["half", "masked", "tf32", "ieee"])
def test_every_candidate(products: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU TF32 rounds operands to 11 bits: like float16, whose definition then is the measure."""
    dtype = torch.float32 if products in ("ieee", "tf32") else torch.float16
    mask = "additive" if products == "masked" else "none"
    problem = Problem.of([(70, 150), (3, 20)], dtype, (width, width), heads=1, dropout=0.1, mask=mask)
    problem.scale = width**-0.5
    monkeypatch.setattr(kernels, "_allows_tf32", lambda: products == "tf32")
    inputs = problem.query, problem.key, problem.value
    judge = (
        Problem(**{**vars(problem), **{x: getattr(problem, x).half() for x in INPUTS}}) if products == "tf32" else None
    )
    options = [candidates(name, products, width) for name in ("forward", "backward_of_queries", "backward_of_keys")]
    for number in range(max(map(len, options))):
        cuts = [of_kernel[min(number, len(of_kernel) - 1)] for of_kernel in options]
        output, sums = kernels.forward(*inputs, *problem.rest, cut=cuts[0])
        gradients = kernels.backward(problem.gradient, *inputs, output, sums, *problem.rest, cuts=(cuts[1], cuts[2]))
        computed = [output, sums, *gradients]
        if judge is None or not ON_GPU:
            assert_is_the_definition(problem, computed)
        else:
            pairs = zip(computed, judge.defined(torch.float16), problem.defined(torch.float64), strict=True)
            for found, own, exact in pairs:
                assert_as_accurate(found, own.float().detach(), exact.detach())


@pytest.mark.parametrize(
    "lengths",
    [[(0, 0)], [(0, 5)], [(5, 0)], [(1, 1)], [(33, 1)], [(1, 33)], [(3, 2)] * 70],
    ids=["nothing", "no query", "no key", "one", "one key", "one query", "many images"],
)
def test_lengths(lengths: list[tuple[int, int]]) -> None:
    """With more than 63 images the tiles are not ordered by their work."""
    problem = Problem.of(lengths, widths=(16, 16), heads=1, dropout=0.1)
    assert_is_the_definition(problem, problem.computed())


def test_without_any_row() -> None:
    problem = Problem.of([(2, 3)])
    empty, offsets = problem.query[:0], offsets_of([0], DEVICE)
    output, sums = kernels.forward(empty, empty, empty, offsets, offsets, 0, 0, 1.0, 0.0, None, None)
    assert output.shape == (0, 2, 32)
    assert sums.shape == (2, 0)
    gradients = kernels.backward(empty, empty, empty, empty, output, sums, offsets, offsets, 0, 0, 1.0, 0.0, None, None)
    assert [len(x) for x in gradients] == [0, 0, 0]


def test_rows_past_the_last_offset_are_zero() -> None:
    output, sums, *gradients = Problem.of(RAGGED).computed()
    assert output[-SPARE:].eq(0).all()
    assert sums[:, -SPARE:].eq(-torch.inf).all()
    for gradient in gradients:
        assert gradient[-SPARE:].eq(0).all()


def test_offsets_beyond_the_rows_are_cut() -> None:
    """Nothing is written outside: the same as with offsets that end where the rows do."""
    problem = Problem.of([(40, 70), (4, 64)])
    right = problem.offsets
    problem.offsets = tuple(x + torch.tensor([0, 0, SPARE], device=DEVICE, dtype=x.dtype) for x in right)
    problem.most = (40, 70)
    expected = problem.computed()
    problem.offsets = tuple(x + torch.tensor([-5, 0, 1000], device=DEVICE, dtype=x.dtype) for x in right)
    for found, same in zip(problem.computed(), expected, strict=True):
        assert torch.equal(found, same)


def test_parts_of_the_keys_where_queries_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_multiprocessors", lambda _: 132)
    problem = Problem.of([(20, 300), (3, 7)])
    inputs = problem.query, problem.key, problem.value
    held = kernels.Problem.of(*inputs, *problem.rest)
    assert [held.splits(Tiles(32, keys, 4, 1)) for keys in (32, 64, 128, 256)] == [4, 2, 1, 1]
    parts: list[int] = []
    add = kernels._add
    monkeypatch.setattr(
        kernels, "_add", lambda partial, *rest, **flags: (parts.append(len(partial)), add(partial, *rest, **flags))
    )
    assert_is_the_definition(problem, problem.computed())
    assert parts == [4, 4]  # forward and backward
    monkeypatch.setattr(kernels, "_multiprocessors", lambda _: 7)
    assert held.splits(SMALL) == 1


def test_not_a_number_reaches_the_own_image_only() -> None:
    problem = Problem.of([(5, 40), (6, 40)])
    problem.key[3] = torch.nan
    output, *_ = problem.computed()
    assert output[:5].isnan().all()
    assert output[5:].isfinite().all()


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
def test_the_same_bits_every_time_and_whatever_else_is_in_the_batch(dropout: float) -> None:
    problem = Problem.of(RAGGED, dropout=dropout)
    together = problem.computed()
    for first, second in zip(together, problem.computed(), strict=True):
        assert torch.equal(first, second)
    if dropout:
        return  # which weights are dropped depends on the place in the batch
    alone = Problem.of(RAGGED[:1])
    for name in ("query", "key", "value", "gradient"):
        setattr(alone, name, getattr(problem, name)[: RAGGED[0][name in ("key", "value")]])
    output, sums, *gradients = alone.computed()
    queries, keys = RAGGED[0]
    assert torch.equal(output, together[0][:queries])
    assert torch.equal(sums, together[1][:, :queries])
    for own, whole, count in zip(gradients, together[2:], (queries, keys, keys), strict=True):
        assert torch.equal(own, whole[:count])


def test_reads_the_heads_of_a_packed_projection_in_place() -> None:
    problem = Problem.of(RAGGED)
    expected = problem.computed()
    packed = torch.randn(len(problem.key), 3, 2, 32, device=DEVICE)
    packed[:, 1], packed[:, 2] = problem.key, problem.value
    problem.key, problem.value = packed[:, 1], packed[:, 2]
    held = kernels.Problem.of(problem.query, problem.key, problem.value, *problem.rest)
    assert held.key.data_ptr() == problem.key.data_ptr()
    for found, same in zip(problem.computed(), expected, strict=True):
        assert torch.equal(found, same)
    across = problem.value.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    problem.value = across  # its last dimension is not contiguous: copied
    assert torch.equal(problem.computed()[0], expected[0])


def test_words_are_those_of_the_definition() -> None:
    """Negative seeds too."""
    problem = Problem.of(RAGGED, heads=3, dropout=0.1)
    for seed in (0, 1, 2**31, 2**40 + 7, 2**63 - 1, -1, -(2**63)):
        problem.seed = torch.tensor(seed, device=DEVICE)
        held = kernels.Problem.of(problem.query, problem.key, problem.value, *problem.rest)
        queries, keys = held.words()
        expected = dropout_words(problem.seed, len(problem.query), 3, len(problem.key))
        assert torch.equal(queries[: expected[0].numel()], expected[0].flatten())
        assert torch.equal(keys, expected[1])


@pytest.fixture
def op(request: pytest.FixtureRequest) -> None:
    """The registered op is computed by the kernels."""
    if not ON_GPU:
        request.getfixturevalue("triton_attention")


@pytest.mark.usefixtures("op")
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_opcheck(dropout: float) -> None:
    problem = Problem.of(RAGGED, dropout=dropout)
    leaves = [x.clone().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    torch.library.opcheck(torch.ops.detr_fast.attention.default, (*leaves, *problem.rest))


@pytest.mark.usefixtures("op")
def test_compiles() -> None:
    problem = Problem.of(RAGGED)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    results = []
    for run in (attention, compiled):
        leaves = [x.clone().requires_grad_() for x in (problem.query, problem.key, problem.value)]
        output = run(*leaves, *problem.offsets, *problem.most)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_transformer_on_these_kernels_is_the_one_on_the_cpu(request: pytest.FixtureRequest, training: bool) -> None:
    """Dropout of attention weights included: the same seed drops the same weights everywhere."""
    counts, queries = (40, 7), 10
    torch.manual_seed(0)
    transformer = Transformer(32, 2, 1, 1, 48, dropout=0.2).train(training)
    for module in transformer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # PyTorch's own differs between devices
    results = []
    for device in ("cpu", DEVICE):
        if device == DEVICE:
            request.getfixturevalue("op")
        torch.manual_seed(1)
        inputs = [torch.randn(n, 32).requires_grad_() for n in (47, 47, 20, 20)]
        direction = torch.randn(20, 32).to(device)
        content, position, query, query_position = (x.to(device) for x in inputs)
        memory = Tokens(content, position, offsets_of(counts, device), max(counts))
        asked = Tokens(query, query_position, offsets_of([queries, queries], device), queries)
        transformer.to(device)
        with pytest.MonkeyPatch.context() as patch:
            if training:
                seeds = (torch.tensor(seed, device=device) for seed in range(100))
                patch.setattr(torch, "randint", lambda *_, seeds=seeds, **__: next(seeds))
            decoded, _ = transformer(memory, asked)
        results.append([decoded.cpu(), *torch.autograd.grad((decoded * direction).sum(), inputs)])
    for expected, found in zip(*results, strict=True):
        limit = 100 * torch.finfo(torch.float32).eps * float(expected.detach().abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=limit)
