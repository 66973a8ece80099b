"""The package as a whole: lazy names, documented names, one stable binary."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import detr_fast
from detr_fast import _C
from detr_fast.ops import instruction_set


def test_every_public_name_resolves() -> None:
    for name in detr_fast.__all__:
        assert getattr(detr_fast, name).__doc__, f"{name} has no docstring"
        assert name in dir(detr_fast)
    with pytest.raises(AttributeError, match="no attribute 'Matcher'"):
        detr_fast.Matcher  # noqa: B018


@pytest.mark.parametrize("module", ["ops", "numpy", "data", "engine"])
def test_every_module_can_be_imported_first(module: str) -> None:
    code = f"import detr_fast.{module}", f"import detr_fast; detr_fast.{module}"
    for line in code:
        subprocess.run([sys.executable, "-c", line], check=True)


def test_instruction_set_is_one_that_exists() -> None:
    assert instruction_set() in ("portable", "avx2", "avx512")
    assert not _C.use_instruction_set("mmx")


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_library_depends_on_the_stable_interface_only() -> None:
    """No C++ symbol of PyTorch: the library then loads in every PyTorch from 2.11 on."""
    symbols = subprocess.run(["nm", "-DC", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True)
    needed = [line.split(maxsplit=1)[1] for line in symbols.stdout.splitlines()]
    assert not [name for name in needed if name.startswith(("at::", "c10::", "torch::"))]
    assert any("aoti_torch" in name or name.startswith("torch_") for name in needed)
    assert Path(_C.__file__).name == "_C.abi3.so"
