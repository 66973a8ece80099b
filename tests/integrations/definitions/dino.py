"""What IDEA-Research/DINO computes, in plain PyTorch and SciPy, an image and a layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from integrations.definitions.deformable_detr import focal_cost, layer_losses
from integrations.definitions.detr import Costs, Outputs, Pairs, Target, chosen, count_of, layers_of, match, wanted
from torch import Tensor

NAMES = ("loss_bbox", "loss_giou", "loss_ce", "loss_xy", "loss_hw", "cardinality_error")


def denoising_pairs(targets: Sequence[Target], groups: int, stride: int) -> Pairs:
    """Query ``group * stride + t`` belongs to target t."""
    pairs = []
    for target in targets:
        own = torch.arange(len(target["labels"])).repeat(groups)
        start = torch.arange(groups).repeat_interleave(len(target["labels"])) * stride
        pairs.append((start + own, own))
    return pairs


def values_of(
    outputs: Outputs, targets: Sequence[Target], pairs: Pairs, num_boxes: float, alpha: float
) -> dict[str, Tensor]:
    values = layer_losses(outputs, targets, pairs, num_boxes, alpha)
    with torch.no_grad():
        distance = (chosen(outputs, "pred_boxes", pairs) - wanted(targets, "boxes", pairs)).abs()
        values["loss_xy"] = distance[:, :2].sum() / num_boxes
        values["loss_hw"] = distance[:, 2:].sum() / num_boxes
    return values


def criterion(
    outputs: Outputs, targets: Sequence[Target], costs: Costs, focal_alpha: float, training: bool = True
) -> tuple[dict[str, Tensor], list[Pairs]]:
    """Unweighted losses labels, boxes and cardinality; the matchings in the order of `return_indices`."""
    num_boxes, losses, matchings = count_of(targets), {}, {}
    jobs = layers_of(outputs)
    if "interm_outputs" in outputs:
        jobs.append(("_interm", outputs["interm_outputs"]))
    jobs += [(f"_enc_{i}", layer) for i, layer in enumerate(outputs.get("enc_outputs", ()))]
    for suffix, layer in jobs:
        pairs = match(layer, targets, costs, partial(focal_cost, alpha=focal_alpha))
        matchings[suffix] = pairs
        values = values_of(layer, targets, pairs, num_boxes, focal_alpha)
        if suffix:
            del values["class_error"]
        losses |= {name + suffix: value for name, value in values.items()}

    meta = outputs["dn_meta"]
    names = ["_dn" + suffix for suffix, _ in layers_of(outputs)]
    if training and meta and "output_known_lbs_bboxes" in meta:
        groups = meta["num_dn_group"]
        pairs = denoising_pairs(targets, groups, meta["pad_size"] // groups)
        for suffix, (_, layer) in zip(names, layers_of(meta["output_known_lbs_bboxes"]), strict=True):
            values = values_of(layer, targets, pairs, num_boxes * groups, focal_alpha)
            losses |= {name + suffix: values[name] for name in NAMES}
    else:
        losses |= {name + suffix: torch.tensor(0.0) for suffix in names for name in NAMES}
    return losses, [matchings[suffix] for suffix, _ in (*jobs[1:], jobs[0])]
