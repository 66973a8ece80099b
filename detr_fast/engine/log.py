"""What a run says: sums of losses kept on the device, JSON lines, TensorBoard and the terminal.

Nothing is read from the device but in :meth:`LossSums.read`, which copies all values at once.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detr_fast.engine.distributed import Processes
from detr_fast.files import naming, write_atomically


class LossSums:
    """Sums of losses since the last line of the log and over the epoch, of the steps that were not skipped.

    All on the device: adding a step launches a few small kernels and waits for nothing.
    """

    ROWS = ("interval", "epoch")

    def __init__(self, device: torch.device):
        self.device = device
        self.names: tuple[str, ...] = ()
        self.sums = torch.zeros(len(self.ROWS), 1, dtype=torch.float64, device=device)  # [2, terms + steps]

    def add(self, losses: Mapping[str, Tensor], was_skipped: Tensor) -> None:
        """Adds the 0-d losses of one step."""
        if not self.names:
            self.names = tuple(losses)
            self.sums = torch.zeros(len(self.ROWS), len(losses) + 1, dtype=torch.float64, device=self.device)
        values = torch.stack([*losses.values(), torch.ones_like(losses[self.names[0]])])
        self.sums += values.double().masked_fill(was_skipped, 0)

    def read(self, row: str, processes: Processes | None = None) -> dict[str, float]:
        """Means since the row was cleared, of all ``processes`` if given (all must call). Waits for the device."""
        values = self.sums[self.ROWS.index(row)].tolist()
        if processes is not None:
            values = [sum(column) for column in zip(*processes.gather(values), strict=True)]
        *values, steps = values
        return {name: value / steps if steps else math.nan for name, value in zip(self.names, values, strict=True)}

    def clear(self, row: str) -> None:
        self.sums[self.ROWS.index(row)].zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"names": list(self.names), "sums": self.sums.to("cpu", copy=True)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.names = tuple(state["names"])
        self.sums = state["sums"].to(self.device, copy=True)


class Log:
    """``log.jsonl`` and TensorBoard in the folder of a run; on other processes than the main one it does nothing."""

    def __init__(self, folder: Path, *, active: bool, tensorboard: bool):
        self.path = folder / "log.jsonl"
        self.active = active
        self.tensorboard = folder / "tensorboard" if tensorboard else None
        self.first_step: int | None = None  # of a continued run; TensorBoard forgets what came after it
        self._writer: Any = None

    def rewind(self, step: int, epoch: int) -> None:
        """Drops what was written after the checkpoint at ``step`` in ``epoch``, which the run does again."""
        self.first_step = step + 1
        if not self.active or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a line cut off by a crash
            is_old = entry["epoch"] < epoch if entry["kind"] == "epoch" else entry["step"] <= step
            if is_old:
                kept.append(line)
        write_atomically(self.path, "".join(line + "\n" for line in kept))

    def write(self, kind: str, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        """Appends one line ``{"kind", "step", "epoch", ...}``; numbers also go to TensorBoard."""
        if not self.active:
            return
        entry = {"kind": kind, "step": step, "epoch": epoch, **{name: plain(value) for name, value in values.items()}}
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self.tensorboard is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self._tensorboard_writer().add_scalar(f"{kind}/{name}", value, step)

    def _tensorboard_writer(self) -> Any:
        """Created with the first value, because importing TensorBoard takes seconds."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.tensorboard), purge_step=self.first_step)
        return self._writer

    def say(self, text: str) -> None:
        """A line on the terminal that leaves a progress bar intact."""
        if self.active:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def plain(value: Any) -> Any:
    """JSON has no NaN or infinity: those become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
