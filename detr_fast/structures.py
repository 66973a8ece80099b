"""All that crosses a module border: images, tokens, predictions and targets of a batch.

Axis letters: B images, L decoder layers, Q queries, T targets of the whole batch (flat), C classes,
M memory tokens of the whole batch (flat), D width. Nothing is padded but the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Annotations reach beyond their image now and then, but a number like this is one of pixels.
_LARGEST_BOX = 4.0


def offsets_of(counts: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Start of each segment in a flat list, and its end: ``[len(counts) + 1]`` int32."""
    starts = torch.from_numpy(np.array([0, *accumulate(counts)], dtype=np.int32))
    return starts if device is None else starts.to(device)


@dataclass(frozen=True)
class Images:
    """A batch of images of different sizes, each in the top-left corner of a common canvas."""

    pixels: Tensor  # [B, 3, height, width], zero where there is no image
    padding: Tensor  # [B, height, width] bool, True = padding
    sizes: tuple[tuple[int, int], ...]  # (height, width) of each image, known on the host

    @classmethod
    def batch(cls, images: Sequence[Tensor] | Tensor) -> Images:
        """Images ``[3, h_i, w_i]`` (or one tensor ``[B, 3, h, w]``) on a common canvas."""
        for index, image in enumerate(images):
            if image.dim() != 3:
                raise ValueError(
                    f"Images.batch: image {index} must be [channels, height, width], got {list(image.shape)}"
                )
        sizes = tuple((image.shape[-2], image.shape[-1]) for image in images)
        height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
        if isinstance(images, Tensor):
            return cls(images, images.new_zeros((len(images), height, width), dtype=torch.bool), sizes)
        pixels = torch.stack([F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])) for x in images])
        padding = torch.ones((len(sizes), height, width), dtype=torch.bool)
        for index, (h, w) in enumerate(sizes):
            padding[index, :h, :w] = False
        return cls(pixels, padding.to(pixels.device, non_blocking=True), sizes)

    def to(self, device: torch.device | str) -> Images:
        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=True),
            padding=self.padding.to(device, non_blocking=True),
        )

    def __len__(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True)
class Tokens:
    """Token sets of a batch, one after the other: image locations or object queries."""

    content: Tensor  # [M, D]
    position: Tensor  # [M, D] added to content wherever tokens are compared
    offsets: Tensor  # [B + 1] int32, tokens of image b are offsets[b]:offsets[b + 1]
    max_count: int  # most tokens of one image, known on the host

    def with_capacity(self, capacity: int, max_count: int) -> Tokens:
        """The same tokens in tensors whose shapes do not change from batch to batch, as a CUDA graph needs them.

        Room for `capacity` tokens in all and `max_count` in one image. Rows past the last offset are zero; nothing
        attends to them, and what becomes of them is meaningless.

        Raises:
            ValueError: there are more tokens than that.
        """
        for name, room, count in (
            ("capacity", capacity, len(self.content)),
            ("max_count", max_count, self.max_count),
        ):
            if room < count:
                raise ValueError(f"Tokens.with_capacity: {name} must be at least {count}, got {room}")
        spare = (0, 0, 0, capacity - len(self.content))
        content, position = F.pad(self.content, spare), F.pad(self.position, spare)
        return replace(self, content=content, position=position, max_count=max_count)


@dataclass(frozen=True)
class Predictions:
    """What a detector says, of every decoder layer; the last layer is the result."""

    logits: Tensor  # [L, B, Q, C]
    boxes: Tensor  # [L, B, Q, 4] cxcywh in [0, 1] of the unpadded image
    masks: Tensor | None = None  # [B, Q, height, width] logits, last layer only

    @classmethod
    def of_layer(cls, outputs: Mapping[str, Any]) -> Predictions:
        """``pred_logits`` and ``pred_boxes`` of one layer, without a copy."""
        _check_outputs(outputs)
        return cls(outputs["pred_logits"][None], outputs["pred_boxes"][None])

    @classmethod
    def from_dict(cls, outputs: Mapping[str, Any]) -> Predictions:
        """The dictionary of facebookresearch/detr: ``pred_logits``, ``pred_boxes`` and, if present, ``aux_outputs``."""
        _check_outputs(outputs)
        layers = [*outputs.get("aux_outputs", ()), outputs]
        for index, layer in enumerate(layers):
            for name in ("pred_logits", "pred_boxes"):
                if layer[name].shape != outputs[name].shape:
                    raise ValueError(
                        f"aux_outputs[{index}]: {name} must be {list(outputs[name].shape)} as in the last layer, "
                        f"got {list(layer[name].shape)}"
                    )
        logits = _stacked([layer["pred_logits"] for layer in layers])
        boxes = _stacked([layer["pred_boxes"] for layer in layers])
        return cls(logits, boxes, outputs.get("pred_masks"))

    def as_dict(self) -> dict[str, Any]:
        """The dictionary of facebookresearch/detr; ``aux_outputs`` holds all layers but the last."""
        outputs: dict[str, Any] = {"pred_logits": self.logits[-1], "pred_boxes": self.boxes[-1]}
        if self.masks is not None:
            outputs["pred_masks"] = self.masks
        if len(self.logits) > 1:
            pairs = zip(self.logits[:-1], self.boxes[:-1], strict=True)
            outputs["aux_outputs"] = [{"pred_logits": logits, "pred_boxes": boxes} for logits, boxes in pairs]
        return outputs


def _check_outputs(outputs: Mapping[str, Any]) -> None:
    if not isinstance(outputs, Mapping):
        raise TypeError(f"outputs must be a dictionary, got {type(outputs).__name__}")
    if "pred_logits" not in outputs or "pred_boxes" not in outputs:
        raise ValueError(f"outputs must have 'pred_logits' and 'pred_boxes', got {sorted(map(str, outputs))}")


def check_listed(targets: Any) -> None:
    """Raises a TypeError unless `targets` is what code bases pass: a list with a dictionary for each image."""
    if isinstance(targets, Sequence) and all(isinstance(own, Mapping) for own in targets):
        return
    found = type(targets).__name__
    if isinstance(targets, Sequence) and not isinstance(targets, str):
        found += f" of {next(type(own).__name__ for own in targets if not isinstance(own, Mapping))}"
    raise TypeError(f"targets must be a list of dictionaries, one of each image, got {found}")


def without_masks(targets: Targets | Sequence[Mapping[str, Tensor]]) -> Targets | Sequence[Mapping[str, Tensor]]:
    """For losses that need none: masks are large, and may have any form then."""
    if isinstance(targets, Targets):
        return targets if targets.masks is None else replace(targets, masks=None)
    check_listed(targets)
    return [{name: value for name, value in own.items() if name != "masks"} for own in targets]


def _stacked(layers: Sequence[Tensor]) -> Tensor:  # L x [...] -> [L, ...]
    """``torch.stack``; where the layers are all slices of one tensor, as decoders return them, that tensor itself.

    That saves the copy, and in backward a tensor of the full size for each layer.
    """
    base = layers[0]._base
    if torch.compiler.is_compiling() or base is None or base.shape != (len(layers), *layers[0].shape):
        return torch.stack(list(layers))
    for index, layer in enumerate(layers):
        is_slice = (
            layer._base is base
            and layer.storage_offset() == base.storage_offset() + index * base.stride(0)
            and layer.stride() == base.stride()[1:]
            and layer.dtype == base.dtype
        )
        # A detached slice, or one whose own gradient is looked at, must stay itself.
        is_transparent = (
            layer.requires_grad == base.requires_grad and not layer.retains_grad and not layer._backward_hooks
        )
        if not (is_slice and is_transparent):
            return torch.stack(list(layers))
    return base


@dataclass(frozen=True)
class Targets:
    """Annotated objects of a batch in one flat list. Rows past ``offsets[B]`` are ignored everywhere."""

    labels: Tensor  # [T] int64
    boxes: Tensor  # [T, 4] float32, cxcywh in [0, 1] of the unpadded image
    offsets: Tensor  # [B + 1] int32, objects of image b are offsets[b]:offsets[b + 1]
    max_count: int  # most objects of one image, known on the host
    masks: tuple[Tensor, ...] | None = None  # per image [n_b, height, width] bool

    @classmethod
    def pack(
        cls,
        targets: Sequence[Mapping[str, Tensor]],
        num_classes: int | None = None,
        names: Sequence[object] | None = None,
        check_values: bool = True,
    ) -> Targets:
        """Packs a list of dictionaries with ``labels [n]`` and ``boxes [n, 4]``.

        Shapes are always checked; values, unless `check_values` is False, where that costs no synchronisation, on the
        CPU: see :meth:`check_values`. ``names`` (image ids or file names) say which image an error is about; without
        them its index in the batch does.

        Raises:
            ValueError: an image has malformed labels or boxes; the message names it.
            TypeError: `targets` is no list of dictionaries.
        """
        check_listed(targets)
        counts = [_check_shapes(target, index, names) for index, target in enumerate(targets)]
        if counts:
            labels = torch.cat([target["labels"] for target in targets]).to(torch.int64)
            boxes = torch.cat([target["boxes"] for target in targets]).to(torch.float32).reshape(-1, 4)
        else:
            labels, boxes = torch.empty(0, dtype=torch.int64), torch.empty(0, 4)
        masks = _masks_of(targets, counts, names)
        offsets = offsets_of(counts)
        packed = cls(labels, boxes, offsets, max(counts, default=0), masks)
        if labels.device.type == "cpu":
            if check_values:
                packed.check_values(num_classes, names)
            return packed
        return replace(packed, offsets=offsets.to(labels.device, non_blocking=True))

    def check_values(self, num_classes: int | None = None, names: Sequence[object] | None = None) -> None:
        """Raises a ValueError that names the image, if a value is none of an annotation. CPU only.

        A label must be in ``[0, num_classes)``, a box finite, of a size of at least 0 and not in pixels.
        """
        if torch.compiler.is_compiling():  # which has no NumPy, and no errors that depend on values
            return
        # A glance through NumPy costs a tenth of the operators below. Negative labels are large without their sign.
        labels, boxes = self.labels.numpy().view(np.uint64), self.boxes.detach().numpy()
        known = len(labels) == 0 or labels.max() < (2**63 if num_classes is None else num_classes)
        is_small = boxes.max(initial=0) <= _LARGEST_BOX and boxes.min(initial=0) >= -_LARGEST_BOX  # not if NaN
        if known and is_small and boxes[:, 2:].min(initial=0) >= 0:
            return
        bad_box = ~(self.boxes.abs() <= _LARGEST_BOX).all(1) | (self.boxes[:, 2:] < 0).any(1)
        bad_label = self.labels < 0
        if num_classes is not None:
            bad_label |= self.labels >= num_classes
        row = int((bad_box | bad_label).nonzero()[0])
        image = int(torch.searchsorted(self.offsets, row, right=True)) - 1
        where = f"{_name_of_image(image, names)}, target {row - int(self.offsets[image])}"
        if bad_label[row]:
            limit = "at least 0" if num_classes is None else f"in [0, {num_classes})"
            raise ValueError(f"targets of {where}: label must be {limit}, got {int(self.labels[row])}")
        raise ValueError(
            f"targets of {where}: box must be (cx, cy, w, h) in fractions of the image's width and height, finite, "
            f"with w and h at least 0, got {self.boxes[row].tolist()}"
        )

    def repeated(self, groups: int) -> Targets:
        """The targets of each image `groups` times over: rows in the order image, group, target; without masks.

        Rows as :func:`detr_fast.ops.match` with groups returns them. Waits for no device; rows past the last offset
        repeat some target.

        Raises:
            ValueError: `groups` is less than 1.
        """
        if isinstance(groups, float) or groups < 1:
            raise ValueError(f"Targets.repeated: groups must be an integer, at least 1, got {groups}")
        one = Targets(self.labels, self.boxes, self.offsets, self.max_count)
        return one if groups == 1 else self.in_groups(groups)[0]

    def in_groups(self, groups: int) -> tuple[Targets, Tensor, Tensor]:
        """``repeated(groups)``, and of each of its rows the group and the target's number within its image.

        Both are ``[T * groups]`` int64; what rows past the last offset have is meaningless.
        """
        rows = torch.arange(len(self.labels) * groups, device=self.offsets.device)
        image = torch.searchsorted(self.offsets * groups, rows, right=True).sub_(1).clamp_(0, max(len(self) - 1, 0))
        start, end = self.offsets[image], self.offsets[(image + 1).clamp_(max=len(self))]
        row_in_image, count = rows - start * groups, (end - start).clamp_(min=1)
        target = row_in_image % count
        source = (start + target).clamp_(max=max(len(self.labels) - 1, 0))
        repeated = Targets(self.labels[source], self.boxes[source], self.offsets * groups, self.max_count * groups)
        return repeated, row_in_image // count, target

    def image_of_row(self) -> Tensor:  # [T] int64
        """Image of each row; of rows past ``offsets[B]`` the last one. Waits for no device."""
        rows = torch.arange(len(self.labels), device=self.offsets.device, dtype=self.offsets.dtype)
        image = torch.searchsorted(self.offsets, rows, right=True) - 1
        return image.clamp_(0, max(len(self) - 1, 0))

    def to(self, device: torch.device | str) -> Targets:
        """On a CUDA device: everything but masks in one pinned buffer and one asynchronous copy."""
        device = torch.device(device)
        if self.labels.device == device:
            return self
        if device.type != "cuda" or self.labels.device.type != "cpu":
            moved = [x.to(device, non_blocking=True) for x in (self.labels, self.boxes, self.offsets)]
        else:
            shapes = _shapes_of(len(self.labels), len(self))
            moved = _parts_of(self._packed(shapes).to(device, non_blocking=True), shapes)
        masks = None if self.masks is None else tuple(m.to(device, non_blocking=True) for m in self.masks)
        return Targets(moved[0], moved[1], moved[2], self.max_count, masks)

    def _packed(self, shapes: _Shapes) -> Tensor:
        """Labels, boxes and offsets in one piece of pinned memory of these shapes, which may have room for more."""
        staging = torch.empty(_bytes_of(shapes), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        for part, place in zip((self.labels, self.boxes, self.offsets), _parts_of(staging, shapes), strict=True):
            place[: len(part)].copy_(part)
        return staging

    def __len__(self) -> int:
        return self.offsets.shape[0] - 1


@dataclass(frozen=True)
class StaticTargets(Targets):
    """Targets in memory whose addresses and shapes never change, as a CUDA graph needs it."""

    memory: Tensor | None = None  # [bytes] uint8, holds labels, boxes and offsets

    @classmethod
    def with_capacity(
        cls, images: int, capacity: int, max_count: int | None = None, device: torch.device | str | None = None
    ) -> StaticTargets:
        """Room for up to `capacity` targets in all and `max_count` (default: `capacity`) in one image; empty at first.

        Raises:
            ValueError: a number is negative, or `max_count` more than `capacity`.
        """
        most = capacity if max_count is None else max_count
        for name, number in (("images", images), ("capacity", capacity)):
            if number < 0:
                raise ValueError(f"StaticTargets: {name} must be at least 0, got {number}")
        if not 0 <= most <= capacity:
            raise ValueError(f"StaticTargets: max_count must be in [0, {capacity}], got {most}")
        shapes = _shapes_of(capacity, images)
        with torch.inference_mode(False):  # also for training, wherever it is made
            memory = torch.zeros(_bytes_of(shapes), dtype=torch.uint8, device=device)
            labels, boxes, offsets = _parts_of(memory, shapes)
        return cls(labels, boxes, offsets, most, memory=memory)

    def copy_(self, other: Targets) -> None:
        """Takes over the targets of `other`, which must fit; from the CPU to a CUDA device in one asynchronous copy.

        Raises:
            ValueError: another number of images, more targets than there is room for, or masks.
        """
        if len(other) != len(self):
            raise ValueError(f"StaticTargets.copy_: targets must be of {len(self)} images, got {len(other)}")
        if len(other.labels) > len(self.labels) or other.max_count > self.max_count:
            raise ValueError(
                f"StaticTargets.copy_: targets must be at most {len(self.labels)}, {self.max_count} in one image, got "
                f"{len(other.labels)} and {other.max_count}"
            )
        if other.masks is not None:
            raise ValueError("StaticTargets.copy_: targets must have no masks")
        if self.memory is not None and self.memory.is_cuda and not other.labels.is_cuda:
            self.memory.copy_(other._packed(_shapes_of(len(self.labels), len(self))), non_blocking=True)
            return
        for kept, given in zip(
            (self.labels, self.boxes, self.offsets), (other.labels, other.boxes, other.offsets), strict=True
        ):
            kept[: len(given)].copy_(given)


_Shapes = tuple[tuple[tuple[int, ...], torch.dtype], ...]


def _shapes_of(targets: int, images: int) -> _Shapes:
    """Labels, boxes and offsets, in the order that keeps each aligned."""
    return ((targets,), torch.int64), ((targets, 4), torch.float32), ((images + 1,), torch.int32)


def _bytes_of(shapes: _Shapes) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)


def _parts_of(memory: Tensor, shapes: _Shapes) -> list[Tensor]:
    """Views of one piece of memory."""
    sizes = [_bytes_of((shape,)) for shape in shapes]
    return [part.view(dtype).view(shape) for part, (shape, dtype) in zip(memory.split(sizes), shapes, strict=True)]


def _masks_of(
    targets: Sequence[Mapping[str, Tensor]], counts: Sequence[int], names: Sequence[object] | None
) -> tuple[Tensor, ...] | None:
    """Masks of all images, or None if none has any."""
    if not any("masks" in target for target in targets):
        return None
    for index, (target, count) in enumerate(zip(targets, counts, strict=True)):
        where = _name_of_image(index, names)
        if "masks" not in target:
            raise ValueError(f"targets of {where}: 'masks' is missing, other images of the batch have it")
        if target["masks"].dim() != 3 or len(target["masks"]) != count:
            raise ValueError(
                f"targets of {where}: masks must be [{count}, height, width] (one a label), "
                f"got {list(target['masks'].shape)}"
            )
    return tuple(target["masks"] for target in targets)


def _name_of_image(index: int, names: Sequence[object] | None) -> str:
    return f"image {index} of the batch" if names is None else f"image {names[index]}"


def _check_shapes(target: Mapping[str, Tensor], index: int, names: Sequence[object] | None) -> int:
    """Checks the shapes of one image's targets and returns their number."""
    labels, boxes = target.get("labels"), target.get("boxes")
    if labels is None or boxes is None:
        missing = "labels" if labels is None else "boxes"
        raise ValueError(f"targets of {_name_of_image(index, names)}: '{missing}' is missing, got {sorted(target)}")
    shape, is_integer = labels.shape, not labels.is_floating_point()
    if len(shape) == 1 and boxes.shape == (shape[0], 4) and is_integer and boxes.is_floating_point():
        return shape[0]
    if shape == (0,) and boxes.numel() == 0:  # torch.tensor([]), of any type
        return 0
    where = _name_of_image(index, names)
    if len(shape) != 1 or not is_integer:
        raise ValueError(f"targets of {where}: labels must be [n] integers, got {list(shape)} {labels.dtype}")
    raise ValueError(
        f"targets of {where}: boxes must be [{shape[0]}, 4] floating point (one row a label), "
        f"got {list(boxes.shape)} {boxes.dtype}"
    )
