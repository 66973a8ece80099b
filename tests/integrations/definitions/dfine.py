"""D-FINE's and DEIM's matcher and criteria as the papers' code computes them, one layer and one loss at a time.

Plain PyTorch and SciPy, written from the published facts; knows nothing of detr_fast. Where the published code leaves
an order to an unstable sort (the union of matchings), the sort here is stable.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from integrations.definitions import rtdetr
from integrations.definitions.rtdetr import Pairs, corners, denoising_pairs, overlaps_of_pairs
from scipy.optimize import linear_sum_assignment
from torch import Tensor

TEMPERATURE = 5


class Matcher(rtdetr.Matcher):
    """NaN costs 1, infinities the largest number; DEIM: from an epoch on, -p IoU^iou_order."""

    def __init__(self, weights: dict[str, float], **options: object) -> None:
        super().__init__(weights, **({"nan_cost": 1.0, "clamps": True} | options))

    def several(
        self, layer: dict[str, Tensor], targets: list[dict[str, Tensor]], rounds: int, blocks_target_numbers: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Matched again and again, used queries at a cost of 1e6; published: also the queries 0 .. n - 1."""
        result = []
        for cost in self.costs(layer, targets):
            cost = cost.numpy().copy()
            queries, numbers = [], []
            for _ in range(rounds):
                q, t = linear_sum_assignment(cost)
                queries.append(q)
                numbers.append(t)
                cost[q] = 1e6
                if blocks_target_numbers:
                    cost[t] = 1e6
            pair = (np.concatenate(queries), np.concatenate(numbers))
            result.append(tuple(torch.as_tensor(side, dtype=torch.int64) for side in pair))
        return result


def union(sets: list[list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    """GO: each query keeps the target that most sets gave it, the lower one of equals."""
    result = []
    for pairs in zip(*sets, strict=True):
        counts: dict[tuple[int, int], int] = {}
        for queries, numbers in pairs:
            for pair in zip(queries.tolist(), numbers.tolist(), strict=True):
                counts[pair] = counts.get(pair, 0) + 1
        target_of_query: dict[int, int] = {}
        for query, target in sorted(counts, key=lambda pair: (-counts[pair], pair)):
            target_of_query.setdefault(query, target)
        queries = torch.tensor(list(target_of_query), dtype=torch.int64)
        result.append((queries, torch.tensor(list(target_of_query.values()), dtype=torch.int64)))
    return result


def weighting(reg_max: int, up: Tensor, reg_scale: float) -> Tensor:
    """W(n): offsets of the bins, ``[reg_max + 1]``."""
    bound = float(up[0].abs()) * abs(reg_scale)
    step = (bound + 1) ** (2 / (reg_max - 2))
    right = [step**n - 1 for n in range(1, reg_max // 2)]
    left = [-value for value in reversed(right)]
    return torch.tensor([-2 * bound, *left, 0.0, *right, 2 * bound])


def bins_of(points: Tensor, boxes: Tensor, reg_max: int, reg_scale: float, up: Tensor) -> tuple[Tensor, Tensor]:
    """Left bin and weight of the right one, ``[N, 4]``, of xyxy boxes seen from points (x, y, w, h)."""
    sizes = points[:, [2, 3, 2, 3]] / abs(reg_scale) + 1e-16
    sides = torch.cat([points[:, :2] - boxes[:, :2], boxes[:, 2:] - points[:, :2]], 1)
    distance = sides / sizes - 0.5 * abs(reg_scale)
    values = weighting(reg_max, up, reg_scale)
    left, weight = torch.zeros_like(distance, dtype=torch.int64), torch.zeros_like(distance)
    for index, d in np.ndenumerate(distance.numpy()):
        below = int((values <= d).sum()) - 1
        if below < 0:
            left[index], weight[index] = 0, 0.0
        elif below >= reg_max:
            left[index], weight[index] = reg_max - 1, 1.0
        else:
            towards, away = abs(d - values[below]), abs(values[below + 1] - d)
            left[index], weight[index] = below, towards / (towards + away)
    return left, weight


class Criterion(rtdetr.Criterion):
    """D-FINE's; DEIM's with "mal" among the losses, `mal_alpha` and `use_uni_set`."""

    clamps = True

    def __init__(self, *arguments: object, reg_max: int = 32, use_uni_set: bool = True, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.reg_max, self.use_uni_set = reg_max, use_uni_set

    def local(
        self, layer: dict[str, Tensor], pairs: Pairs, num_boxes: float, scale: tuple[Tensor, float], is_denoising: bool
    ) -> dict[str, Tensor]:
        if "pred_corners" not in layer:
            return {}
        logits = layer["pred_corners"][pairs.where].reshape(-1, self.reg_max + 1)
        if is_denoising not in self.bins:
            points = layer["ref_points"][pairs.where].detach()
            self.bins[is_denoising] = bins_of(points, corners(pairs.boxes, True), self.reg_max, scale[1], scale[0])
        left, weight = (part.reshape(-1) for part in self.bins[is_denoising])
        iou = overlaps_of_pairs(layer["pred_boxes"][pairs.where].detach(), pairs.boxes, True)[0]
        entropy = F.cross_entropy(logits, left, reduction="none") * (1 - weight)
        entropy = entropy + F.cross_entropy(logits, left + 1, reduction="none") * weight
        found = {"loss_fgl": (entropy * iou.repeat_interleave(4)).sum() / num_boxes}
        if "teacher_corners" in layer:
            found["loss_ddf"] = self.distillation(layer, pairs, iou, is_denoising)
        return found

    def distillation(self, layer: dict[str, Tensor], pairs: Pairs, iou: Tensor, is_denoising: bool) -> Tensor:
        student, teacher = layer["pred_corners"], layer["teacher_corners"].detach()
        if torch.equal(student, teacher):
            return student.sum() * 0
        images, queries = student.shape[:2]
        edges = (images, queries, 4, self.reg_max + 1)
        weight = layer["teacher_logits"].detach().sigmoid().amax(-1)
        weight[pairs.where] = iou.to(weight.dtype)
        matched = torch.zeros(images, queries, dtype=torch.bool)
        matched[pairs.where] = True
        target = (teacher.reshape(edges) / TEMPERATURE).softmax(-1)
        divergence = F.kl_div((student.reshape(edges) / TEMPERATURE).log_softmax(-1), target, reduction="none").sum(-1)
        loss = weight[..., None] * TEMPERATURE**2 * divergence  # [B, Q, 4]
        if not is_denoising:
            self.balance = tuple((4 * mask.sum() * 8 / images) ** 0.5 for mask in (matched, ~matched))
        of_matched = loss[matched].mean() if matched.any() else 0
        of_others = loss[~matched].mean() if (~matched).any() else 0
        return (of_matched * self.balance[0] + of_others * self.balance[1]) / sum(self.balance)

    def losses_of(
        self,
        layer: dict[str, Tensor],
        targets: list[dict[str, Tensor]],
        own: tuple[list[tuple[Tensor, Tensor]], float],
        of_boxes: tuple[list[tuple[Tensor, Tensor]], float],
        suffix: str,
        scale: tuple[Tensor, float],
        classes: int | None = None,
    ) -> dict[str, Tensor]:
        """Class losses use a layer's own pairs, the others those of all layers together."""
        found = {}
        for name in self.losses:
            pairs, num_boxes = of_boxes if name in ("boxes", "local") else own
            if name == "local":
                losses = self.local(layer, Pairs(pairs, targets), num_boxes, scale, suffix.startswith("_dn"))
                found |= {k + suffix: v * self.weight_dict[k] for k, v in losses.items() if k in self.weight_dict}
            else:
                found |= self.loss(name, layer, targets, pairs, num_boxes, suffix, classes)
        return found

    def __call__(self, outputs: dict, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.bins: dict[bool, tuple[Tensor, Tensor]] = {}
        scale = (outputs["up"], float(outputs["reg_scale"])) if "up" in outputs else (torch.ones(1), 1.0)
        layers = [("", outputs)]
        layers += [(f"_aux_{index}", layer) for index, layer in enumerate(outputs["aux_outputs"])]
        layers += [("_pre", outputs["pre_outputs"])] if "pre_outputs" in outputs else []
        encoder = [(f"_enc_{index}", layer) for index, layer in enumerate(outputs["enc_aux_outputs"])]
        sets = [self.matcher(layer, targets) for _, layer in layers + encoder]
        together = union(sets)
        num_boxes = self.num_boxes(targets)
        num_together = float(max(sum(len(queries) for queries, _ in together), 1))

        losses = {}
        for (suffix, layer), pairs in zip(layers + encoder, sets, strict=True):
            goals, classes = targets, self.num_classes
            if suffix.startswith("_enc") and outputs["enc_meta"]["class_agnostic"]:
                goals = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
                classes = 1
            own = (pairs, num_boxes)
            of_boxes = (together, num_together) if self.use_uni_set else own
            losses |= self.losses_of(layer, goals, own, of_boxes, suffix, scale, classes)
        if "dn_outputs" in outputs:
            pairs = denoising_pairs(outputs["dn_meta"], targets)
            own = (pairs, num_boxes * outputs["dn_meta"]["dn_num_group"])
            denoised = [(f"_dn_{index}", layer) for index, layer in enumerate(outputs["dn_outputs"])]
            if "dn_pre_outputs" in outputs:
                denoised.append(("_dn_pre", outputs["dn_pre_outputs"]))
            for suffix, layer in denoised:
                losses |= self.losses_of(layer, targets, own, own, suffix, scale)
        return {name: torch.nan_to_num(value, nan=0.0) for name, value in losses.items()}


def random_batch(
    counts: tuple[int, ...] = (3, 0, 7, 5),
    layers: int = 3,
    queries: int = 20,
    classes: int = 11,
    groups: int = 2,
    reg_max: int = 32,
    agreeing: bool = True,
    **options: object,
) -> tuple[dict, list[dict[str, Tensor]], dict[str, Tensor]]:
    """Outputs of D-FINE: RT-DETRv2's with corners, reference points, teachers and the sets before refinement."""
    outputs, targets, leaves = rtdetr.random_batch(counts, layers, queries, classes, groups, **options)
    generator = torch.Generator().manual_seed(int(options.get("seed", 0)) + 1000)
    images, dtype = len(counts), outputs["pred_logits"].dtype

    def refined(name: str, layer: dict, number: int) -> dict:
        corner_logits = torch.randn(images, number, 4 * (reg_max + 1), generator=generator).to(dtype)
        leaves[f"{name} corners"] = corner_logits.requires_grad_()
        return {**layer, "pred_corners": leaves[f"{name} corners"]}

    def points(number: int) -> Tensor:
        random = torch.rand(images, number, 4, generator=generator)
        return torch.cat([random[..., :2], 0.1 + 0.4 * random[..., 2:]], -1).to(dtype)

    references = points(queries)
    last = refined("last", outputs, queries) | {"ref_points": references}
    last["up"], last["reg_scale"] = torch.tensor([0.5]), torch.tensor([4.0])
    teacher = {"teacher_corners": last["pred_corners"], "teacher_logits": last["pred_logits"]}
    last["aux_outputs"] = [
        refined(f"aux {index}", layer, queries) | {"ref_points": references} | teacher
        for index, layer in enumerate(outputs["aux_outputs"])
    ]
    last["pre_outputs"] = _like(outputs["aux_outputs"][0], "pre", leaves)
    if agreeing:  # queries that several layers match to the same target, as trained models have them
        for layer in (*last["aux_outputs"], last["pre_outputs"], *last["enc_aux_outputs"]):
            with torch.no_grad():
                layer["pred_boxes"].lerp_(last["pred_boxes"], 0.9)
    if "dn_aux_outputs" in outputs:
        number = 2 * max(counts) * groups
        references = points(number)
        denoised = [
            refined(f"dn {index}", layer, number) | {"ref_points": references}
            for index, layer in enumerate(last.pop("dn_aux_outputs"))
        ]
        teacher = {
            "teacher_corners": denoised[-1]["pred_corners"],
            "teacher_logits": denoised[-1]["pred_logits"],
        }
        last["dn_outputs"] = [layer | teacher for layer in denoised]
        last["dn_pre_outputs"] = _like(denoised[0], "dn pre", leaves)
    return last, targets, leaves


def _like(layer: dict[str, Tensor], name: str, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Another set of the same shape, of its own leaves."""
    own = {}
    for key, noise in (("pred_logits", 0.3), ("pred_boxes", 0.0)):
        value = layer[key].detach()
        value = value + noise * value.flip(1) if noise else 0.9 * value + 0.1 * value.flip(1)
        leaves[f"{name} {key}"] = own[key] = value.requires_grad_()
    return own
