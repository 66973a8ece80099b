"""The emulator reports what it must and nothing else: each fault is planted once, beside the sound kernel."""

from __future__ import annotations

from types import ModuleType

import pytest

SEEDS = range(4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("kernel", "result"), [("exchange", 32), ("overwrite", 7), ("last block", 4)])
def test_sound_kernels_run(emulator: ModuleType, kernel: str, result: int, seed: int) -> None:
    emulator.use_schedule(seed)
    assert emulator.planted(f"sound {kernel}") == result


FAULTS = {
    "missing __syncthreads": "race: thread .* of block 0 .* the same memory with no barrier between",
    "missing __syncwarp": "race: thread .* of block 0 reads and thread 0 of block 0 writes",
    "missing __threadfence": "race: thread 0 of block .* writes and thread 0 of block .* reads",
    "no counter of blocks": "race: thread 0 of block .* writes and thread 0 of block .* reads|"
    "race: thread 0 of block .* reads and thread 0 of block .* writes",
    "exchange between blocks": "race: thread 0 of block .* (reads|writes) and thread 0 of block .*",
    "shared memory without leave": "CUDA kernel planted: invalid argument",
    "divergent __syncthreads": r"divergent barrier: .* __syncthreads at planted.cu:\d+ and at planted.cu:\d+",
    "half of a warp": "__syncwarp at planted.cu.*: the mask has lanes that have exited",
    "exited lanes": "__shfl_sync at planted.cu.*: the mask has lanes that have exited",
    "past shared memory": "shared memory past the 124 bytes of the launch",
    "too many threads": "CUDA kernel planted: invalid argument",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_reported(emulator: ModuleType, fault: str, seed: int) -> None:
    """Whatever the order of the threads: races are found by what orders two accesses, not by luck."""
    emulator.use_schedule(seed)
    with pytest.raises(RuntimeError, match=FAULTS[fault]):
        emulator.planted(fault)
    assert emulator.planted("sound exchange") == 32  # usable afterwards


def test_unwritten_shared_memory_is_nan(emulator: ModuleType) -> None:
    assert emulator.planted("unwritten memory") == 2  # one static, one dynamic
