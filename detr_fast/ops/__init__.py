"""Stateless functions with native kernels. Importing this package registers every op with PyTorch's dispatcher.

One op, one file: the function with its contract, the definition in plain PyTorch (`*_reference`), the fake kernel for
`torch.compile`, and autograd.
"""

from __future__ import annotations

import torch  # noqa: F401  loads the libraries that _C needs, so it comes first

# isort: split
try:
    import detr_fast._C as _C
except ImportError as error:
    raise ImportError(
        f"detr_fast: the native library does not load: {error}. In a checkout it is built by "
        "pip install --no-build-isolation -e . ; an installed package is hidden by a checkout in the current folder. "
        "detr-fast doctor says more"
    ) from error
from detr_fast.ops.assignment import (
    Assignment,
    assign,
    assign_reference,
    assign_with_prices,
    batch_linear_assignment,
)
from detr_fast.ops.attention import attention, attention_reference
from detr_fast.ops.matching import match, match_reference
from detr_fast.ops.matching_cost import ForbiddenPairs, matching_cost, matching_cost_reference
from detr_fast.ops.matching_union import unite, unite_reference
from detr_fast.ops.set_loss import WeightedLoss, set_loss, set_loss_reference, weighted_set_loss

__all__ = [
    "Assignment",
    "ForbiddenPairs",
    "WeightedLoss",
    "assign",
    "assign_reference",
    "assign_with_prices",
    "attention",
    "attention_reference",
    "batch_linear_assignment",
    "instruction_set",
    "match",
    "match_reference",
    "matching_cost",
    "matching_cost_reference",
    "set_loss",
    "set_loss_reference",
    "unite",
    "unite_reference",
    "weighted_set_loss",
]


def instruction_set() -> str:
    """Name of the instruction set whose CPU kernels run: "avx512", "avx2" or "portable"."""
    return str(_C.instruction_set())
