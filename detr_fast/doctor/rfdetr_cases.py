"""RF-DETR's matcher and criterion on random outputs, as many as its base model has in training."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from detr_fast.doctor.code_bases import Case, Result

LAYERS, QUERIES, GROUPS, CLASSES = 3, 300, 13, 91
COUNTS = (12, 3)  # objects of each image
_TERMS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}


def cases(package: str, device: torch.device) -> Mapping[str, Callable[[], Case]]:
    return {
        "matcher": lambda: Case.patched(package, _matcher(device)),
        "criterion": lambda: Case.patched(package, _criterion(device)),
    }


def _inputs(device: torch.device) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Logits [L, B, groups * Q, C] and boxes [L, B, groups * Q, 4], which require a gradient, and targets."""
    generator = torch.Generator().manual_seed(0)
    shape = (LAYERS, len(COUNTS), GROUPS * QUERIES)
    logits = torch.randn(*shape, CLASSES, generator=generator) * 2 - 1
    boxes = torch.rand(*shape, 4, generator=generator) * 0.5 + 0.1
    targets = [
        {
            "labels": torch.randint(0, CLASSES, (count,), generator=generator).to(device),
            "boxes": (torch.rand(count, 4, generator=generator) * 0.5 + 0.1).to(device),
        }
        for count in COUNTS
    ]
    return logits.to(device).requires_grad_(), boxes.to(device).requires_grad_(), targets


def _package_matcher() -> Any:
    from rfdetr.models.matcher import HungarianMatcher

    return HungarianMatcher(cost_class=2, cost_bbox=5, cost_giou=2)


def _matcher(device: torch.device) -> Callable[[], Result]:
    matcher = _package_matcher()
    logits, boxes, targets = _inputs(device)
    outputs = {"pred_logits": logits[-1].detach(), "pred_boxes": boxes[-1].detach()}

    def run() -> Result:
        return Result(pairs=[side for pair in matcher(outputs, targets, group_detr=GROUPS) for side in pair])

    return run


def _criterion(device: torch.device) -> Callable[[], Result]:
    from rfdetr.models.criterion import SetCriterion

    losses = ["labels", "boxes", "cardinality"]
    options = {"group_detr": GROUPS, "ia_bce_loss": True}
    criterion = SetCriterion(CLASSES, _package_matcher(), _TERMS, 0.25, losses, **options).to(device).train()
    logits, boxes, targets = _inputs(device)
    rows = [{"pred_logits": x, "pred_boxes": y} for x, y in zip(logits, boxes, strict=True)]
    outputs = {**rows[-1], "aux_outputs": rows[:-1]}

    def run() -> Result:
        found = criterion(outputs, targets)
        weighted = [_TERMS[_term(name)] * value for name, value in found.items() if _term(name) in _TERMS]
        total = torch.stack(weighted).sum()
        gradients = torch.autograd.grad(total, (logits, boxes), retain_graph=True)
        return Result({name: value.detach() for name, value in found.items()}, gradients)

    return run


def _term(name: str) -> str:
    """Without the number of the layer."""
    return re.sub(r"_\d+$", "", name)
