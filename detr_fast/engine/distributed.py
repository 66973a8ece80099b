"""Several processes: started by ``torchrun``, gloo on CPUs and NCCL on GPUs. With one process everything is a no-op."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from detr_fast.engine.errors import LostContact

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """This process among all of the run."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    @property
    def is_main(self) -> bool:
        """The one process that writes logs, checkpoints and the terminal."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """``value`` of every process, in the order of ranks, on every process. Values are pickled."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Value) -> Value:
        """The main process's ``value`` on every process."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any process."""
        return any(self.gather(flag))


def choose_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda``; with several processes each takes the GPU of its local rank.

    Raises:
        ValueError: ``cuda`` is asked for and there is none.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            f"train.device (in Python device) must be one that this machine has, got {name!r}, but PyTorch finds no "
            "CUDA device; give cpu or auto"
        )
    if name not in ("auto", "cuda"):
        return torch.device(name)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextlib.contextmanager
def processes(device: str, timeout_seconds: int = 1800) -> Iterator[Processes]:
    """Joins the process group that ``torchrun`` announced, and leaves it.

    On an error the group is left at once, without waiting: the others get an error from their next exchange instead of
    hanging, and ``torchrun`` stops them.

    Raises:
        LostContact: another process ended, or did not answer for ``timeout_seconds``.
    """
    chosen = choose_device(device)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if count == 1 or dist.is_initialized():
        initialized = dist.is_initialized()
        yield Processes(dist.get_rank(), dist.get_world_size(), chosen) if initialized else Processes(0, 1, chosen)
        return
    # NCCL moves tensors between GPUs; objects (detections, flags) go through gloo without touching the GPU's stream.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))
        yield Processes(dist.get_rank(), dist.get_world_size(), chosen)
        dist.barrier()
    except RuntimeError as error:
        # The first line says what happened, the rest where in the library.
        reason = (str(error).strip().splitlines() or [""])[0]
        if isinstance(error, dist.DistError) or "gloo/transport" in reason:
            raise LostContact(
                f"another process ended or does not answer ({reason[:200]}); start all of them again with --resume"
            ) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class SharedFlag:
    """A flag that any process may set and that all processes see at the same step.

    The exchange of a step is finished in the next one, so that no step waits for it.
    """

    def __init__(self, processes: Processes):
        self.processes = processes
        self.is_set = False
        self.signal_number = int(signal.SIGTERM)  # that set it; another process's is not known
        self._pending: tuple[torch.Tensor, Any] | None = None

    def exchange(self) -> bool:
        """Called once a step by every process; whether any process had set its flag (one step ago)."""
        if self.processes.count == 1:
            return self.is_set
        seen = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            seen = bool(flag.item())
        flag = torch.tensor([float(self.is_set)])
        self._pending = (flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True))
        return seen

    def agree(self) -> bool:
        """The same, waiting for all processes."""
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None
        return self.processes.any(self.is_set)


@contextlib.contextmanager
def caught_signals(flag: SharedFlag) -> Iterator[SharedFlag]:
    """SIGTERM and the first SIGINT set the flag; a second SIGINT interrupts at once.

    One more SIGTERM is let pass afterwards: Slurm signals every process and torchrun hands it on, so that it may
    arrive again while a process that has saved says so.
    """
    own = os.getpid()

    def catch(number: int, frame: Any) -> None:
        if flag.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.is_set, flag.signal_number = True, number

    def once_more(number: int, frame: Any) -> None:
        signal.signal(number, before[signal.Signals(number)])
        if os.getpid() != own:  # a child that has inherited this
            os.kill(os.getpid(), number)

    try:
        before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: signals are someone else's
        yield flag
        return
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, once_more if flag.is_set and number == signal.SIGTERM else handler)
