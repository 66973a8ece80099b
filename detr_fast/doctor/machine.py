"""What is installed on this machine, and which native paths of the package it has."""

from __future__ import annotations

import importlib
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import detr_fast
from detr_fast.doctor.library import CudaKernels, cuda_kernels

_DRIVER = Path("/proc/driver/nvidia/version")


def version_of(distribution: str) -> str | None:
    """Of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def installed() -> dict[str, str]:
    """Versions and devices, by what is printed before them; works without PyTorch."""
    own = version_of("detr_fast")
    found = {
        "detr_fast": f"{own or '(not installed)'}, {Path(detr_fast.__file__).parent}",
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "PyTorch": _pytorch(),
    }
    for name, distribution in (("Triton", "triton"), ("NumPy", "numpy"), ("SciPy", "scipy")):
        found[name] = version_of(distribution) or "not installed"
    found["CPU"] = _processor()
    return found | _threads_and_devices()


def _pytorch() -> str:
    try:
        import torch
    except ImportError as error:
        return f"cannot be imported: {error}"
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU"
    return f"{torch.__version__}, built {build}"


def _processor() -> str:
    model = platform.processor() or platform.machine()
    description = Path("/proc/cpuinfo")
    if description.exists():
        named = re.search(r"^model name\s*:\s*(.+)$", description.read_text(), re.MULTILINE)
        model = named[1] if named else model
    return f"{' '.join(model.split())}, {os.cpu_count()} cores"


def _threads_and_devices() -> dict[str, str]:
    try:
        import torch
    except ImportError:
        return {}
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"threads": f"{torch.get_num_threads()} of PyTorch, {usable} cores usable by this process"}
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        found[f"cuda:{index}"] = f"{name}, compute capability {major}.{minor}, {memory:.0f} GiB"
    found["NVIDIA driver"] = _driver()
    return found


def _driver() -> str:
    import torch

    known = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text()) if _DRIVER.exists() else None
    if torch.cuda.is_available():
        return known[0] if known else "there, version unknown"
    if known is None:
        return "none, so no CUDA device"
    reason = "this PyTorch is built for the CPU" if torch.version.cuda is None else "PyTorch finds no usable device"
    return f"{known[0]}, but {reason}"


def native_paths() -> dict[str, str]:
    """Which kernels run here, by what is printed before them. The native library must be usable."""
    from detr_fast import ops

    others = {"avx512": "", "avx2": " (this processor has no AVX-512)"}
    instructions = ops.instruction_set()
    kernels = cuda_kernels()
    return {
        "CPU kernels": instructions + others.get(instructions, " (no vector instructions: slower)"),
        "CUDA kernels": f"{kernels}; {_use_of(kernels)}",
        "Triton kernels": _triton(),
    }


def _use_of(kernels: CudaKernels) -> str:
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device to run them on" if kernels.machine_code else "no CUDA device"
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    missing = sorted({10 * major + minor for major, minor in capabilities if not kernels.serve(10 * major + minor)})
    if not missing:
        return "used on every CUDA device"
    devices, wanted = ", ".join(f"sm_{capability}" for capability in missing), ";".join(map(str, missing))
    return f"NONE for {devices}, which is here: build it with nvcc on the path and CUDAARCHS='{wanted}'"


def _triton() -> str:
    """Attention on a CUDA device is Triton's."""
    import torch

    has_device = torch.cuda.is_available()
    if version_of("triton") is None and not _can_import("triton"):
        needed = ": attention on CUDA fails without it, pip install triton" if has_device else ", not needed on a CPU"
        return f"not usable: Triton is not installed{needed}"
    if not has_device:
        return "not used: no CUDA device; attention on the CPU is PyTorch's operators"
    try:
        importlib.import_module("detr_fast.ops.triton.attention")
    except Exception as error:
        return f"not usable: {type(error).__name__}: {error}"
    return "used for attention on CUDA (heads up to 128 wide, not float64)"


def _can_import(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
