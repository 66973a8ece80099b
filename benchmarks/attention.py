"""Attention of DETR at the sizes it trains on: ours on packed tokens against eager, SDPA with a mask, FlashAttention.

The padded rivals get what their users have: a batch padded to its largest image, with a mask where images differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Bar, Benchmark, DisagreementError, Faster, Options, Smaller, Within, with_graph
from benchmarks.scenes import training_sizes
from detr_fast.ops.attention import attention, attention_reference
from detr_fast.structures import offsets_of

HEADS, WIDTH = 8, 32
QUERIES = 100
# Exponentials limit the forward pass: 16 a clock on a multiprocessor, at the 1.755 GHz of an H100 or H200 under load.
EXPONENTIALS = 16 * 1.755e9


@dataclass(frozen=True)
class Case:
    name: str
    images: int
    stride: int  # of the feature map
    queries: int | None = None  # of each image; None: its own locations
    keys: int | None = None  # likewise
    bars: Sequence[Bar] = ()


def encoder(images: int, stride: int, *bars: Bar) -> Case:
    return Case("encoder self-attention" + (", DC5" if stride == 16 else ""), images, stride, bars=bars)


def faster(**by: float) -> tuple[Bar, ...]:
    """On the device alone: graph against graph."""
    return tuple(Faster(f"{than}, graph", times, "detr_fast, graph") for than, times in by.items())


ON_DEVICE = (
    encoder(8, 32, *faster(eager=5, sdpa=2.5, varlen=1.15)),
    encoder(32, 32, *faster(eager=5, sdpa=2.5, varlen=1.15)),
    encoder(8, 16, *faster(eager=8, sdpa=3, varlen=1.15), Smaller("eager", 5)),
    Case("decoder cross-attention", 8, 32, QUERIES, None, faster(sdpa=1.5)),
    Case("decoder cross-attention", 2, 32, QUERIES, None, faster(sdpa=1.5)),
    Case("decoder self-attention", 8, 32, QUERIES, QUERIES, faster(sdpa=1.5)),
)
ON_CPU = (
    encoder(4, 32),
    Case("decoder cross-attention", 4, 32, QUERIES),
    Case("decoder self-attention", 4, 32, QUERIES, QUERIES),
)


def benchmarks(options: Options) -> Iterator[Benchmark]:
    on_device = options.device.type == "cuda"
    for case in ON_DEVICE if on_device else ON_CPU:
        yield forward_and_backward(Inputs.of(case, options), case)
        if options.quick:
            return
    if on_device:
        for dropout in (0.0, 0.1):
            yield forward_only(Inputs.of(encoder(8, 16), options), dropout)


class Inputs:
    """Packed queries, keys and values ``[N, H, W]``, and the same padded ``[B, H, tokens, W]``."""

    def __init__(
        self, query_counts: Sequence[int], key_counts: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(count: int) -> Tensor:
            return torch.randn(count, HEADS, WIDTH, generator=generator).to(device, dtype)

        self.counts = query_counts, key_counts
        self.packed = [draw(sum(query_counts)), draw(sum(key_counts)), draw(sum(key_counts))]
        self.gradient = draw(sum(query_counts))
        self.offsets = offsets_of(query_counts, device), offsets_of(key_counts, device)
        self.most = max(query_counts), max(key_counts)
        self.padded = [_padded(x, n) for x, n in zip(self.packed, (query_counts, key_counts, key_counts), strict=True)]
        self.padded_gradient = _padded(self.gradient, query_counts)
        self.mask: Tensor | None = None  # [B, 1, 1, keys], True attends; none where nothing is padded
        if len(set(key_counts)) > 1:
            lengths = torch.tensor(key_counts, device=device)
            self.mask = (torch.arange(self.most[1], device=device) < lengths[:, None])[:, None, None]
        for x in (*self.packed, *self.padded):
            x.requires_grad_()

    @classmethod
    def of(cls, case: Case, options: Options) -> Inputs:
        sizes = training_sizes(2 if options.quick else case.images)
        stride = 8 * case.stride if options.quick else case.stride
        cells = [math.ceil(height / stride) * math.ceil(width / stride) for height, width in sizes]
        queries = cells if case.queries is None else [case.queries] * len(cells)
        keys = cells if case.keys is None else [case.keys] * len(cells)
        dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
        return cls(queries, keys, dtype, options.device)

    @property
    def scores(self) -> int:
        return HEADS * sum(q * k for q, k in zip(*self.counts, strict=True))

    def value(self) -> str:
        return f"{len(self.counts[0])} x {_span(self.counts[0])} x {_span(self.counts[1])}"


def _span(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)}-{max(counts)}"


def _padded(x: Tensor, counts: Sequence[int]) -> Tensor:  # [N, H, W] -> [B, H, most, W]
    rows = torch.nn.utils.rnn.pad_sequence(list(x.split(list(counts))), batch_first=True)
    return rows.transpose(1, 2).contiguous()


def forward_and_backward(inputs: Inputs, case: Case) -> Benchmark:
    device = inputs.gradient.device

    def packed(run: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        def step() -> list[Tensor]:
            output = run(*inputs.packed)
            return [output.detach(), *torch.autograd.grad(output, inputs.packed, inputs.gradient)]

        return step

    def padded(run: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        def step() -> list[Tensor]:
            output = run(*inputs.padded)
            return [output.detach(), *torch.autograd.grad(output, inputs.padded, inputs.padded_gradient)]

        return step

    runs = {
        "detr_fast": packed(lambda q, k, v: attention(q, k, v, *inputs.offsets, *inputs.most)),
        "eager": padded(lambda q, k, v: _eager(q, k, v, inputs.mask)),
        "sdpa": padded(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask)),
    }
    if device.type == "cuda":
        runs["varlen"] = packed(_varlen(inputs))
    providers: dict[str, Callable[[], object]] = {}
    for name, run in runs.items():
        providers |= with_graph(run, device, name)
    return Benchmark(
        case=f"{case.name}, forward and backward",
        axis="images x queries x keys",
        value=inputs.value(),
        providers=providers,
        check=Check(inputs),
        bars=case.bars,
    )


def forward_only(inputs: Inputs, dropout: float) -> Benchmark:
    """Against the rate of exponentials; dropout must cost at most 60 % more."""
    device = inputs.gradient.device
    query, key, value = (x.detach() for x in inputs.packed)
    seed = torch.tensor(1, device=device) if dropout else None

    def run() -> list[Tensor]:
        return [attention(query, key, value, *inputs.offsets, *inputs.most, dropout=dropout, seed=seed)]

    bars = []
    if device.type == "cuda":
        rate = torch.cuda.get_device_properties(device).multi_processor_count * EXPONENTIALS
        limit = inputs.scores / rate * 1e6 / 0.6
        bars = [Within(limit * (1.6 if dropout else 1), "detr_fast, graph")]
    return Benchmark(
        case="encoder self-attention, DC5, forward" + (f", dropout {dropout}" if dropout else ""),
        axis="images x queries x keys",
        value=inputs.value(),
        providers=with_graph(run, device),
        check=Check(inputs, dropout, seed),
        bars=bars,
    )


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """As ``nn.MultiheadAttention`` computes it where weights are asked for, which is the published DETR's default."""
    images, heads, count, width = query.shape
    query, key, value = (x.flatten(0, 1) for x in (query * WIDTH**-0.5, key, value))
    if mask is None:
        scores = query @ key.mT
    else:
        added = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        added = added.expand(-1, heads, -1, -1).flatten(0, 1)
        scores = torch.baddbmm(added, query, key.mT)
    return (scores.softmax(-1) @ value).view(images, heads, count, width)


def _varlen(inputs: Inputs) -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found = varlen_attn(query, key, value, *inputs.offsets, *inputs.most)
        assert isinstance(found, Tensor)
        return found

    return run


class Check:
    """Output and gradients of real tokens within twice the error of the definition in the same type, and what summing
    so many terms in another order costs."""

    def __init__(self, inputs: Inputs, dropout: float = 0.0, seed: Tensor | None = None) -> None:
        self.counts = inputs.counts
        self.roundings = max(inputs.most) ** 0.5
        results = []
        for dtype in (torch.float64, inputs.gradient.dtype):
            leaves = query, key, value = [x.detach().to(dtype).requires_grad_() for x in inputs.packed]
            output, _ = attention_reference(query, key, value, *inputs.offsets, dropout=dropout, seed=seed)
            gradients = torch.autograd.grad(output, leaves, inputs.gradient.to(dtype))
            results.append([output.detach(), *gradients])
        self.exact, own = results
        pairs = zip(own, self.exact, strict=True)
        self.allowed = [2 * float((x.double() - y).abs().max()) for x, y in pairs]

    def __call__(self, provider: str, result: list[Tensor]) -> None:
        names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
        counts = (self.counts[0], self.counts[0], self.counts[1], self.counts[1])
        judged = list(zip(names, self.exact, self.allowed, counts, strict=True))
        # The forward pass alone gives the output only.
        for (name, exact, allowed, count), found in zip(judged[: len(result)], result, strict=True):
            if found.dim() == 4:
                found = torch.cat([x[:, :n].transpose(0, 1) for x, n in zip(found, count, strict=True)])
            error = float((found.double() - exact).abs().max())
            tolerance = allowed + self.roundings * torch.finfo(torch.float32).eps * float(exact.abs().max())
            if not error <= tolerance:
                raise DisagreementError(f"{provider}: {name} is off by {error:.3g}, allowed {tolerance:.3g}")
