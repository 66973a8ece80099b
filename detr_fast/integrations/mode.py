"""The two ways in which every adapter can compute."""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["stable", "compat"]


def check_mode(name: str, mode: str) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"{name}: mode must be {' or '.join(map(repr, get_args(Mode)))}, got {mode!r}")


def check_same_mode(name: str, mode: str, matcher: object) -> None:
    """Raises a ValueError if the matcher has a mode, and another one."""
    own = getattr(matcher, "mode", mode)
    if own in get_args(Mode) and own != mode:
        raise ValueError(f"{name}: mode must be that of its matcher, {own!r}, got {mode!r}")
