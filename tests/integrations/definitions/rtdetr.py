"""RT-DETR's matchers and criteria as the paper's code computes them, one decoder layer and one loss at a time.

Plain PyTorch and SciPy, written from the published facts; knows nothing of detr_fast. Pairs of an image are
(queries, targets), queries ascending.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def corners(boxes: Tensor, clamps: bool = False) -> Tensor:
    """xyxy of cxcywh; D-FINE takes a negative size as 0."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    if clamps:
        size = size.clamp(min=0)
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def iou_and_giou(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Of xyxy boxes, element by element with broadcasting; no epsilon anywhere."""
    overlap = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp(min=0)
    inter = overlap[..., 0] * overlap[..., 1]
    area = (one[..., 2] - one[..., 0]) * (one[..., 3] - one[..., 1])
    other_area = (other[..., 2] - other[..., 0]) * (other[..., 3] - other[..., 1])
    union = area + other_area - inter
    hull = torch.maximum(one[..., 2:], other[..., 2:]) - torch.minimum(one[..., :2], other[..., :2])
    hull_area = hull[..., 0] * hull[..., 1]
    iou = inter / union
    return iou, iou - (hull_area - union) / hull_area


def overlaps_of_pairs(boxes: Tensor, goals: Tensor, clamps: bool) -> tuple[Tensor, Tensor]:
    """IoU and GIoU of cxcywh pairs ``[N, 4]``: the diagonal of the matrices of all with all, as published."""
    iou, giou = iou_and_giou(corners(boxes, clamps)[:, None], corners(goals, clamps)[None])
    return iou.diagonal(), giou.diagonal()


class Matcher:
    """``matcher(layer, targets)``: for each image the pairs of least cost, by SciPy."""

    def __init__(
        self,
        weights: dict[str, float],
        use_focal_loss: bool = True,
        alpha: float = 0.25,
        gamma: float = 2.0,
        nan_cost: float | None = None,
        clamps: bool = False,
        iou_order: float | None = None,
    ) -> None:
        self.weights, self.use_focal_loss, self.alpha, self.gamma = weights, use_focal_loss, alpha, gamma
        self.nan_cost, self.clamps, self.iou_order = nan_cost, clamps, iou_order

    def costs(self, layer: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> list[Tensor]:
        """``[Q, n]`` of each image; computed for the whole batch at once, as published."""
        logits, boxes = layer["pred_logits"].detach(), layer["pred_boxes"].detach()
        images, queries = logits.shape[:2]
        labels = torch.cat([target["labels"] for target in targets])
        goals = torch.cat([target["boxes"] for target in targets])
        p = logits.flatten(0, 1).sigmoid() if self.use_focal_loss else logits.flatten(0, 1).softmax(-1)
        p = p[:, labels]
        flat = boxes.flatten(0, 1)
        iou, giou = iou_and_giou(corners(flat, self.clamps)[:, None], corners(goals, self.clamps)[None])
        if self.iou_order is not None:
            cost = -p * iou**self.iou_order
        else:
            class_cost = -p
            if self.use_focal_loss:
                positive = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log()
                class_cost = positive - (1 - self.alpha) * p**self.gamma * -(1 - p + 1e-8).log()
            cost = self.weights["cost_bbox"] * torch.cdist(flat, goals, p=1)
            cost = cost + self.weights["cost_class"] * class_cost - self.weights["cost_giou"] * giou
        if self.nan_cost is not None:
            cost = torch.nan_to_num(cost, nan=self.nan_cost)
        sizes = [len(target["labels"]) for target in targets]
        return [block[image] for image, block in enumerate(cost.view(images, queries, -1).split(sizes, -1))]

    def __call__(self, layer: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        found = [linear_sum_assignment(cost.numpy()) for cost in self.costs(layer, targets)]
        return [(torch.as_tensor(q, dtype=torch.int64), torch.as_tensor(t, dtype=torch.int64)) for q, t in found]


class Pairs:
    """The pairs of a batch in flat lists, and what belongs to them."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]], targets: list[dict[str, Tensor]]) -> None:
        image = torch.cat([torch.full_like(q, index) for index, (q, _) in enumerate(pairs)])
        self.where = (image, torch.cat([q for q, _ in pairs]))
        self.labels = torch.cat([target["labels"][t] for target, (_, t) in zip(targets, pairs, strict=True)])
        self.boxes = torch.cat([target["boxes"][t] for target, (_, t) in zip(targets, pairs, strict=True)])


def class_loss(
    name: str,
    layer: dict[str, Tensor],
    pairs: Pairs,
    num_boxes: float,
    classes: int,
    alpha: float,
    gamma: float,
    quality: Tensor | None,
    mal_alpha: float | None = None,
) -> Tensor:
    """The losses that are summed over queries and classes and divided by `num_boxes`."""
    logits = layer["pred_logits"]
    label = torch.full(logits.shape[:2], classes, dtype=torch.int64)
    label[pairs.where] = pairs.labels
    positive = F.one_hot(label, classes + 1)[..., :-1].to(logits.dtype)
    p = logits.sigmoid()
    if name == "bce":
        return F.binary_cross_entropy_with_logits(logits, positive, reduction="none").sum() / num_boxes
    if name == "focal":
        entropy = F.binary_cross_entropy_with_logits(logits, positive, reduction="none")
        of_label = p * positive + (1 - p) * (1 - positive)
        loss = entropy * (1 - of_label) ** gamma
        if alpha >= 0:
            loss = loss * (alpha * positive + (1 - alpha) * (1 - positive))
        return loss.sum() / num_boxes
    score = torch.zeros_like(label, dtype=logits.dtype)
    score[pairs.where] = quality.to(logits.dtype)
    score = score[..., None] * positive
    if name == "vfl":
        weight = alpha * p.detach() ** gamma * (1 - positive) + score
    else:
        score = score**gamma
        weight = (1.0 if mal_alpha is None else mal_alpha) * p.detach() ** gamma * (1 - positive) + positive
    return F.binary_cross_entropy_with_logits(logits, score, weight=weight, reduction="none").sum() / num_boxes


def box_losses(
    boxes: Tensor, goals: Tensor, weight: Tensor | None, num_boxes: float, clamps: bool
) -> dict[str, Tensor]:
    """Of the boxes of pairs ``[N, 4]``."""
    loss = 1 - overlaps_of_pairs(boxes, goals, clamps)[1]
    loss = loss if weight is None else loss * weight
    return {"loss_bbox": (boxes - goals).abs().sum() / num_boxes, "loss_giou": loss.sum() / num_boxes}


def denoising_pairs(meta: dict, targets: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Every group has every target; the queries are told by the model."""
    groups = meta["dn_num_group"]
    return [
        (queries, torch.arange(len(target["labels"])).repeat(groups))
        for queries, target in zip(meta["dn_positive_idx"], targets, strict=True)
    ]


class Criterion:
    """v1 (`version` 1) and v2: entries already multiplied by their weights."""

    clamps = False

    def __init__(
        self,
        matcher: Matcher,
        weight_dict: dict[str, float],
        losses: list[str],
        alpha: float = 0.2,
        gamma: float = 2.0,
        num_classes: int = 80,
        boxes_weight_format: str | None = None,
        share_matched_indices: bool = False,
        eos_coef: float = 1e-4,
        mal_alpha: float | None = None,
    ) -> None:
        self.matcher, self.weight_dict, self.losses = matcher, weight_dict, losses
        self.alpha, self.gamma, self.num_classes = alpha, gamma, num_classes
        self.boxes_weight_format, self.share_matched_indices = boxes_weight_format, share_matched_indices
        self.eos_coef, self.mal_alpha = eos_coef, mal_alpha

    def loss(
        self,
        name: str,
        layer: dict[str, Tensor],
        targets: list[dict[str, Tensor]],
        pairs: list[tuple[Tensor, Tensor]],
        num_boxes: float,
        suffix: str,
        classes: int | None = None,
    ) -> dict[str, Tensor]:
        classes = self.num_classes if classes is None else classes
        flat = Pairs(pairs, targets)
        boxes = layer["pred_boxes"][flat.where]
        quality = None
        if name in ("vfl", "mal") or (name == "boxes" and self.boxes_weight_format is not None):
            iou, giou = overlaps_of_pairs(boxes.detach(), flat.boxes, self.clamps)
            quality = giou if self.boxes_weight_format == "giou" else iou
        if name == "boxes":
            weight = None if self.boxes_weight_format is None else quality
            found = box_losses(boxes, flat.boxes, weight, num_boxes, self.clamps)
        elif name == "labels":
            found = self.cross_entropy(layer["pred_logits"], flat)
            if suffix:
                del found["class_error"]
        elif name == "cardinality":
            counts = torch.tensor([len(target["labels"]) for target in targets])
            logits = layer["pred_logits"]
            objects = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
            found = {"cardinality_error": (objects - counts).abs().float().mean()}
        else:
            options = (classes, self.alpha, self.gamma, quality, self.mal_alpha)
            found = {f"loss_{name}": class_loss(name, layer, flat, num_boxes, *options)}
        weighted = {key: value * self.weight_dict[key] for key, value in found.items() if key in self.weight_dict}
        return {key + suffix: value for key, value in weighted.items()}

    def cross_entropy(self, logits: Tensor, pairs: Pairs) -> dict[str, Tensor]:
        label = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64)
        label[pairs.where] = pairs.labels
        weight = torch.ones(self.num_classes + 1)
        weight[-1] = self.eos_coef
        error = torch.tensor(100.0)
        if len(pairs.labels):
            error = 100 - 100 * (logits[pairs.where].argmax(-1) == pairs.labels).float().mean()
        return {"loss_ce": F.cross_entropy(logits.transpose(1, 2), label, weight), "class_error": error}

    def num_boxes(self, targets: list[dict[str, Tensor]]) -> float:
        return float(max(sum(len(target["labels"]) for target in targets), 1))

    def __call__(self, outputs: dict, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        num_boxes = self.num_boxes(targets)
        pairs = self.matcher(outputs, targets)
        losses = {}
        for name in self.losses:
            losses |= self.loss(name, outputs, targets, pairs, num_boxes, "")
        for index, layer in enumerate(outputs.get("aux_outputs", ())):
            if not self.share_matched_indices:
                pairs = self.matcher(layer, targets)
            for name in self.losses:
                losses |= self.loss(name, layer, targets, pairs, num_boxes, f"_aux_{index}")
        if "dn_aux_outputs" in outputs:
            pairs = denoising_pairs(outputs["dn_meta"], targets)
            count = num_boxes * outputs["dn_meta"]["dn_num_group"]
            for index, layer in enumerate(outputs["dn_aux_outputs"]):
                for name in self.losses:
                    losses |= self.loss(name, layer, targets, pairs, count, f"_dn_{index}")
        if "enc_aux_outputs" in outputs:
            goals, classes = targets, self.num_classes
            if outputs["enc_meta"]["class_agnostic"]:
                goals = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
                classes = 1
            for index, layer in enumerate(outputs["enc_aux_outputs"]):
                pairs = self.matcher(layer, targets)
                for name in self.losses:
                    losses |= self.loss(name, layer, goals, pairs, num_boxes, f"_enc_{index}", classes)
        return losses


def random_batch(
    counts: tuple[int, ...] = (3, 0, 7, 5),
    layers: int = 3,
    queries: int = 20,
    classes: int = 11,
    groups: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    encoder_classes: int | None = None,
    with_encoder: bool = True,
    with_denoising: bool = True,
) -> tuple[dict, list[dict[str, Tensor]], dict[str, Tensor]]:
    """Outputs of RT-DETRv2, targets, and the leaves whose gradients are compared."""
    generator = torch.Generator().manual_seed(seed)
    images, most = len(counts), max(counts)

    def box(*shape: int) -> Tensor:
        random = torch.rand(*shape, 4, generator=generator)
        return torch.cat([0.2 + 0.6 * random[..., :2], 0.05 + 0.5 * random[..., 2:]], -1)

    targets = [{"labels": torch.randint(0, classes, (n,), generator=generator), "boxes": box(n)} for n in counts]
    leaves: dict[str, Tensor] = {}

    def layer(name: str, queries: int, classes: int) -> dict[str, Tensor]:
        logits = 2 * torch.randn(images, queries, classes, generator=generator) - 1
        leaves[f"{name} logits"] = logits.to(dtype).requires_grad_()
        leaves[f"{name} boxes"] = box(images, queries).to(dtype).requires_grad_()
        return {"pred_logits": leaves[f"{name} logits"], "pred_boxes": leaves[f"{name} boxes"]}

    outputs: dict = layer("last", queries, classes)
    outputs["aux_outputs"] = [layer(f"aux {index}", queries, classes) for index in range(layers - 1)]
    if with_encoder:
        outputs["enc_aux_outputs"] = [layer("encoder", queries, encoder_classes or classes)]
        outputs["enc_meta"] = {"class_agnostic": encoder_classes is not None}
    if with_denoising and most:
        outputs["dn_aux_outputs"] = [layer(f"dn {index}", 2 * most * groups, classes) for index in range(layers)]
        outputs["dn_meta"] = denoising_meta(counts, groups, queries)
    return outputs, targets, leaves


def denoising_meta(counts: tuple[int, ...], groups: int, queries: int) -> dict:
    """Group g has max(counts) positive queries from 2 g max(counts) on, then as many negative ones."""
    most = max(counts)
    positive = [torch.cat([torch.arange(n) + 2 * most * g for g in range(groups)]) for n in counts]
    split = [2 * most * groups, queries]
    return {"dn_positive_idx": tuple(positive), "dn_num_group": groups, "dn_num_split": split}


def shared_weights(**others: float) -> dict[str, float]:
    return {"loss_vfl": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0} | others


def is_close(actual: float, expected: float) -> bool:
    return math.isclose(actual, expected, rel_tol=1e-5, abs_tol=1e-7)
