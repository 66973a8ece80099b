"""Trains Hugging Face's DETR with its own Trainer on generated images, with our loss in place of its own.

    python docs/examples/finetune_transformers.py --steps 300

Needs transformers and accelerate. `--model facebook/detr-resnet-50` starts from a published checkpoint instead of a
small network with random weights. Without the line with `detr_fast.patch` the same script runs with transformers' loss.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    ResNetConfig,
    Trainer,
    TrainingArguments,
)

import detr_fast
from detr_fast.data.shapes import NAMES, write_shapes


class CocoFolder(Dataset[dict[str, Any]]):
    """Images and annotations of a split, as DetrImageProcessor wants them."""

    def __init__(self, folder: Path, split: str, processor: DetrImageProcessor) -> None:
        self.folder, self.processor = folder / split, processor
        dataset = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        classes = {category["id"]: label for label, category in enumerate(dataset["categories"])}
        self.images, self.annotations = dataset["images"], {image["id"]: [] for image in dataset["images"]}
        for annotation in dataset["annotations"]:
            labelled = annotation | {"category_id": classes[annotation["category_id"]]}
            self.annotations[annotation["image_id"]].append(labelled)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        target = {"image_id": image["id"], "annotations": self.annotations[image["id"]]}
        pixels = Image.open(self.folder / image["file_name"]).convert("RGB")
        encoded = self.processor(pixels, annotations=target, return_tensors="pt")
        return {"pixel_values": encoded["pixel_values"][0], "labels": encoded["labels"][0]}


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All images have one size here; otherwise `processor.pad` makes a batch and its mask."""
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    return {"pixel_values": pixels, "labels": [sample["labels"] for sample in samples]}


def build(name: str | None) -> DetrForObjectDetection:
    if name is not None:
        return DetrForObjectDetection.from_pretrained(name, num_labels=len(NAMES), ignore_mismatched_sizes=True)
    backbone = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[32, 64, 96, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_labels=len(NAMES),
        num_queries=20,
        d_model=64,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        auxiliary_loss=True,
    )
    return DetrForObjectDetection(config)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Trains and returns the logged losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_transformers"))
    parser.add_argument("--model", help="name or folder of a checkpoint (default: a small network, random weights)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--images", type=int, default=400)
    options = parser.parse_args(arguments)

    detr_fast.patch("transformers")  # the whole change

    torch.manual_seed(0)
    data = write_shapes(options.output / "shapes", {"train": options.images}, image_size=96)
    processor = DetrImageProcessor(do_resize=False, do_pad=False)
    trainer = Trainer(
        model=build(options.model),
        args=TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            max_grad_norm=1.0,
            logging_steps=max(options.steps // 10, 1),
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            seed=0,
        ),
        train_dataset=CocoFolder(data, "train", processor),
        data_collator=collate,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main())
