"""Another revision of detr_fast, built beside this one and timed in its own process, in turns with ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.harness import OURS, Benchmark, DisagreementError, Options
from benchmarks.machine import REPOSITORY, revision


class OtherRevision:
    """Builds a revision in a temporary folder and keeps a worker there that runs *these* benchmarks with it.

    Raises:
        subprocess.CalledProcessError: there is no such revision, or it cannot be built.
    """

    def __init__(self, reference: str, options: Options, threads: int) -> None:
        self.reference, self.options, self.threads = reference, options, threads

    def __enter__(self) -> OtherRevision:
        self._folder = tempfile.TemporaryDirectory(prefix="detr_fast-")
        self._worker: subprocess.Popen[str] | None = None
        try:
            self._start()
        except BaseException:
            self._remove()
            raise
        return self

    def _start(self) -> None:
        source = Path(self._folder.name) / "source"
        _git("worktree", "add", "--detach", "--quiet", str(source), self.reference)
        self.commit = revision(source)
        print(f"building {self.reference} ({self.commit})", flush=True)
        _build(source)
        # Only the package is taken from there; benchmarks are ours, so that both are asked the same.
        packages = Path(self._folder.name) / "packages"
        packages.mkdir()
        (packages / "detr_fast").symlink_to(source / "detr_fast")
        (packages / "benchmarks").symlink_to(Path(__file__).parent)
        settings = {"device": str(self.options.device), "quick": self.options.quick, "threads": self.threads}
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(settings)],
            cwd=packages,
            env={**os.environ, "PYTHONPATH": str(packages)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        """Leaves neither the process nor the working tree behind."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
        source = Path(self._folder.name) / "source"
        if source.exists():
            _git("worktree", "remove", "--force", str(source))
        self._folder.cleanup()

    def ask(self, **request: Any) -> Any:
        """One request to the worker and its answer.

        Raises:
            DisagreementError: the other revision's result is wrong.
            RuntimeError: it cannot run this benchmark.
        """
        assert self._worker is not None
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        self._worker.stdin.write(json.dumps(request) + "\n")
        self._worker.stdin.flush()
        line = self._worker.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.reference}: the worker ended with status {self._worker.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            kind = DisagreementError if answer["kind"] == "DisagreementError" else RuntimeError
            raise kind(f"{self.reference}: {answer['error']}")
        return answer["result"]

    def samplers(self, suite: str, index: int, benchmark: Benchmark) -> list[RemoteSampler]:
        """Our own providers of the benchmark as that revision has them; none, with a message, if it cannot run it."""
        names = [name for name in benchmark.providers if name.startswith(OURS)]
        try:
            self.ask(do="select", suite=suite, index=index)
        except RuntimeError as error:
            print(f"\n{benchmark.case}: not timed at {error}")
            return []
        return [RemoteSampler(self, name) for name in names]


class RemoteSampler:
    """A provider of the benchmark that the worker has selected."""

    def __init__(self, other: OtherRevision, provider: str) -> None:
        self._other, self._provider = other, provider
        self.name = f"{provider} @ {other.commit}"

    def warm_up(self) -> None:
        self._other.ask(do="warm_up", provider=self._provider)

    def sample(self, calls: int) -> float:
        return float(self._other.ask(do="sample", provider=self._provider, calls=calls))

    def peak_mb(self) -> float | None:
        found = self._other.ask(do="peak_mb", provider=self._provider)
        return None if found is None else float(found)

    def device_activity(self) -> tuple[int, int] | None:
        found = self._other.ask(do="device_activity", provider=self._provider)
        return None if found is None else (int(found[0]), int(found[1]))


def _git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(REPOSITORY), *arguments], check=True)


def _build(source: Path) -> None:
    """Builds the native libraries into the package's folder, with the running interpreter."""
    build, python = str(source / "build"), f"-DPython_EXECUTABLE={sys.executable}"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in (
        ["cmake", "-S", str(source), "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", python],
        ["cmake", "--build", build],
        ["cmake", "--install", build, "--prefix", str(source)],
    ):
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
