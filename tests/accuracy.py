"""Computed tolerances: a result may be at most twice as far from float64 as the definition in the same type."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(actual: Tensor, definition: Tensor, exact: Tensor) -> None:
    """`definition` has the type of `actual`, `exact` is the definition computed in float64."""
    assert actual.shape == exact.shape
    assert actual.dtype == definition.dtype
    if exact.numel() == 0:
        return
    torch.testing.assert_close(actual.isnan(), exact.isnan(), rtol=0, atol=0)
    finite = exact.isfinite()
    assert torch.equal(actual[~finite & ~exact.isnan()].double(), exact[~finite & ~exact.isnan()])
    actual_type = actual.dtype
    compute_type = torch.float64 if actual_type == torch.float64 else torch.float32
    actual, definition, exact = actual[finite].double(), definition[finite].double(), exact[finite]
    own = (definition - exact).abs().max().item() if exact.numel() else 0.0
    # The definition may be exact by luck, or itself the judge (float64): some roundings of the largest result remain.
    stored = max(torch.finfo(actual_type).eps / 2, torch.finfo(torch.float64).eps * 32)
    rounding = (2 * torch.finfo(compute_type).eps + stored) * exact.abs().max().item() if exact.numel() else 0.0
    error = (actual - exact).abs().max().item() if exact.numel() else 0.0
    assert error <= 2 * own + rounding, f"error {error:.2e}, the definition's own {own:.2e}"
