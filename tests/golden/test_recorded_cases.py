"""Recorded outputs of the published implementations, where the recordings lie beside this repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CHECKER = ROOT.parent / "shared" / "golden" / "check.py"


@pytest.mark.skipif(not CHECKER.exists(), reason="the recordings are not part of the repository")
@pytest.mark.parametrize(
    ("groups", "pattern"),
    [
        (["models", "losses"], "*/detr*"),
        (["boxes", "postprocess"], "*"),
        (["data"], "*/coco_targets"),
        (["data"], "*/eval_transform"),
        (["evaluation"], "*/coco_numbers"),
    ],
)
def test_recorded_cases(groups: list[str], pattern: str) -> None:
    command = [sys.executable, str(CHECKER), str(HERE / "adapter.py"), "--only", *groups, "--match", pattern]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
