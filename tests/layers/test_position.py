"""Cells of packed tokens and position encodings against the padded definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from detr_fast.layers.position import Cells, LearnedPosition, SinePosition, cells_inside
from detr_fast.structures import Images


def batch(*sizes: tuple[int, int]) -> Images:
    return Images.batch([torch.zeros(3, height, width) for height, width in sizes])


def padding_of_map(images: Images, height: int, width: int) -> torch.Tensor:
    """The published rule: the padding mask resized by "nearest"."""
    return F.interpolate(images.padding[None].float(), size=(height, width))[0].bool()


@pytest.mark.parametrize("stride", [1, 2, 8, 16, 32])
def test_cells_inside_is_nearest_interpolation(stride: int) -> None:
    canvases = [*range(1, 70), 333, 640, 799, 800, 1066, 1200, 1333]
    for canvas in canvases:
        cells = -(-canvas // stride)
        lengths = torch.arange(1, canvas + 1)
        padding = torch.arange(canvas)[None] >= lengths[:, None]  # one row for every possible length
        expected = (~F.interpolate(padding[None].float(), size=cells)[0].bool()).sum(1)
        assert [cells_inside(length, canvas, cells) for length in lengths.tolist()] == expected.tolist()


@pytest.mark.parametrize("cells", [7, 13, 100])
def test_cells_inside_with_sizes_that_do_not_divide(cells: int) -> None:
    for canvas in (100, 101, 321, 1000):
        lengths = torch.arange(1, canvas + 1)
        padding = torch.arange(canvas)[None] >= lengths[:, None]
        expected = (~F.interpolate(padding[None].float(), size=cells)[0].bool()).sum(1)
        assert [cells_inside(length, canvas, cells) for length in lengths.tolist()] == expected.tolist()


def test_gather_takes_the_cells_that_are_not_padding() -> None:
    images = batch((64, 33), (20, 90), (1, 1), (64, 90))
    feature = torch.randn(4, 5, 8, 12)
    inside = ~padding_of_map(images, 8, 12)
    cells = Cells.of(images, 8, 12)
    expected = feature.permute(0, 2, 3, 1)[inside]
    assert torch.equal(cells.gather(feature), expected)
    assert cells.offsets.diff().tolist() == inside.flatten(1).sum(1).tolist()
    assert cells.max_count == 8 * 12
    assert torch.equal(cells.scatter(expected), feature * inside[:, None])


@pytest.mark.parametrize("half_pixel", [False, True])
def test_sine_positions_are_the_padded_definition(half_pixel: bool) -> None:
    images = batch((64, 33), (20, 90), (1, 1), (64, 90))
    sine = SinePosition(16, half_pixel=half_pixel)
    cells = Cells.of(images, 8, 12)
    expected = cells.gather(sine.of_padding(padding_of_map(images, 8, 12)))
    assert torch.equal(sine(cells), expected)


def test_sine_position_of_one_cell() -> None:
    """A single row is at 2 pi 1 / (1 + 1e-6); channels alternate between sine and cosine, y before x."""
    encoding = SinePosition(4, temperature=100.0)(Cells.of(batch((5, 5)), 1, 1))
    angle = torch.tensor(2 * torch.pi / (1 + 1e-6))
    expected = torch.stack([angle.sin(), angle.cos(), (angle / 10).sin(), (angle / 10).cos()])
    torch.testing.assert_close(encoding, torch.cat([expected, expected])[None])


def test_learned_positions_are_column_then_row() -> None:
    learned = LearnedPosition(3)
    encoding = learned(Cells.of(batch((40, 60), (20, 60)), 2, 3))
    assert encoding.shape == (6 + 3, 6)
    column, row = learned.col_embed.weight, learned.row_embed.weight
    assert torch.equal(encoding[5], torch.cat([column[2], row[1]]))
    assert torch.equal(encoding[6 + 1], torch.cat([column[1], row[0]]))


def test_learned_positions_say_when_the_map_is_too_large() -> None:
    with pytest.raises(ValueError, match="reach 50 x 50 cells, the feature map of an image has 2 x 51"):
        LearnedPosition(4)(Cells.of(batch((2, 51)), 2, 51))
