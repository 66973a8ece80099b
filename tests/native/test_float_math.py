"""Elementary functions of float against double precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent


def test_exp_log_and_log1p_are_within_two_units_in_the_last_place(run_built: Callable[..., str]) -> None:
    run_built("-O2", HERE / "float_math.cpp")
