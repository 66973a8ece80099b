"""A plain PyTorch loop whose matching and losses are one CUDA graph: nothing in a step waits for the GPU.

    python docs/examples/criterion_in_a_graph.py

Needs a CUDA device. The model stands for any that returns logits ``[L, B, Q, C + 1]`` and boxes ``[L, B, Q, 4]``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from detr_fast import HungarianMatcher, Predictions, SetCriterion, Targets

LAYERS, IMAGES, QUERIES, CLASSES = 6, 16, 100, 91


class Heads(nn.Module):
    """Learned queries and two linear heads; enough to have gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(LAYERS, 1, QUERIES, 256))
        self.classes, self.boxes = nn.Linear(256, CLASSES + 1), nn.Linear(256, 4)

    def forward(self, features: Tensor) -> Predictions:  # [IMAGES, 256]
        x = self.queries + features[:, None]
        return Predictions(self.classes(x), self.boxes(x).sigmoid())


def batches(count: int, device: str) -> Iterator[tuple[Tensor, Targets]]:
    """Random features, and between none and 20 objects an image, packed on the CPU as a data loader would."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        counts = torch.randint(0, 21, (IMAGES,), generator=generator).tolist()
        targets = [
            {
                "labels": torch.randint(0, CLASSES, (n,), generator=generator),
                "boxes": 0.1 + 0.4 * torch.rand(n, 4, generator=generator),
            }
            for n in counts
        ]
        yield torch.randn(IMAGES, 256, generator=generator).to(device), Targets.pack(targets, CLASSES)


def main(steps: int = 50, device: str = "cuda") -> list[float]:
    """Trains and returns the losses."""
    torch.manual_seed(0)
    model = Heads().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    weights = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    weights |= {f"{name}_{layer}": weight for name, weight in weights.items() for layer in range(LAYERS - 1)}
    criterion = SetCriterion(CLASSES, HungarianMatcher(1, 5, 2), weights, 0.1, ["labels", "boxes"]).to(device)

    loss_of, totals = None, []
    for features, targets in batches(steps, device):
        predictions = model(features)
        if loss_of is None:  # once; up to 512 objects in a batch and 64 in an image
            loss_of = criterion.capture(predictions, capacity=512, max_count=64)
        total, _ = loss_of(predictions, targets)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.detach())  # stays on the device
    print(criterion.matcher_report() or "every pair had a finite cost")
    return torch.stack(totals).tolist()  # the only time that anything is read


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("criterion_in_a_graph: needs a CUDA device, found none")
    losses = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
