"""From mask logits to instance masks and panoptic maps in the size of the original image."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

SMALLEST_AREA = 4  # pixels; smaller segments are dropped


class PostProcessSegm:
    """Instance masks of every query in the size of the original image."""

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold

    @torch.no_grad()
    def __call__(
        self,
        results: list[dict[str, Tensor]],
        outputs: Mapping[str, Tensor],
        original_sizes: Tensor,  # [B, 2] height and width of each image on disk
        processed_sizes: Tensor,  # [B, 2] height and width the model saw, without padding
    ) -> list[dict[str, Tensor]]:
        """Adds ``masks [Q, 1, height, width]`` (uint8) to each image's result."""
        canvas = processed_sizes.amax(0).tolist()
        sizes = zip(processed_sizes.tolist(), original_sizes.tolist(), strict=True)
        for result, masks, (processed, original) in zip(results, outputs["pred_masks"], sizes, strict=True):
            logits = _on_image(masks, canvas, processed)
            chosen = (logits.sigmoid() > self.threshold).to(torch.float32)
            result["masks"] = F.interpolate(chosen[:, None], size=original, mode="nearest").to(torch.uint8).cpu()
        return results


class PostProcessPanoptic:
    """One segment a pixel: things as instances, stuff (what is not a thing) merged by class.

    ``reference_padding`` resizes masks, which cover the padded canvas, to each image's unpadded size;
    ``reference_merge`` lets go of merged stuff whose first pass leaves small segments. Both are faults of the published
    code that published numbers may rest on; without the flags padding is cut off and stuff stays merged.
    """

    def __init__(
        self,
        is_thing_map: Mapping[int, bool],  # of every label the model can give
        threshold: float = 0.85,
        *,
        reference_padding: bool = False,
        reference_merge: bool = False,
    ) -> None:
        self.is_thing_map, self.threshold = is_thing_map, threshold
        self.reference_padding, self.reference_merge = reference_padding, reference_merge

    @torch.no_grad()
    def __call__(
        self,
        outputs: Mapping[str, Tensor],
        processed_sizes: Tensor | Sequence[Sequence[int]],  # [B, 2] height and width, without padding
        target_sizes: Tensor | Sequence[Sequence[int]] | None = None,  # [B, 2] of the maps; as processed by default
    ) -> list[dict[str, Any]]:
        """Of each image ``png_string`` (segment ids as colours) and ``segments_info`` in COCO's panoptic format."""
        processed = torch.as_tensor(processed_sizes).tolist()
        targets = processed if target_sizes is None else torch.as_tensor(target_sizes).tolist()
        if not len(processed) == len(targets) == len(outputs["pred_logits"]):
            raise ValueError(
                f"processed_sizes and target_sizes must have one row for each of {len(outputs['pred_logits'])} images, "
                f"got {len(processed)} and {len(targets)}"
            )
        canvas = [max(size[axis] for size in processed) for axis in (0, 1)]
        images = zip(outputs["pred_logits"], outputs["pred_masks"], processed, targets, strict=True)
        return [self._image(logits, masks, canvas, size, target) for logits, masks, size, target in images]

    def _image(
        self, logits: Tensor, masks: Tensor, canvas: Sequence[int], size: Sequence[int], target: Sequence[int]
    ) -> dict[str, Any]:
        scores, labels = logits.softmax(-1).max(-1)
        keep = (labels != logits.shape[-1] - 1) & (scores > self.threshold)
        masks = _on_image(masks[keep], size if self.reference_padding else canvas, size)
        label_of_segment = labels[keep].tolist()
        for label in label_of_segment:
            if label not in self.is_thing_map:
                raise ValueError(f"is_thing_map must say for every label whether it is a thing, {label} is missing")
        ids, areas = self._paint(masks, label_of_segment, target, merge=True)
        while any(area <= SMALLEST_AREA for area in areas):
            large = self._worth_keeping(areas, label_of_segment)
            masks = masks[torch.tensor(large, device=masks.device)]
            label_of_segment = [label for label, is_large in zip(label_of_segment, large, strict=True) if is_large]
            ids, areas = self._paint(masks, label_of_segment, target, merge=not self.reference_merge)
            if all(large):
                break
        segments = [
            {"id": index, "isthing": bool(self.is_thing_map[label]), "category_id": label, "area": area}
            for index, (label, area) in enumerate(zip(label_of_segment, areas, strict=True))
            if area > 0
        ]
        return {"png_string": _png(ids), "segments_info": segments}

    def _worth_keeping(self, areas: Sequence[int], labels: Sequence[int]) -> list[bool]:
        """Which masks stay: the large ones, and stuff that was merged into a large one."""
        large = [area > SMALLEST_AREA for area in areas]
        if self.reference_merge:
            return large
        kept = {label for label, is_large in zip(labels, large, strict=True) if is_large}
        return [
            is_large or (not self.is_thing_map[label] and label in kept)
            for label, is_large in zip(labels, large, strict=True)
        ]

    def _paint(
        self, masks: Tensor, labels: Sequence[int], target: Sequence[int], merge: bool
    ) -> tuple[NDArray[np.int32], list[int]]:
        """The number of the segment at each pixel of the target size, and the area of each segment."""
        if len(masks) == 0:
            return np.zeros(tuple(target), np.int32), []
        ids = masks.argmax(0).to(torch.int32).cpu().numpy()
        if merge:
            first: dict[int, int] = {}
            owner = [i if self.is_thing_map[label] else first.setdefault(label, i) for i, label in enumerate(labels)]
            ids = np.asarray(owner, np.int32)[ids]
        height, width = target
        ids = np.asarray(Image.fromarray(ids).resize((width, height), Image.Resampling.NEAREST))
        return ids, np.bincount(ids.ravel(), minlength=len(labels)).tolist()


def _on_image(masks: Tensor, canvas: Sequence[int], size: Sequence[int]) -> Tensor:
    """Logits ``[n, h, w]`` of the padded canvas, in pixels of the image: ``[n, *size]``."""
    if len(masks) == 0:
        return masks.new_zeros((0, *size))
    resized = F.interpolate(masks[None].float(), size=tuple(canvas), mode="bilinear", align_corners=False)[0]
    return resized[:, : size[0], : size[1]]


def _png(ids: NDArray[np.int32]) -> bytes:
    colours = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], -1).astype(np.uint8)
    with io.BytesIO() as buffer:
        Image.fromarray(colours).save(buffer, format="PNG")
        return buffer.getvalue()
