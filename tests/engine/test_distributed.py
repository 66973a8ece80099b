"""Devices and the exchange between processes; two real processes are tested through the command line."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from detr_fast.engine.distributed import Processes, SharedFlag, caught_signals, choose_device, processes


def test_one_process_exchanges_with_itself() -> None:
    alone = Processes()
    assert alone.is_main
    assert alone.gather("x") == ["x"]
    assert alone.broadcast("x") == "x"
    assert not alone.any(False)
    flag = SharedFlag(alone)
    assert not flag.exchange()
    flag.is_set = True
    assert flag.exchange()
    assert flag.agree()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"train\.device .* got 'cuda', but PyTorch finds no CUDA device"):
        choose_device("cuda")


def _count_steps(rank: int, folder: str) -> None:
    """Process 1 sets its flag at step 3; both must leave at the same step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    with processes("cpu") as joined:
        flag, steps = SharedFlag(joined), 0
        for steps in range(1, 20):
            flag.is_set = rank == 1 and steps >= 3
            if flag.exchange():
                break
        (Path(folder) / f"{rank}.txt").write_text(f"{steps} {joined.gather(rank)} {flag.agree()}")
    dist.destroy_process_group()


def test_all_processes_see_a_flag_at_the_same_step(tmp_path: Path) -> None:
    multiprocessing.start_processes(_count_steps, (str(tmp_path),), nprocs=2, start_method="fork")
    seen = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert seen == ["4 [0, 1] True"] * 2


def test_one_more_sigterm_passes_after_the_first_and_the_next_does_not() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with caught_signals(SharedFlag(Processes())) as flag:
            signal.raise_signal(signal.SIGTERM)
        assert flag.is_set
        if (child := os.fork()) == 0:  # which nobody has told before
            signal.raise_signal(signal.SIGTERM)
            os._exit(len(seen))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        signal.raise_signal(signal.SIGTERM)
        assert seen == []
        signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        with caught_signals(SharedFlag(Processes())):
            pass
        signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)
