"""Tries an installed detr_fast: every native library, the packaged files and the command line, against plain formulas.

    python -I tests/packaging/smoke.py

Needs nothing but what a wheel of detr_fast installs, and takes seconds. It refuses a package that lies in a checkout,
so that a wheel without its libraries cannot borrow them from there; ``--anywhere`` allows it. Exit code 1 and the first
check that fails, or 0.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def check(holds: Any, what: str) -> None:
    """As an assertion, but also where Python was told to leave those out."""
    if not holds:
        raise SystemExit(f"smoke: {what}")


def least_cost(cost: Any) -> float:
    """Of every assignment of the rows to different columns, the cost of the cheapest."""
    rows, columns = cost.shape
    choices = itertools.permutations(range(columns), rows)
    return min(sum(float(cost[row, column]) for row, column in enumerate(choice)) for choice in choices)


def installed_package(anywhere: bool) -> Path:
    import detr_fast

    folder = Path(detr_fast.__file__).resolve().parent
    if not anywhere:
        # Of another prefix, or beside setup.py: an editable installation, or a checkout on the path.
        prefix = Path(sys.prefix).resolve()
        check(folder.is_relative_to(prefix), f"detr_fast must be installed in {prefix}, got {folder}")
        check(not (folder.parent / "setup.py").exists(), f"detr_fast must not be a checkout's, got {folder}")
    for name in ("py.typed", "clusters/slurm.sh", "clusters/kubeflow.yaml"):
        check((folder / name).is_file(), f"the package must contain {name}")
    return folder


def numpy_without_torch() -> None:
    import numpy as np

    from detr_fast.numpy import linear_sum_assignment

    check("torch" not in sys.modules, "detr_fast.numpy must not import torch")
    cost = np.random.default_rng(0).normal(size=(4, 6))
    for dtype in (np.float64, np.float32):
        rows, columns = linear_sum_assignment(cost.astype(dtype))
        check(rows.tolist() == [0, 1, 2, 3], "linear_sum_assignment: rows must be in order")
        total = float(cost[rows, columns].sum())
        check(abs(total - least_cost(cost)) < 1e-5, f"linear_sum_assignment: {total} is not the least cost")


def example() -> tuple[Any, Any, list[dict[str, Any]]]:
    """Logits [2, 3, 6, 5] and boxes [2, 3, 6, 4] of two layers, and the targets of three images, the second empty."""
    import torch

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 5, generator=generator)
    boxes = torch.rand(2, 3, 6, 4, generator=generator) * 0.4 + 0.2
    targets = []
    for count in (3, 0, 2):
        own = {"labels": torch.randint(0, 4, (count,), generator=generator)}
        targets.append(own | {"boxes": torch.rand(count, 4, generator=generator) * 0.4 + 0.2})
    return logits, boxes, targets


def giou(box: Any, other: Any) -> Any:
    """Of cxcywh boxes [..., 4]."""
    import torch

    low, high = box[..., :2] - box[..., 2:] / 2, box[..., :2] + box[..., 2:] / 2
    other_low, other_high = other[..., :2] - other[..., 2:] / 2, other[..., :2] + other[..., 2:] / 2
    intersection = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0).prod(-1)
    hull = (torch.maximum(high, other_high) - torch.minimum(low, other_low)).prod(-1)
    union = box[..., 2:].prod(-1) + other[..., 2:].prod(-1) - intersection
    return intersection / union - (hull - union) / hull


def costs_of_image(logits: Any, boxes: Any, target: dict[str, Any]) -> Any:
    """DETR's matching cost [targets, Q] with weights 1, 5, 2."""
    probability = logits.softmax(-1)[:, target["labels"]].T
    distance = (target["boxes"][:, None] - boxes).abs().sum(-1)
    return 5 * distance - probability - 2 * giou(target["boxes"][:, None], boxes)


def matcher_and_criterion() -> None:
    import torch
    import torch.nn.functional as F

    from detr_fast import HungarianMatcher, Predictions, SetCriterion, Targets

    logits, boxes, targets = example()
    matcher = HungarianMatcher(cost_class=1, cost_bbox=5, cost_giou=2)
    pairs = matcher({"pred_logits": logits[-1], "pred_boxes": boxes[-1]}, targets)
    classes, box_loss, giou_loss = torch.full((3, 6), 4), torch.tensor(0.0), torch.tensor(0.0)
    for image, ((queries, own), target) in enumerate(zip(pairs, targets, strict=True)):
        check(len(queries) == len(target["labels"]), f"HungarianMatcher: image {image} must be matched whole")
        cost = costs_of_image(logits[-1, image], boxes[-1, image], target)
        total = float(cost[own, queries].sum())
        check(abs(total - least_cost(cost)) < 1e-4, f"HungarianMatcher: {total} of image {image} is not the least cost")
        classes[image, queries] = target["labels"][own]
        box_loss += (boxes[-1, image, queries] - target["boxes"][own]).abs().sum() / 5
        giou_loss += (1 - giou(boxes[-1, image, queries], target["boxes"][own])).sum() / 5

    weights = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    criterion = SetCriterion(4, matcher, weights, eos_coef=0.1, losses=["labels", "boxes", "cardinality"])
    logits.requires_grad_()
    packed = Targets.pack(targets, num_classes=4)
    total, losses = criterion.weighted_loss(Predictions(logits, boxes), packed)
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.1])
    expected = {"loss_ce": F.cross_entropy(logits[-1].flatten(0, 1), classes.flatten(), weight)}
    expected |= {"loss_bbox": box_loss, "loss_giou": giou_loss}
    for name, value in expected.items():
        got, must = float(losses[name]), float(value.detach())
        check(abs(got - must) < 1e-4, f"SetCriterion: {name} must be {must}, got {got}")
    total.backward()
    found = logits.grad[-1].clone()
    (definition,) = torch.autograd.grad(expected["loss_ce"], logits)
    check(torch.allclose(found, definition[-1], atol=1e-5), "SetCriterion: the gradient of loss_ce is wrong")


def ops() -> None:
    import torch

    from detr_fast.ops import assign_with_prices, attention, batch_linear_assignment, instruction_set
    from detr_fast.structures import offsets_of

    print(f"CPU kernels: {instruction_set()}")
    cost = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    found = batch_linear_assignment(cost)
    proved = assign_with_prices(cost.reshape(1, 8, 6), torch.tensor([0, 4, 8], dtype=torch.int32))
    prices = proved.target_price.view(2, 4).sum(1) + proved.query_price.view(2, 6).sum(1)
    for index in range(2):
        total = float(cost[index].gather(1, found[index][:, None].long()).sum())
        check(abs(total - least_cost(cost[index])) < 1e-5, "batch_linear_assignment: not the least cost")
        check(abs(total - float(prices[index])) < 1e-5, "assign_with_prices: the prices do not prove the cost")

    counts = [3, 5]
    query, key, value = torch.randn(3, sum(counts), 2, 8, generator=torch.Generator().manual_seed(2))
    offsets = offsets_of(counts, query.device)
    output = attention(query, key, value, offsets, offsets, 5, 5)
    for start, end in ((0, 3), (3, 8)):
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) / math.sqrt(8)
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[start:end])
        check(torch.allclose(output[start:end], expected, atol=1e-5), "attention: differs from the formula")


def compiled() -> None:
    """The ops have fake kernels: matching and losses are traced as one graph. Without a C++ compiler."""
    import torch

    from detr_fast import HungarianMatcher, Predictions, SetCriterion, Targets

    logits, boxes, targets = example()
    packed = Targets.pack(targets, num_classes=4)
    matcher = HungarianMatcher(1, 5, 2, invalid="skip")
    criterion = SetCriterion(4, matcher, {"loss_ce": 1.0, "loss_bbox": 5.0}, eos_coef=0.1, losses=["labels", "boxes"])

    def loss(logits: Any, boxes: Any) -> Any:
        return criterion.weighted_loss(Predictions(logits, boxes), packed)[0]

    whole = torch.compile(loss, backend="aot_eager", fullgraph=True)
    difference = float((whole(logits, boxes) - loss(logits, boxes)).abs())
    check(difference < 1e-5, f"torch.compile: differs from eager by {difference}")


def every_module() -> None:
    """None needs a package that the wheel does not install, but Triton's kernels, which are imported when called."""
    import importlib
    import pkgutil

    import detr_fast

    for module in pkgutil.walk_packages(detr_fast.__path__, "detr_fast."):
        if not module.name.startswith("detr_fast.ops.triton."):
            importlib.import_module(module.name)


def command_line(folder: Path) -> None:
    from detr_fast.data.shapes import write_shapes

    program = Path(sys.executable).parent / "detr-fast"
    check(program.is_file(), f"{program} must be installed")

    def said(*words: str) -> str:
        done = subprocess.run([program, *words], capture_output=True, text=True, cwd=folder)
        check(done.returncode == 0, f"detr-fast {' '.join(words)}: exit code {done.returncode}\n{done.stderr}")
        return done.stdout

    check("COMMAND" in said("--help"), "detr-fast --help must list the commands")
    check("--train.batch_size" in said("train", "--help"), "detr-fast train --help must list the settings")
    check(said("version").strip(), "detr-fast version must print one")
    check("all is well" in said("doctor", "--quick"), "detr-fast doctor must find all well")
    write_shapes(folder / "shapes", {"train": 4, "val": 2}, image_size=64, seed=0)
    check("train" in said("check-data", "shapes"), "detr-fast check-data must summarise the data")


def main() -> None:
    folder = installed_package("--anywhere" in sys.argv[1:])
    numpy_without_torch()
    ops()
    matcher_and_criterion()
    compiled()
    every_module()
    with tempfile.TemporaryDirectory() as scratch:
        command_line(Path(scratch))
    import torch

    print(f"{folder} works: Python {sys.version.split()[0]}, PyTorch {torch.__version__}")


if __name__ == "__main__":
    main()
