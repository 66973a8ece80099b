"""The two ways in which every adapter can compute."""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["stable", "compat"]


def check_mode(name: str, mode: str) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"{name}: mode must be {' or '.join(map(repr, get_args(Mode)))}, got {mode!r}")
