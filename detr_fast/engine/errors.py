"""What can go wrong for reasons outside of this program; every message alone says what to do."""

from __future__ import annotations

import signal
from pathlib import Path


class EngineError(Exception):
    """An error whose message is enough for the user."""


class ConfigError(EngineError, ValueError):
    """A setting has a name that does not exist or a value that cannot be."""


class CheckpointError(EngineError):
    """A checkpoint is missing, damaged or not what it was taken for."""


class ForeignCheckpointError(CheckpointError):
    """The file is readable, but another program wrote it: it holds weights and no run."""


class TrainingError(EngineError):
    """Training cannot go on; the message names the step, its images and the last good checkpoint."""


class LostContact(EngineError):
    """Another process ended or cannot be reached; the run continues from its last checkpoint."""


class Interrupted(Exception):
    """A signal ended the run after it was saved."""

    def __init__(self, signal_number: int, checkpoint: Path):
        name = signal.Signals(signal_number).name
        super().__init__(f"{name}: saved {checkpoint}; continue with --resume {checkpoint.parent}")
        self.signal_number = signal_number
        self.checkpoint = checkpoint
