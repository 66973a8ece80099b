"""Which tiles a kernel uses: a small fixed set for each width and type, timed once for each class of shapes.

What was found is kept in a file beside Triton's own cache, so that later processes begin with it.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
import triton
from triton import knobs

from detr_fast.files import write_atomically


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut: its block of queries and of keys, its warps, and blocks that are loaded ahead."""

    queries: int
    keys: int
    warps: int
    stages: int
    chunk: int = 128  # columns of a head that are multiplied at a time


# By how products are computed ("half" for both half types, "masked" for them with a mask, else PyTorch's name) and by
# the wider head, padded. The first of each is used where nothing may be timed: with torch.use_deterministic_algorithms,
# and for a new class of shapes while a CUDA graph is captured.
CANDIDATES: dict[str, dict[tuple[str, int], tuple[Tiles, ...]]] = {
    "forward": {
        ("half", 32): (Tiles(64, 128, 4, 2), Tiles(128, 128, 8, 2), Tiles(64, 64, 4, 3)),
        ("half", 64): (Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 2)),
        ("half", 128): (Tiles(64, 64, 8, 2, chunk=64), Tiles(64, 32, 4, 2, chunk=32)),
        ("masked", 32): (Tiles(64, 32, 4, 2),),
        ("masked", 64): (Tiles(64, 32, 8, 2),),
        ("masked", 128): (Tiles(32, 32, 8, 1, chunk=64),),
        ("tf32", 32): (Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2)),
        ("tf32", 64): (Tiles(64, 32, 4, 2, chunk=32),),
        ("tf32", 128): (Tiles(64, 32, 8, 1, chunk=32),),
        ("ieee", 32): (Tiles(32, 32, 8, 1, chunk=16),),
        ("ieee", 64): (Tiles(32, 32, 8, 1, chunk=16),),
        ("ieee", 128): (Tiles(32, 32, 8, 1, chunk=16),),
    },
    "backward_of_queries": {
        ("half", 32): (Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 2), Tiles(64, 128, 4, 2)),
        ("half", 64): (Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2)),
        ("half", 128): (Tiles(32, 32, 8, 1), Tiles(64, 32, 8, 2, chunk=32)),
        ("masked", 32): (Tiles(64, 32, 4, 2),),
        ("masked", 64): (Tiles(64, 32, 8, 2),),
        ("masked", 128): (Tiles(32, 32, 8, 1, chunk=64),),
        ("tf32", 32): (Tiles(64, 32, 4, 2),),
        ("tf32", 64): (Tiles(32, 32, 4, 1, chunk=32),),
        ("tf32", 128): (Tiles(32, 32, 8, 1, chunk=64),),
        ("ieee", 32): (Tiles(64, 32, 8, 1, chunk=16),),
        ("ieee", 64): (Tiles(32, 32, 8, 1, chunk=16),),
        ("ieee", 128): (Tiles(32, 32, 8, 1, chunk=16),),
    },
    "backward_of_keys": {
        ("half", 32): (Tiles(64, 64, 4, 3), Tiles(64, 128, 8, 2), Tiles(64, 64, 4, 2)),
        ("half", 64): (Tiles(32, 64, 4, 2),),
        ("half", 128): (Tiles(32, 32, 8, 2, chunk=64),),
        ("masked", 32): (Tiles(32, 32, 4, 2),),
        ("masked", 64): (Tiles(64, 32, 8, 2),),
        ("masked", 128): (Tiles(32, 32, 8, 1, chunk=64),),
        ("tf32", 32): (Tiles(32, 64, 4, 2),),
        ("tf32", 64): (Tiles(32, 32, 4, 1, chunk=32),),
        ("tf32", 128): (Tiles(32, 32, 8, 1, chunk=32),),
        ("ieee", 32): (Tiles(64, 32, 8, 1, chunk=16),),
        ("ieee", 64): (Tiles(32, 32, 8, 1, chunk=16),),
        ("ieee", 128): (Tiles(32, 32, 8, 1, chunk=16),),
    },
}


def candidates(kernel: str, products: str, width: int) -> tuple[Tiles, ...]:
    return CANDIDATES[kernel][products, max(32, triton.next_power_of_2(width))]


@dataclass(frozen=True)
class ShapeClass:
    """What a choice depends on; lengths count by their power of two."""

    kernel: str
    type: str
    key_width: int
    value_width: int
    heads: int
    mask: str
    dropout: bool
    products: str
    images: int
    longest_query: int
    longest_key: int

    def __str__(self) -> str:
        return " ".join(str(x) for x in asdict(self).values())


_chosen: dict[tuple[torch.device, ShapeClass], Tiles] = {}


def choose(shape: ShapeClass, options: Sequence[Tiles], run: Callable[[Tiles], object], device: torch.device) -> Tiles:
    """The fastest of the options for these shapes; `run` launches the kernel with one and must be repeatable."""
    if len(options) == 1 or device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return options[0]
    found = _chosen.get((device, shape))
    if found is not None:
        return found
    file = _file(torch.cuda.get_device_name(device))
    known = _read(file).get(str(shape))
    found = next((tiles for tiles in options if asdict(tiles) == known), None)
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            return options[0]
        times = [
            triton.testing.do_bench(lambda tiles=tiles: run(tiles), warmup=5, rep=20, return_mode="median")
            for tiles in options
        ]
        found = options[times.index(min(times))]
        _write(file, str(shape), asdict(found))
    _chosen[device, shape] = found
    return found


@lru_cache
def _file(device_name: str) -> Path:
    """One for each device, release of Triton and version of the kernels."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    name = "-".join([*device_name.lower().split(), "triton", triton.__version__, digest])
    return Path(knobs.cache.dir) / "detr_fast" / f"attention-{name}.json"


def _read(file: Path) -> dict[str, dict[str, int]]:
    """Empty where there is no file that can be read; what is found is then written anew, or said to be lost."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(file: Path, shape: str, tiles: dict[str, int]) -> None:
    """Adds an entry; another process that writes at the same time may undo that, and it is timed once more."""
    content = {**_read(file), shape: tiles}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(content, indent=1))
    except OSError as error:
        warnings.warn(f"attention: the chosen tiles are not kept for the next process: {error}", stacklevel=2)
