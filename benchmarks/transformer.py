"""Encoder and decoder of DETR, forward and backward, on a batch of mixed sizes: packed against padded; no dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Bar, Benchmark, DisagreementError, Faster, Options, Smaller
from benchmarks.model import twins
from benchmarks.scenes import training_sizes
from detr_fast.structures import Tokens, offsets_of

WIDTH, QUERIES = 256, 100
BARS: tuple[Bar, ...] = (Faster("transformers", 1.3),)


def benchmarks(options: Options) -> Iterator[Benchmark]:
    ours, theirs = (model.to(options.device).train() for model in twins())
    stride = 128 if options.quick else 32
    packed, padded = ours.get_submodule("transformer"), theirs.get_submodule("model")
    yield forward_and_backward(packed, padded, Batch(4, stride, options.device), BARS)
    if options.device.type == "cuda":
        yield forward_and_backward(
            packed,
            padded,
            Batch(8, 16, options.device),
            (Smaller("transformers", 5), Faster("transformers, sdpa", 1.5)),
        )


class Batch:
    """Locations of images and queries, packed and padded, with gradients to come back."""

    def __init__(self, images: int, stride: int, device: torch.device) -> None:
        self.sizes = training_sizes(images)
        self.counts = [math.ceil(height / stride) * math.ceil(width / stride) for height, width in self.sizes]
        height, width = (max(math.ceil(size[axis] / stride) for size in self.sizes) for axis in (0, 1))
        generator = torch.Generator().manual_seed(0)
        draws = [torch.randn(sum(self.counts), WIDTH, generator=generator) for _ in range(2)]
        self.content, self.position = (x.to(device) for x in draws)
        self.padded, self.padded_position = (self._pad(x, height * width) for x in (self.content, self.position))
        rows = torch.arange(height * width, device=device)
        self.present = (rows < torch.tensor(self.counts, device=device)[:, None]).long()
        self.gradient = torch.randn(images, QUERIES, WIDTH, generator=generator).to(device)
        self.offsets = offsets_of(self.counts, device)
        self.query_offsets = offsets_of([QUERIES] * images, device)
        for leaf in (self.content, self.padded):
            leaf.requires_grad_()

    def _pad(self, x: Tensor, length: int) -> Tensor:  # [M, D] -> [B, length, D]
        padded = x.new_zeros(len(self.counts), length, x.shape[1])
        for image, part in enumerate(x.split(self.counts)):
            padded[image, : len(part)] = part
        return padded


def forward_and_backward(ours: nn.Module, theirs: Any, batch: Batch, bars: tuple[Bar, ...]) -> Benchmark:
    """Decoded queries, and the gradients of locations and of one weight in the first layer."""
    query = theirs.query_position_embeddings.weight.detach()
    images = len(batch.counts)

    def packed(transformer: Callable[..., Any]) -> Callable[[], list[Tensor]]:
        def step() -> list[Tensor]:
            tokens = Tokens(batch.content, batch.position, batch.offsets, max(batch.counts))
            position = query.repeat(images, 1)
            queries = Tokens(torch.zeros_like(position), position, batch.query_offsets, QUERIES)
            decoded, _ = transformer(tokens, queries, every_layer=False)
            return _results(ours, decoded[-1].unflatten(0, (images, QUERIES)), batch.content, batch.gradient)

        return step

    def padded(implementation: str) -> Callable[[], list[Tensor]]:
        def step() -> list[Tensor]:
            for part in (theirs.encoder, theirs.decoder):
                part.config._attn_implementation = implementation
                part.config.auxiliary_loss = False  # else it norms between layers, which no checkpoint was trained with
            memory = theirs.encoder(
                inputs_embeds=batch.padded,
                attention_mask=batch.present,
                spatial_position_embeddings=batch.padded_position,
            ).last_hidden_state
            decoded = theirs.decoder(
                inputs_embeds=torch.zeros_like(batch.gradient),
                spatial_position_embeddings=batch.padded_position,
                object_queries_position_embeddings=query.expand(images, -1, -1),
                encoder_hidden_states=memory,
                encoder_attention_mask=batch.present,
            ).last_hidden_state
            return _results(theirs, decoded, batch.padded, batch.gradient)

        return step

    def rows(x: Tensor, counts: list[int]) -> Tensor:
        """Of images one after the other: what is padded, or packed already."""
        return x if x.dim() == 2 else torch.cat([part[:n] for part, n in zip(x, counts, strict=True)])

    counts = [QUERIES] * images, batch.counts
    exact = [rows(x, n) for x, n in zip(padded("eager")(), counts, strict=True)]

    def check(provider: str, result: list[Tensor]) -> None:
        """Against transformers' eager code, which shares nothing with ours."""
        for name, found, n, expected in zip(("queries", "gradient"), result, counts, exact, strict=True):
            # A sum that is almost 0 may fall on either side of a ReLU, which moves a row: such rows are few.
            errors = (rows(found, n) - expected).abs().amax(-1)
            error = float(errors.quantile(0.99) / expected.abs().max())
            if not error <= 1e2 * torch.finfo(torch.float32).eps:
                raise DisagreementError(f"{provider}: {name} of the transformers differ by {error:.3g} of the largest")

    return Benchmark(
        case="encoder and decoder, forward and backward",
        axis="images x locations",
        value=f"{images} x {min(batch.counts)}-{max(batch.counts)}",
        providers={
            "detr_fast": packed(ours),
            "detr_fast, torch.compile": packed(torch.compile(ours, fullgraph=True, dynamic=True)),
            "transformers": padded("eager"),
            "transformers, sdpa": padded("sdpa"),
        },
        check=check,
        bars=bars,
    )


def _results(module: nn.Module, decoded: Tensor, locations: Tensor, gradient: Tensor) -> list[Tensor]:
    """Decoded queries and the gradient of locations; those of all weights are computed and dropped."""
    module.zero_grad()
    locations.grad = None
    decoded.backward(gradient)
    assert locations.grad is not None
    return [decoded.detach(), locations.grad]
