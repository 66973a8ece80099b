"""``detr-fast``, but its second process is killed once: ``killed_once.py MARKER STEP train ...``.

MARKER is a file that says that it was.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from detr_fast.__main__ import main
from detr_fast.data.batch import Batch
from detr_fast.engine import train as loop
from detr_fast.engine.run import Run

marker, step, *words = sys.argv[1:]
original = loop._step


def killed_once(run: Run, batches: list[Batch]) -> None:
    if run.place.step == int(step) and run.processes.rank == 1 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    original(run, batches)


loop._step = killed_once
sys.exit(main(words))
