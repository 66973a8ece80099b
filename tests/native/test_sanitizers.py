"""All kernels under AddressSanitizer and UndefinedBehaviorSanitizer, those of CUDA in the emulator."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
pytestmark = pytest.mark.slow
FLAGS = ["-std=c++20", "-O1", "-g", "-Wno-psabi", "-ffp-contract=off", "-fsanitize=address,undefined"]


def run(tmp_path: Path, *sources: str | Path) -> None:
    program = tmp_path / "fuzz"
    build = ["g++", *FLAGS, "-fno-sanitize-recover=undefined", *map(str, sources), "-o", str(program)]
    subprocess.run(build, check=True)
    ran = subprocess.run([program], capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip() == "sound"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="-march=native needs a known processor")
def test_kernels_touch_only_their_memory(tmp_path: Path) -> None:
    run(tmp_path, "-march=native", HERE / "fuzz.cpp")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_cuda_kernels_touch_only_their_memory(tmp_path: Path) -> None:
    """In the emulator, where shared memory past the launch's is poisoned."""
    emulator = ROOT / "tests" / "emulator"
    flags = ["-I", emulator / "include", "-fno-extern-tls-init", "-Wno-unknown-pragmas"]
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    run(tmp_path, *flags, emulator / "emulator.cpp", HERE / "fuzz_cuda.cpp", "-x", "c++", *kernels)
