"""The ragged attention op against its definition: values, gradients, dropout, types, compilation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from detr_fast.ops.attention import attention, attention_reference
from detr_fast.ops.dropout import dropout_keeps, dropout_words
from detr_fast.structures import offsets_of

# (queries, keys) of each image
RAGGED = [(5, 7), (0, 3), (4, 0), (1, 1), (6, 6)]
EQUAL = [(4, 4), (4, 4), (4, 4)]
CROSS = [(3, 9), (3, 2)]
CASES = {
    "ragged": RAGGED,
    "equal": EQUAL,
    "cross": CROSS,
    "nothing": [(0, 0)],
    "runs": [(2, 3), (2, 3), (5, 1), (5, 1)],
}


def arguments(
    lengths: list[tuple[int, int]],
    dtype: torch.dtype = torch.float64,
    widths: tuple[int, int] = (8, 8),
    spare: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
    """Random inputs of two heads; ``spare`` rows lie past the last offset."""
    torch.manual_seed(0)
    queries, keys = [q for q, _ in lengths], [k for _, k in lengths]
    query = torch.randn(sum(queries) + spare, 2, widths[0], dtype=torch.float64).to(dtype)
    key = torch.randn(sum(keys) + spare, 2, widths[0], dtype=torch.float64).to(dtype)
    value = torch.randn(sum(keys) + spare, 2, widths[1], dtype=torch.float64).to(dtype)
    return query, key, value, offsets_of(queries), offsets_of(keys), max(queries), max(keys)


@pytest.mark.parametrize("widths", [(8, 8), (8, 4)], ids=["one width", "two widths"])
@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
def test_output_and_log_sum_exp_are_the_definition(lengths: list[tuple[int, int]], widths: tuple[int, int]) -> None:
    inputs = arguments(lengths, widths=widths, spare=2)
    expected = attention_reference(*inputs[:5], scale=0.3)
    found = torch.ops.detr_fast.attention(*inputs, 0.3, 0.0, None, None)
    limit = 50 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(found[0], expected[0], rtol=limit, atol=limit)
    torch.testing.assert_close(found[1], expected[1], rtol=limit, atol=limit)


def test_definition_is_softmax_attention() -> None:
    query, key, value, *_ = arguments([(5, 7)])
    offsets = offsets_of([5]), offsets_of([7])
    heads = (x.transpose(0, 1)[None] for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads)[0].transpose(0, 1)
    torch.testing.assert_close(attention_reference(query, key, value, *offsets)[0], expected)


def test_queries_without_keys_give_zero() -> None:
    output = attention(*arguments(RAGGED))
    assert output[5:9].eq(0).all()
    assert output[:5].ne(0).all()


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["plain", "dropout"])
@pytest.mark.parametrize("widths", [(4, 4), (4, 3)], ids=["one width", "two widths"])
@pytest.mark.parametrize("lengths", [[(2, 3), (0, 1), (2, 0), (1, 1)], [(2, 2), (2, 2)]], ids=["ragged", "equal"])
def test_gradient(lengths: list[tuple[int, int]], widths: tuple[int, int], dropout: float) -> None:
    *tensors, query_offsets, key_offsets, max_query, max_key = arguments(lengths, widths=widths, spare=1)
    tensors = [x.requires_grad_() for x in tensors]

    def run(*leaves: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention(*leaves, query_offsets, key_offsets, max_query, max_key, dropout=dropout)

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types(dtype: torch.dtype) -> None:
    """The error of one rounding of inputs, weights and result each; scores and sums are kept in float32."""
    inputs = arguments([(40, 70), (3, 130)], dtype)
    wide = [x.double() for x in inputs[:3]]
    expected, sums = attention_reference(*wide, *inputs[3:5])
    output, found_sums = torch.ops.detr_fast.attention(*inputs, 8**-0.5, 0.0, None, None)
    assert output.dtype == dtype
    assert found_sums.dtype == torch.float32
    limit = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=limit, atol=limit * float(wide[2].abs().max()))
    # PyTorch's fused kernel computes exponentials to 20 bits where the inputs are half types.
    limit = 40 * (torch.finfo(torch.float32).eps if dtype == torch.float32 else 2**-20)
    torch.testing.assert_close(found_sums.double(), sums, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_of_narrow_types(dtype: torch.dtype) -> None:
    """Computed in float32 from the rounded output, and rounded once."""
    inputs = arguments([(40, 70), (3, 130)], dtype)
    gradients = []
    for tensors in (inputs[:3], [x.double() for x in inputs[:3]]):
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = attention(*leaves, *inputs[3:])
        factor = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        gradients.append(torch.autograd.grad((output * factor.to(output.dtype)).sum(), leaves))
    for found, expected in zip(*gradients, strict=True):
        assert found.dtype == dtype
        limit = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=limit, atol=limit * float(expected.abs().max()))


@pytest.mark.parametrize("count", [17, 300, 900])
@pytest.mark.usefixtures("restored_threads")
def test_an_image_does_not_depend_on_its_neighbours(count: int) -> None:
    torch.set_num_threads(1)  # PyTorch's fused kernel cuts small heads by the number of threads
    lengths = [(count, count), (count, count), (7, 5), (count, 64)]
    inputs = arguments(lengths, torch.float32)
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    together = attention(*leaves, *inputs[3:])
    together.square().sum().backward()
    queries, keys = inputs[3].tolist(), inputs[4].tolist()
    for image, (query_count, key_count) in enumerate(lengths):
        parts = [slice(queries[image], queries[image + 1]), *[slice(keys[image], keys[image + 1])] * 2]
        alone = [x[part].clone().requires_grad_() for x, part in zip(inputs[:3], parts, strict=True)]
        offsets = offsets_of([query_count]), offsets_of([key_count])
        output = attention(*alone, *offsets, query_count, key_count)
        output.square().sum().backward()
        assert torch.equal(output, together[parts[0]])
        for leaf, own, part in zip(leaves, alone, parts, strict=True):
            assert torch.equal(own.grad, leaf.grad[part])


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["plain", "dropout"])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
def test_mask(kind: str, dropout: float, shared: bool) -> None:
    """Of each image and head, or one for all."""
    *tensors, query_offsets, key_offsets, max_query, max_key = arguments(RAGGED, spare=1)
    leaves = [x.requires_grad_() for x in tensors]
    shape = (1, 1) if shared else (len(RAGGED), 2)
    mask = torch.randn(*shape, max_query, max_key, dtype=torch.float64)
    if kind == "boolean":
        mask = mask > 0
        mask[:, :, 0] = False  # a query that may attend to nothing
    offsets, seed = (query_offsets, key_offsets), torch.tensor(4)
    results = []
    for run in (
        lambda: attention(*leaves, *offsets, max_query, max_key, 0.3, dropout, seed, mask),
        lambda: attention_reference(*leaves, *offsets, 0.3, dropout, seed if dropout else None, mask)[0],
    ):
        output = run()
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if kind == "boolean":
        assert results[0][0][0].eq(0).all()


def test_gradient_with_a_mask() -> None:
    *tensors, query_offsets, key_offsets, max_query, max_key = arguments([(2, 3), (3, 2)], widths=(4, 3))
    mask = torch.randn(2, 1, max_query, max_key, dtype=torch.float64)
    mask[0, 0, 0] = -torch.inf
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(
        lambda *x: attention(*x, query_offsets, key_offsets, max_query, max_key, mask=mask), leaves
    )


def test_mask_is_that_of_pytorch() -> None:
    query, key, value, *_ = arguments([(5, 7)])
    mask = torch.rand(1, 2, 5, 7) < 0.6
    mask[..., 0] = True
    heads = (x.transpose(0, 1)[None] for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)[0].transpose(0, 1)
    found = attention(query, key, value, offsets_of([5]), offsets_of([7]), 5, 7, mask=mask)
    torch.testing.assert_close(found, expected)


def test_what_is_dropped_is_independent_in_rows_columns_and_rectangles() -> None:
    """Means of the products of one, two and four weights' indicators, within five standard deviations."""
    rate, count = 0.3, 512
    kept = dropout_keeps(torch.tensor(12345678901234), rate, count, 2, count).double() - (1 - rate)  # [2, n, n]
    variance = rate * (1 - rate)
    pairs = {
        "row": (kept[:, :, :-1] * kept[:, :, 1:]),
        "column": (kept[:, :-1] * kept[:, 1:]),
        "diagonal": kept[:, :-1, :-1] * kept[:, 1:, 1:],
        "head": kept[0] * kept[1],
    }
    assert abs(kept.mean()) < 5 * (variance / kept.numel()) ** 0.5
    for name, products in pairs.items():
        assert abs(products.mean()) < 5 * variance / products.numel() ** 0.5, name
    for step in (1, 7, 64):
        corners = kept[:, :-step, :-step] * kept[:, step:, :-step] * kept[:, :-step, step:] * kept[:, step:, step:]
        assert abs(corners.mean()) < 5 * variance**2 / corners.numel() ** 0.5, step
    deviation = (variance / count) ** 0.5
    for axis in (1, 2):  # sums of rows and columns spread as sums of independent draws
        spread = kept.mean(axis).std()
        assert 0.9 * deviation < spread < 1.1 * deviation


@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.5, 0.999])
def test_share_that_is_dropped(rate: float) -> None:
    kept = dropout_keeps(torch.tensor(7), rate, 600, 3, 600)
    assert abs(float(kept.double().mean()) - (1 - rate)) < 5 * (rate * (1 - rate) / kept.numel()) ** 0.5


def test_seeds_drop_other_weights() -> None:
    """Masks of different seeds, their transposes and their neighbouring rows agree in half of the places."""
    count = 128
    drawn = [dropout_keeps(torch.tensor(seed), 0.5, count, 1, count)[0] for seed in (0, 1, 2**32, 2**62, 0x9E3779B9)]
    drawn += [x.mT for x in drawn] + [x.roll(1, 0) for x in drawn]
    for first, second in itertools.combinations(drawn, 2):
        assert abs((first == second).double().mean() - 0.5) < 5 * 0.5 / count


def test_words_are_odd_and_never_change() -> None:
    """Recorded: the same seed must drop the same weights in every release."""
    queries, keys = dropout_words(torch.tensor(2**40 + 5), 2, 2, 3)
    assert queries.tolist() == [[1868410821, -1513866293], [197455265, 2046903823]]
    assert keys.tolist() == [-1458961099, 252977087, 1984735667]
    assert (queries % 2 != 0).all()
    assert (keys % 2 != 0).all()


def test_almost_everything_is_dropped_at_almost_one() -> None:
    assert not dropout_keeps(torch.tensor(1), 1 - 2**-40, 50, 2, 50).any()


def test_a_given_seed_decides() -> None:
    inputs = arguments(RAGGED)
    seed = torch.tensor(3)
    first, second = (attention(*inputs, dropout=0.5, seed=seed) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, attention(*inputs, dropout=0.5, seed=torch.tensor(4)))
    assert torch.equal(attention(*inputs, seed=seed), attention(*inputs))  # nothing is dropped


def test_dropout_drops_that_share_and_keeps_the_mean() -> None:
    count = 400
    query, key = torch.zeros(count, 2, 4), torch.zeros(count, 2, 4)  # every weight is 1 / count
    value = torch.ones(count, 2, 4)
    offsets = offsets_of([count])
    torch.manual_seed(0)
    output = attention(query, key, value, offsets, offsets, count, count, dropout=0.3)
    # A row is a mean of `count` draws of 0 or 1 / 0.7; bounds are five standard deviations.
    deviation = (0.3 / 0.7 / count) ** 0.5
    assert (output - 1).abs().max() < 5 * deviation
    assert abs(output.mean() - 1) < 5 * deviation / (2 * count) ** 0.5
    assert output.std() > deviation / 2


def test_dropout_follows_the_global_seed() -> None:
    inputs = arguments(RAGGED)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return attention(*inputs, dropout=0.5)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(1)
    first, second = attention(*inputs, dropout=0.5), attention(*inputs, dropout=0.5)
    assert not torch.equal(first, second)


def test_strided_inputs() -> None:
    """Heads of a packed projection, and a layout whose last dimension is not contiguous."""
    query, key, value, *rest = arguments(RAGGED)
    packed = torch.randn(len(key), 3, 2, 8, dtype=torch.float64)
    packed[:, 1], packed[:, 2] = key, value
    expected = attention(query, key, value, *rest)
    assert torch.equal(attention(query, packed[:, 1], packed[:, 2], *rest), expected)
    across = value.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(attention(query, key, across, *rest), expected)


def test_second_derivatives_are_refused() -> None:
    query, key, value, *rest = arguments([(3, 4)], widths=(4, 3))
    (gradient,) = torch.autograd.grad(
        attention(query.requires_grad_(), key, value, *rest).sum(), query, create_graph=True
    )
    with pytest.raises(RuntimeError, match="attention: has first derivatives only"):
        gradient.square().sum().backward()


def test_a_learned_mask_can_be_evaluated() -> None:
    inputs = arguments([(5, 7)], torch.float32)
    mask = torch.randn(1, 1, 5, 7, requires_grad=True)
    with torch.no_grad():
        found = attention(*inputs, mask=mask)
    assert torch.equal(found, attention(*inputs, mask=mask.detach()))


@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_of_types_and_masks(kind: str, dtype: torch.dtype) -> None:
    *tensors, query_offsets, key_offsets, max_query, max_key = arguments(RAGGED, dtype, (8, 4))
    mask = {"none": None, "boolean": torch.rand(1, 2, 6, 7) < 0.5, "additive": torch.randn(5, 1, 6, 7)}[kind]
    rest = (query_offsets, key_offsets, max_query, max_key, 0.5, 0.0, None, mask)
    torch.library.opcheck(torch.ops.detr_fast.attention.default, (*(x.requires_grad_() for x in tensors), *rest))


def test_compiles_once_with_masks_of_changing_size() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep_graph(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(attention, backend=keep_graph, fullgraph=True, dynamic=True)
    # No number twice: dimensions that are equal at first are taken to be equal always.
    for count, keys in ((7, 13), (9, 17), (10, 21)):
        inputs = arguments([(count, keys), (3, 4), (1, 2)], torch.float32)
        mask = torch.rand(3, 1, count, keys) < 0.7
        assert torch.equal(compiled(*inputs, mask=mask), attention(*inputs, mask=mask))
    assert len(graphs) == 1


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_opcheck(dropout: float) -> None:
    seed = torch.tensor(5) if dropout else None
    *tensors, query_offsets, key_offsets, max_query, max_key = arguments(RAGGED, torch.float32)
    leaves = [x.requires_grad_() for x in tensors]
    rest = (query_offsets, key_offsets, max_query, max_key, 0.5, dropout, seed, None)
    torch.library.opcheck(torch.ops.detr_fast.attention.default, (*leaves, *rest))
    plain = [x.detach() for x in leaves]
    output, sums = torch.ops.detr_fast.attention(*plain, *rest)
    torch.library.opcheck(
        torch.ops.detr_fast.attention_backward.default, (torch.randn_like(output), *plain, output, sums, *rest)
    )


def test_compiles_once_for_all_segmentations() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep_graph(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(attention, backend=keep_graph, fullgraph=True)
    query, key, value, *_ = arguments([(12, 16)], torch.float32)
    for queries, keys in (([5, 7], [8, 8]), ([12, 0], [1, 15]), ([6, 6], [16, 0])):
        offsets = offsets_of(queries), offsets_of(keys)
        expected = attention(query, key, value, *offsets, 12, 16)
        assert torch.equal(compiled(query, key, value, *offsets, 12, 16), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {0: torch.zeros(5, 16)},
            r"attention: query must be \[N, H, W\] with at least one head and column, got \[5, 16\]",
        ),
        ({1: torch.zeros(7, 2, 4)}, r"key must have query's heads and width \[2, 8\], got \[2, 4\]"),
        ({2: torch.zeros(6, 2, 8)}, r"value must have key's tokens and heads \[7, 2\], got \[6, 2\]"),
        ({2: torch.zeros(7, 2, 8).half()}, "value must be of query's type torch.float32, got torch.float16"),
        ({4: torch.tensor([0, 7])}, r"key_offsets must be \[B \+ 1\] int32, got \[2\] torch.int64"),
        ({8: 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({7: 0.0}, "scale must be positive and finite, got 0.0"),
        ({9: 42}, "seed must be a tensor, got int"),
        ({4: [0, 7]}, "key_offsets must be a tensor, got list"),
        ({0: torch.zeros(5, 2, 8).int()}, "query must be float16, bfloat16, float32 or float64, got torch.int32"),
        ({0: torch.zeros(5, 0, 8)}, r"query must be \[N, H, W\] with at least one head and column, got \[5, 0, 8\]"),
        ({3: torch.zeros(0).int()}, r"query_offsets must be \[B \+ 1\] int32, got \[0\] torch.int32"),
        ({4: torch.zeros(3).int()}, "key_offsets must be as many as query_offsets, 2, got 3"),
        ({9: torch.tensor([1])}, r"seed must be \[\] int64, got \[1\] torch.int64"),
        ({10: torch.ones(5, 7)}, r"mask must be \[1 or 1, 2 or 1, 5, 7\], got \[5, 7\]"),
        ({10: torch.ones(1, 2, 5, 8)}, r"mask must be \[1 or 1, 2 or 1, 5, 7\], got \[1, 2, 5, 8\]"),
        ({10: torch.ones(1, 1, 5, 7).int()}, "mask must be bool or floating point, got torch.int32"),
        ({10: torch.ones(1, 1, 5, 7, requires_grad=True)}, "mask must not require a gradient"),
        ({4: torch.tensor([0, 7], device="meta")}, "key_offsets must be on query's device cpu, got meta"),
        ({2: torch.zeros(7, 2, 8, device="meta")}, "value must be on query's device cpu, got meta"),
    ],
)
def test_errors_name_the_argument(change: dict[int, object], message: str) -> None:
    inputs: list[object] = [*arguments([(5, 7)], torch.float32), None, 0.0, None, None]
    for place, wrong in change.items():
        inputs[place] = wrong
    with pytest.raises(ValueError, match=message):
        attention(*inputs)  # type: ignore[arg-type]
