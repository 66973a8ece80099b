"""Every native op is tested with each instruction set and on emulated CUDA, with memory that starts as NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from detr_fast import _C

INSTRUCTION_SETS = ("portable", "avx2", "avx512")


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[*INSTRUCTION_SETS, "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kernels that compute tensors of the CPU; "cuda" are those of CUDA in the emulator."""
    best = _C.instruction_set()
    if request.param == "cuda":
        request.getfixturevalue("emulated_ops")
    elif not _C.use_instruction_set(request.param):
        pytest.skip(f"this processor or build has no {request.param}")
    yield request.param
    _C.use_instruction_set(best)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
