"""Every CUDA kernel once or twice, small: what compute-sanitizer runs."""

from __future__ import annotations

import torch
from ops.problems import matchings, predictions_and_targets

from detr_fast.ops import assign_with_prices, attention, match, matching_cost, set_loss, unite, weighted_set_loss
from detr_fast.structures import offsets_of

DEVICE = "cuda"


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for counts in ([5, 0, 40], [5, 70, 130], [20, 300], [90, 3]):  # one for each search, the last with T > Q
        cost = torch.rand(1, sum(counts), 320 if max(counts) != 90 else 40, generator=generator).round(decimals=1)
        cost[0, 3, ::2] = torch.nan
        for dtype in (torch.float32, torch.float64):
            assign_with_prices(cost.to(DEVICE, dtype), offsets_of(counts, DEVICE))
    many = [x.to(DEVICE) for x in predictions_and_targets((2, 0, 5) * 30, 3, 70, 6)]  # tiles of 64, heavy images first
    set_loss(many[0], many[1], match(*many, max_count=5), *many[2:])
    for kind in ("softmax", "focal"):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            inputs = [x.to(DEVICE) for x in predictions_and_targets((3, 0, 20), 2, 70, 20, dtype)]
            logits, boxes = (x.requires_grad_() for x in inputs[:2])
            pairs = match(*inputs, kind=kind, max_count=20)  # type: ignore[arg-type]
            matching_cost(*inputs, kind=kind)  # type: ignore[arg-type]
            weight = torch.ones(2, 5, device=DEVICE)
            weighted_set_loss(logits, boxes, pairs, *inputs[2:], weight, kind=kind).total.backward()  # type: ignore[arg-type]
    unite(*(x.to(DEVICE) for x in matchings(7, (5, 0, 40), 300, 0.5, 0)), 300)
    attend()
    torch.cuda.synchronize()


def attend() -> None:
    """Attention: partial blocks, empty images, dropout, masks, split keys."""
    queries, keys = [70, 0, 5, 3], [130, 9, 0, 1]
    offsets = offsets_of(queries, DEVICE), offsets_of(keys, DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        for width in (24, 32, 64):
            query, key, value = (
                torch.randn(sum(counts) + 2, 2, width, device=DEVICE, dtype=dtype).requires_grad_()
                for counts in (queries, keys, keys)
            )
            for mask in (None, torch.rand(1, 1, 70, 130, device=DEVICE) < 0.5):
                output = attention(query, key, value, *offsets, 70, 130, dropout=0.1, mask=mask)
                output.square().sum().backward()


if __name__ == "__main__":
    main()
