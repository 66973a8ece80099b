"""The emulator's threads run in another order than their numbers', and memory starts as NaN."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan(emulator: ModuleType) -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    emulator.use_schedule(1)
    yield
    emulator.use_schedule(0)
    torch.use_deterministic_algorithms(False)
