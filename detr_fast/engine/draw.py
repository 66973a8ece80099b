"""Draws boxes with captions on pictures."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

# Hues this far apart on the colour circle stay distinct for many classes.
GOLDEN_ANGLE = 0.381966


def colour_of_class(label: int) -> tuple[int, int, int]:
    """A strong colour, always the same for the same class."""
    red, green, blue = colorsys.hsv_to_rgb((0.58 + label * GOLDEN_ANGLE) % 1.0, 0.85, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],  # xyxy in pixels
    labels: Sequence[int],
    captions: Sequence[str],
) -> Image.Image:
    """A copy of the image with a frame and a caption for each box; captions stay inside the picture."""
    picture = image.convert("RGB")
    if picture is image:
        picture = image.copy()
    canvas = ImageDraw.Draw(picture)
    side = min(picture.size)
    thickness = max(1, round(side / 150))
    font = ImageFont.load_default(size=max(10, round(side / 25)))
    for box, label in zip(boxes, labels, strict=True):
        low_x, high_x = sorted((box[0], box[2]))
        low_y, high_y = sorted((box[1], box[3]))
        canvas.rectangle((low_x, low_y, high_x, high_y), outline=colour_of_class(label), width=thickness)
    for box, label, caption in zip(boxes, labels, captions, strict=True):
        if caption:
            _draw_caption(canvas, font, picture.size, box, colour_of_class(label), caption)
    return picture


def _draw_caption(
    canvas: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    size: tuple[int, int],
    box: Sequence[float],
    colour: tuple[int, int, int],
    caption: str,
) -> None:
    """Above the box where there is room, else inside its upper edge."""
    left, top, right, bottom = canvas.textbbox((0, 0), caption, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(0, min(box[0], box[2])), max(0, size[0] - width))
    y = min(box[1], box[3]) - height
    if y < 0:
        y = max(0, min(box[1], box[3]))
    canvas.rectangle((x, y, x + width, y + height), fill=colour)
    red, green, blue = colour
    is_bright = 0.299 * red + 0.587 * green + 0.114 * blue > 150
    canvas.text((x + 2 - left, y + 2 - top), caption, fill="black" if is_bright else "white", font=font)
