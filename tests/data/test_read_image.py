"""Image files of all kinds become 8-bit RGB; damaged ones say so with their name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_fast.data.faults import DataFault
from detr_fast.data.images import check_image, read_image


def noise(height: int = 48, width: int = 64, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(noise()).convert(mode).save(path)
    image = read_image(path, (64, 48))
    assert image.mode == "RGB"
    assert image.size == (64, 48)
    assert check_image(path, (64, 48), "a") is None


def test_16_bits_keep_their_upper_half(tmp_path: Path) -> None:
    pixels = np.arange(0, 65536, 64, dtype=np.uint16).reshape(16, 64)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png"))[..., 1], pixels >> 8)


def test_missing_file() -> None:
    with pytest.raises(DataFault, match=r"nowhere\.jpg: file not found"):
        read_image(Path("nowhere.jpg"))
    fault = check_image(Path("nowhere.jpg"), (1, 1), "nowhere.jpg")
    assert fault is not None
    assert fault.kind == "missing file"


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise()).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataFault, match=rf"a\.{suffix}: cannot be read"):
        read_image(path)
    fault = check_image(path, (64, 48), path.name)
    assert fault is not None
    assert fault.kind == "unreadable file"


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_file_of_other_content(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataFault, match=r"a\.png: cannot be read"):
        read_image(path)
    fault = check_image(path, (1, 1), "a.png")
    assert fault is not None
    assert fault.kind == "unreadable file"
    assert "0x" not in str(fault)


def test_size_that_differs_from_the_annotations(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(noise()).save(path)
    message = "size in the annotations is 60x48, the file is 64x48"
    with pytest.raises(DataFault, match=message):
        read_image(path, (60, 48))
    fault = check_image(path, (60, 48), "a.jpg")
    assert fault is not None
    assert str(fault) == f"a.jpg: {message}"


def test_exif_orientation_is_not_applied_but_mentioned(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise()).save(path, exif=exif)
    assert read_image(path, (64, 48)).size == (64, 48)
    with pytest.raises(DataFault, match="EXIF orientation turns it"):
        read_image(path, (48, 64))
