"""Where tokens are: the cells of a feature map that lie inside the images, and their position encodings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.structures import Images, offsets_of


@dataclass(frozen=True)
class Cells:
    """Cells of a padded feature map that lie inside the images, image by image and row by row.

    Rows and columns are listed once an image (R rows, W columns in the whole batch), so that what depends only on one
    of them is computed only once.
    """

    place: Tensor  # [M] int64 into the flattened map [B * height * width]
    row: Tensor  # [M] int64 into the rows of the batch
    column: Tensor  # [M] int64 into the columns of the batch
    row_number: Tensor  # [R] int64, 0 is the top row of the image
    row_count: Tensor  # [R] int64, rows of the same image
    column_number: Tensor  # [W] int64, 0 is the leftmost column of the image
    column_count: Tensor  # [W] int64, columns of the same image
    offsets: Tensor  # [B + 1] int32
    max_count: int  # most cells of one image
    sizes: tuple[tuple[int, int], ...]  # (rows, columns) of each image
    shape: tuple[int, int]  # (height, width) of the padded map

    @classmethod
    @torch.compiler.disable  # else every combination of sizes would be compiled anew
    def of(cls, images: Images, height: int, width: int) -> Cells:
        """Cells of a map ``[B, height, width]`` that the reference keeps: its padding mask resized by "nearest".

        All is computed on the host from the image sizes and moved in one copy, without synchronisation.
        """
        if isinstance(images, StaticImages):
            return images.cells(height, width)
        parts, sizes = _cells_on_host(images, height, width)
        return cls._moved(parts, sizes, (height, width), images.pixels.device)

    @classmethod
    def with_capacity(cls, images: Images, height: int, width: int) -> Cells:
        """The same in tensors that have room for the whole map, whatever the sizes; see :meth:`copy_`."""
        parts, sizes = _cells_on_host(images, height, width)
        room = _room(len(images), height, width)
        # Spare entries point at the first cell; counts of 1 keep their coordinates finite.
        spare = (0, 0, 0, 0, 1, 0, 1, 0)
        padded = [
            F.pad(part, (0, length - len(part)), value=value)
            for part, length, value in zip(parts, room, spare, strict=True)
        ]
        cells = cls._moved(padded, sizes, (height, width), images.pixels.device)
        return replace(cells, max_count=height * width, sizes=((height, width),) * len(images))

    def copy_(self, images: Images) -> None:
        """Takes over the cells of other images on a canvas of the same size; one asynchronous copy and a few launches.

        Only of cells :meth:`with_capacity`.
        """
        other = Cells.with_capacity(images, *self.shape)
        for name in ("place", "row", "column", "row_number", "row_count", "column_number", "column_count", "offsets"):
            getattr(self, name).copy_(getattr(other, name))

    @classmethod
    def _moved(
        cls,
        parts: list[Tensor],
        sizes: tuple[tuple[int, int], ...],
        shape: tuple[int, int],
        device: torch.device,
    ) -> Cells:
        place, row, column, row_number, row_count, column_number, column_count, offsets = _move(
            torch.cat(parts), device
        ).split([len(part) for part in parts])
        most = max(rows * columns for rows, columns in sizes)
        return cls(
            place, row, column, row_number, row_count, column_number, column_count, offsets.int(), most, sizes, shape
        )

    def gather(self, feature: Tensor) -> Tensor:  # [B, D, height, width] -> [M, D]
        return feature.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, self.place)

    def scatter(self, tokens: Tensor) -> Tensor:  # [M, D] -> [B, D, height, width], 0 where there is no image
        height, width = self.shape
        feature = tokens.new_zeros((len(self.sizes) * height * width, tokens.shape[-1]))
        feature = feature.index_copy(0, self.place, tokens)
        return feature.unflatten(0, (len(self.sizes), height, width)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class StaticImages(Images):
    """Images in memory whose addresses and shapes never change, as a CUDA graph needs it; also their cells."""

    known: dict[tuple[int, int], Cells] = field(default_factory=dict)  # by the feature map's (height, width)

    @classmethod
    def like(cls, images: Images) -> StaticImages:
        """A copy of a batch, with room for any other batch of as many images on the same canvas."""
        with torch.inference_mode(False):
            return cls(images.pixels.clone(), images.padding.clone(), images.sizes)

    def copy_(self, images: Images) -> None:
        """Takes over pixels and sizes of another batch; nothing is read back."""
        self.pixels.copy_(images.pixels, non_blocking=True)
        self.padding.copy_(images.padding, non_blocking=True)
        for cells in self.known.values():
            cells.copy_(images)

    def cells(self, height: int, width: int) -> Cells:
        if (height, width) not in self.known:
            self.known[height, width] = Cells.with_capacity(self, height, width)
        return self.known[height, width]


def _cells_on_host(images: Images, height: int, width: int) -> tuple[list[Tensor], tuple[tuple[int, int], ...]]:
    """The index tensors of :class:`Cells`, all int64, in their order, offsets last; (rows, columns) of each image."""
    canvas = images.pixels.shape[-2:]
    sizes = tuple((cells_inside(h, canvas[0], height), cells_inside(w, canvas[1], width)) for h, w in images.sizes)
    lists: list[list[Tensor]] = [[] for _ in range(7)]
    rows_before = columns_before = 0
    for image, (rows, columns) in enumerate(sizes):
        row, column = torch.arange(rows), torch.arange(columns)
        place = (image * height + row)[:, None] * width + column
        of_image = (
            place.flatten(),
            (rows_before + row)[:, None].expand(rows, columns).flatten(),
            (columns_before + column)[None].expand(rows, columns).flatten(),
            row,
            torch.full((rows,), rows),
            column,
            torch.full((columns,), columns),
        )
        for whole, part in zip(lists, of_image, strict=True):
            whole.append(part)
        rows_before, columns_before = rows_before + rows, columns_before + columns
    offsets = offsets_of([rows * columns for rows, columns in sizes])
    return [*(torch.cat(x) for x in lists), offsets.long()], sizes


def _room(images: int, height: int, width: int) -> list[int]:
    """Lengths of these tensors where every image fills the map."""
    cells, rows, columns = images * height * width, images * height, images * width
    return [cells, cells, cells, rows, rows, columns, columns, images + 1]


def _move(numbers: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)


def cells_inside(length: int, canvas: int, cells: int) -> int:
    """How many of ``cells`` lie inside the first ``length`` of ``canvas`` pixels, as ``F.interpolate`` (nearest) says.

    Its rule: cell i shows pixel ``floor(i * (canvas / cells))``, computed in float32.
    """
    ratio = np.float32(canvas) / np.float32(cells)
    shown = np.floor(np.arange(cells, dtype=np.float32) * ratio)
    return int((shown < length).sum())


def sine_of_coordinate(coordinate: Tensor, width: int, temperature: float) -> Tensor:
    """Sines (even channels) and cosines (odd) of falling frequency: ``[...] -> [..., width]``."""
    channel = torch.arange(width, dtype=torch.float32, device=coordinate.device)
    angle = coordinate[..., None] / temperature ** (2 * (channel // 2) / width)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2)


class SinePosition(nn.Module):
    """Fixed encoding ``[M, 2 * width]``: y first, then x, each in (0, 2 pi] over the image without its padding.

    ``half_pixel`` puts a cell's coordinate at its centre, as Deformable DETR does; DETR takes its far edge.
    """

    def __init__(self, width: int, temperature: float = 10000.0, half_pixel: bool = False) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"SinePosition: width of one axis must be even, got {width}")
        self.width, self.temperature, self.half_pixel = width, temperature, half_pixel

    def forward(self, cells: Cells) -> Tensor:  # [M, 2 * width]
        y = self._encode(cells.row_number + 1, cells.row_count)
        x = self._encode(cells.column_number + 1, cells.column_count)
        return torch.cat([y.index_select(0, cells.row), x.index_select(0, cells.column)], -1)

    def of_padding(self, padding: Tensor) -> Tensor:  # [B, height, width] bool -> [B, 2 * width, height, width]
        """The published definition, for any padding mask: cells are counted from the top and from the left."""
        inside = ~padding
        y, x = inside.cumsum(1, dtype=torch.float32), inside.cumsum(2, dtype=torch.float32)
        encoded = self._encode(y, y[:, -1:]), self._encode(x, x[:, :, -1:])
        return torch.cat(encoded, -1).permute(0, 3, 1, 2)

    def _encode(self, number: Tensor, count: Tensor) -> Tensor:
        number = number - 0.5 if self.half_pixel else number
        coordinate = number / (count + 1e-6) * (2 * math.pi)
        return sine_of_coordinate(coordinate, self.width, self.temperature)


class LearnedPosition(nn.Module):
    """Learned encoding ``[M, 2 * width]``: the column's embedding first, then the row's; at most 50 of each."""

    limit = 50

    def __init__(self, width: int) -> None:
        super().__init__()
        self.row_embed, self.col_embed = nn.Embedding(self.limit, width), nn.Embedding(self.limit, width)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, cells: Cells) -> Tensor:  # [M, 2 * width]
        rows, columns = (max(size[axis] for size in cells.sizes) for axis in (0, 1))
        if max(rows, columns) > self.limit:
            raise ValueError(
                f"learned positions reach {self.limit} x {self.limit} cells, the feature map of an image has "
                f"{rows} x {columns}: use smaller images, a larger stride or position_embedding='sine'"
            )
        row, column = self.row_embed(cells.row_number), self.col_embed(cells.column_number)
        return torch.cat([column.index_select(0, cells.column), row.index_select(0, cells.row)], -1)
