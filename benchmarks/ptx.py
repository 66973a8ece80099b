"""What the compiler made of the CUDA kernels, read from the built library: registers, stack and shared memory.

Needs no GPU and no tool of the CUDA toolkit: the kernels are ELF files inside the library. A stack of 0 bytes also says
that no register is spilled. `csrc/cuda/resources.csv` holds the numbers that a test compares.
"""

from __future__ import annotations

import csv
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from benchmarks.machine import REPOSITORY

ARCHITECTURES = (80, 86, 89, 90, 100)  # of the build by default
RECORDED = REPOSITORY / "csrc" / "cuda" / "resources.csv"

_MACHINE = 190  # EM_CUDA
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # ELF64
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_REGISTERS, _FRAME = 0x2F, 0x11  # attributes of .nv.info: number for each function


@dataclass(frozen=True, order=True)
class Kernel:
    """One kernel for one architecture."""

    name: str  # as "assign<float, 64>"
    architecture: int  # as 90
    registers: int  # of a thread
    stack: int  # bytes of a thread; spilled registers are there
    shared: int  # bytes of a block, without what the launch adds
    instructions: int


def library() -> Path:
    """The extension of this repository, or where that is not built in place, the installed one."""
    built = sorted((REPOSITORY / "detr_fast").glob("_C*.so"))
    if built:
        return built[0]
    import detr_fast._C

    return Path(detr_fast._C.__file__)


def kernels(path: Path) -> list[Kernel]:
    """All kernels in a library, sorted; none if it was built without nvcc."""
    data = path.read_bytes()
    found = [kernel for cubin in cubins(data) for kernel in kernels_of(cubin)]
    names = demangled([kernel.name for kernel in found])
    return sorted(Kernel(name, *astuple(kernel)[1:]) for name, kernel in zip(names, found, strict=True))


def compiler() -> str:
    """Version of nvcc, as "13.0.88"; empty without it."""
    if shutil.which("nvcc") is None:
        return ""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V(\d+\.\d+\.\d+)", said)
    return release[1] if release else ""


def recorded() -> tuple[str, dict[tuple[str, int], int]]:
    """Compiler, and registers by name and architecture."""
    with RECORDED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return rows[0]["nvcc"], {(row["name"], int(row["architecture"])): int(row["registers"]) for row in rows}


def record(found: list[Kernel]) -> None:
    """Makes these the numbers that the test compares; a build for fewer architectures is refused."""
    present = tuple(sorted({kernel.architecture for kernel in found}))
    if present != ARCHITECTURES:
        raise ValueError(f"ptx: the library must be built for {ARCHITECTURES}, got {present}")
    with RECORDED.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["nvcc", *(field.name for field in fields(Kernel))])
        writer.writerows([compiler(), *astuple(kernel)] for kernel in found)


def report(found: list[Kernel]) -> str:
    """A line for each kernel, a column for each architecture: registers, and the stack where there is one."""
    if not found:
        return "the library has no CUDA kernels: it was built without nvcc"
    architectures = sorted({kernel.architecture for kernel in found})
    by_name: dict[str, dict[int, Kernel]] = {}
    for kernel in found:
        by_name.setdefault(kernel.name, {})[kernel.architecture] = kernel
    width = max(map(len, by_name))
    lines = [f"{'registers':{width}}  " + "  ".join(f"{f'sm_{a}':>7}" for a in architectures) + "   shared"]
    for name, kernel_of in by_name.items():
        cells = []
        for architecture in architectures:
            kernel = kernel_of[architecture]
            cells.append(f"{kernel.registers}" + (f"+{kernel.stack}B" if kernel.stack else ""))
        shared = max(kernel.shared for kernel in kernel_of.values())
        lines.append(f"{name:{width}}  " + "  ".join(f"{cell:>7}" for cell in cells) + f"  {shared:5} B")
    stacks = sum(kernel.stack > 0 for kernel in found)
    return "\n".join([*lines, f"{len(found)} kernels, {stacks} with a stack (or spilled registers)"])


def cubins(data: bytes) -> Iterator[bytes]:
    """ELF files of kernels inside a library, each with what follows it."""
    start = data.find(b"\x7fELF", 1)
    while start >= 0:
        header = _HEADER.unpack_from(data, start) if start + _HEADER.size <= len(data) else None
        if header is not None and header[2] == _MACHINE:
            yield data[start:]
        start = data.find(b"\x7fELF", start + 1)


def kernels_of(cubin: bytes) -> Iterator[Kernel]:
    """With their names as the linker knows them."""
    header = _HEADER.unpack_from(cubin)
    flags, section_offset, section_count, names_index = header[7], header[6], header[12], header[13]
    sections = [_SECTION.unpack_from(cubin, section_offset + n * _SECTION.size) for n in range(section_count)]

    def content(section: tuple[int, ...]) -> bytes:
        return cubin[section[4] : section[4] + section[5]]

    def text(table: bytes, offset: int) -> str:
        return table[offset : table.index(b"\0", offset)].decode()

    named = {text(content(sections[names_index]), section[0]): section for section in sections}
    strings = content(named[".strtab"])
    symbols = [text(strings, _SYMBOL.unpack(entry)[0]) for entry in _pieces(content(named[".symtab"]), _SYMBOL.size)]
    info = _function_attributes(content(named[".nv.info"]))
    # Since compute capability 10 the architecture stands in the second byte.
    architecture = flags & 0xFF if header[0][8] < 8 else flags >> 8 & 0xFF
    for section_name, section in named.items():
        if not section_name.startswith(".text."):
            continue
        name = section_name.removeprefix(".text.")
        own = info[symbols.index(name)]
        shared = named[f".nv.shared.{name}"][5] if f".nv.shared.{name}" in named else 0
        yield Kernel(name, architecture, own[_REGISTERS], own.get(_FRAME, 0), shared, section[5] // 16)


def _pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[k : k + size] for k in range(0, len(data), size))


def _function_attributes(info: bytes) -> dict[int, dict[int, int]]:
    """By index of the symbol and attribute."""
    found: dict[int, dict[int, int]] = {}
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != 4:  # its value is in the place of the size
            continue
        if size == 8 and attribute in (_REGISTERS, _FRAME):
            symbol, value = struct.unpack_from("<II", info, at)
            found.setdefault(symbol, {})[attribute] = value
        at += size
    return found


def demangled(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        return names
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [_short(line) for line in said.stdout.splitlines()]


def _short(signature: str) -> str:
    """ "void detr::cuda::(anonymous namespace)::assign_kernel<float, 64>(...)" as "assign<float, 64>"."""
    found = re.search(r"(\w+?)(?:_kernel)?<(.*?)>\(", signature)
    if found is None:
        plain = re.search(r"(\w+?)_kernel\(", signature)
        return plain[1] if plain else signature
    arguments = re.sub(r"detr::cuda::(\(anonymous namespace\)::)?", "", found[2])
    return f"{found[1]}<{arguments}>".replace(str(2**31 - 1), "any")
