"""Registers and stack of the CUDA kernels, read from the installed library: no GPU, no compilation."""

from __future__ import annotations

import pytest

from benchmarks import ptx


@pytest.fixture(scope="module")
def kernels() -> list[ptx.Kernel]:
    found = ptx.kernels(ptx.library())
    if not found:
        pytest.skip("the library was built without nvcc")
    return found


def test_every_architecture_has_every_kernel(kernels: list[ptx.Kernel]) -> None:
    of_architecture: dict[int, set[str]] = {}
    for kernel in kernels:
        of_architecture.setdefault(kernel.architecture, set()).add(kernel.name)
    if set(of_architecture) != set(ptx.ARCHITECTURES):
        pytest.skip(f"built for {sorted(of_architecture)} (CUDAARCHS, or an older nvcc), not {ptx.ARCHITECTURES}")
    assert len({frozenset(names) for names in of_architecture.values()}) == 1
    names = next(iter(of_architecture.values()))
    ops = {"assign", "matching_cost", "set_loss", "scale_gradients", "unite"}
    assert {name.partition("<")[0] for name in names} == ops


def test_no_kernel_has_a_stack_or_spills(kernels: list[ptx.Kernel]) -> None:
    assert [kernel for kernel in kernels if kernel.stack] == []


def test_registers_do_not_grow(kernels: list[ptx.Kernel]) -> None:
    compiler, registers = ptx.recorded()
    if ptx.compiler() != compiler:
        pytest.skip(f"recorded with nvcc {compiler}, this one is {ptx.compiler()}")
    assert {(kernel.name, kernel.architecture) for kernel in kernels} <= set(registers)
    grown = [k for k in kernels if k.registers > registers[k.name, k.architecture]]
    assert grown == [], "if that is meant: python -m benchmarks.run ptx --update"


def test_two_blocks_fit_a_multiprocessor(kernels: list[ptx.Kernel]) -> None:
    """65,536 registers and 256 threads a block; searches of more than 256 rows and float64 have one."""
    for kernel in kernels:
        if "any" not in kernel.name and "double" not in kernel.name:
            assert 2 * 256 * kernel.registers <= 65536, kernel.name


def test_declared_shared_memory_is_what_launches_leave_room_for(kernels: list[ptx.Kernel]) -> None:
    """kMostStaticShared in csrc/cuda/launch.h; since 9.0 the system's own 1 KiB is counted."""
    for kernel in kernels:
        assert kernel.shared - (1024 if kernel.architecture >= 90 else 0) <= 2048, kernel


def test_the_derivations_state_the_recorded_registers() -> None:
    stated = (ptx.REPOSITORY / "csrc" / "README.md").read_text()
    _, registers = ptx.recorded()
    rows = {
        "assign, at most 64 targets": "assign<float, 64>",
        "assign, at most 256": "assign<float, 256>",
        "assign, any number": "assign<float, any>",
        "matching_cost, float32": "matching_cost<float, float>",
        "set_loss, float32": "set_loss<float, float>",
        "scale_gradients, float32": "scale_gradients<float, float>",
    }
    for title, name in rows.items():
        numbers = " / ".join(str(registers[name, architecture]) for architecture in ptx.ARCHITECTURES)
        assert f"| {title} | {numbers} |" in stated
