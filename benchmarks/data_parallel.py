"""Data-parallel training steps in processes of their own: JSON lines in, losses out.

The benchmark starts ``python -m benchmarks.data_parallel`` once for each rank and keeps it between calls; gloo connects
the ranks, as ``torchrun`` would.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, DisagreementError, Faster, Options
from benchmarks.machine import REPOSITORY
from benchmarks.reference import reference_model
from benchmarks.reference_step import ReferenceCriterion, dictionaries, weighted_sum
from benchmarks.scenes import shapes_batch
from benchmarks.steps import Start, parallel_step
from detr_fast.engine.distributed import processes

LABELS = 3
ONE, TWO = "detr_fast, one process, 2 threads", "detr_fast, two processes"


@dataclass(frozen=True)
class Task:
    """What every rank trains; each takes pictures of its own."""

    model: str
    images: int  # of each process
    size: int

    def start(self, rank: int) -> Start:
        batch = shapes_batch(self.images, self.size, seed=rank)
        return Start.random(self.model, LABELS, batch, torch.device("cpu"), dropout=0.0)


def benchmark(options: Options) -> Benchmark:
    """Every call trains on as many images: two processes take one step together, one process takes two."""
    task = Task("detr_tiny", 2, 64) if options.quick else Task("detr_small", 8, 128)
    groups = {TWO: Group(task, 2, threads=1, steps=1), ONE: Group(task, 1, threads=2, steps=2)}
    expected = {TWO: _definition(task, 2), ONE: _definition(task, 1)}

    def check(provider: str, losses: list[float]) -> None:
        """Of the first step of all ranks; what comes after it starts from other weights."""
        ranks = groups[provider].count
        found, exact = sum(losses[:ranks]) / ranks, expected[provider]
        if not abs(found - exact) <= 1e3 * torch.finfo(torch.float32).eps * exact:
            raise DisagreementError(f"{provider}: the loss of the first step is {found}, not {exact}")

    return Benchmark(
        case=f"{task.model} on shapes, two processes of gloo",
        axis="images x side",
        value=f"{2 * task.images}x{task.size}",
        providers=dict(groups),
        check=check,
        bars=(Faster(ONE, 0.9, TWO),),
    )


def _definition(task: Task, ranks: int) -> float:
    """The joint loss of all ranks' predictions; norms see the images of one rank only."""
    starts = [task.start(rank) for rank in range(ranks)]
    model = reference_model(task.model, LABELS, dropout=0.0)
    model.load_state_dict(starts[0].state)
    model.train()
    targets = [target for start in starts for target in dictionaries(start.batch)]
    with torch.no_grad():
        outputs = [model(start.batch.images.pixels, start.batch.images.padding) for start in starts]
        return float(weighted_sum(ReferenceCriterion(LABELS)(_joined(outputs), targets)))


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Outputs of several batches as of one."""
    first = parts[0]
    joined: dict[str, Any] = {
        name: torch.cat([part[name] for part in parts]) for name, value in first.items() if isinstance(value, Tensor)
    }
    if "aux_outputs" in first:
        layers = zip(*(part["aux_outputs"] for part in parts), strict=True)
        joined["aux_outputs"] = [_joined(list(layer)) for layer in layers]
    return joined


class Group:
    """A call takes steps on all ranks at once and returns their losses, step by step; started by the first call."""

    def __init__(self, task: Task, count: int, threads: int, steps: int) -> None:
        self.task, self.count, self.threads, self.steps = task, count, threads, steps
        self._workers: list[subprocess.Popen[str]] = []

    def __call__(self) -> list[float]:
        if not self._workers:
            self._start()
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.write(f"{self.steps}\n")
            worker.stdin.flush()
        answers = [self._answer(worker) for worker in self._workers]
        return [loss for step in zip(*answers, strict=True) for loss in step]

    def _answer(self, worker: subprocess.Popen[str]) -> list[float]:
        assert worker.stdout is not None
        line = worker.stdout.readline()
        if not line:
            raise RuntimeError(f"a rank of the data-parallel benchmark ended with status {worker.wait()}")
        return json.loads(line)

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self.count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.count, "MASTER_PORT": port}
            environment = {name: str(value) for name, value in place.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": str(self.threads)}
            self._workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.data_parallel", json.dumps(asdict(self.task))],
                    cwd=REPOSITORY,
                    env={**os.environ, **environment},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

    def close(self) -> None:
        """Workers end when there is nothing more to read."""
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.close()
        for worker in self._workers:
            worker.wait()
        self._workers = []

    def __del__(self) -> None:
        self.close()


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # so that nothing printed on the way is taken for an answer
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with processes("cpu") as joined:
        step = parallel_step(Task(**json.loads(sys.argv[1])).start(joined.rank), joined)
        for line in sys.stdin:
            print(json.dumps([float(step()) for _ in range(int(line))]), file=answers, flush=True)
        # DistributedDataParallel must not be the last to hold the process group.
        del step
        gc.collect()


if __name__ == "__main__":
    main()
