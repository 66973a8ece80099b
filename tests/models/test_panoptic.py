"""DETR with masks: published layout, masks against the published formulas, freezing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.models import build_model
from detr_fast.models.checkpoint import load_weights
from detr_fast.models.panoptic import MaskHead, QueryMaps
from detr_fast.structures import Images

GOLDEN = Path(__file__).parent.parent / "golden"
SMALL = {"num_queries": 3, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 16}


def small(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("detr_small_panoptic", 4, **{**SMALL, **options})


def images() -> Images:
    generator = torch.Generator().manual_seed(1)
    return Images.batch([torch.randn(3, *size, generator=generator) for size in ((64, 48), (40, 96))])


def test_published_names_and_shapes() -> None:
    rows = [line.split("\t") for line in (GOLDEN / "detr_resnet50_panoptic_keys.txt").read_text().splitlines()]
    published = {name: tuple(int(x) for x in re.findall(r"\d+", shape)) for name, shape, _ in rows}
    with torch.device("meta"):
        model = build_model("detr_resnet50_panoptic", 250)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == published
    assert sum(p.numel() for p in model.parameters()) == 42_899_288
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 42_676_888


def test_masks_belong_to_the_canvas() -> None:
    model = small().eval()
    predictions = model(images())
    assert predictions.masks.shape == (2, 3, 16, 24)
    outputs = model([torch.randn(3, 64, 64)])
    assert set(outputs) == {"pred_logits", "pred_boxes", "pred_masks", "aux_outputs"}
    detected = model.detr(images())
    assert torch.equal(predictions.boxes, detected.boxes)
    assert torch.equal(predictions.logits, detected.logits)


def test_query_maps_share_one_softmax_between_heads_and_places() -> None:
    torch.manual_seed(0)
    module = QueryMaps(16, 4).double()
    queries, memory = torch.randn(2, 3, 16, dtype=torch.float64), torch.randn(2, 16, 5, 6, dtype=torch.float64)
    padding = torch.zeros(2, 5, 6, dtype=torch.bool)
    padding[1, 3:] = True
    maps = module(queries, memory, padding)
    assert maps.shape == (2, 3, 4, 5, 6)
    torch.testing.assert_close(maps.sum((2, 3, 4)), torch.ones(2, 3, dtype=torch.float64))
    assert maps[1, :, :, 3:].eq(0).all()
    q = F.linear(queries[1, 2], module.q_linear.weight, module.q_linear.bias).view(4, 4)
    k = F.linear(memory[1].permute(1, 2, 0), module.k_linear.weight, module.k_linear.bias)[:3].view(3, 6, 4, 4)
    scores = torch.einsum("nc,hwnc->nhw", q, k) / 4**0.5
    torch.testing.assert_close(maps[1, 2, :, :3], scores.flatten().softmax(0).view(4, 3, 6))


def test_mask_head_is_the_published_stack() -> None:
    """All queries through every convolution, features and maps side by side."""
    torch.manual_seed(0)
    head = MaskHead(128, 8, (10, 6, 4)).double()
    for parameter in head.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    feature, maps = torch.randn(2, 128, 3, 4).double(), torch.randn(2, 5, 8, 3, 4).double()
    finer = [torch.randn(2, c, 3 * s, 4 * s).double() for c, s in ((10, 2), (6, 4), (4, 8))]

    def layer(number: int, x: Tensor) -> Tensor:
        return getattr(head, f"gn{number}")(getattr(head, f"lay{number}")(x)).relu()

    x = torch.cat([feature.repeat_interleave(5, 0), maps.flatten(0, 1)], 1)
    x = layer(2, layer(1, x))
    for number, level in enumerate(finer, 1):
        adapted = getattr(head, f"adapter{number}")(level).repeat_interleave(5, 0)
        x = layer(number + 2, adapted + F.interpolate(x, size=level.shape[-2:], mode="nearest"))
    expected = head.out_lay(x).view(2, 5, 24, 32)
    torch.testing.assert_close(head(feature, maps, finer), expected)


def test_every_weight_is_trained() -> None:
    model = small().train()
    predictions = model(images())
    (predictions.masks.square().mean() + predictions.logits.square().mean() + predictions.boxes.mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_frozen_detector_neither_trains_nor_drops() -> None:
    model = small(freeze_detr=True, dropout=0.5).train()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"bbox_attention", "mask_head"}
    (group,) = model.parameter_groups(1e-4, 1e-5)
    assert group["lr"] == 1e-4
    assert torch.equal(model(images()).boxes, model(images()).boxes)


def test_second_stage_starts_from_a_detection_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(1)
    detector = build_model("detr_small", 4, **SMALL).eval()
    torch.save({"model": detector.state_dict()}, tmp_path / "detector.pth")
    model = small(2, freeze_detr=True).eval()
    load_weights(model.detr, tmp_path / "detector.pth")
    assert torch.equal(model(images()).boxes, detector(images()).boxes)
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    again = small(3).eval()
    load_weights(again, tmp_path / "whole.pth")
    assert torch.equal(model(images()).masks, again(images()).masks)


def test_sizes_that_group_norm_cannot_split() -> None:
    with pytest.raises(
        ValueError, match=r"hidden_dim to be a multiple of 128 and nheads of 8.*hidden_dim=64, nheads=8"
    ):
        build_model("detr_small_panoptic", 4, hidden_dim=64)
