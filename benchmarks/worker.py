"""Runs benchmarks on request: JSON lines in, JSON lines out. Started by benchmarks.other_revision."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.harness import Benchmark, LocalSampler, Options
from benchmarks.run import benchmarks_of


class Worker:
    """Walks through the benchmarks in the order in which they are asked for."""

    def __init__(self, device: str, quick: bool, threads: int) -> None:
        torch.set_num_threads(threads)
        self.options = Options(torch.device(device), quick)
        self.suite, self.next_index = "", 0
        self.remaining: Iterator[Benchmark] = iter(())
        self.selected: Benchmark | None = None

    def answer(self, request: dict[str, Any]) -> Any:
        action = request.pop("do")
        if action == "select":
            return self.select(**request)
        assert self.selected is not None
        sampler = LocalSampler(self.selected, request.pop("provider"), self.options.device)
        return getattr(sampler, action)(**request)

    def select(self, suite: str, index: int) -> None:
        if suite != self.suite or index < self.next_index:
            self.suite, self.next_index = suite, 0
            self.remaining = benchmarks_of(suite, self.options)
        while self.next_index <= index:
            self.selected = next(self.remaining)
            self.next_index += 1


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # so that nothing printed on the way is taken for an answer
    worker = Worker(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"result": worker.answer(json.loads(line))}
        except Exception as error:  # whatever it is, the process that asked must hear of it and go on
            answer = {"error": f"{type(error).__name__}: {error}", "kind": type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
