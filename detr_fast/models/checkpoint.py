"""Weights from files: the published layout, Hugging Face's, ours, and ImageNet backbones. Only tensors are read."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# Names of transformers' DETR (4.x and 5.x) and of its ResNet, rewritten in this order into the published ones.
_HUGGING_FACE = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(detr\.)?model\.", r"\1"),
        (r"\bbackbone\.(conv_encoder\.)?model\.", "backbone.0.body."),
        (r"\b(backbone\.)?position_embedding\.row_embeddings", "backbone.1.row_embed"),
        (r"\b(backbone\.)?position_embedding\.column_embeddings", "backbone.1.col_embed"),
        (r"body\.embedder\.embedder\.convolution", "body.conv1"),
        (r"body\.embedder\.embedder\.normalization", "body.bn1"),
        (r"body\.encoder\.stages\.(\d+)\.layers\.", lambda m: f"body.layer{int(m[1]) + 1}."),
        (r"\.shortcut\.convolution", ".downsample.0"),
        (r"\.shortcut\.normalization", ".downsample.1"),
        (r"\.layer\.(\d+)\.convolution", lambda m: f".conv{int(m[1]) + 1}"),
        (r"\.layer\.(\d+)\.normalization", lambda m: f".bn{int(m[1]) + 1}"),
        (r"\b(en|de)coder\.layers", r"transformer.\1coder.layers"),
        (r"\b(en|de)coder\.layernorm", r"transformer.\1coder.norm"),
        (r"\.(mlp\.)?fc([12])\.", r".linear\2."),
        (r"\.self_attn_layer_norm", ".norm1"),
        (r"\.encoder_attn_layer_norm", ".norm2"),
        (r"(encoder\.layers\.\d+)\.final_layer_norm", r"\1.norm2"),
        (r"(decoder\.layers\.\d+)\.final_layer_norm", r"\1.norm3"),
        (r"\.encoder_attn\.", ".multihead_attn."),
        (r"\.o_proj\.", ".out_proj."),
        (r"\bquery_position_embeddings", "query_embed"),
        (r"\binput_projection", "input_proj"),
        (r"\bclass_labels_classifier", "class_embed"),
        (r"\bbbox_predictor", "bbox_embed"),
    )
)


class ClassesDiffer(ValueError):
    """Weights are of a model that tells another number of classes apart."""

    def __init__(self, path: str | Path, found: int, expected: int) -> None:
        super().__init__(
            f"{path} tells {found} classes apart, the model {expected}: build the model with num_classes={found}, "
            "or load with new_classes=True (--model.new_classes=true) to start with a new class layer"
        )
        self.found, self.expected = found, expected


def load_weights(model: nn.Module, path: str | Path, *, new_classes: bool = False) -> None:
    """Fills a model from a file: a state dict, or a dictionary that holds one under "model".

    Names may be those of the published DETR checkpoints (ours are the same) or of Hugging Face's
    ``DetrForObjectDetection`` (``facebook/detr-resnet-50``); the file may be ``.pth``, ``.pt`` or ``.safetensors``.
    Every weight must be there, in the right shape. With ``new_classes`` the layer that tells classes apart is left as
    it is, to fine-tune on other classes.

    Raises:
        FileNotFoundError: there is no such file.
        ClassesDiffer: the file is of a model of another number of classes.
        ValueError: the file holds no weights, or those of another model; the message says how they differ.
    """
    state = read_state(path)
    if any("class_labels_classifier" in name for name in state):
        state = from_hugging_face(state)
    prefix = "detr." if hasattr(model, "detr") else ""
    head = f"{prefix}class_embed."
    own = model.state_dict()
    if new_classes:
        state = {**state, **{name: value for name, value in own.items() if name.startswith(head)}}
    found, expected = (len(x.get(f"{head}bias", ())) - 1 for x in (state, own))
    if found != expected and f"{head}bias" in state:
        raise ClassesDiffer(path, found, expected)
    _load(model, state, path)


def load_backbone(model: nn.Module, path: str | Path) -> None:
    """Starts a model's ResNet from ImageNet weights in torchvision's or timm's layout; their classifier is ignored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold the weights of this ResNet; the message says how they differ.
    """
    state = {name: value for name, value in read_state(path).items() if not name.startswith("fc.")}
    prefix = "detr." if hasattr(model, "detr") else ""
    _load(model.get_submodule(f"{prefix}backbone.0.body"), state, path)


def count_classes(state: Mapping[str, Tensor]) -> int:
    """Classes that the weights tell apart, without "no object".

    Raises:
        ValueError: there is no class layer among them.
    """
    for name in ("class_embed.bias", "class_labels_classifier.bias"):
        for prefix in ("", "detr."):
            if prefix + name in state:
                return len(state[prefix + name]) - 1
    raise ValueError(f"weights must hold a class layer of DETR (class_embed.bias), found {_first(list(state))}")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU, without the prefix that DistributedDataParallel adds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    content = _read_file(path)
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(x, Tensor) for x in content.values()):
        raise ValueError(f'{path} must hold a state dict, or one under "model"; found {_describe(content)}')
    return {name.removeprefix("module."): value for name, value in content.items()}


def _read_file(path: Path) -> Any:
    try:
        return load_file(path) if path.suffix == ".safetensors" else read_tensors(path)
    except (ValueError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as a file of tensors: {reason}") from error


def read_tensors(path: Path) -> Any:
    """What ``torch.save`` wrote: tensors, numbers, text, lists and dictionaries, on the CPU.

    Raises:
        ValueError: the file is damaged or another; the message is the reason alone.
    """
    try:
        # The published training script stores its arguments beside the weights.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # and asks to file an issue
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the bytes of another file are a program to PyTorch's reader, which fails anyhow
        raise ValueError(_reason(path, error)) from error


def _reason(path: Path, error: Exception) -> str:
    """Why a file cannot be read. PyTorch says how to run the code in it, or where its reader stopped."""
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        return "it is empty"
    if start == b"PK" and not zipfile.is_zipfile(path):
        return "it is cut off"
    if start == b"PK":
        with zipfile.ZipFile(path) as archive:
            is_saved = any(name.endswith("data.pkl") for name in archive.namelist())
        holds_objects = isinstance(error, pickle.UnpicklingError)
    else:
        is_saved = start == b"\x80\2"  # the format of PyTorch 1.5 and before
        holds_objects = "GLOBAL" in str(error)
    if is_saved and holds_objects:
        return "it holds Python objects, which could run code; only tensors, numbers, text and lists of them are read"
    if is_saved and isinstance(error, RuntimeError):
        return str(error).strip().splitlines()[0]
    return "it is not a file that torch.save has written"


def _describe(content: object) -> str:
    if isinstance(content, Mapping):
        return f"a dictionary with {', '.join(map(str, list(content)[:5])) or 'nothing'}"
    return type(content).__name__


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of transformers' ``DetrForObjectDetection`` under the published names."""
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in _HUGGING_FACE:
            name = pattern.sub(replacement, name)
        renamed[name] = value
    packed = {}
    for name, value in renamed.items():
        match = re.fullmatch(r"(.*_attn)\.([qkv])_proj\.(weight|bias)", name)
        if match is None:
            packed[name] = value
        elif match[2] == "q":
            parts = (renamed.get(f"{match[1]}.{part}_proj.{match[3]}") for part in "qkv")
            packed[f"{match[1]}.in_proj_{match[3]}"] = torch.cat([part for part in parts if part is not None])
    return packed


def _load(module: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    own = module.state_dict()
    state = {name: x for name, x in state.items() if name in own or not name.endswith("num_batches_tracked")}
    differences = {
        "missing": [name for name in own if name not in state],
        "not expected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {list(state[name].shape)} instead of {list(x.shape)}"
            for name, x in own.items()
            if name in state and state[name].shape != x.shape
        ],
    }
    found = [f"{len(names)} {kind} ({_first(names)})" for kind, names in differences.items() if names]
    if found:
        raise ValueError(f"{path} holds the weights of another model: {'; '.join(found)}")
    module.load_state_dict(state, strict=True)


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
