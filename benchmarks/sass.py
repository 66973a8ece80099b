"""Loops in the disassembly of built kernels, and the instructions that one scan of the assignment's search costs.

A scan relaxes all slots from a row, finds the nearest and moves on: the cycle of the control flow with two warp minima
(REDUX). Needs nvdisasm, of the CUDA toolkit or of Triton.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks import ptx

_BRANCH = re.compile(r"(@!?U?P\d+ )?BRA\s+(!?U?P\d+, )?.*\(\.(L_x_\d+)\)")
_MOST_DECISIONS, _LONGEST = 6, 600


def nvdisasm() -> str | None:
    """Path of the tool, or None."""
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else Path()
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=str(beside))


def scans(library: Path, architecture: int) -> dict[str, list[int]]:
    """For each float kernel of `assign`, the instructions of a scan of each of its searches, ascending."""
    tool = nvdisasm()
    if tool is None:
        raise FileNotFoundError("nvdisasm: install the CUDA toolkit or Triton")
    found: dict[str, list[int]] = {}
    for cubin in ptx.cubins(library.read_bytes()):
        for kernel in ptx.kernels_of(cubin):
            if kernel.architecture != architecture or "assign_kernelIf" not in kernel.name:
                continue
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(cubin)
                file.flush()
                said = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
            own = said[said.index(f".text.{kernel.name}:") :].split("//------", 1)[0]
            found[ptx.demangled([kernel.name])[0]] = _cycles(own)
    return found


def loops(assembly: str) -> tuple[list[str], list[tuple[int, int]]]:
    """All instructions, and of each loop the place of its head and of the branch back to it."""
    instructions, labels = _parsed(assembly)
    branches = [(at, _BRANCH.match(text)) for at, text in enumerate(instructions)]
    found = [(labels[branch[3]], at) for at, branch in branches if branch and labels.get(branch[3], at + 1) <= at]
    return instructions, found


def _parsed(assembly: str) -> tuple[list[str], dict[str, int]]:
    """Instructions, and the place of each label among them."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        label, instruction = re.match(r"\.(L_x_\d+):", line), re.search(r"/\*[0-9a-f]+\*/\s+(.*?);", line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(instruction[1].strip())
    return instructions, labels


def _cycles(assembly: str) -> list[int]:
    """Longest of the ways around each loop with two minima."""
    instructions, labels = _parsed(assembly)
    branches = [(at, _BRANCH.match(text)) for at, text in enumerate(instructions)]
    heads = {labels[branch[3]] for at, branch in branches if branch and labels.get(branch[3], at + 1) <= at}
    lengths = []
    for head in sorted(heads):
        # Keys are relaxed there: one load from shared memory and two minima of numbers for each slot of a lane.
        start = "\n".join(instructions[head : head + 60])
        if "LDS" not in start or start.count("FMNMX") < 2:
            continue
        decisions = itertools.product((False, True), repeat=_MOST_DECISIONS)
        ways = [_way(instructions, labels, head, list(taken)) for taken in decisions]
        if any(ways):
            lengths.append(max(ways))
    return sorted(lengths)


def _way(instructions: list[str], labels: dict[str, int], head: int, taken: list[bool]) -> int:
    """Instructions from `head` back to it if branches are taken so and two minima are met; otherwise 0."""
    at, count, minima = head, 0, 0
    while count < _LONGEST and at < len(instructions):
        text = instructions[at]
        count += 1
        minima += text.startswith("REDUX")
        branch = _BRANCH.match(text)
        if branch:
            is_conditional = bool(branch[1] or branch[2])
            if is_conditional and not taken:
                return 0
            if not is_conditional or taken.pop(0):
                at = labels[branch[3]]
                if at == head:
                    return count if minima == 2 else 0
                continue
        at += 1
    return 0
