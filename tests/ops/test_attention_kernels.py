"""The Triton kernels of attention against the definition: on a GPU where there is one, else in Triton's interpreter.

The interpreter multiplies matrices of bfloat16 wrongly (Triton issue 11584), so that type is for the GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
from detr_fast.ops.triton import choice
from detr_fast.ops.triton.choice import ShapeClass, Tiles, candidates

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
SMALL = Tiles(32, 32, 4, 1)  # several blocks of few rows
# (queries, keys) of each image: whole and partial blocks, one row, none.
RAGGED = [(40, 70), (0, 3), (4, 0), (1, 1), (32, 64)]
SPARE = 3  # rows past the last offset


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
        if mask == "boolean":
            masks["boolean"][:, :, 0] = False  # a query that may attend to nothing
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
@pytest.mark.parametrize("widths", [(32, 32), (64, 32), (16, 16), (8, 24)], ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_output_sums_and_gradients_are_the_definition(
    dtype: torch.dtype, widths: tuple[int, int], dropout: float
) -> None:
    problem = Problem.of(RAGGED, dtype, widths, dropout=dropout)
    assert_is_the_definition(problem, problem.computed())


@pytest.mark.parametrize("mask", ["boolean", "additive"])
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["plain", "dropout"])
@pytest.mark.parametrize("splits", [1, 3])
def test_masks(mask: str, dropout: float, splits: int) -> None:
    problem = Problem.of(RAGGED, dropout=dropout, mask=mask)
    computed = problem.computed(splits=splits)
    assert_is_the_definition(problem, computed)
    if mask == "boolean":
        assert computed[0][0].eq(0).all()
        assert computed[1][:, 0].eq(-torch.inf).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("splits", [2, 5])
def test_keys_in_parts(splits: int, dtype: torch.dtype) -> None:
    """More parts than an image has blocks of keys among them."""
    problem = Problem.of(RAGGED, dtype, dropout=0.2)
    assert_is_the_definition(problem, problem.computed(splits=splits))


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("products", ["half", "masked", "ieee"])
def test_every_candidate(products: str, width: int) -> None:
    lengths = [(70, 150), (3, 20)]
    dtype = torch.float32 if products == "ieee" else torch.float16
    problem = Problem.of(lengths, dtype, (width, width), heads=1, mask="additive" if products == "masked" else "none")
    inputs = problem.query, problem.key, problem.value
    for cut in candidates("forward", products, width):
        output, sums = kernels.forward(*inputs, *problem.rest, cut=cut)
    options = [candidates(name, products, width) for name in ("backward_of_queries", "backward_of_keys")]
    for number in range(max(map(len, options))):
        cuts = tuple(of_kernel[min(number, len(of_kernel) - 1)] for of_kernel in options)
        gradients = kernels.backward(problem.gradient, *inputs, output, sums, *problem.rest, cuts=cuts)
        assert_is_the_definition(problem, [output, sums, *gradients])


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
    problem = Problem.of(RAGGED, heads=3, dropout=0.1)
    for seed in (0, 1, 2**31, 2**40 + 7, 2**63 - 1):
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


# ---- the choice of tiles ---------------------------------------------------------------------------------------------

SHAPE = ShapeClass("forward", "bfloat16", 32, 32, 8, "none", False, "half", 8, 2048, 2048)
OPTIONS = candidates("forward", "half", 32)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Tiles]:
    """Tiles that were timed; the second is the fastest. Looks like a CUDA device whose cache is empty."""
    found: list[Tiles] = []

    def do_bench(run, **_: object) -> float:
        run()
        return float(found[-1] != OPTIONS[1])

    monkeypatch.setattr(choice.triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Test")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(choice, "_file", lambda _: tmp_path / "kept" / "attention.json")
    torch.use_deterministic_algorithms(False)
    return found


def chosen(timed: list[Tiles]) -> Tiles:
    return choice.choose(SHAPE, OPTIONS, timed.append, torch.device("cuda", 0))


def test_the_fastest_is_chosen_once_and_kept_for_other_processes(timed: list[Tiles], tmp_path: Path) -> None:
    assert chosen(timed) == OPTIONS[1]
    assert timed == list(OPTIONS)
    assert chosen(timed) == OPTIONS[1]
    choice._chosen.clear()  # as in another process
    assert chosen(timed) == OPTIONS[1]
    assert len(timed) == len(OPTIONS)
    assert list(json.loads((tmp_path / "kept" / "attention.json").read_text())) == [str(SHAPE)]


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}'], ids=["cut off", "no table", "another class"])
def test_a_file_without_an_answer_is_written_anew(timed: list[Tiles], tmp_path: Path, content: str) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "attention.json").write_text(content)
    assert chosen(timed) == OPTIONS[1]
    assert str(SHAPE) in json.loads((tmp_path / "kept" / "attention.json").read_text())


def test_nothing_is_timed_where_that_is_not_allowed(timed: list[Tiles], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert chosen(timed) == OPTIONS[0]
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen(timed) == OPTIONS[0]
    assert timed == []
    assert choice._chosen == {}


def test_a_folder_that_cannot_be_written_is_a_warning(timed: list[Tiles], tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")  # a file in the way
    with pytest.warns(UserWarning, match="the chosen tiles are not kept"):
        assert chosen(timed) == OPTIONS[1]
