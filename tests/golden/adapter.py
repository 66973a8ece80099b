"""Connects detr_fast to the golden cases' checker; its docstring describes the functions below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast import boxes

box_iou = boxes.box_iou
generalized_box_iou = boxes.generalized_box_iou
box_cxcywh_to_xyxy = boxes.box_cxcywh_to_xyxy
box_xyxy_to_cxcywh = boxes.box_xyxy_to_cxcywh
masks_to_boxes = boxes.masks_to_boxes


def build(config: dict[str, Any]) -> nn.Module:
    from detr_fast.models.detr import detr

    if config["family"] != "detr":
        raise NotImplementedError(f"models of the family {config['family']!r} are not part of detr_fast")
    names = ("num_queries", "hidden_dim", "nheads", "enc_layers", "dec_layers", "dim_feedforward", "aux_loss")
    options = {name: config[name] for name in (*names, "position_embedding", "pre_norm", "dilation")}
    if config.get("masks"):
        from detr_fast.models.panoptic import detr_panoptic

        return detr_panoptic(config["backbone"], config["num_classes"], **options)
    return detr(config["backbone"], config["num_classes"], **options)


def matcher(config: dict[str, Any]) -> nn.Module:
    from detr_fast.matcher import HungarianMatcher

    costs = config["costs"]
    kind = "softmax" if config["family"] in ("detr", "updetr") else "focal"
    return HungarianMatcher(costs["class"], costs["bbox"], costs["giou"], kind=kind)


def criterion(config: dict[str, Any]) -> nn.Module:
    from detr_fast.criterion import SetCriterion

    if config["family"] not in ("detr", "deformable", "conditional"):
        raise NotImplementedError(f"losses of the family {config['family']!r} are not part of detr_fast")
    return SetCriterion(
        config["num_classes"],
        matcher(config),
        config["weights"],
        config.get("eos_coef", 1.0),  # focal losses have none
        config["losses"],
        alpha=config.get("focal_alpha", 0.25),
    )


def postprocess(config: dict[str, Any]) -> Callable[..., Any]:
    from detr_fast.models import postprocess as detections

    kind = config["kind"]
    if kind == "detection_softmax":
        return detections.postprocess_detections
    if kind == "detection_top100":
        return detections.postprocess_top_scores
    from detr_fast.models import postprocess_masks as masks

    if kind == "segmentation":
        return masks.PostProcessSegm(config["threshold"])
    is_thing = {category: category <= config["thing_ids_up_to"] for category in range(config["known_ids_up_to"] + 1)}
    return masks.PostProcessPanoptic(
        is_thing,
        config["threshold"],
        reference_padding=config["reference_padding"],
        reference_merge=config["reference_merge"],
    )


def position_encoding(config: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    from detr_fast.layers.position import SinePosition

    half_pixel = config["flavour"] == "deformable"
    return SinePosition(config["num_pos_feats"], config["temperature"], half_pixel).of_padding


def coco_target(
    width: int, height: int, image_id: int, annotations: list[dict[str, Any]], return_masks: bool
) -> dict[str, Tensor]:
    from detr_fast.data.coco import coco_target as convert

    return convert(width, height, image_id, annotations, return_masks)


def eval_transform(image: Any, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    from detr_fast.data.transforms import evaluation_transform

    return evaluation_transform()(image, target, torch.Generator())


def coco_eval(ground_truth_path: str, results_path: str, iou_type: str) -> Any:
    from detr_fast.engine.evaluate import coco_numbers

    return coco_numbers(ground_truth_path, results_path, iou_type)
