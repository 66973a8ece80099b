"""What the numbers were measured on: processor, revision, versions and memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parent.parent


def device_name(device: torch.device) -> str:
    """Processor or GPU, as "Intel Xeon Processor @ 2.50GHz, 2 cores"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    description = Path("/proc/cpuinfo")
    if description.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", description.read_text(), re.MULTILINE)
        model = found[1] if found else model
    model = re.sub(r"\((R|TM)\)", "", model)
    return f"{' '.join(model.split())}, {os.cpu_count()} cores"


def slug(name: str) -> str:
    """A file name for a device: "intel-xeon-2.50ghz-2-cores", "h200"."""
    words = re.sub(r"[^a-z0-9.]+", " ", name.lower()).split()
    return "-".join(word for word in words if word not in ("processor", "cpu", "nvidia", "with"))


def revision(folder: Path = REPOSITORY) -> str:
    """Short commit, with -dirty if tracked files outside benchmarks/results differ; "unknown" outside of git."""
    git = ["git", "-C", str(folder)]
    found = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    if found.returncode != 0:
        return "unknown"
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"],
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def version_of(package: str) -> str:
    """Empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def peak_memory(run: Callable[[], object], device: torch.device) -> float | None:
    """MB that a call needs at most, beyond what was in use before it.

    On CUDA what PyTorch allocates; on Linux the growth of the resident set; where neither
    can be measured None.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # so that memory freed before, and still held, does not hide what is needed
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except PermissionError:  # as in some containers
        return None
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before) / 1e3


def _status(name: str) -> int:
    """An entry of this process's status, in kB."""
    found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0
