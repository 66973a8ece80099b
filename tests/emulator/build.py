"""Builds and loads the emulator: the project's CUDA kernels, compiled by g++."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"


def missing() -> str | None:
    """What keeps the emulator from being built, or None."""
    if shutil.which("g++") is None:
        return "needs g++"
    if _cmake() is None or not (BUILD / "CMakeCache.txt").exists():
        return "needs an editable installation: pip install --no-build-isolation -e ."
    return None


def _cmake() -> str | None:
    return shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")


@functools.cache
def load() -> ModuleType:
    """The module with the emulator's controls; importing it registers torch.ops.detr_fast_emulated."""
    import detr_fast.ops  # noqa: F401

    with (BUILD / "emulator.lock").open("w") as lock:  # several processes of pytest start at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [_cmake(), "--build", str(BUILD), "--target", "emulated"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-2000:])
    library = next((BUILD / "tests" / "emulator").glob("_emulated*.so"))
    specification = importlib.util.spec_from_file_location("_emulated", library)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
