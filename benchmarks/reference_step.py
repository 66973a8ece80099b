"""One training step as the paper's code base takes it: losses layer by layer from lists, and all of them read back.

Source: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 3.1 and appendix A.4.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import eager
from detr_fast.data.batch import Batch
from detr_fast.matcher import Pairs

Target = dict[str, Tensor]
EOS = 0.1
WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}


def dictionaries(batch: Batch) -> list[Target]:
    """Targets of each image with all entries that the paper's loader gives them."""
    targets, found = batch.targets, []
    bounds = targets.offsets.tolist()
    for image, (start, end) in enumerate(pairwise(bounds)):
        boxes = targets.boxes[start:end]
        size = torch.tensor(batch.images.sizes[image])
        found.append(
            {
                "boxes": boxes,
                "labels": targets.labels[start:end],
                "image_id": torch.tensor([batch.image_ids[image]]),
                "area": boxes[:, 2:].prod(1) * size.prod(),
                "iscrowd": torch.zeros(end - start, dtype=torch.int64),
                "orig_size": batch.original_sizes[image],
                "size": size,
            }
        )
    return found


class ReferenceCriterion(nn.Module):
    """All losses of all layers, each from the pairs of its own matching."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        class_weight = torch.ones(num_classes + 1)
        class_weight[-1] = EOS
        self.class_weight: Tensor
        self.register_buffer("class_weight", class_weight)

    def forward(self, outputs: dict[str, Any], targets: Sequence[Target]) -> dict[str, Tensor]:
        device = outputs["pred_logits"].device
        count = torch.as_tensor([sum(len(t["labels"]) for t in targets)], dtype=torch.float, device=device)
        ranks = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            ranks = dist.get_world_size()
        num_boxes = torch.clamp(count / ranks, min=1).item()
        losses = self._of_layer(outputs, targets, num_boxes, is_last=True)
        for layer, auxiliary in enumerate(outputs["aux_outputs"]):
            found = self._of_layer(auxiliary, targets, num_boxes)
            losses.update({f"{name}_{layer}": value for name, value in found.items()})
        return losses

    def _of_layer(
        self, outputs: dict[str, Any], targets: Sequence[Target], num_boxes: float, is_last: bool = False
    ) -> dict[str, Tensor]:
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        pairs = eager.match(logits, boxes, targets)
        place = _places(pairs)
        labels = torch.cat([target["labels"][own] for target, (_, own) in zip(targets, pairs, strict=True)])
        classes = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        classes[place] = labels
        found = {"loss_ce": F.cross_entropy(logits.transpose(1, 2), classes, self.class_weight)}
        if is_last:
            found["class_error"] = _class_error(logits[place], labels)
        with torch.no_grad():
            lengths = torch.as_tensor([len(target["labels"]) for target in targets], device=logits.device)
            objects = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
            found["cardinality_error"] = F.l1_loss(objects.float(), lengths.float())

        matched = boxes[place]
        goals = torch.cat([target["boxes"][own] for target, (_, own) in zip(targets, pairs, strict=True)], dim=0)
        found["loss_bbox"] = F.l1_loss(matched, goals, reduction="none").sum() / num_boxes
        found["loss_giou"] = (1 - torch.diag(eager.giou(matched, goals))).sum() / num_boxes
        return found


def _places(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Image and query of every pair, on the CPU."""
    images = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(pairs)])
    return images, torch.cat([queries for queries, _ in pairs])


@torch.no_grad()
def _class_error(logits: Tensor, labels: Tensor) -> Tensor:  # [pairs, C], [pairs]
    if not len(labels):
        return torch.full((), 100.0, device=labels.device)
    found = logits.topk(1, 1).indices.flatten()
    return 100 - (found == labels).float().sum() * (100 / len(labels))


class Meters:
    """The last values of every number, and their mean; a tensor is read when it is given."""

    def __init__(self) -> None:
        self.recent: dict[str, deque[float]] = {}
        self.totals: dict[str, tuple[float, int]] = {}

    def update(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            number = value.item() if isinstance(value, Tensor) else value
            self.recent.setdefault(name, deque(maxlen=20)).append(number)
            total, count = self.totals.get(name, (0.0, 0))
            self.totals[name] = total + number, count + 1


def reference_optimizer(
    model: nn.Module, learning_rate: float = 1e-4, backbone_learning_rate: float = 1e-5, weight_decay: float = 1e-4
) -> torch.optim.AdamW:
    """AdamW in the two groups of the paper; unfused."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for name, parameter in trained if "backbone" not in name]},
        {"params": [parameter for name, parameter in trained if "backbone" in name], "lr": backbone_learning_rate},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay, fused=False, foreach=True)


class ReferenceStep:
    """``step(batch)`` with a batch on the host; returns the loss."""

    def __init__(
        self,
        model: nn.Module,  # a ReferenceDETR, or DistributedDataParallel around it
        criterion: ReferenceCriterion,
        optimizer: torch.optim.Optimizer,
        clip_norm: float = 0.1,
    ) -> None:
        self.model, self.criterion, self.optimizer, self.clip_norm = model.train(), criterion, optimizer, clip_norm
        self.meters = Meters()

    def __call__(self, batch: Batch, targets: Sequence[Target]) -> float:  # targets: those of dictionaries(batch)
        device = self.criterion.class_weight.device
        pixels, padding = batch.images.pixels.to(device), batch.images.padding.to(device)
        moved = [{name: value.to(device) for name, value in target.items()} for target in targets]
        losses = self.criterion(self.model(pixels, padding), moved)
        total = weighted_sum(losses)
        value = self._read(losses)
        self.optimizer.zero_grad()
        total.backward()
        if self.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.meters.update(lr=self.optimizer.param_groups[0]["lr"])
        return value

    def _read(self, losses: dict[str, Tensor]) -> float:
        """Logs everything and stops where the loss is not finite."""
        reduced = _reduced(losses)
        unscaled = {f"{name}_unscaled": value for name, value in reduced.items()}
        scaled = {name: value * w for name, value in reduced.items() if (w := _weight(name)) is not None}
        total: Any = sum(scaled.values())
        value = total.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"loss is {value}")
        self.meters.update(loss=value, **scaled, **unscaled)
        self.meters.update(class_error=reduced["class_error"])
        return value


def weighted_sum(losses: dict[str, Tensor]) -> Tensor:
    total: Any = sum(losses[name] * weight for name in losses if (weight := _weight(name)) is not None)
    return total


def _weight(name: str) -> float | None:
    """Every decoder layer counts the same; None for what is only logged."""
    return WEIGHTS.get(name.rstrip("0123456789").rstrip("_"))


@torch.no_grad()
def _reduced(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over all ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return losses
    names = sorted(losses)
    values = torch.stack([losses[name] for name in names])
    dist.all_reduce(values)
    return dict(zip(names, values / dist.get_world_size(), strict=True))
