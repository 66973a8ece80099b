"""All kernels under AddressSanitizer and UndefinedBehaviorSanitizer, those of CUDA in the emulator."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
pytestmark = pytest.mark.slow
FLAGS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="-march=native needs a known processor")
def test_kernels_touch_only_their_memory(run_built: Callable[..., str]) -> None:
    assert run_built(*FLAGS, "-march=native", HERE / "fuzz.cpp").strip() == "sound"


def test_cuda_kernels_touch_only_their_memory(run_built: Callable[..., str]) -> None:
    """In the emulator, where shared memory past the launch's is poisoned."""
    emulator = ROOT / "tests" / "emulator"
    flags = [*FLAGS, "-I", emulator / "include", "-fno-extern-tls-init", "-Wno-unknown-pragmas"]
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    printed = run_built(*flags, emulator / "emulator.cpp", HERE / "fuzz_cuda.cpp", "-x", "c++", *kernels)
    assert printed.strip() == "sound"
