"""The command line from end to end, on a generated data set of a few small images."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from detr_fast.__main__ import main
from detr_fast.data.shapes import write_shapes
from detr_fast.engine import output
from detr_fast.engine.checkpoint import load_checkpoint, save_checkpoint

SMALLEST = [
    *("--model.name=detr_tiny", "--model.num-queries=8", "--model.hidden-dim=32", "--model.nheads=2"),
    *("--model.enc-layers=1", "--model.dec-layers=2", "--model.dim-feedforward=32", "--data.scales=64"),
    *("--data.evaluation-size=64", "--data.workers=0", "--train.log-steps=1", "--train.tensorboard=no"),
    *("--train.device=cpu", "--evaluate.batch-size=5"),
]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", {"train": 8, "val": 5}, 64, seed=1)


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert main(["train", str(shapes), *SMALLEST, "--train.epochs=1", f"--train.output={folder}"]) == 0
    return folder


def words(*more: object) -> list[str]:
    return [sys.executable, "-m", "detr_fast", *map(str, more)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_train_resume_evaluate_and_predict(
    shapes: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume", str(run), "--train.epochs", "2"]) == 0
    said = capsys.readouterr().out
    assert "continuing" in said
    assert "epoch 2/2" in said
    assert load_checkpoint(run / "last.pth")["place"]["epoch"] == 2

    assert main(["evaluate", str(run / "last.pth"), str(shapes), "--json", str(tmp_path / "numbers.json")]) == 0
    table = capsys.readouterr().out
    assert "average precision at IoU 0.75" in table
    assert "triangle" in table
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    trained = json.loads((run / "evaluation.json").read_text())
    assert numbers["numbers"] == trained["numbers"]
    assert numbers["images"] == 5

    found = tmp_path / "found"
    images = [str(shapes / "val"), str(shapes / "train" / "00000[01].jpg")]
    assert main(["predict", str(run), *images, "--output", str(found), "--threshold", "0"]) == 0
    predictions = json.loads((found / "predictions.json").read_text())
    assert len(predictions) == 7
    assert all(len(entry["objects"]) == 8 for entry in predictions.values())
    assert len(list(found.glob("*.png"))) == 7
    with Image.open(found / "000000.png") as drawn:
        assert drawn.size == (64, 64)


def test_a_report_of_a_run(run: Path, tmp_path: Path) -> None:
    assert main(["report", str(run), "--output", str(tmp_path / "report.html")]) == 0
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_another_split(shapes: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), str(shapes), "--split", "train"]) == 0
    assert "8 images" in capsys.readouterr().out


def test_check_data(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-data", str(shapes)]) == 0
    assert "rectangle" in capsys.readouterr().out


def test_shards_in_the_place_of_the_folder(
    shapes: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = str(tmp_path / "shards")
    assert main(["shard", str(shapes), shards, "--images-per-shard", "3"]) == 0
    said = capsys.readouterr().out
    assert "train: 8 images in 3 shards" in said
    assert "val: 5 images in 2 shards" in said
    assert main(["shard", str(shapes), shards, "--images-per-shard", "3", "--split", "val"]) == 0
    assert "2 shards kept" in capsys.readouterr().out
    assert main(["check-data", shards]) == 0
    assert "no faults" in capsys.readouterr().out
    for name, place in (("folder", shapes), ("shards", shards)):
        assert main(["evaluate", str(run), str(place), "--json", str(tmp_path / f"{name}.json")]) == 0
    assert (tmp_path / "shards.json").read_text() == (tmp_path / "folder.json").read_text()
    assert main(["train", shards, *SMALLEST, "--train.epochs=1", f"--train.output={tmp_path / 'run'}"]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0


def test_shards_at_a_url(shapes: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shard", str(shapes), "memory://bucket/shapes"]) == 0
    assert main(["check-data", "memory://bucket/shapes"]) == 0
    assert "no faults" in capsys.readouterr().out
    command = ["train", "memory://bucket/shapes", *SMALLEST, "--train.epochs=1", f"--train.output={tmp_path / 'run'}"]
    assert main(command) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["path"] == "memory://bucket/shapes"
    assert main(["evaluate", str(tmp_path / "run"), "memory://bucket/shapes"]) == 0
    assert main(["report", str(run), "--data", "memory://bucket/shapes", "--output", str(tmp_path / "r.html")]) == 0


def test_check_data_of_an_unusual_layout(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").symlink_to(shapes / "val")
    (tmp_path / "truth.json").symlink_to(shapes / "annotations" / "instances_val.json")
    layout = [f"--data.train-images={tmp_path / 'photos'}", f"--data.train-annotations={tmp_path / 'truth.json'}"]
    assert main(["check-data", *layout]) == 0
    said = capsys.readouterr().out
    assert "photos" in said
    assert "no faults" in said


def test_a_copied_run_continues_where_it_is(shapes: Path, run: Path, tmp_path: Path) -> None:
    before = (run / "last.pth").read_bytes()
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    epochs = load_checkpoint(run / "last.pth")["place"]["epoch"] + 1
    assert main(["train", "--resume", str(copied), f"--train.epochs={epochs}"]) == 0
    assert (run / "last.pth").read_bytes() == before
    assert load_checkpoint(copied / "last.pth")["place"]["epoch"] == epochs
    assert json.loads((copied / "config.json").read_text())["train"]["output"] == str(copied)


def test_evaluate_takes_the_device_that_is_there(shapes: Path, run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    copied.mkdir()
    state = load_checkpoint(run / "last.pth")
    state["config"]["train"]["device"] = "cpu" if torch.cuda.is_available() else "cuda"
    save_checkpoint(copied / "last.pth", {name: value for name, value in state.items() if name != "format"})
    numbers = tmp_path / "numbers.json"
    assert main(["evaluate", str(copied), str(shapes), "--json", str(numbers)]) == 0
    assert json.loads(numbers.read_text())["images"] == 5


def test_unreadable_images_stop_or_are_skipped(
    shapes: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    command = ["predict", str(run), str(broken), str(shapes / "val" / "000000.jpg"), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "broken.jpg: cannot be read" in capsys.readouterr().err
    assert main([*command, "--skip-faults"]) == 0
    assert "1 images, 1 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", "DATA", "--train.epoch=3"], "no setting is called train.epoch; did you mean train.epochs?"),
        (["train", "DATA", "--epochs=3"], "unknown argument --epochs=3; did you mean --train.epochs?"),
        (["train", "DATA", "--train.epochs=x"], "train.epochs must be an integer, got 'x'"),
        (["train"], "detr-fast train DATA"),
        (["train", "nothing/here", "--model.name=detr_tiny"], "here must be a folder, not found"),
        (["train", "--resume", "nothing/here"], "checkpoint nothing/here does not exist"),
        (["train", "DATA", "--train.device=gpu"], "train.device must be auto|cpu|cuda, got 'gpu'"),
        (["train", "DATA", "--config", "no.json"], "--config must be a file of settings, there is none at no.json"),
        (["train", "DATA", "--model.weights=no.pth"], "model.weights: there is no file no.pth"),
        (["train", "DATA", "--model.weights=notes.txt"], "model.weights: notes.txt cannot be read"),
        (["train", "DATA", "--model.backbone-weights=no.pth"], "model.backbone_weights: there is no file no.pth"),
        (["train", "DATA", "--model.name=detr_tiny", "--train.output=notes.txt"], "notes.txt (it is a file); choose"),
        (["train", "DATA", "--model.name=detr_tiny", "--train.output=notes.txt/x"], "notes.txt/x (Not a directory)"),
        (["predict", "RUN", "DATA/val", "--output", "notes.txt"], "--output: cannot write to notes.txt (it is a file)"),
        (["demo", "--output", "notes.txt"], "notes.txt (it is a file); choose another folder"),
        (["shard", "DATA", "notes.txt"], "OUTPUT: cannot write to notes.txt (it is a file); choose another folder"),
        (["evaluate", "RUN", "DATA", "--json", "no/x.json"], "--json must be in a folder that exists, got no/x.json"),
        (["evaluate", "RUN", "DATA", "--detections", "."], "--detections must be a file, . is a folder"),
        (["doctor", "--json", "no/x.json"], "--json must be in a folder that exists, got no/x.json"),
        (["report", "RUN", "--output", "no/x.html"], "--output must be in a folder that exists, got no/x.html"),
        (["evaluate", "nothing.pth", "DATA"], "checkpoint nothing.pth does not exist"),
        (["predict", "RUN", "nothing*.jpg"], "no image found: nothing*.jpg"),
        (["predict", "RUN", "DATA/val", "--threshold", "7"], "--threshold must be in [0, 1], got 7.0"),
        (["predict"], "the following arguments are required: CHECKPOINT, IMAGES"),
        (["trian"], "invalid choice: 'trian'"),
        (["check-data", "nothing/here"], "nothing/here"),
        (["check-data"], "detr-fast check-data DATA"),
        (["check-data", "DATA", "--data.pth=x"], "no setting is called data.pth; did you mean data.path?"),
        (["check-data", "DATA", "--train.epochs=3"], "check-data takes settings data.NAME only, got --train.epochs"),
        (["report", "RUN", "--train.epochs=3"], "report takes no settings, got --train.epochs"),
        (["shard", "DATA"], "the following arguments are required: OUTPUT"),
        (["shard", "DATA", "new", "--images-per-shard", "0"], "--images-per-shard must be at least 1, got 0"),
        (["shard", "DATA", "new", "--split", "extra"], "has no annotations of split 'extra'"),
        (["shard", "DATA", "new", "--train.epochs=3"], "shard takes no settings, got --train.epochs"),
        (["train", "memory://nowhere/set", "--model.name=detr_tiny"], "has no shards of split 'train'"),
        (["version", "--train.epochs=3"], "version takes no settings, got --train.epochs"),
        (["train", "DATA", "--model.name=detr_small_panoptic"], "model.name must be a detection model"),
    ],
)
def test_an_error_of_the_user_is_one_line(
    command: list[str],
    said: str,
    shapes: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("no folder, and no weights")
    given = [word.replace("DATA", str(shapes)).replace("RUN", str(run)) for word in command]
    assert main(given) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("detr-fast: error: ")
    assert said in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["predict", "RUN", "DATA", "--thresold=0.5"], "unknown argument --thresold=0.5; did you mean --threshold?"),
        (["evaluate", "RUN", "DATA", "--thresold", "0.5"], "unknown argument --thresold"),
        (["evaluate", "RUN", "DATA", "--epochs=5"], "unknown argument --epochs=5"),
        (["train", "DATA", "--batch-size=5"], "unknown argument --batch-size=5; did you mean --train.batch_size?"),
        (["demo", "extra"], "unknown argument extra"),
        (["doctor", "--jsn", "x"], "unknown argument --jsn; did you mean --json?"),
    ],
)
def test_only_what_the_command_knows_and_is_close_is_suggested(
    command: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    assert capsys.readouterr().err == f"detr-fast: error: {said}\n"


def test_a_folder_that_may_not_be_written_is_known_before_the_evaluation(
    shapes: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**arguments: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    monkeypatch.setattr(output.tempfile, "TemporaryFile", refuse)
    assert main(["evaluate", str(run), str(shapes), "--json", str(tmp_path / "x.json")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith(f"--json: cannot write to {tmp_path} (Permission denied); choose another folder\n")
    assert main(["train", str(shapes), *SMALLEST, f"--train.output={tmp_path}"]) == 2
    assert f"train.output: cannot write to {tmp_path} (Permission denied); choose" in capsys.readouterr().err


def test_a_run_that_was_not_evaluated_has_no_report(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    (copied / "evaluation.json").unlink()
    assert main(["report", str(copied)]) == 2
    said = (
        f"{copied} has no evaluation yet: continue it with `detr-fast train --resume {copied}` to the end of an epoch"
    )
    assert capsys.readouterr().err == f"detr-fast: error: {said}\n"


def test_traceback_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "nothing.pth", "DATA", "--traceback"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_categories_of_another_data_set_are_refused(
    shapes: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    (other / "annotations").mkdir(parents=True)
    (other / "val").symlink_to(shapes / "val")
    content = json.loads((shapes / "annotations" / "instances_val.json").read_text())
    content["categories"][0]["name"] = "dog"
    (other / "annotations" / "instances_val.json").write_text(json.dumps(content))
    assert main(["evaluate", str(run), str(other)]) == 2
    assert "category 1 is 'dog', the model knows it as 'circle'" in capsys.readouterr().err


def test_help_of_train_lists_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--optimizer.backbone_learning_rate=1e-05" in said
    assert "--model.num_queries=100" in said
    assert "detr_resnet101_dc5" in said


def test_settings_come_from_a_file_and_the_command_line_wins(shapes: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"train": {"epochs": 1, "seed": 5}, "model": {"name": "detr_tiny", "num_queries": 3}}))
    folder = tmp_path / "run"
    command = ["train", str(shapes), *SMALLEST, "--config", str(file), f"--train.output={folder}", "--train.seed=6"]
    assert main(command) == 0
    saved = json.loads((folder / "config.json").read_text())
    assert (saved["train"]["epochs"], saved["train"]["seed"], saved["model"]["num_queries"]) == (1, 6, 8)


def test_sigterm_saves_and_exits(shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = words("train", shapes, *SMALLEST, "--train.epochs=10000", f"--train.output={folder}", "--data.workers=1")
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while not ((folder / "log.jsonl").exists() and (folder / "log.jsonl").read_text().count("\n") >= 3):
            assert process.poll() is None, "training ended by itself"
            assert time.monotonic() < until, "training did not start"
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.startswith("detr-fast: SIGTERM: saved")
    assert "Traceback" not in errors
    place = load_checkpoint(folder / "last.pth")["place"]
    assert place["step"] >= 3
    assert place["step"] == place["epoch"] * 4 + place["images"] // 2


@pytest.mark.slow
def test_two_processes(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["-m", "detr_fast", "train", str(shapes), *SMALLEST, "--train.epochs=2", f"--train.output={folder}"]
    done = subprocess.run([*launcher, *arguments], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1
    # Two images each on two processes: 2 steps an epoch of 8 images.
    assert load_checkpoint(folder / "last.pth")["place"]["step"] == 4
    trained = json.loads((folder / "evaluation.json").read_text())
    assert trained["images"] == 5
    assert main(["evaluate", str(folder / "last.pth"), str(shapes), "--json", str(tmp_path / "numbers.json")]) == 0
    alone = json.loads((tmp_path / "numbers.json").read_text())
    # Batches of other images round differently, which must not move a number of five images by more than this.
    assert alone["numbers"] == pytest.approx(trained["numbers"], abs=1e-6)
    assert alone["images"] == 5


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith("detr_fast ")
