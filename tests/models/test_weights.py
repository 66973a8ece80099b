"""Weights from files in the published, Hugging Face's and ImageNet layouts, and what is said when they do not fit."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from detr_fast.models import build_model
from detr_fast.models.checkpoint import count_classes, from_hugging_face, load_backbone, load_weights
from detr_fast.models.detr import detr

SMALL = {"num_queries": 5, "hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 16}


def tiny(seed: int, num_classes: int = 3, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("detr_tiny", num_classes, **{**SMALL, **options})


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["published", "bare", "with arguments", "distributed", "safetensors"])
def test_layouts_of_a_file(tmp_path: Path, kind: str) -> None:
    source, model = tiny(1), tiny(2)
    state = source.state_dict()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    elif kind == "bare":
        torch.save(state, path)
    elif kind == "distributed":
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    else:
        extra = {"args": argparse.Namespace(lr=1e-4), "epoch": 3, "optimizer": {}} if kind == "with arguments" else {}
        torch.save({"model": state, **extra}, path)
    assert not same(source, model)
    load_weights(model, path)
    assert same(source, model)


def rename_to_hugging_face(state: dict[str, Tensor], version: int) -> dict[str, Tensor]:
    """Published names into those of transformers 4.x (with timm's backbone) or 5.x, written independently."""
    body = "model.backbone.conv_encoder.model." if version == 4 else "model.backbone.model."
    output, hidden = ("out_proj", "") if version == 4 else ("o_proj", "mlp.")
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("backbone.0.body."):
            new = body + name.removeprefix("backbone.0.body.")
        elif name.startswith("transformer."):
            new = "model." + name.removeprefix("transformer.")
            last = ".norm3" if ".decoder." in name else ".norm2"
            new = new.replace(last, ".final_layer_norm").replace(".norm1", ".self_attn_layer_norm")
            new = new.replace(".norm2", ".encoder_attn_layer_norm").replace("decoder.norm", "decoder.layernorm")
            new = new.replace("multihead_attn", "encoder_attn").replace("out_proj", output)
            new = new.replace("linear1", f"{hidden}fc1").replace("linear2", f"{hidden}fc2")
        else:
            places = {
                "class_embed": "class_labels_classifier",
                "bbox_embed": "bbox_predictor",
                "query_embed": "model.query_position_embeddings",
                "input_proj": "model.input_projection",
                "backbone": "model.backbone",
            }
            first, _, rest = name.partition(".")
            new = f"{places[first]}.{rest}"
        if ".in_proj_" in new:
            stem, kind = new.split("in_proj_")
            parts = zip("qkv", value.chunk(3), strict=True)
            renamed.update({f"{stem}{part}_proj.{kind}": piece for part, piece in parts})
        else:
            renamed[new] = value
    return renamed


@pytest.mark.parametrize("version", [4, 5])
def test_hugging_face_names(tmp_path: Path, version: int) -> None:
    torch.manual_seed(0)
    source, model = (detr("resnet50", 3, **SMALL) for _ in range(2))
    for index, value in enumerate(source.state_dict().values()):  # every entry another value
        value.fill_(index)
    path = tmp_path / "weights.pth"
    torch.save(rename_to_hugging_face(source.state_dict(), version), path)
    load_weights(model, path)
    assert same(source, model)


def test_hugging_face_learned_positions() -> None:
    tables = {"row_embeddings": torch.zeros(50, 4), "column_embeddings": torch.ones(50, 4)}
    for prefix in ("model.backbone.position_embedding", "model.position_embedding"):
        found = from_hugging_face({f"{prefix}.{name}.weight": table for name, table in tables.items()})
        assert found["backbone.1.row_embed.weight"].eq(0).all()
        assert found["backbone.1.col_embed.weight"].eq(1).all()


def test_another_number_of_classes(tmp_path: Path) -> None:
    source, model = tiny(1), tiny(2, num_classes=7)
    path = tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    message = "tells 3 classes apart, the model 7: build the model with num_classes=3, or load with new_classes=True"
    with pytest.raises(ValueError, match=message):
        load_weights(model, path)
    before = model.class_embed.weight.clone()
    load_weights(model, path, new_classes=True)
    assert torch.equal(model.class_embed.weight, before)
    assert torch.equal(model.query_embed.weight, source.query_embed.weight)


def test_weights_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(tiny(1, dec_layers=1).state_dict(), path)
    with pytest.raises(ValueError, match=r"another model: 18 missing \(transformer.decoder.layers.1.linear1"):
        load_weights(tiny(2), path)
    with pytest.raises(ValueError, match=r"1 of another shape \(query_embed.weight \[5, 32\] instead of \[6, 32\]\)"):
        load_weights(tiny(2, dec_layers=1, num_queries=6), path)
    torch.save({**tiny(1).state_dict(), "spare": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"1 not expected \(spare\)"):
        load_weights(tiny(2), path)


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        load_weights(tiny(1), path)
    torch.save({"epoch": 3, "best": 0.5}, path)
    with pytest.raises(ValueError, match=r"must hold a state dict.*found a dictionary with epoch, best"):
        load_weights(tiny(1), path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"cannot be read as a file of tensors: it is not a file that torch\.save has"):
        load_weights(tiny(1), path)


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_file_is_not_run(tmp_path: Path, archive: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": Trap()}, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(
        ValueError, match="cannot be read as a file of tensors: it holds Python objects, which could run"
    ):
        load_weights(tiny(1), path)
    assert not Trap.sprung


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 7, 1000])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, suffix: str, kept: int) -> None:
    path = tmp_path / f"weights{suffix}"
    state = {name: value.contiguous() for name, value in tiny(1).state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"weights\{suffix} cannot be read as a file of tensors: \S") as caught:
        load_weights(tiny(1), path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["class_embed.bias", "detr.class_embed.bias", "class_labels_classifier.bias"])
def test_classes_are_counted(name: str) -> None:
    assert count_classes({name: torch.zeros(8)}) == 7
    with pytest.raises(ValueError, match="must hold a class layer"):
        count_classes({"fc.bias": torch.zeros(8)})


class Trap:
    sprung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return spring, ()


def spring() -> None:
    Trap.sprung = True


@pytest.mark.parametrize("counters", [True, False], ids=["torchvision", "timm"])
def test_imagenet_backbone(tmp_path: Path, counters: bool) -> None:
    torch.manual_seed(0)
    source, model = (detr("resnet18", 3, **SMALL) for _ in range(2))
    state = dict(source.backbone[0].body.state_dict())
    if counters:
        norms = [name.removesuffix("running_var") for name in state if name.endswith("running_var")]
        state |= {f"{name}num_batches_tracked": torch.tensor(7) for name in norms}
    state |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    path = tmp_path / "resnet18.pth"
    torch.save(state, path)
    transformer = model.transformer.encoder.layers[0].linear1.weight.clone()
    load_backbone(model, path)
    assert same(source.backbone, model.backbone)
    assert torch.equal(model.transformer.encoder.layers[0].linear1.weight, transformer)
    with pytest.raises(ValueError, match=r"another model: .* missing \(layer1.0.conv3.weight"):
        load_backbone(detr("resnet50", 3, **SMALL), path)
