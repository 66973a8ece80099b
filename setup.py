"""Builds detr_fast._C and detr_fast._numpy with CMake; everything else is declared in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


class CMakeBuild(build_ext):
    """CMake builds and installs all extensions at once, into the package or next to it for an editable install."""

    def run(self) -> None:
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"  # kept, so that the next build is incremental
        prefix = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        # cmake and ninja may be installed beside Python, in an environment that is not active.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment = {**os.environ, "PATH": path}
        configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        subprocess.run([*configure, f"-DPython_EXECUTABLE={sys.executable}"], check=True, env=environment)
        subprocess.run(["cmake", "--build", build], check=True, env=environment)
        subprocess.run(["cmake", "--install", build, "--prefix", prefix], check=True, env=environment)


setup(
    ext_modules=[Extension("detr_fast._C", sources=[]), Extension("detr_fast._numpy", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
