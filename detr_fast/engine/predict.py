"""A trained detector for use: from a checkpoint and images to boxes, scores and names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from detr_fast.data.coco import Categories
from detr_fast.data.images import read_image
from detr_fast.data.transforms import evaluation_transform
from detr_fast.engine.checkpoint import load_checkpoint
from detr_fast.engine.config import Config
from detr_fast.engine.distributed import choose_device
from detr_fast.engine.draw import draw_boxes
from detr_fast.engine.errors import CheckpointError, ConfigError, ForeignCheckpointError
from detr_fast.engine.run import BEST, LAST
from detr_fast.models import build_model
from detr_fast.models.checkpoint import count_classes, load_weights, read_state
from detr_fast.models.postprocess import postprocess_detections
from detr_fast.structures import Images

AnyImage = str | Path | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Detections:
    """Objects found in one image, the most certain first."""

    boxes: Tensor  # [n, 4] float32, xyxy in pixels of the image
    scores: Tensor  # [n] float32 in [0, 1]
    labels: Tensor  # [n] int64, index of the class
    names: tuple[str, ...]  # name of the class of each object
    category_ids: tuple[int, ...]  # its id in the data set that the model was trained on
    size: tuple[int, int]  # (height, width) of the image

    def __len__(self) -> int:
        return len(self.scores)

    def draw(self, image: AnyImage) -> Image.Image:
        """A copy of the image with boxes, names and scores."""
        captions = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores.tolist(), strict=True)]
        return draw_boxes(as_picture(image), self.boxes.tolist(), self.labels.tolist(), captions)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: size of the image and a list of objects with box xyxy in pixels."""
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.names, self.category_ids, strict=True)
        objects = [{"name": name, "category_id": id_, "score": score, "box": box} for box, score, name, id_ in rows]
        return {"height": self.size[0], "width": self.size[1], "objects": objects}


class Detector:
    """A model with everything that prediction needs: preparation of images, names of classes, a device."""

    def __init__(
        self,
        model: nn.Module,
        categories: Categories,
        *,
        size: int = 800,
        max_size: int | None = 1333,
        device: str | torch.device = "auto",
    ):
        self.device = choose_device(str(device))
        self.model = model.to(self.device).eval()
        self.categories = categories
        self.transform = evaluation_transform(size=size, max_size=max_size)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "auto",
        model: str = "",
        **options: Any,
    ) -> Detector:
        """From a checkpoint of ``detr-fast train`` (a file or a run's folder), or a published one of ``model``.

        ``options`` are those of the model's builder that a published checkpoint was not trained with by default.

        Raises:
            CheckpointError: the file is missing, damaged or of another model.
        """
        overrides = [("model.name", model)] if model else []
        overrides += [(f"model.{name}", value) for name, value in options.items()]
        return load_detector(path, overrides, device)[0]

    def to(self, device: str | torch.device) -> Detector:
        self.device = choose_device(str(device))
        self.model.to(self.device)
        return self

    def predict(
        self,
        images: AnyImage | Sequence[AnyImage],
        threshold: float = 0.5,
        batch_size: int = 1,
    ) -> list[Detections]:
        """Objects with a score of at least ``threshold`` in each image.

        Images are paths, PIL images, arrays ``[height, width, 3]`` uint8 (RGB) or tensors ``[3, height, width]``
        (uint8, or floating point in [0, 1]); one of them or a list.

        Raises:
            DataFault: a file cannot be read; the message names it.
            ValueError: an array or tensor has another shape or type, or another argument is none.
        """
        if isinstance(images, (str, Path, Image.Image)):
            return list(self.predict_each([images], threshold, batch_size))
        if isinstance(images, (np.ndarray, Tensor)):
            images = [images] if images.ndim == 3 else list(images)
        return list(self.predict_each(images, threshold, batch_size))

    @torch.no_grad()
    def predict_each(
        self, images: Sequence[AnyImage], threshold: float = 0.5, batch_size: int = 1
    ) -> Iterator[Detections]:
        """The same for one image after the other, holding no more than ``batch_size`` in memory."""
        check_threshold(threshold)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        for start in range(0, len(images), batch_size):
            pictures = [as_picture(image) for image in images[start : start + batch_size]]
            prepared = [self.transform(picture, {}, torch.Generator())[0] for picture in pictures]
            outputs = self.model(Images.batch(prepared).to(self.device))
            outputs = outputs if isinstance(outputs, dict) else outputs.as_dict()
            sizes = torch.tensor([(picture.height, picture.width) for picture in pictures], device=self.device)
            for picture, found in zip(pictures, postprocess_detections(outputs, sizes), strict=True):
                yield self._detections(found, threshold, (picture.height, picture.width))

    def _detections(self, found: dict[str, Tensor], threshold: float, size: tuple[int, int]) -> Detections:
        scores, order = found["scores"].float().cpu().sort(descending=True, stable=True)
        order = order[scores >= threshold]
        labels = found["labels"].cpu()[order]
        names, ids = zip(*map(self._name_of_class, labels.tolist()), strict=True) if len(order) else ((), ())
        return Detections(found["boxes"].float().cpu()[order], scores[: len(order)], labels, names, ids, size)

    def _name_of_class(self, label: int) -> tuple[str, int]:
        category = self.categories.ids[label]
        return self.categories.names[label] or f"category {category}", category


def check_threshold(threshold: float, name: str = "threshold") -> None:
    """Scores are probabilities; a larger one would find nothing, and a percentage looks like one.

    Raises:
        ConfigError: the argument ``name`` is none.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(f"{name} must be in [0, 1], got {threshold}")


def load_detector(
    path: str | Path,
    overrides: Iterable[tuple[str, Any]] = (),
    device: str | torch.device = "auto",
) -> tuple[Detector, Config]:
    """A detector and the settings of its training, with ``overrides``; see :meth:`Detector.load`."""
    path = Path(path)
    if path.is_dir():
        path = path / BEST if (path / BEST).exists() else path / LAST
    try:
        if path.suffix == ".safetensors":
            raise ForeignCheckpointError
        state = load_checkpoint(path)
    except ForeignCheckpointError:
        return _load_published(path, overrides, device)
    config = Config.from_dict(state["config"]).with_overrides(overrides)
    model = build_model(config.model.name, state["num_classes"], **config.model.options)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise CheckpointError(
            f"checkpoint {path} is not of this model: {' '.join(str(error).split())[:500]}"
        ) from error
    return _detector(model, Categories.from_dict(state["categories"]), config, device), config


def _load_published(
    path: Path, overrides: Iterable[tuple[str, Any]], device: str | torch.device
) -> tuple[Detector, Config]:
    """Published checkpoints say nothing of their model; class c is category id c and its name unknown."""
    overrides = list(overrides)
    if not any(key == "model.name" for key, _ in overrides):
        raise CheckpointError(
            f"checkpoint {path} was not written by detr_fast: say which model it is of, "
            "as model='detr_resnet50' in Python or --model.name=detr_resnet50"
        )
    config = Config().with_overrides(overrides)
    try:
        classes = count_classes(read_state(path))
        model = build_model(config.model.name, classes, **config.model.options)
        load_weights(model, path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    categories = Categories(tuple(range(classes)), ("",) * classes)
    return _detector(model, categories, config, device), config


def _detector(model: nn.Module, categories: Categories, config: Config, device: str | torch.device) -> Detector:
    size, max_size = config.data.shorter_side, config.data.max_size
    return Detector(model, categories, size=size, max_size=max_size or None, device=device)


def as_picture(image: AnyImage) -> Image.Image:
    """Any accepted form of an image as PIL RGB."""
    if isinstance(image, (str, Path)):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"an image array must be [height, width, 3] uint8, got {list(image.shape)} {image.dtype}")
        return Image.fromarray(image)
    if image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"an image tensor must be [3, height, width], got {list(image.shape)}")
    if image.is_floating_point():
        image = (image.clamp(0, 1) * 255).round()
    return Image.fromarray(image.to(torch.uint8).permute(1, 2, 0).cpu().numpy())
