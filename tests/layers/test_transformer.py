"""The packed transformer against the same mathematics on padded batches with PyTorch's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detr_fast.layers.attention import MultiheadAttention
from detr_fast.layers.transformer import DecoderLayer, EncoderLayer, Transformer
from detr_fast.structures import Tokens, offsets_of

WIDTH, HEADS, HIDDEN = 16, 4, 24
COUNTS = (5, 9, 1)  # memory tokens of each image
QUERIES = 3


def tokens(counts: tuple[int, ...] = COUNTS, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    content, position = torch.randn(2, sum(counts), WIDTH, generator=generator, dtype=torch.float64)
    return Tokens(content, position, offsets_of(counts), max(counts))


def padded(x: Tensor, counts: tuple[int, ...] = COUNTS) -> Tensor:  # [M, D] -> [B, most, D]
    return nn.utils.rnn.pad_sequence(list(x.split(counts)), batch_first=True)


def padding(counts: tuple[int, ...] = COUNTS) -> Tensor:
    return torch.arange(max(counts))[None] >= torch.tensor(counts)[:, None]


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


def torch_attention(ours: MultiheadAttention) -> nn.MultiheadAttention:
    """PyTorch's module with our weights: the parameter names are the same."""
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double().eval()
    theirs.load_state_dict(ours.state_dict())
    return theirs


def test_cross_attention_is_that_of_pytorch() -> None:
    ours = randomised(MultiheadAttention(WIDTH, HEADS))
    queries, memory = tokens((QUERIES,) * 3, 1), tokens()
    query = (queries.content + queries.position).unflatten(0, (3, QUERIES))
    key = padded(memory.content + memory.position)
    expected, weights = torch_attention(ours)(query, key, padded(memory.content), key_padding_mask=padding())
    torch.testing.assert_close(ours(queries, memory), expected.flatten(0, 1))
    for found, whole, count in zip(ours.weights(queries, memory), weights, COUNTS, strict=True):
        torch.testing.assert_close(found.double(), whole[:, :count], rtol=1e-5, atol=1e-6)  # pictures: float32


@pytest.mark.parametrize("pre_norm", [False, True])
def test_encoder_layer_is_that_of_pytorch(pre_norm: bool) -> None:
    ours = randomised(EncoderLayer(WIDTH, HEADS, HIDDEN, pre_norm=pre_norm))
    theirs = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, norm_first=pre_norm).double().eval()
    theirs.load_state_dict(ours.state_dict())
    memory = tokens()
    without_position = Tokens(memory.content, torch.zeros_like(memory.position), memory.offsets, memory.max_count)
    expected = theirs(padded(memory.content), src_key_padding_mask=padding())[~padding()]
    torch.testing.assert_close(ours(without_position).content, expected)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_decoder_layer_is_that_of_pytorch(pre_norm: bool) -> None:
    ours = randomised(DecoderLayer(WIDTH, HEADS, HIDDEN, pre_norm=pre_norm))
    theirs = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, norm_first=pre_norm).double().eval()
    theirs.load_state_dict(ours.state_dict())
    queries, memory = tokens((QUERIES,) * 3, 1), tokens()
    queries = Tokens(queries.content, torch.zeros_like(queries.position), queries.offsets, QUERIES)
    content = queries.content.unflatten(0, (3, QUERIES))
    expected = theirs(content, padded(memory.content), memory_key_padding_mask=padding()).flatten(0, 1)
    torch.testing.assert_close(ours(queries, memory, memory.content).content, expected)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_positions_are_added_where_tokens_are_compared_only(pre_norm: bool) -> None:
    """The encoder layer, written out in the formulas of the paper."""
    layer = randomised(EncoderLayer(WIDTH, HEADS, HIDDEN, pre_norm=pre_norm))
    memory = tokens((7,))
    attend = torch_attention(layer.self_attn)

    def self_attention(x: Tensor) -> Tensor:
        located = (x + memory.position)[None]
        return attend(located, located, x[None])[0][0]

    x = memory.content
    if pre_norm:
        x = x + self_attention(layer.norm1(x))
        x = x + layer.perceptron(layer.norm2(x))
    else:
        x = layer.norm1(x + self_attention(x))
        x = layer.norm2(x + layer.perceptron(x))
    torch.testing.assert_close(layer(memory).content, x)


def alone(memory: Tokens, queries: Tokens, counts: tuple[int, ...], image: int) -> tuple[Tokens, Tokens]:
    """One image of a batch."""
    content, position = (x.split(counts)[image] for x in (memory.content, memory.position))
    own = slice(image * QUERIES, (image + 1) * QUERIES)
    asked = Tokens(queries.content[own], queries.position[own], offsets_of([QUERIES]), QUERIES)
    return Tokens(content, position, offsets_of([counts[image]]), counts[image]), asked


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    """In float64, to its rounding: matrix products of other sizes may sum in another order."""
    transformer = randomised(Transformer(WIDTH, HEADS, 2, 2, HIDDEN))
    memory, queries = tokens(), tokens((QUERIES,) * 3, 1)
    together, _ = transformer(memory, queries)
    for image in range(3):
        own = slice(image * QUERIES, (image + 1) * QUERIES)
        found, _ = transformer(*alone(memory, queries, COUNTS, image))
        torch.testing.assert_close(found, together[:, own], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("others", [(7, 300), (64, 1), (5, 5)], ids=str)
def test_the_bits_of_an_image_do_not_depend_on_its_neighbours(others: tuple[int, int]) -> None:
    """Same number of tokens in all, hence the same matrix products: other images in the batch change nothing."""
    transformer = randomised(Transformer(WIDTH, HEADS, 2, 2, HIDDEN)).float()
    counts = (40, *others, 400 - 40 - sum(others))
    memory, queries = tokens(counts), tokens((QUERIES,) * 4, 1)
    other = tokens(counts, seed=7)
    content, position = (
        torch.cat([a[: counts[0]], b[counts[0] :]]).float()
        for a, b in ((memory.content, other.content), (memory.position, other.position))
    )
    queries = Tokens(queries.content.float(), queries.position.float(), queries.offsets, QUERIES)
    results = [
        transformer(Tokens(*x, memory.offsets, memory.max_count), queries)[0][:, :QUERIES]
        for x in ((memory.content.float(), memory.position.float()), (content, position))
    ]
    assert torch.equal(*results)


def test_room_for_more_tokens_changes_nothing() -> None:
    """As for a CUDA graph: static shapes, and rows past the last offset that no result or gradient depends on."""
    transformer = randomised(Transformer(WIDTH, HEADS, 2, 2, HIDDEN))
    memory, queries = tokens(), tokens((QUERIES,) * 3, 1)
    results = []
    for given in (memory, memory.with_capacity(40, 20)):
        transformer.zero_grad()
        decoded, _ = transformer(given, queries)
        decoded.square().sum().backward()
        results.append([decoded.detach(), *(parameter.grad.clone() for parameter in transformer.parameters())])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("room", "message"),
    [((14, 20), "capacity must be at least 15, got 14"), ((40, 8), "max_count must be at least 9, got 8")],
)
def test_too_little_room_is_an_error(room: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"Tokens.with_capacity: {message}"):
        tokens().with_capacity(*room)


def test_activation_checkpointing_recomputes_the_same_dropout() -> None:
    layer = randomised(EncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.3)).train()
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        torch.manual_seed(2)
        run(tokens()).content.square().sum().backward()
        results.append([parameter.grad.clone() for parameter in layer.parameters()])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found)


def test_autocast_computes_products_and_attention_in_the_half_type() -> None:
    transformer = randomised(Transformer(WIDTH, HEADS, 1, 1, HIDDEN)).float()
    float32 = [
        Tokens(x.content.float(), x.position.float(), x.offsets, x.max_count)
        for x in (tokens(), tokens((QUERIES,) * 3, 1))
    ]
    expected, _ = transformer(*float32)
    seen = []
    handle = transformer.encoder.layers[0].self_attn.out_proj.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = transformer(*float32)
    handle.remove()
    assert seen == [torch.bfloat16]
    # Without any of the three attentions the result is off by 0.19 of the largest and more.
    limit = 2 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=limit * float(expected.detach().abs().max()))
    found.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in transformer.parameters())


def test_compiles_the_whole_transformer_once_for_all_batches() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep_graph(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    transformer = randomised(Transformer(WIDTH, HEADS, 1, 1, HIDDEN))
    compiled = torch.compile(transformer, backend=keep_graph, fullgraph=True, dynamic=True)
    queries = tokens((QUERIES,) * 3, 1)
    # No number twice: dimensions that are equal at first are taken to be equal always.
    for counts in ((5, 10, 2), (30, 4, 11), (7, 7, 8)):
        expected, _ = transformer(tokens(counts), queries)
        torch.testing.assert_close(compiled(tokens(counts), queries)[0], expected)
    assert len(graphs) == 1


def test_layers_that_are_returned() -> None:
    transformer = randomised(Transformer(WIDTH, HEADS, 1, 3, HIDDEN))
    every, _ = transformer(tokens(), tokens((QUERIES,) * 3, 1), every_layer=True)
    last, _ = transformer(tokens(), tokens((QUERIES,) * 3, 1), every_layer=False)
    assert every.shape == (3, 9, WIDTH)
    assert torch.equal(every[-1:], last)
    assert not torch.equal(every[0], every[1])


def test_initial_weights_are_the_published_ones() -> None:
    transformer = Transformer(64, 4, 2, 2, 128)
    first, second = transformer.encoder.layers
    assert torch.equal(first.linear1.bias, second.linear1.bias)  # copies of one template
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    assert first.self_attn.in_proj_bias.eq(0).all()
    assert first.self_attn.out_proj.bias.eq(0).all()
    bound = (6 / (64 + 3 * 64)) ** 0.5  # Xavier, of the packed matrix
    largest = first.self_attn.in_proj_weight.abs().max()
    assert 0.98 * bound < largest <= bound


def test_final_norm_of_the_encoder_is_part_of_pre_norm_only() -> None:
    assert Transformer(WIDTH, HEADS, 1, 1, HIDDEN, pre_norm=True).encoder.norm is not None
    assert Transformer(WIDTH, HEADS, 1, 1, HIDDEN).encoder.norm is None


def test_dropout_is_active_in_training_only() -> None:
    transformer = randomised(Transformer(WIDTH, HEADS, 1, 1, HIDDEN, dropout=0.5))
    inputs = tokens(), tokens((QUERIES,) * 3, 1)
    assert torch.equal(transformer(*inputs)[0], transformer(*inputs)[0])
    transformer.train()
    torch.manual_seed(1)
    first, second = transformer(*inputs)[0], transformer(*inputs)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(first, transformer(*inputs)[0])


def test_compiles_into_one_graph_with_gradients() -> None:
    layer = randomised(EncoderLayer(WIDTH, HEADS, HIDDEN))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for module in (layer, compiled):
        layer.zero_grad()
        module(tokens()).content.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 5}, "width must be a multiple of heads 5, got 16"),
        ({"activation": "glue"}, r"activation must be one of \['gelu', 'relu'\], got 'glue'"),
    ],
)
def test_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transformer(**{"width": WIDTH, "heads": HEADS, "hidden": HIDDEN, **arguments})
