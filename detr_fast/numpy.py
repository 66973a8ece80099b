"""SciPy's ``linear_sum_assignment`` on the native solver, for NumPy arrays; does not import PyTorch."""

from __future__ import annotations

from detr_fast._numpy import linear_sum_assignment

__all__ = ["linear_sum_assignment"]
