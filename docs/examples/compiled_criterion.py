"""Model and criterion in one compiled function, without graph breaks and without recompiling when targets change.

    python docs/examples/compiled_criterion.py

`aot_eager` compiles in seconds and shows that all is one graph; leave `backend` out for Inductor's kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from detr_fast import HungarianMatcher, Predictions, SetCriterion, Targets

LAYERS, IMAGES, QUERIES, CLASSES = 3, 2, 50, 20


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(LAYERS, 1, QUERIES, 64))
        self.classes, self.boxes = nn.Linear(64, CLASSES + 1), nn.Linear(64, 4)

    def forward(self, features: Tensor) -> Predictions:
        x = self.queries + features[:, None]
        return Predictions(self.classes(x), self.boxes(x).sigmoid())


def targets_of(counts: tuple[int, ...], seed: int) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    return Targets.pack(
        [
            {
                "labels": torch.randint(0, CLASSES, (n,), generator=generator),
                "boxes": 0.1 + 0.4 * torch.rand(n, 4, generator=generator),
            }
            for n in counts
        ],
        CLASSES,
    )


def main(backend: str = "aot_eager") -> tuple[list[float], int]:
    """Losses of three batches with other numbers of objects, and how many graphs were compiled."""
    torch.manual_seed(0)
    weights = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    # "skip": the default would look at the costs on a CPU, to raise an error that names what is not finite.
    matcher = HungarianMatcher(1, 5, 2, invalid="skip")
    model, criterion = Heads(), SetCriterion(CLASSES, matcher, weights, 0.1, ["labels", "boxes"])

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def loss_of(features: Tensor, targets: Targets) -> Tensor:
        return criterion.weighted_loss(model(features), targets)[0]

    counters.clear()
    losses = []
    for seed, counts in enumerate(((3, 5), (7, 2), (11, 30))):
        total = loss_of(torch.randn(IMAGES, 64), targets_of(counts, seed))
        total.backward()
        losses.append(float(total.detach()))
    return losses, counters["stats"]["unique_graphs"]


if __name__ == "__main__":
    losses, graphs = main()
    print(f"losses {losses}, {graphs} graph(s) compiled")
