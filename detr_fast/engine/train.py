"""The training loop: from settings to a folder with checkpoints, logs and evaluations.

A step reads nothing back from the device: losses are summed there and read when they are logged.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from detr_fast.data.batch import Batch
from detr_fast.engine.build import build_run, learns_from_nothing
from detr_fast.engine.checkpoint import LAST
from detr_fast.engine.config import Config, changed_settings
from detr_fast.engine.distributed import SharedFlag, caught_signals, processes
from detr_fast.engine.errors import Interrupted, TrainingError
from detr_fast.engine.evaluate import Evaluation, evaluate
from detr_fast.engine.loaders import naming_faults
from detr_fast.engine.log import duration
from detr_fast.engine.optimizer import learning_rate_factor, set_learning_rates
from detr_fast.engine.output import make_folder
from detr_fast.engine.profile import Profile
from detr_fast.engine.rates import Rates, rates_text
from detr_fast.engine.resume import choose_folder, find_checkpoint, load_to_continue
from detr_fast.engine.run import Run
from detr_fast.engine.speed import arithmetic, compilations
from detr_fast.files import remove_parts, write_atomically


def train(config: Config, resume: str | Path | None = None) -> Path:
    """Trains and returns the folder of the run.

    Args:
        config: all settings; its ``train.output`` is where everything is written.
        resume: a run's folder or ``last.pth`` to continue; the settings may differ from those it was started with.

    Raises:
        ConfigError, DataFault, CheckpointError: something given cannot be used, or a checkpoint cannot be written.
        TrainingError: too many steps in a row were not finite.
        LostContact: another process ended or does not answer.
        Interrupted: SIGTERM or SIGINT came; the run was saved first.
    """
    with (
        processes(config.train.device, config.distributed.timeout_seconds) as joined,
        arithmetic(config.speed.tf32, config.train.deterministic),
        compilations(config.speed),
    ):
        path = find_checkpoint(resume) if resume else None
        folder = joined.broadcast(choose_folder(config, path))
        profile_steps = config.train.profile_steps
        # A profile is of this start; the settings that are kept must not repeat it with every --resume.
        config = config.with_overrides({"train.output": str(folder), "train.profile_steps": 0})
        state = load_to_continue(path, joined) if path else None
        run = build_run(config, joined, folder, resumed=state is not None)
        if state is not None and path is not None:
            run.restore(state, path)
        if joined.is_main:
            make_folder("train.output", folder)
            remove_parts(folder)
        # Also of a new run: one that died before its first checkpoint may have left lines behind.
        run.log.rewind(run.place.step, run.place.epoch)
        if joined.is_main:
            write_atomically(folder / "config.json", _json(config.to_dict()))
        _introduce(run, path)
        if state is not None:
            _say_changes(run, Config.from_dict(state["config"]))
        try:
            with caught_signals(SharedFlag(joined)) as stop, Profile(run, profile_steps) as profile:
                _epochs(run, stop, profile)
        finally:
            run.log.close()
            run.leave()
    return folder


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _introduce(run: Run, resumed: Path | None) -> None:
    """Says what is about to be trained."""
    say, data, config = run.log.say, run.loader.dataset, run.config
    say(f"train      {data.summary()}")
    if run.evaluation is not None:
        say(f"evaluate   {run.evaluation.summary()}")
    count = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    say(f"model      {config.model.name}, {count:,} parameters, {trained:,} of them trained")
    if resumed is None and config.model.weights:
        fresh = ", class layer new" if config.model.new_classes else ""
        say(f"weights    {config.model.weights}{fresh}")
    for group in run.optimizer.param_groups:
        size = sum(p.numel() for p in group["params"])
        say(f"optimizer  {group['name']}: {size:,} parameters, learning rate {group['initial_lr']:g}")
    precision = str(run.precision).removeprefix("torch.")
    say(f"device     {run.device}, {precision}, {run.processes.count} process(es), {run.images_of_step} images a step")
    place = f", continuing {resumed} after step {run.place.step}" if resumed else ""
    say(f"run        {run.folder}{place}")
    if resumed is None and learns_from_nothing(config, run.model):
        say(
            f"warning    {config.model.name} has the constant norms and the constant stem of a published backbone, "
            "which do not learn: give model.weights or model.backbone_weights, or train detr_small from nothing"
        )
    if run.place.epoch >= config.train.epochs:
        say(f"done       all {config.train.epochs} epochs are trained; more with --train.epochs=N")


def _say_changes(run: Run, saved: Config) -> None:
    """Says which settings are others than those that the checkpoint was trained with."""
    for key, (before, now) in changed_settings(saved, run.config).items():
        if key not in ("train.output", "train.profile_steps"):  # of each start
            run.log.say(f"changed    {key} {before} -> {now}")


def _epochs(run: Run, stop: SharedFlag, profile: Profile) -> None:
    while run.place.epoch < run.config.train.epochs and not _is_stale(run):
        started = time.monotonic() - run.place.seconds
        rates = _steps(run, stop, started, profile)
        run.place.seconds = time.monotonic() - started
        result = None
        if _is_evaluated(run):
            run.save()  # a signal ends an evaluation, and the resumed run starts it again
            result = _evaluate(run, stop)
        _finish_epoch(run, result, rates)
        run.save()
        if stop.agree():
            raise Interrupted(stop.signal_number, run.folder / LAST)


def _is_stale(run: Run) -> bool:
    patience, place = run.config.train.patience, run.place
    if not patience or place.stale < patience:
        return False
    run.log.say(
        f"stopped    no better AP than {place.best_ap:.3f} of epoch {place.best_epoch + 1} in {place.stale} evaluations"
    )
    return True


def _steps(run: Run, stop: SharedFlag, started: float, profile: Profile) -> dict[str, float]:
    """The rest of the epoch; returns its rates."""
    config, place = run.config.train, run.place
    recent: dict[int, tuple[int, ...]] = {}  # image ids of the steps that were not looked at yet
    rates = Rates(run.device)
    with _progress(run) as bar:
        for batches in _grouped(run, rates):
            recent[place.step] = tuple(image for batch in batches for image in batch.image_ids)
            _step(run, batches)
            for batch in batches:
                rates.add(batch, len(batch) * run.processes.count)
            bar.update()
            profile.step()
            if place.step % config.log_steps == 0:
                bar.set_postfix_str(_log_interval(run, recent, rates), refresh=False)
            should_stop = stop.exchange()
            is_due = bool(config.checkpoint_steps) and place.step % config.checkpoint_steps == 0
            if should_stop or (is_due and run.loader.batches_left(place.images)):
                place.seconds = time.monotonic() - started
                report_skipped(run, recent)
                run.save()
            if should_stop:
                raise Interrupted(stop.signal_number, run.folder / LAST)
    report_skipped(run, recent)
    return rates.of_epoch()


def _grouped(run: Run, rates: Rates) -> Iterator[list[Batch]]:
    """The batches of one step after the other, from where the epoch stands."""
    if run.loader.batches_left(run.place.images) == 0:
        return
    batches = rates.timed(naming_faults(run.loader.start(run.place.epoch, run.place.images)))
    while group := list(islice(batches, run.config.train.accumulate)):
        yield group


def _step(run: Run, batches: list[Batch]) -> None:
    place = run.place
    set_learning_rates(run.optimizer, learning_rate_factor(run.config.schedule, place.step, place.epoch))
    result = run.step(batches)
    run.sums.add(result.losses, result.was_skipped)
    run.skipped.add(result, place.step)
    if run.average is not None:
        run.average.update(place.step, result.was_skipped)
    place.step += 1
    place.images += run.images_of_step


def _progress(run: Run) -> tqdm[Any]:
    """A bar of the epoch, where there is a terminal."""
    accumulate, batches = run.config.train.accumulate, run.loader.batches
    done = batches - run.loader.batches_left(run.place.images)
    return tqdm(
        total=batches // accumulate,
        initial=done // accumulate,
        desc=f"epoch {run.place.epoch + 1}/{run.config.train.epochs}",
        unit="step",
        leave=False,
        disable=None if run.processes.is_main else True,
    )


def _log_interval(run: Run, recent: dict[int, tuple[int, ...]], rates: Rates) -> str:
    """Writes the means since the last line; returns what the terminal shows of it."""
    report_skipped(run, recent)
    means = run.sums.read("interval", run.processes)
    run.sums.clear("interval")
    factor = learning_rate_factor(run.config.schedule, run.place.step - 1, run.place.epoch)
    learning = {f"learning_rate_{g['name']}": g["initial_lr"] * factor for g in run.optimizer.param_groups}
    if (unmatched := run.criterion.matcher_report()) is not None:
        run.log.say(f"step {run.place.step}: left out of the matching: {unmatched}")
    measured = rates.read()
    values = {**means, **learning, **measured, **_matching(run), "skipped": run.skipped.total}
    run.log.write("step", run.place.step, run.place.epoch, values)
    return f"loss {means.get('loss', float('nan')):.3f}, {rates_text(measured)}"


def _matching(run: Run) -> dict[str, float]:
    """How this process's latest batch was matched: see MatchingDiagnostics. Waits for the device."""
    diagnostics = run.criterion.diagnostics()
    if diagnostics is None:
        return {}
    found = diagnostics.as_dict()
    for image, terms in found["forbidden"].items():
        counted = ", ".join(f"{count} by their {term} cost" for term, count in terms.items())
        run.log.say(f"step {run.place.step}: pairs of image {image} of the batch that cannot match: {counted}")
    changed = found["changed"]
    return {
        "matching_changed": sum(changed) / len(changed) if changed else 0.0,
        "matching_dropped": found["dropped"],
        **{f"matching_cost_{term}": layers[-1] for term, layers in found["cost"].items()},
    }


def report_skipped(run: Run, recent: dict[int, tuple[int, ...]]) -> None:
    """Says which of the ``recent`` steps were left out, and why. Waits for the device; all processes must call.

    Raises:
        TrainingError: more than ``train.most_skipped`` in a row were.
    """
    skipped = run.skipped.read(recent, run.processes)
    recent.clear()
    if skipped is None:
        return
    where = f"epoch {run.place.epoch + 1}"
    for reason in skipped.reasons:
        run.log.say(f"left out   {where}, {reason}")
    if skipped.count > len(skipped.reasons):
        run.log.say(f"left out   {where}, and {skipped.count - len(skipped.reasons)} more steps")
    if skipped.longest > run.config.train.most_skipped:
        good = f"last good checkpoint: {run.last_good}" if run.last_good else "there is no checkpoint yet"
        raise TrainingError(
            f"{where}: {skipped.longest} steps in a row were not finite and changed nothing, more than "
            f"train.most_skipped={run.config.train.most_skipped}; {skipped.reasons[0]}; {good}"
        )


def _is_evaluated(run: Run) -> bool:
    every, epoch = run.config.evaluate.every, run.place.epoch
    is_last = epoch + 1 == run.config.train.epochs
    return run.evaluation is not None and (is_last or (epoch + 1) % every == 0)


def _evaluate(run: Run, stop: SharedFlag) -> Evaluation:
    """Evaluates; a signal interrupts it."""
    run.share_buffers()
    result = evaluate(
        run.evaluated,
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


def _finish_epoch(run: Run, result: Evaluation | None, rates: dict[str, float]) -> None:
    """Logs the epoch, keeps the best weights and moves on to the next."""
    place, config = run.place, run.config
    means = run.sums.read("epoch", run.processes)
    numbers = result.numbers if result is not None else {}
    run.log.write("epoch", place.step, place.epoch, {**means, **numbers, **rates, "seconds": place.seconds})
    left = duration(place.seconds * (config.train.epochs - place.epoch - 1))
    shown = f"  AP {numbers['AP']:.3f}  AP50 {numbers['AP50']:.3f}" if numbers else ""
    run.log.say(
        f"epoch {place.epoch + 1}/{config.train.epochs}  loss {means.get('loss', float('nan')):.3f}{shown}  "
        f"{rates_text(rates)}  {duration(place.seconds)}  {left} left"
    )
    if result is not None:
        is_best = place.best_epoch < 0 or numbers["AP"] > place.best_ap
        place.stale = 0 if is_best else place.stale + 1
        if is_best:
            place.best_ap, place.best_epoch = numbers["AP"], place.epoch
        if run.processes.is_main:
            write_atomically(run.folder / "evaluation.json", _json(result.to_dict() | {"epoch": place.epoch}))
        if is_best:
            run.save_best()
    run.sums.clear("epoch")
    place.epoch, place.images, place.seconds = place.epoch + 1, 0, 0.0
    run.loader.sampler.set_epoch(place.epoch)
