"""The native libraries of the package: whether they load, and if not, why; for which GPUs they have kernels."""

from __future__ import annotations

import importlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import detr_fast

_ELF = b"\x7fELF"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # ELF64
_CUDA_MACHINE = 190  # EM_CUDA
_PTX_TARGET = re.compile(rb"\.target\s+sm_(\d+)")

_REINSTALL = "install detr_fast again from where it came; in a checkout: pip install --no-build-isolation --no-deps ."
_BUILD_HERE = (
    "it was built on a newer system than this one: build it here, pip install --no-build-isolation . in a checkout"
)
_REMEDIES = (
    ("undefined symbol", "it needs PyTorch 2.11 or newer, and finds {torch}: upgrade PyTorch, or its file is damaged"),
    ("libtorch", "PyTorch's own libraries are not where it looks ({torch}): install PyTorch again"),
    ("libc10", "PyTorch's own libraries are not where it looks ({torch}): install PyTorch again"),
    ("GLIBC", _BUILD_HERE),
    ("CXXABI", _BUILD_HERE),
)


@dataclass(frozen=True)
class CudaKernels:
    """Of which compute capabilities, as 90 for 9.0, the library has machine code, and of which PTX to compile."""

    machine_code: Sequence[int]
    ptx: Sequence[int]

    def serve(self, capability: int) -> bool:
        """Machine code runs on later minor versions of its generation, PTX on everything newer."""
        same = any(code // 10 == capability // 10 and code <= capability for code in self.machine_code)
        return same or any(target <= capability for target in self.ptx)

    def __str__(self) -> str:
        if not self.machine_code and not self.ptx:
            return "not compiled (the library was built without nvcc)"
        parts = [f"sm_{code}" for code in self.machine_code] + [f"PTX of compute_{code}" for code in self.ptx]
        return f"compiled for {', '.join(parts)}"


def problem() -> str | None:
    """Why the native libraries cannot be used and what to do about it, or None."""
    try:
        import torch
    except ImportError as error:
        return f"PyTorch cannot be imported: {error}. Install PyTorch 2.11 or newer."
    for name, meaning in (("_C", "the kernels of all ops"), ("_numpy", "the solver for NumPy arrays")):
        try:
            importlib.import_module(f"detr_fast.{name}")
        except ImportError as error:
            return _explained(name, meaning, error, torch.__version__)
    return None


def _explained(name: str, meaning: str, error: ImportError, torch_version: str) -> str:
    folder = Path(detr_fast.__file__).parent
    lead = f"The native library detr_fast.{name} ({meaning}) cannot be used.\n  error       {error}\n  what to do  "
    there = sorted(file.name for file in folder.glob(f"{name}.*") if file.suffix in (".so", ".pyd"))
    if isinstance(error, ModuleNotFoundError) and not there:
        text = f"{folder} has no file {name}.*.so: it was not built, or the folder is a checkout's and hides the "
        return f"{lead}{text}installed package; leave that folder, or {_REINSTALL}"
    if isinstance(error, ModuleNotFoundError):
        return f"{lead}{', '.join(there)} in {folder} is for another Python or system: {_REINSTALL}"
    for word, remedy in _REMEDIES:
        if word in str(error):
            return lead + remedy.format(torch=torch_version)
    return f"{lead}the file is damaged or for another system: {_REINSTALL}"


def cuda_kernels() -> CudaKernels:
    """Read from the library's file; needs no GPU and no tool of the CUDA toolkit."""
    path = importlib.import_module("detr_fast._C").__file__
    return kernels_in(Path(path or "").read_bytes())


def kernels_in(data: bytes) -> CudaKernels:
    """The kernels are ELF files, and PTX is text, inside the library."""
    codes = set()
    start = data.find(_ELF, 1)
    while start >= 0:
        if start + _HEADER.size <= len(data):
            identity, _, machine, *_, flags, _, _, _, _, _, _ = _HEADER.unpack_from(data, start)
            if machine == _CUDA_MACHINE:
                # Since compute capability 10 it stands in the second byte.
                codes.add(flags & 0xFF if identity[8] < 8 else flags >> 8 & 0xFF)
        start = data.find(_ELF, start + 1)
    return CudaKernels(sorted(codes), sorted({int(found) for found in _PTX_TARGET.findall(data)}))
