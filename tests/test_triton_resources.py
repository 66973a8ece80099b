"""Registers, spills, shared memory and instructions of the Triton kernels, compiled without a GPU.

In a process of its own: the tests' own Triton interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from benchmarks import sass, triton_kernels
from benchmarks.triton_kernels import ARCHITECTURES, Case, Compiled, cases

README_RELEASE = "3.7.1"
LIMITS = {80: (7.3, 11), 90: (7.3, 11), 100: (7.6, 11.2)}  # of the forward pass, without and with dropout

COMPILE = """
import json
from dataclasses import asdict
from benchmarks.triton_kernels import cases, compiled
print(json.dumps([asdict(compiled(case)) for case in cases(quick=True)]))
"""


@pytest.fixture(scope="module")
def found() -> list[Compiled]:
    """The default kernels of DETR's head width for sm_90, as they are now."""
    if sass.nvdisasm() is None:
        pytest.skip("needs nvdisasm, of Triton's wheel or the CUDA toolkit")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, cwd=triton_kernels.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Compiled(**one) for one in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def recorded() -> dict[tuple[str, int], Compiled]:
    """Of the installed release of Triton."""
    known = triton_kernels.recorded()
    if not known:
        pytest.skip("nothing is recorded for this release of Triton: python -m benchmarks.run triton --update")
    return known


def test_nothing_spills(found: list[Compiled]) -> None:
    assert [one for one in found if one.stack] == []


def test_spills_of_all_that_is_recorded(recorded: dict[tuple[str, int], Compiled]) -> None:
    """Without a mask at DETR's head width nothing spills by default; elsewhere a few words at most."""
    names = {case.name for case in cases(quick=True)}
    assert [one for one in recorded.values() if one.stack and one.name in names] == []
    assert [one for one in recorded.values() if one.stack > 32 and one.architecture <= 90] == []


def test_nothing_has_changed(found: list[Compiled], recorded: dict[tuple[str, int], Compiled]) -> None:
    """Registers, shared memory and instructions of the main loops."""
    assert len(found) == 6
    for one in found:
        known = recorded[one.name, one.architecture]
        assert one == known, "if that is meant: python -m benchmarks.run triton --update"


def test_every_kernel_is_recorded(recorded: dict[tuple[str, int], Compiled]) -> None:
    assert set(recorded) == {(case.name, case.architecture) for case in cases()}


def test_instructions_a_score(recorded: dict[tuple[str, int], Compiled]) -> None:
    """Of the forward pass at DETR's head width: the best kernel of each kind, and what dropout adds to the default."""
    for architecture in ARCHITECTURES:
        of_width = [case for case in cases() if _is_forward(case) and case.architecture == architecture]
        plain = [recorded[case.name, architecture].per_score for case in of_width if not case.dropout]
        dropped = [recorded[case.name, architecture].per_score for case in of_width if case.dropout]
        assert min(plain) <= LIMITS[architecture][0]
        assert min(dropped) <= LIMITS[architecture][1]
        assert dropped[0] <= 1.6 * plain[0]


def _is_forward(case: Case) -> bool:
    return (case.kernel, case.products, case.width) == ("forward", "half", 32)


def test_the_derivations_state_what_is_recorded(recorded: dict[tuple[str, int], Compiled]) -> None:
    if triton_kernels.triton.__version__ != README_RELEASE:
        pytest.skip(f"it tells of Triton {README_RELEASE}")
    stated = (triton_kernels.RECORDED.parent / "README.md").read_text()
    for title, name in triton_kernels.stated().items():
        rows = [recorded[name, architecture] for architecture in ARCHITECTURES]
        registers = " / ".join(str(row.registers) for row in rows)
        instructions = " / ".join(f"{row.per_score:.1f}" for row in rows)
        assert f"| {title} | {registers} | {instructions} |" in stated
