"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "fuzz.cpp"
FLAGS = ["-std=c++20", "-O1", "-g", "-Wno-psabi", "-ffp-contract=off", "-fsanitize=address,undefined"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="-march=native needs a known processor")
def test_kernels_touch_only_their_memory(tmp_path: Path) -> None:
    program = tmp_path / "fuzz"
    build = ["g++", *FLAGS, "-fno-sanitize-recover=undefined", "-march=native", str(SOURCE), "-o", str(program)]
    subprocess.run(build, check=True)
    ran = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip() == "sound"
