"""What only a GPU can show of attention: real sizes, synchronisations, launches, compilation, graphs, devices.

That the kernels are the definition is tested in tests/ops/test_attention_kernels.py, on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accuracy import assert_as_accurate
from torch import Tensor, nn
from torch.autograd import DeviceType

from benchmarks.scenes import training_sizes
from detr_fast.layers.transformer import Transformer
from detr_fast.ops.attention import attention, attention_reference
from detr_fast.structures import Tokens, offsets_of

pytest.importorskip("triton")

from detr_fast.ops.triton import attention_backward, attention_forward, choice
from detr_fast.ops.triton.choice import candidates

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HEADS, WIDTH = 8, 32
QUERIES = 100


def counts_of(images: int, seed: int = 0) -> list[int]:
    return [-(-h // 32) * -(-w // 32) for h, w in training_sizes(images, seed)]


def self_attention(counts: list[int], dtype: torch.dtype) -> tuple[list[Tensor], tuple]:
    """Leaves, and what follows them: offsets and largest counts."""
    torch.manual_seed(0)
    leaves = [torch.randn(sum(counts), HEADS, WIDTH, device=DEVICE, dtype=dtype).requires_grad_() for _ in range(3)]
    return leaves, (offsets_of(counts, DEVICE), offsets_of(counts, DEVICE), max(counts), max(counts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_real_sizes_are_the_definition(dtype: torch.dtype, dropout: float) -> None:
    leaves, rest = self_attention(counts_of(2), dtype)
    seed = torch.tensor(3, device=DEVICE) if dropout else None
    gradient = torch.randn_like(leaves[0])
    output = attention(*leaves, *rest, dropout=dropout, seed=seed)
    found = [output, *torch.autograd.grad(output, leaves, gradient)]
    results = []
    for type_ in (dtype, torch.float64):
        wide = [x.detach().to(type_).requires_grad_() for x in leaves]
        output, _ = attention_reference(*wide, *rest[:2], dropout=dropout, seed=seed)
        results.append([output.detach(), *torch.autograd.grad(output, wide, gradient.to(type_))])
    for mine, definition, exact in zip(found, *results, strict=True):
        assert_as_accurate(mine.detach(), definition, exact)


def transformer_step(
    transformer: Transformer, counts: list[int], capacity: int | None = None
) -> Callable[[], list[Tensor]]:
    torch.manual_seed(0)
    content, position = torch.randn(2, sum(counts), HEADS * WIDTH, device=DEVICE)
    content.requires_grad_()
    query, direction = torch.randn(2, QUERIES * len(counts), HEADS * WIDTH, device=DEVICE)
    offsets, asked = offsets_of(counts, DEVICE), offsets_of([QUERIES] * len(counts), DEVICE)

    def step() -> list[Tensor]:
        tokens = Tokens(content, position, offsets, max(counts))
        if capacity is not None:
            tokens = tokens.with_capacity(capacity, capacity)
        with torch.autocast(DEVICE, torch.bfloat16):
            decoded, _ = transformer(tokens, Tokens(torch.zeros_like(query), query, asked, QUERIES))
        return [decoded, *torch.autograd.grad((decoded * direction).sum(), [content, *transformer.parameters()])]

    return step


@pytest.fixture
def transformer() -> Transformer:
    torch.manual_seed(1)
    return Transformer(HEADS * WIDTH, HEADS, 2, 2, 512, dropout=0.1).to(DEVICE)


@pytest.fixture
def waiting_is_an_error() -> Iterator[Callable[[], None]]:
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_waits_for_nothing(transformer: Transformer, waiting_is_an_error: Callable[[], None]) -> None:
    step = transformer_step(transformer, counts_of(2))
    step()  # compiles and times tiles
    torch.cuda.synchronize()
    waiting_is_an_error()
    step()


def test_launches() -> None:
    leaves, rest = self_attention(counts_of(8), torch.bfloat16)

    def step() -> None:
        attention(*leaves, *rest).sum().backward()

    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
    ours = [name for name in names if "backward_of" in name or name in ("forward", "add_splits")]
    assert sorted(ours) == ["backward_of_keys", "backward_of_queries", "forward"]
    assert len(names) <= 6, names  # and the sum with its gradient


def test_other_lengths_compile_nothing_anew() -> None:
    kernels = (attention_forward.forward, attention_backward.backward_of_queries, attention_backward.backward_of_keys)

    def step(counts: list[int]) -> int:
        leaves, rest = self_attention(counts, torch.bfloat16)
        attention(*leaves, *rest, dropout=0.1).sum().backward()
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)

    compiled = step([1024, 700, 513])
    for counts in ([1000, 3, 1], [801, 801, 1024], [600, 17, 999]):
        assert step(counts) == compiled


def test_the_choice_of_tiles_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(choice, "_file", lambda _: tmp_path / "attention.json")
    leaves, rest = self_attention(counts_of(2), torch.bfloat16)
    attention(*leaves, *rest).sum().backward()
    assert len(choice._chosen) == 3
    for (_, shape), tiles in choice._chosen.items():
        assert tiles in candidates(shape.kernel, "half", WIDTH)
    assert len(choice._read(tmp_path / "attention.json")) == 3


def test_a_graph_with_room_for_more_tokens(transformer: Transformer) -> None:
    """The offsets change between replays; everything else keeps its shape."""
    transformer.eval()
    capacity, batches = 2200, [counts_of(2), counts_of(2, seed=5)]
    query, direction = torch.randn(2, 2 * QUERIES, HEADS * WIDTH, device=DEVICE)
    queries = Tokens(torch.zeros_like(query), query, offsets_of([QUERIES] * 2, DEVICE), QUERIES)
    given = [
        Tokens(*torch.randn(2, sum(counts), HEADS * WIDTH, device=DEVICE), offsets_of(counts, DEVICE), max(counts))
        for counts in batches
    ]
    kept = given[0].with_capacity(capacity, 1200)
    kept = Tokens(kept.content.clone(), kept.position.clone(), kept.offsets.clone(), kept.max_count)

    def run() -> list[Tensor]:
        decoded, _ = transformer(kept, queries)
        return [decoded, *torch.autograd.grad((decoded * direction).sum(), transformer.parameters())]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tokens in (*given, given[0]):
        room = tokens.with_capacity(capacity, 1200)
        kept.content.copy_(room.content)
        kept.position.copy_(room.position)
        kept.offsets.copy_(room.offsets)
        graph.replay()
        for replayed, eager in zip([x.clone() for x in captured], run(), strict=True):
            assert torch.equal(replayed, eager)


def test_graphed_callables(transformer: Transformer) -> None:
    """PyTorch's own way to put forward and backward of a module into graphs."""

    class OfTensors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = transformer.eval()

        def forward(self, content: Tensor, position: Tensor, offsets: Tensor, query: Tensor) -> Tensor:
            asked = torch.arange(3, dtype=torch.int32, device=DEVICE) * QUERIES
            queries = Tokens(torch.zeros_like(query), query, asked, QUERIES)
            return self.transformer(Tokens(content, position, offsets, 1200), queries)[0]

    module = OfTensors()

    def inputs(seed: int) -> tuple[Tensor, ...]:
        counts = counts_of(2, seed)
        torch.manual_seed(seed)
        content, position = torch.randn(2, sum(counts), HEADS * WIDTH, device=DEVICE)
        room = Tokens(content, position, offsets_of(counts, DEVICE), max(counts)).with_capacity(2200, 1200)
        query = torch.randn(2 * QUERIES, HEADS * WIDTH, device=DEVICE)
        return room.content.requires_grad_(), room.position, room.offsets, query

    expected = [module(*inputs(seed)).detach() for seed in (1, 2)]
    graphed = torch.cuda.make_graphed_callables(module, inputs(0))
    for seed, exact in zip((1, 2), expected, strict=True):
        content, *others = inputs(seed)
        decoded = graphed(content, *others)
        (decoded * decoded.detach().roll(1, -1)).sum().backward()
        torch.testing.assert_close(decoded.detach(), exact)
        assert content.grad is not None
        assert content.grad.isfinite().all()


def test_compiled_by_inductor(transformer: Transformer) -> None:
    transformer.eval()
    eager = transformer_step(transformer, counts_of(2))()
    compiled = transformer_step(torch.compile(transformer, fullgraph=True), counts_of(2))()
    for expected, found in zip(eager, compiled, strict=True):
        limit = 4 * torch.finfo(torch.bfloat16).eps * float(expected.detach().abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=limit)


def test_second_device_while_the_first_is_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    leaves, rest = self_attention([70, 40], torch.bfloat16)
    moved = [x.detach().to("cuda:1").requires_grad_() for x in leaves]
    there = attention(*moved, *(x.to("cuda:1") for x in rest[:2]), *rest[2:])
    there.sum().backward()
    torch.testing.assert_close(there.to(DEVICE), attention(*leaves, *rest))
