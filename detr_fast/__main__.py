"""The command line: ``detr-fast`` or ``python -m detr_fast``.

Exit codes: 0 done, 1 done but a check failed (``demo``, ``check-data``, ``doctor``), 2 an error of the user or the
data, 128 + the signal's number when a signal ended a training run after it was saved (143 SIGTERM, 130 Ctrl-C).
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from detr_fast.engine.config import Config, flat, read_settings, settings, split_overrides
from detr_fast.engine.errors import ConfigError, EngineError, Interrupted
from detr_fast.engine.output import check_file, make_folder

if TYPE_CHECKING:
    from detr_fast.engine.predict import Detector

Overrides = Sequence[tuple[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        overrides, words = split_overrides(words)
        arguments, unknown = _parser().parse_known_args(words)
        if unknown:
            raise ConfigError(f"unknown argument {unknown[0]}{arguments.parser.nearest(unknown[0])}")
        return int(arguments.run(arguments, overrides))
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("detr-fast: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if show_traceback or not isinstance(error, (EngineError, OSError, ValueError)):
            traceback.print_exc()
            return 2
        print(f"detr-fast: error: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """Errors are one line, as all others are; what is slow to put together is only asked for by ``--help``."""

    more: Callable[[], str] | None = None

    def format_help(self) -> str:
        return super().format_help() + (self.more() if self.more is not None else "")

    def nearest(self, word: str) -> str:
        """``; did you mean --X?`` for an option that is none, where one of this command looks like it."""
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        own = {option.lstrip("-"): option for option in self._option_string_actions}
        close = [own[found] for found in difflib.get_close_matches(name.replace("_", "-"), own, n=1, cutoff=0.6)]
        if self.more is not None:  # a setting without its section
            close += [f"--{key}" for key in settings() if key.split(".")[1] == name]
        return f"; did you mean {close[0]}?" if close and word.startswith("-") else ""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="detr-fast",
        description="Trains, evaluates and uses DETR on COCO-format data.",
        epilog="example:\n  detr-fast demo\nevery command: --help, and --traceback to see where an error comes from",
        formatter_class=plain,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, meaning: str, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=meaning, description=meaning, epilog=example, formatter_class=plain, allow_abbrev=False
        )
        added.set_defaults(run=run, parser=added)
        return added

    _add_train(command)
    _add_evaluate(command)
    _add_predict(command)
    check = command(
        "check-data",
        _check_data,
        "Summarises a data set and lists every fault.",
        "example:\n  detr-fast check-data DATA",
    )
    check.add_argument("path", metavar="DATA", nargs="?", help="a COCO-format data set; see train for data.*")
    _add_shard(command)
    demo = command(
        "demo",
        _demo,
        "Trains a small DETR on generated shapes and writes report.html (at most 5 minutes on 2 cores).",
        "example:\n  detr-fast demo --output runs/demo\nexit code 1 if AP50 on held-out shapes is below 0.5",
    )
    demo.add_argument("--output", metavar="FOLDER", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    report = command(
        "report",
        _report,
        "Writes a run's curves, numbers, predictions and attention as one HTML file.",
        "example:\n  detr-fast report runs/first",
    )
    report.add_argument("folder", metavar="RUN", type=Path, help="folder of a run that was evaluated")
    report.add_argument("--data", metavar="DATA", help="where the data set lies now, if it was moved")
    report.add_argument("--output", metavar="FILE", type=Path, help="default: RUN/report.html")
    doctor = command(
        "doctor",
        _doctor,
        "Tries everything on this machine: installation, native kernels, code bases before and after (half a minute).",
        "examples:\n  detr-fast doctor\n  detr-fast doctor --quick --json doctor.json\n"
        "exit code 1 if the native library cannot be used or something computes other numbers than it must",
    )
    doctor.add_argument("--quick", action="store_true", help="do not time the code bases")
    doctor.add_argument("--json", metavar="FILE", type=Path, help="also write everything to a file")
    command("version", _version, "Prints the version.", "example:\n  detr-fast version")
    return parser


def _add_train(command: Any) -> None:
    example = (
        "examples:\n"
        "  detr-fast train DATA --model.name=detr_small --train.epochs=50 --train.output=runs/first\n"
        "  detr-fast train DATA --model.weights=detr-r50-e632da11.pth --model.new-classes=true\n"
        "  detr-fast train --resume runs/first\n"
        "  torchrun --nproc-per-node 2 -m detr_fast train DATA --model.name=detr_small --train.output=runs/two"
    )
    train = command("train", _train, "Trains on a COCO-format data set.", example)
    train.more = _help_of_settings
    train.add_argument("path", metavar="DATA", nargs="?", help="a COCO-format data set, folder or URL; sets data.path")
    train.add_argument("--config", metavar="FILE", type=Path, help="settings from a .json or .toml file")
    train.add_argument(
        "--profile",
        action="store_true",
        help="write a trace of ten steps and a table of what each part costs to profile/ in the run's folder",
    )
    train.add_argument(
        "--resume",
        metavar="RUN",
        nargs="?",
        const="",
        help="continue a run's folder or checkpoint bit for bit; without a value that of train.output, or the "
        "latest in runs; auto: continue the newest whole checkpoint of train.output if there is one, else start",
    )


def _help_of_settings() -> str:
    from detr_fast.engine.describe import describe_models, describe_settings

    lead = "\nsettings, each as --section.name=value (dashes for underscores, lists separated by commas):\n\n"
    return f"{lead}{describe_settings()}\n\n{describe_models()}\n"


def _add_evaluate(command: Any) -> None:
    evaluate = command(
        "evaluate",
        _evaluate,
        "Prints the 12 COCO numbers and the average precision of every class.",
        "examples:\n  detr-fast evaluate runs/first/best.pth DATA --json numbers.json\n"
        "  detr-fast evaluate detr-r50-e632da11.pth COCO --model.name=detr_resnet50 --data.published-ids=true",
    )
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="file, or the folder of a run")
    evaluate.add_argument("path", metavar="DATA", help="a COCO-format data set, folder or URL")
    evaluate.add_argument("--split", default=None, help="default: data.evaluation_split, val")
    evaluate.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers to a file")
    evaluate.add_argument("--detections", metavar="FILE", type=Path, help="also write all detections, COCO's format")


def _add_predict(command: Any) -> None:
    predict = command(
        "predict",
        _predict,
        "Detects objects in images; writes predictions.json and the images with boxes drawn.",
        "example:\n  detr-fast predict runs/first/best.pth photos/ 'more/*.jpg' --output found --threshold 0.7",
    )
    predict.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="file, or the folder of a run")
    predict.add_argument("images", metavar="IMAGES", nargs="+", help="files, folders or patterns")
    predict.add_argument(
        "--output", metavar="FOLDER", type=Path, default=Path("predictions"), help="default: predictions"
    )
    predict.add_argument("--threshold", metavar="SCORE", type=float, default=0.5, help="least score, default: 0.5")
    predict.add_argument("--skip-faults", action="store_true", help="leave out unreadable images instead of stopping")


def _add_shard(command: Any) -> None:
    shard = command(
        "shard",
        _shard,
        "Writes a data set as tar files (shards) that are read where they lie: a folder, or a URL that fsspec reaches.",
        "examples:\n  detr-fast shard DATA SHARDS\n  detr-fast shard DATA s3://bucket/coco --split train2017\n"
        "  detr-fast train s3://bucket/coco\n"
        "a conversion that was interrupted goes on when it is called again; s3:// needs s3fs, http:// aiohttp",
    )
    shard.add_argument("path", metavar="DATA", help="a COCO-format data set, folder or URL")
    shard.add_argument("output", metavar="OUTPUT", help="folder or URL to write to")
    shard.add_argument("--split", help="default: every split")
    shard.add_argument("--name", help="what to call the split in OUTPUT; default: as it is called in DATA")
    shard.add_argument("--images-per-shard", metavar="COUNT", type=int, default=1000, help="default: 1000")
    shard.add_argument("--skip-faults", action="store_true", help="leave out what cannot be used instead of stopping")


def _train(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from detr_fast.engine.resume import find_checkpoint, newest_whole, settings_of_run
    from detr_fast.engine.train import train

    if arguments.config and not arguments.config.is_file():
        raise ConfigError(f"--config must be a file of settings, there is none at {arguments.config}")
    profile = [("train.profile_steps", "10")] if arguments.profile else []
    given = [*profile, *overrides, *([("data.path", _absolute(arguments.path))] if arguments.path else [])]
    output = dict(given).get("train.output", "")
    resume = arguments.resume
    if resume == "auto":
        if not output:
            raise ConfigError("--resume auto needs --train.output=FOLDER")
        resume, damage = newest_whole(Path(output))
        if damage:
            print(f"detr-fast: {damage}; continuing {resume}", file=sys.stderr)
    elif resume == "":
        resume = output or "latest"
    if resume is None:
        config = Config()
    else:
        resume = find_checkpoint(resume)
        # The folder it lies in now; a run that was copied or moved leaves the one it came from alone.
        config = settings_of_run(resume).with_overrides({"train.output": str(resume.parent.absolute())})
    if arguments.config:
        config = config.with_overrides(flat(read_settings(arguments.config)))
    config = config.with_overrides(given)
    if not config.data.path and not config.data.train_annotations:
        raise ConfigError("train needs the folder of a data set: detr-fast train DATA")
    try:
        train(config, resume)
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"detr-fast: {stop}", file=sys.stderr)
        return 128 + stop.signal_number
    return 0


def _absolute(path: str) -> str:
    """A run may be continued from another folder; a URL is the same everywhere."""
    return path if "://" in path else str(Path(path).absolute())


def _evaluate(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from detr_fast.engine.distributed import processes
    from detr_fast.engine.evaluate import evaluate
    from detr_fast.engine.loaders import evaluation_dataset
    from detr_fast.files import write_atomically

    check_file("--json", arguments.json)  # known before everything is evaluated
    check_file("--detections", arguments.detections)
    detector, config = _load(arguments.checkpoint, overrides)
    split = [("data.evaluation_split", arguments.split)] if arguments.split else []
    # Where the training data lay is no property of the model.
    forgotten = [(f"data.{name}_{what}", "") for name in ("train", "evaluation") for what in ("images", "annotations")]
    config = config.with_overrides([*forgotten, ("data.path", arguments.path), *overrides, *split])
    # Where it was trained is no property of the model either.
    with processes(_device(overrides)) as joined:
        detector.to(joined.device)
        dataset = evaluation_dataset(config.data, detector.categories)
        found = evaluate(
            detector.model,
            dataset,
            batch_size=config.evaluate.batch_size,
            workers=config.data.workers,
            processes=joined,
            progress=joined.is_main,
        )
        if found is not None and joined.is_main:
            print(found)
            if arguments.json:
                write_atomically(arguments.json, json.dumps(found.to_dict(), indent=2) + "\n")
            if arguments.detections:
                write_atomically(arguments.detections, json.dumps(found.detections))
    return 0


def _load(checkpoint: Path, overrides: Overrides) -> tuple[Detector, Config]:
    """A detector and the settings it was trained with; of a published checkpoint those that the command line gives."""
    from detr_fast.engine.predict import load_detector

    return load_detector(checkpoint, overrides, _device(overrides))


def _device(overrides: Overrides) -> str:
    return dict(overrides).get("train.device", "auto")


def _predict(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from detr_fast.data.faults import DataFault
    from detr_fast.engine.pictures import distinct_names, find_pictures
    from detr_fast.engine.predict import check_threshold
    from detr_fast.files import write_atomically

    check_threshold(arguments.threshold, "--threshold")
    files = find_pictures(arguments.images)
    detector, _ = _load(arguments.checkpoint, overrides)
    make_folder("--output", arguments.output)
    names = distinct_names(files)
    found: dict[str, Any] = {}
    skipped = 0
    for file in files:
        try:
            detections = detector.predict(file, arguments.threshold)[0]
        except DataFault as fault:
            if not arguments.skip_faults:
                raise
            print(f"detr-fast: skipped: {fault}", file=sys.stderr)
            skipped += 1
            continue
        found[str(file)] = detections.to_dict()
        detections.draw(file).save(arguments.output / names[file])
        print(f"{file}: {len(detections)} objects")
    write_atomically(arguments.output / "predictions.json", json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} images, {skipped} skipped; written to {arguments.output}")
    return 0


def _check_data(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from detr_fast.data.check import check_data, check_splits
    from detr_fast.data.layouts import find_split

    _accept_settings("check-data", overrides, "data.")
    data = Config().with_overrides(overrides).data
    path = arguments.path or data.path or None
    names = ("train_split", "evaluation_split", "train_images", "train_annotations")
    layout = {f"data.{name}" for name in (*names, "evaluation_images", "evaluation_annotations")}
    if not layout & dict(overrides).keys():
        if path is None:
            raise ConfigError("check-data needs the folder of a data set: detr-fast check-data DATA")
        report = check_data(path)
    else:
        splits = {
            data.train_split: (data.train_images, data.train_annotations),
            data.evaluation_split: (data.evaluation_images, data.evaluation_annotations),
        }
        found = {
            split: find_split(path, split, images=images or None, annotations=annotations or None)
            for split, (images, annotations) in splits.items()
            if path is not None or annotations
        }
        report = check_splits(path or ", ".join(str(paths.annotations) for paths in found.values()), found)
    print(report)
    return 1 if report.faults else 0


def _shard(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from detr_fast.data.layouts import find_split, find_splits
    from detr_fast.data.remote import as_path
    from detr_fast.data.shard_writer import SPLIT_NAME, check_arguments, write_shards

    _accept_settings("shard", overrides)
    if arguments.images_per_shard < 1:
        raise ConfigError(f"--images-per-shard must be at least 1, got {arguments.images_per_shard}")
    split = arguments.split
    if arguments.name and not split:
        raise ConfigError("--name goes with --split, which says whose name it is")
    found = {split: find_split(arguments.path, split)} if split else find_splits(arguments.path)
    named = {arguments.name or name: paths for name, paths in found.items()}
    for name, paths in named.items():
        if not SPLIT_NAME.fullmatch(name):
            raise ConfigError(
                f"split {name!r}: shards can only be called with letters, digits, '_' and '-'; give it another name: "
                f"--split {split or name!r} --name NAME"
            )
        check_arguments(paths, arguments.output, name)
    if isinstance(destination := as_path(arguments.output), Path):
        make_folder("OUTPUT", destination)
    for name, paths in named.items():
        written = write_shards(
            paths,
            arguments.output,
            name,
            images_per_shard=arguments.images_per_shard,
            on_fault="skip" if arguments.skip_faults else "raise",
            progress=True,
        )
        for fault in written.faults:
            print(f"detr-fast: left out: {fault}", file=sys.stderr)
        print(written)
    print(f"written to {arguments.output}")
    return 0


def _demo(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from detr_fast.engine.demo import demo

    return demo(arguments.output, overrides)


def _accept_settings(command: str, overrides: Overrides, section: str | None = None) -> None:
    """Refuses settings that a command would not look at."""
    for key, _ in overrides:
        if section is None or not key.startswith(section):
            accepted = "no settings" if section is None else f"settings {section}NAME only"
            raise ConfigError(f"{command} takes {accepted}, got --{key}")


def _report(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from detr_fast.engine.report import write_report

    _accept_settings("report", overrides)
    check_file("--output", arguments.output)
    path = arguments.output or arguments.folder / "report.html"
    print(write_report(arguments.folder, path, arguments.data))
    return 0


def _doctor(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from detr_fast.doctor import doctor

    _accept_settings("doctor", overrides)
    check_file("--json", arguments.json)  # known before everything is tried
    return doctor(arguments.quick, arguments.json)


def _version(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from importlib.metadata import PackageNotFoundError, version

    _accept_settings("version", overrides)
    try:
        print(f"detr_fast {version('detr_fast')}")
    except PackageNotFoundError:
        print("detr_fast (not installed)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
