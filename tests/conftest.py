"""Fixtures for all tests."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels then compute tensors of the CPU

from emulator import build

NATIVE_OPS = ("assign", "matching_cost", "match", "set_loss", "set_loss_backward", "unite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def emulator() -> ModuleType:
    """The module with the emulator's controls; torch.ops.detr_fast_emulated are the CUDA ops for tensors of the CPU."""
    reason = build.missing()
    if reason is not None:
        pytest.skip(reason)
    return build.load()


@contextmanager
def computed_by(kernels: Mapping[str, Callable[..., object]]) -> Iterator[None]:
    """Ops on tensors of the CPU are computed by these, and so is all that stands on them."""
    library = torch.library.Library("detr_fast", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that is the purpose
        for name, kernel in kernels.items():
            library.impl(name, kernel, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


@pytest.fixture
def triton_attention() -> Iterator[None]:
    """Attention is computed by the interpreted Triton kernels."""
    pytest.importorskip("triton")
    from detr_fast.ops.triton import attention

    with computed_by({"attention": attention.forward, "attention_backward": attention.backward}):
        yield


@pytest.fixture
def emulated_ops(emulator: ModuleType) -> Iterator[ModuleType]:
    """The native ops are computed by the emulated CUDA kernels."""
    with computed_by({name: getattr(torch.ops.detr_fast_emulated, name).default for name in NATIVE_OPS}):
        yield emulator
