"""Reads image files: RGB pixels as they are stored, or the name of the file and what is wrong with it.

EXIF orientation is not applied: COCO's boxes, and the published detectors, refer to the stored pixels.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from detr_fast.data.faults import DataFault, Fault
from detr_fast.data.shards import ShardedImage

# All that Pillow raises on damaged files of the various formats.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
ORIENTATION = 0x0112  # EXIF tag
TURNED = (5, 6, 7, 8)  # its values that exchange width and height


ImageFile = Path | ShardedImage


def read_image(
    file: ImageFile,
    size: tuple[int, int] | None = None,  # (width, height) that the annotations say
) -> Image.Image:
    """The image as 8-bit RGB. Grey, palette, CMYK and 16-bit images are converted, transparency is dropped.

    Raises:
        DataFault: the file is missing or damaged, or its size is not ``size``; the message names the file.
    """
    try:
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            if size is not None and image.size != size:
                raise DataFault(f"{file}: {_size_message(image, size)}")
            return _to_rgb(image)
    except FileNotFoundError:
        raise DataFault(f"{file}: file not found") from None
    except DataFault:
        raise
    except DECODING_ERRORS as error:
        raise DataFault(f"{file}: cannot be read ({_reason(error)})") from error


def check_image(
    file: ImageFile,
    size: tuple[int, int],  # (width, height) that the annotations say
    name: str,
) -> Fault | None:
    """What is wrong with a file, found by decoding it all; see :func:`sound_content`."""
    found = sound_content(file, size, name)
    return found if isinstance(found, Fault) else None


def sound_content(
    file: ImageFile,
    size: tuple[int, int],  # (width, height) that the annotations say
    name: str,
) -> bytes | Fault:
    """The bytes of a file that can be decoded, or what is wrong with it.

    JPEG is decoded at an eighth of its size in grey, which still reads every byte and so finds truncated files: 3 times
    faster than full decoding.

    Raises:
        DataFault: the file lies elsewhere and cannot be reached, which says nothing about the file.
    """
    try:
        content = file.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            if image.size != size:
                return Fault("size differs", name, _size_message(image, size))
            image.draft("L", (image.width // 8, image.height // 8))
            image.load()
    except FileNotFoundError:
        return Fault("missing file", name, f"file not found in {file.parent}")
    except DataFault:
        raise
    except DECODING_ERRORS as error:
        return Fault("unreadable file", name, f"cannot be read ({_reason(error)})")
    return content


def _reason(error: Exception) -> str:
    """Without the address of the buffer that Pillow mentions."""
    return str(error).partition(" <_io.")[0]


def _size_message(image: Image.Image, size: tuple[int, int]) -> str:
    message = f"size in the annotations is {size[0]}x{size[1]}, the file is {image.width}x{image.height}"
    if image.size == size[::-1] and image.getexif().get(ORIENTATION) in TURNED:
        message += " (EXIF orientation turns it; it is not applied: turn the stored pixels or the annotations)"
    return message


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow would clip them to 255
        pixels = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
