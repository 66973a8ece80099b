"""Programs built by g++."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def run_built(tmp_path: Path) -> Callable[..., str]:
    """Builds a program from these flags and sources, runs it and returns what it printed."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")

    def run(*arguments: str | Path) -> str:
        program = tmp_path / "program"
        build = ["g++", "-std=c++20", "-Wno-psabi", "-ffp-contract=off", *map(str, arguments), "-o", str(program)]
        subprocess.run(build, check=True)
        ran = subprocess.run([program], capture_output=True, text=True, timeout=180)
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
        return ran.stdout

    return run
