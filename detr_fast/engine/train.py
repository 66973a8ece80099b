"""The training loop: from settings to a folder with checkpoints, logs and evaluations.

A step reads nothing back from the device: losses are summed there and read when they are logged.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from detr_fast.engine.checkpoint import load_checkpoint, write_atomically
from detr_fast.engine.config import Config
from detr_fast.engine.distributed import SharedFlag, processes
from detr_fast.engine.errors import CheckpointError, ConfigError, Interrupted
from detr_fast.engine.evaluate import Evaluation, evaluate
from detr_fast.engine.loaders import naming_faults
from detr_fast.engine.log import duration
from detr_fast.engine.run import LAST, Run, build_run, learns_from_nothing
from detr_fast.engine.step import check_finite, training_step


def train(config: Config, resume: str | Path | None = None) -> Path:
    """Trains and returns the folder of the run.

    Args:
        config: all settings; its ``train.output`` is where everything is written.
        resume: a run's folder or ``last.pth`` to continue; the settings may differ from those it was started with.

    Raises:
        ConfigError, DataFault, CheckpointError: something given cannot be used.
        TrainingError: the loss or a gradient was not finite.
        Interrupted: SIGTERM or SIGINT came; the run was saved first.
    """
    with processes(config.train.device) as joined:
        path = find_checkpoint(resume) if resume else None
        folder = joined.broadcast(_choose_folder(config, path))
        config = config.with_overrides({"train.output": str(folder)})
        state = load_checkpoint(path) if path else None
        run = build_run(config, joined, folder, resumed=state is not None)
        if state is not None and path is not None:
            run.restore(state, path)
        if joined.is_main:
            folder.mkdir(parents=True, exist_ok=True)
        # Also of a new run: one that died before its first checkpoint may have left lines behind.
        run.log.rewind(run.place.step, run.place.epoch)
        if joined.is_main:
            write_atomically(folder / "config.json", _json(config.to_dict()))
        _introduce(run, path)
        try:
            with _caught_signals(SharedFlag(joined)) as stop:
                _epochs(run, stop)
        finally:
            run.log.close()
            run.leave()
    return folder


def find_checkpoint(path: str | Path) -> Path:
    """``last.pth`` of a run's folder, or the file itself; ``latest`` is that of the newest folder in ``runs``."""
    if path == "latest":
        runs = sorted(Path("runs").glob(f"*/{LAST}"), key=lambda file: file.stat().st_mtime)
        if not runs:
            raise CheckpointError(f"no run to continue: there is no runs/*/{LAST} here; give its folder")
        return runs[-1]
    path = Path(path)
    found = path / LAST if path.is_dir() else path
    if not found.is_file():
        raise CheckpointError(f"checkpoint {found} does not exist")
    return found


def settings_of_run(checkpoint: Path) -> Config:
    """The settings a checkpoint was trained with, as ``config.json`` beside it says them, or itself."""
    file = checkpoint.parent / "config.json"
    return Config.load(file) if file.exists() else Config.from_dict(load_checkpoint(checkpoint)["config"])


def _choose_folder(config: Config, checkpoint: Path | None) -> Path:
    """The folder of the run; a new run does not overwrite an old one."""
    if checkpoint is not None:
        folder = Path(config.train.output or checkpoint.parent).absolute()
        if folder.resolve() != checkpoint.parent.resolve() and (folder / LAST).exists():
            raise ConfigError(
                f"train.output: {folder} holds another run than {checkpoint}, which is to be continued; "
                "choose another folder, or none to continue where it is"
            )
        return folder
    if not config.train.output:
        return Path("runs", f"{config.model.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}").absolute()
    folder = Path(config.train.output).absolute()
    if (folder / LAST).exists():
        raise ConfigError(
            f"train.output: {folder} holds a run already; continue it with --resume {folder} or choose another"
        )
    return folder


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _introduce(run: Run, resumed: Path | None) -> None:
    """Says what is about to be trained."""
    say, data = run.log.say, run.loader.dataset
    say(f"train      {data.summary()}")
    if run.evaluation is not None:
        say(f"evaluate   {run.evaluation.summary()}")
    count = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    say(f"model      {run.config.model.name}, {count:,} parameters, {trained:,} of them trained")
    for group in run.optimizer.param_groups:
        size = sum(p.numel() for p in group["params"])
        say(f"optimizer  {group['name']}: {size:,} parameters, learning rate {group['initial_lr']:g}")
    precision = str(run.precision).removeprefix("torch.")
    say(f"device     {run.device}, {precision}, {run.processes.count} process(es)")
    place = f", continuing {resumed} after step {run.place.step}" if resumed else ""
    say(f"run        {run.folder}{place}")
    if resumed is None and learns_from_nothing(run.config, run.model):
        say(
            f"warning    {run.config.model.name} has the constant norms and the constant stem of a published backbone, "
            "which do not learn: give model.weights or model.backbone_weights, or train detr_small from nothing"
        )
    if run.place.epoch >= run.config.train.epochs:
        say(f"done       all {run.config.train.epochs} epochs are trained; more with --train.epochs=N")


@contextlib.contextmanager
def _caught_signals(flag: SharedFlag) -> Iterator[SharedFlag]:
    """SIGTERM and the first SIGINT set the flag; a second SIGINT interrupts at once."""

    def catch(number: int, frame: Any) -> None:
        if flag.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.is_set, flag.signal_number = True, number

    try:
        before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: signals are someone else's
        yield flag
        return
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _epochs(run: Run, stop: SharedFlag) -> None:
    while run.place.epoch < run.config.train.epochs:
        started = time.monotonic() - run.place.seconds
        waited = _steps(run, stop, started)
        run.place.seconds = time.monotonic() - started
        run.save()
        result = _evaluate(run, stop)
        _finish_epoch(run, result, waited)
        run.save()
        if stop.agree():
            raise Interrupted(stop.signal_number, run.folder / LAST)


def _steps(run: Run, stop: SharedFlag, started: float) -> float:
    """The rest of the epoch; returns the seconds in which the model waited for data."""
    config, place = run.config.train, run.place
    recent: dict[int, tuple[int, ...]] = {}  # image ids of the steps whose losses were not read yet
    clock = _Clock()
    bar = _progress(run)
    if place.batch < run.loader.batches:
        batches = naming_faults(run.loader.start(place.epoch, place.batch))
        for batch in clock.timed(batches):
            recent[place.step] = batch.image_ids
            training_step(run, batch)
            place.step += 1
            place.batch += 1
            clock.images += len(batch) * run.processes.count
            bar.update()
            if place.step % config.log_steps == 0:
                bar.set_postfix(loss=f"{_log_interval(run, recent, clock):.3f}", refresh=False)
            should_stop = stop.exchange()
            is_due = bool(config.checkpoint_steps) and place.step % config.checkpoint_steps == 0
            if should_stop or (is_due and place.batch < run.loader.batches):
                place.seconds = time.monotonic() - started
                check_finite(run, recent)
                run.save()
            if should_stop:
                bar.close()
                raise Interrupted(stop.signal_number, run.folder / LAST)
    bar.close()
    check_finite(run, recent)
    return clock.all_waited


def _progress(run: Run) -> tqdm[Any]:
    """A bar of the epoch, where there is a terminal."""
    return tqdm(
        total=run.loader.batches,
        initial=run.place.batch,
        desc=f"epoch {run.place.epoch + 1}/{run.config.train.epochs}",
        unit="batch",
        leave=False,
        disable=None if run.processes.is_main else True,
    )


class _Clock:
    """Rate of images and time spent waiting for data since the last line of the log."""

    def __init__(self) -> None:
        self.started, self.waited, self.all_waited, self.images = time.monotonic(), 0.0, 0.0, 0

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            before = time.monotonic()
            batch = next(batches, None)
            waited = time.monotonic() - before
            self.waited += waited
            self.all_waited += waited
            if batch is None:
                return
            yield batch

    def read(self) -> dict[str, float]:
        elapsed = max(time.monotonic() - self.started, 1e-9)
        values = {"images_per_second": self.images / elapsed, "data_share": self.waited / elapsed}
        self.started, self.waited, self.images = time.monotonic(), 0.0, 0
        return values


def _log_interval(run: Run, recent: dict[int, tuple[int, ...]], clock: _Clock) -> float:
    """Writes the means since the last line; returns the loss."""
    check_finite(run, recent)
    recent.clear()
    means = run.sums.read("interval", run.processes)
    run.sums.clear("interval")
    rates = {f"learning_rate_{group['name']}": group["lr"] for group in run.optimizer.param_groups}
    if (skipped := run.criterion.matcher_report()) is not None:
        run.log.say(f"step {run.place.step}: left out of the matching: {skipped}")
    memory = {}
    if run.device.type == "cuda":
        memory["memory_gib"] = torch.cuda.max_memory_allocated(run.device) / 2**30
    run.log.write("step", run.place.step, run.place.epoch, {**means, **rates, **clock.read(), **memory})
    return means["loss"]


def _evaluate(run: Run, stop: SharedFlag) -> Evaluation | None:
    """Evaluates if this epoch is to be; a signal ends it, and the resumed run starts it again."""
    every, epoch = run.config.evaluate.every, run.place.epoch
    is_last = epoch + 1 == run.config.train.epochs
    if run.evaluation is None or not (is_last or (epoch + 1) % every == 0):
        return None
    run.share_buffers()
    result = evaluate(
        run.model,
        run.evaluation,
        batch_size=run.config.evaluate.batch_size,
        workers=run.config.data.workers,
        processes=run.processes,
        precision=run.precision,
        should_stop=lambda: stop.is_set,
        progress=run.processes.is_main,
    )
    if result is None:
        stop.agree()
        raise Interrupted(stop.signal_number, run.folder / LAST)
    return result


def _finish_epoch(run: Run, result: Evaluation | None, waited: float) -> None:
    """Logs the epoch, keeps the best weights and moves on to the next."""
    place, config = run.place, run.config
    means = run.sums.read("epoch", run.processes)
    numbers = result.numbers if result is not None else {}
    extra = {"seconds": place.seconds, "data_seconds": waited}
    run.log.write("epoch", place.step, place.epoch, {**means, **numbers, **extra})
    left = duration(place.seconds * (config.train.epochs - place.epoch - 1))
    shown = f"  AP {numbers['AP']:.3f}  AP50 {numbers['AP50']:.3f}" if numbers else ""
    rate = run.loader.batches * config.train.batch_size * run.processes.count / max(place.seconds, 1e-9)
    run.log.say(
        f"epoch {place.epoch + 1}/{config.train.epochs}  loss {means['loss']:.3f}{shown}  "
        f"{rate:.1f} images/s  {duration(place.seconds)}  {left} left"
    )
    if result is not None:
        place.best_ap, place.best_epoch, is_best = _best(place.best_ap, place.best_epoch, result, place.epoch)
        if run.processes.is_main:
            write_atomically(run.folder / "evaluation.json", _json(result.to_dict() | {"epoch": place.epoch}))
        if is_best:
            run.save_best()
    run.sums.clear("epoch")
    place.epoch, place.batch, place.seconds = place.epoch + 1, 0, 0.0
    run.loader.sampler.set_epoch(place.epoch)


def _best(best_ap: float, best_epoch: int, result: Evaluation, epoch: int) -> tuple[float, int, bool]:
    ap = result.numbers["AP"]
    if best_epoch < 0 or ap > best_ap:
        return ap, epoch, True
    return best_ap, best_epoch, False
