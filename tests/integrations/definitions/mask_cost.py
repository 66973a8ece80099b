"""The mask costs of Mask2Former (mask2former.modeling.matcher) and of RF-DETR's segmentation, as plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment


def sampled(masks, points, mode="bilinear", padding="zeros"):
    """Masks [N, h, w] at the points [P, 2], which are x and y in [0, 1]: [N, P]."""
    grid = (2 * points - 1)[None, :, None].expand(len(masks), -1, -1, -1)
    values = F.grid_sample(masks[:, None], grid, mode=mode, padding_mode=padding, align_corners=False)
    return values[:, 0, :, 0]


def binary_cross_entropy(x, y):
    """Logits [Q, P] against targets [T, P]: the mean over the points, [Q, T]."""
    ones, zeros = torch.ones_like(x), torch.zeros_like(x)
    positive = F.binary_cross_entropy_with_logits(x, ones, reduction="none")
    negative = F.binary_cross_entropy_with_logits(x, zeros, reduction="none")
    return (positive @ y.mT + negative @ (1 - y).mT) / x.shape[1]


def dice(x, y):
    p = x.sigmoid()
    return 1 - (2 * p @ y.mT + 1) / (p.sum(-1)[:, None] + y.sum(-1)[None] + 1)


def mask2former_cost(logits, masks, target, points, cost_class=1, cost_mask=1, cost_dice=1):
    """Of one image: [Q, T]."""
    of_class = -logits.softmax(-1)[:, target["labels"]]
    x = sampled(masks, points)
    y = sampled(target["masks"].to(masks), points)
    return cost_mask * binary_cross_entropy(x, y) + cost_class * of_class + cost_dice * dice(x, y)


def mask2former_match(outputs, targets, num_points, **weights):
    """Draws the points of one image after the other from the global generator, as Mask2Former does."""
    pairs = []
    for logits, masks, target in zip(outputs["pred_logits"], outputs["pred_masks"], targets, strict=True):
        points = torch.rand(1, num_points, 2, device=masks.device)[0]
        cost = mask2former_cost(logits, masks.float(), target, points, **weights)
        rows, columns = linear_sum_assignment(cost.cpu().numpy())
        pairs.append((torch.as_tensor(rows), torch.as_tensor(columns)))
    return pairs


def rfdetr_mask_costs(pred_masks, targets, ratio=16):
    """RF-DETR's cross-entropy and dice of every query with every target of its image: a list of two [Q, T] an image.

    One draw of points for the whole batch; predictions are interpolated, targets take the nearest pixel.
    """
    if isinstance(pred_masks, dict):
        features = pred_masks["spatial_features"]
        points = torch.rand(1, features.shape[-2] * features.shape[-1] // ratio, 2, device=features.device)[0]
        logits = []
        for spatial, queries in zip(features, pred_masks["query_features"], strict=True):
            logits.append(queries @ sampled(spatial, points, padding="border") + pred_masks["bias"])
    else:
        points = torch.rand(1, pred_masks.shape[-2] * pred_masks.shape[-1] // ratio, 2, device=pred_masks.device)[0]
        logits = [sampled(masks, points, padding="border") for masks in pred_masks]
    costs = []
    for x, target in zip(logits, targets, strict=True):
        y = sampled(target["masks"].to(x), points, mode="nearest", padding="border")
        costs.append((binary_cross_entropy(x, y), dice(x, y)))
    return costs
