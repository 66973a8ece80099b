"""What ``detr-fast`` makes of the commands in the recipes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from detr_fast.__main__ import _parser
from detr_fast.engine.config import Config, split_overrides


@pytest.fixture
def accepted() -> Callable[[Sequence[str]], tuple[Any, Config]]:
    """Parses the words of a command line, and refuses what ``detr-fast`` would refuse."""

    def parse(arguments: Sequence[str]) -> tuple[Any, Config]:
        overrides, rest = split_overrides(arguments)
        parsed, unknown = _parser().parse_known_args(rest)
        assert not unknown
        return parsed, Config().with_overrides(overrides)

    return parse
