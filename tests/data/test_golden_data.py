"""Targets and evaluation transforms against those recorded from the published implementation."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.data.coco import coco_target
from detr_fast.data.transforms import evaluation_transform

GOLDEN = Path(__file__).parents[1] / "golden" / "data"


def load(name: str) -> tuple[dict[str, np.ndarray], Any]:
    with np.load(GOLDEN / name) as archive:
        data = {key: archive[key] for key in archive.files}
    return data, json.loads(str(data.pop("meta")))


def picture(seed: int, height: int, width: int) -> Image.Image:
    """The recorded cases' picture: a random grid of 12 x 16 colours, resized bilinearly."""
    raw = np.random.PCG64((zlib.crc32(b"picture") ^ seed) & 0xFFFFFFFF).random_raw(3 * 12 * 16)
    grid = ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(3, 12, 16) * 256

    def axis(size: int, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.clip((np.arange(size) + 0.5) * (cells / size) - 0.5, 0, cells - 1)
        low = np.minimum(at.astype(np.int64), cells - 2)
        return low, low + 1, at - low

    (y0, y1, fy), (x0, x1, fx) = axis(height, 12), axis(width, 16)
    rows = grid[:, y0] * (1 - fy)[None, :, None] + grid[:, y1] * fy[None, :, None]
    pixels = np.floor(rows[:, :, x0] * (1 - fx) + rows[:, :, x1] * fx).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


@pytest.mark.parametrize("image_id", [11, 12, 13, 14, 15])
def test_targets(image_id: int) -> None:
    data, _ = load("coco_targets.npz")
    content = json.loads((GOLDEN / "annotations.json").read_text())
    image = next(entry for entry in content["images"] if entry["id"] == image_id)
    chosen = [entry for entry in content["annotations"] if entry["image_id"] == image_id]
    target = coco_target(image["width"], image["height"], image_id, chosen, True)
    for name in ("boxes", "labels", "area", "iscrowd", "image_id", "size", "orig_size"):
        expected = data[f"{image_id}.{name}"]
        np.testing.assert_array_equal(target[name].numpy().reshape(expected.shape), expected, err_msg=name)
    shape = tuple(data[f"{image_id}.mask_shape"])
    bits = np.unpackbits(data[f"{image_id}.mask_bits"])[: int(np.prod(shape))].reshape(shape)
    np.testing.assert_array_equal(target["masks"].numpy(), bits != 0)
    assert "masks" not in coco_target(image["width"], image["height"], image_id, chosen, False)


def test_evaluation_transform() -> None:
    data, meta = load("eval_transform.npz")
    transform = evaluation_transform(meta["short_side"], meta["long_side"])
    for case in meta["images"]:
        index, width, height = case["index"], case["width"], case["height"]
        boxes, area = (torch.from_numpy(data[f"{index}.{name}"]) for name in ("boxes", "area"))
        target = {"boxes": boxes, "area": area, "orig_size": torch.tensor([height, width])}
        pixels, target = transform(picture(case["picture_seed"], height, width), target)
        assert list(pixels.shape) == data[f"{index}.tensor_shape"].tolist()
        for name in ("size", "orig_size"):
            assert target[name].tolist() == data[f"{index}.out_{name}"].tolist()
        # A few float32 roundings of numbers up to 1.
        np.testing.assert_allclose(target["boxes"], data[f"{index}.out_boxes"], rtol=0, atol=4 * 2.0**-24)
        np.testing.assert_allclose(target["area"], data[f"{index}.out_area"], rtol=4 * 2.0**-24)
        step = case["pixel_step"]
        # One grey level of a resize that rounds the other way, in standard deviations.
        np.testing.assert_allclose(pixels[:, ::step, ::step], data[f"{index}.pixels"], rtol=0, atol=1.01 / 255 / 0.224)
