"""Sums of losses, and the log that a continued run rewrites from its checkpoint on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from detr_fast.engine.distributed import processes
from detr_fast.engine.log import Log, LossSums, duration

KEPT, SKIPPED = torch.tensor(False), torch.tensor(True)


def test_means_over_the_interval_and_the_epoch() -> None:
    sums = LossSums(torch.device("cpu"))
    for value in (1.0, 3.0):
        sums.add({"loss": torch.tensor(value), "loss_ce": torch.tensor(2 * value)}, KEPT)
    assert sums.read("interval") == {"loss": 2.0, "loss_ce": 4.0}
    sums.clear("interval")
    sums.add({"loss": torch.tensor(5.0), "loss_ce": torch.tensor(0.0)}, KEPT)
    assert sums.read("interval") == {"loss": 5.0, "loss_ce": 0.0}
    assert sums.read("epoch") == {"loss": 3.0, "loss_ce": 8 / 3}


def test_a_step_that_was_skipped_spoils_no_mean() -> None:
    sums = LossSums(torch.device("cpu"))
    for value, skipped in ((1.0, KEPT), (math.nan, SKIPPED), (math.inf, SKIPPED), (2.0, KEPT)):
        sums.add({"loss": torch.tensor(value)}, skipped)
    assert sums.read("epoch") == {"loss": 1.5}
    sums.clear("interval")
    sums.add({"loss": torch.tensor(math.nan)}, SKIPPED)
    assert math.isnan(sums.read("interval")["loss"])


def _read_means(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    sums = LossSums(torch.device("cpu"))
    sums.add({"loss": torch.tensor(2.0 + 4 * rank), "x": torch.tensor(8.0 * rank)}, KEPT)
    with processes("cpu") as joined:
        (Path(folder) / f"{rank}.txt").write_text(f"{sums.read('epoch', joined)} {sums.read('epoch')['loss']}")
    dist.destroy_process_group()


def test_means_are_of_all_processes(tmp_path: Path) -> None:
    multiprocessing.start_processes(_read_means, (str(tmp_path),), nprocs=2, start_method="fork")
    seen = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert seen == ["{'loss': 4.0, 'x': 4.0} 2.0", "{'loss': 4.0, 'x': 4.0} 6.0"]


def test_sums_survive_a_checkpoint() -> None:
    sums, restored = LossSums(torch.device("cpu")), LossSums(torch.device("cpu"))
    sums.add({"loss": torch.tensor(1.0), "x": torch.tensor(2.0)}, KEPT)
    restored.load_state_dict(sums.state_dict())
    for each in (sums, restored):
        each.add({"loss": torch.tensor(2.0), "x": torch.tensor(4.0)}, KEPT)
    assert restored.read("epoch") == sums.read("epoch") == {"loss": 1.5, "x": 3.0}


def test_what_is_written_after_the_checkpoint_is_dropped(tmp_path: Path) -> None:
    log = Log(tmp_path, active=True, tensorboard=False)
    for step in (2, 4):
        log.write("step", step, 0, {"loss": 1.0})
    log.write("epoch", 4, 0, {"loss": 1.0})
    log.write("step", 6, 1, {"loss": math.nan})
    with log.path.open("a") as file:
        file.write('{"kind": "st')  # cut off by a crash
    log.rewind(step=4, epoch=1)
    kept = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(entry["kind"], entry["step"]) for entry in kept] == [("step", 2), ("step", 4), ("epoch", 4)]
    log.rewind(step=4, epoch=0)  # saved before the evaluation of epoch 0
    kept = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(entry["kind"], entry["step"]) for entry in kept] == [("step", 2), ("step", 4)]


def test_values_that_json_does_not_know_are_text(tmp_path: Path) -> None:
    log = Log(tmp_path, active=True, tensorboard=False)
    log.write("step", 1, 0, {"loss": math.inf})
    assert json.loads(log.path.read_text())["loss"] == "inf"


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(tmp_path, active=True, tensorboard=True)
    log.write("step", 3, 0, {"loss": 1.5, "broken": math.nan})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [(3, 1.5)]
    assert events.Tags()["scalars"] == ["step/loss"]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    Log(tmp_path, active=False, tensorboard=True).write("step", 1, 0, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.2, 61, 3723)] == ["0:00", "1:01", "1:02:03"]
