"""The training loop: continued runs equal undisturbed ones, faults stop with a reason."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from detr_fast.data.faults import DataFault
from detr_fast.engine import train as loop
from detr_fast.engine.build import learns_from_nothing
from detr_fast.engine.checkpoint import load_checkpoint
from detr_fast.engine.config import Config
from detr_fast.engine.errors import CheckpointError, ConfigError, Interrupted, TrainingError
from detr_fast.engine.resume import find_checkpoint, newest_whole
from detr_fast.engine.run import Run
from detr_fast.engine.train import train
from detr_fast.models import build_model

Settings = Callable[..., Config]
# One canvas, of which images fill different parts.
MANY_SIZES = {"data.scales": (64, 96, 128), "data.canvas_multiple": 128, "evaluate.every": 0}
TIMES = ("seconds", "images_per_second", "data_share", "memory_gib", "valid_pixels")


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, moments, random states, sums and logs are equal to the last bit; only times differ."""
    one, two = load_checkpoint(first / "last.pth"), load_checkpoint(second / "last.pth")
    for state in (one, two):
        state["place"].pop("seconds")
        state.pop("config")
    assert_equal(one, two, "checkpoint")
    assert read_log(first) == read_log(second)


def assert_equal(one: Any, two: Any, where: str) -> None:
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_equal(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for number, (x, y) in enumerate(zip(one, two, strict=True)):
            assert_equal(x, y, f"{where}[{number}]")
    else:
        assert one == two, where


def read_log(folder: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in entries]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """A signal arrives while ``step`` is computed."""
    original = loop._step

    def with_signal(run: Any, batches: Any) -> None:
        original(run, batches)
        if run.place.step == step + 1:
            signal.raise_signal(number)

    monkeypatch.setattr(loop, "_step", with_signal)


def test_a_run_writes_what_it_promises(straight: Path) -> None:
    assert {file.name for file in straight.iterdir()} == {
        *("best.pth", "last.pth", "previous.pth", "config.json", "evaluation.json", "log.jsonl")
    }
    config = Config.load(straight / "config.json")
    assert (config.train.output, config.model.options["num_queries"]) == (str(straight), 8)
    log = read_log(straight)
    assert [(e["kind"], e["step"], e["epoch"]) for e in log] == [
        *[("step", 2, 0), ("step", 4, 0), ("epoch", 4, 0), ("step", 6, 1), ("step", 8, 1), ("epoch", 8, 1)]
    ]
    assert log[2]["loss"] == pytest.approx((log[0]["loss"] + log[1]["loss"]) / 2, rel=1e-12)
    assert {"loss_ce", "loss_giou_0", "gradient_norm", "AP", "AP50"} <= log[2].keys()
    parts = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    total = sum(weight * (log[2][name] + log[2][f"{name}_0"]) for name, weight in parts.items())
    # Sums of six float32 terms, each rounded once a step.
    assert log[2]["loss"] == pytest.approx(total, rel=10 * torch.finfo(torch.float32).eps)
    best = load_checkpoint(straight / "best.pth")
    assert "optimizer" not in best
    assert best["categories"]["names"] == ["circle", "rectangle", "triangle"]


def test_a_run_continued_after_an_epoch_equals_a_straight_one(straight: Path, settings: Settings) -> None:
    folder = train(settings("resumed", {"train.epochs": 1}))
    train(settings("resumed"), resume=folder)
    assert_same_run(straight, folder)


@pytest.mark.parametrize("step", [0, 3])
def test_a_run_stopped_by_a_signal_equals_a_straight_one(
    straight: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(Interrupted, match="SIGTERM: saved") as stop:
            train(settings("resumed"))
    state = load_checkpoint(stop.value.checkpoint)
    assert state["place"]["step"] == step + 1
    train(settings("resumed"), resume=stop.value.checkpoint)
    assert_same_run(straight, stop.value.checkpoint.parent)


def test_a_signal_in_the_evaluation_starts_it_again(
    straight: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.evaluate

    def with_signal(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", with_signal)
        with pytest.raises(Interrupted, match="SIGINT: saved") as stop:
            train(settings("resumed"))
    train(settings("resumed"), resume=stop.value.checkpoint)
    assert_same_run(straight, stop.value.checkpoint.parent)


def test_a_killed_run_continues_from_its_last_checkpoint(
    straight: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop._step

    def killed(run: Any, batches: Any) -> None:
        if run.place.step == 6:
            raise KeyboardInterrupt  # what nothing in the loop handles
        original(run, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(settings("resumed", {"train.checkpoint_steps": 5, "train.log_steps": 1}))
    folder = settings("resumed").train.output
    assert load_checkpoint(find_checkpoint(folder))["place"]["step"] == 5
    assert read_log(Path(folder))[-1]["step"] == 6
    train(settings("resumed", {"train.log_steps": 1}), resume=folder)
    reference = train(settings("reference", {"train.log_steps": 1}))
    assert_same_run(reference, Path(folder))


def _train_as_two(rank: int, folder: str, straight: Config, first_epoch: Config, resumed: Config) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    train(straight)
    train(resumed, resume=train(first_epoch))
    dist.destroy_process_group()


def test_two_processes_continued_equal_two_undisturbed(settings: Settings, tmp_path: Path) -> None:
    # The line of every third step spans the interruption after the second, so the sums of both must be continued.
    two = {"train.log_steps": 3}
    configs = settings("first", two), settings("second", {**two, "train.epochs": 1}), settings("second", two)
    multiprocessing.start_processes(_train_as_two, (str(tmp_path), *configs), nprocs=2, start_method="fork")
    assert_same_run(tmp_path / "first", tmp_path / "second")
    assert len(load_checkpoint(tmp_path / "second" / "last.pth")["random"]) == 2
    assert [(entry["kind"], entry["step"]) for entry in read_log(tmp_path / "second")] == [
        *[("epoch", 2), ("step", 3), ("epoch", 4)]
    ]


def test_the_number_of_workers_changes_nothing(straight: Path, settings: Settings) -> None:
    assert_same_run(straight, train(settings("workers", {"data.workers": 2})))


def test_the_seed_changes_everything(straight: Path, settings: Settings) -> None:
    other = train(settings("other", {"train.seed": 43, "train.epochs": 1}))
    assert read_log(other)[0]["loss"] != read_log(straight)[0]["loss"]


def test_steps_that_are_not_finite_are_left_out_and_stop_the_run_if_there_are_too_many(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(settings("run", {"train.epochs": 1}))
    good = load_checkpoint(folder / "last.pth")
    capsys.readouterr()
    with pytest.raises(TrainingError) as caught:
        train(settings("run", {"loss.bbox": 1e39, "train.most_skipped": 1}), resume=folder)
    message = str(caught.value)
    assert message.startswith("epoch 2: 2 steps in a row were not finite and changed nothing, more than ")
    assert "step 5, image ids " in message
    assert message.endswith(f"last good checkpoint: {folder / 'last.pth'}")
    assert "left out   epoch 2, step 6, image ids " in capsys.readouterr().out
    assert_equal(good, load_checkpoint(folder / "last.pth"), "checkpoint")
    train(settings("run", {"loss.bbox": 1e39, "train.most_skipped": 4}), resume=folder)
    after = load_checkpoint(folder / "last.pth")
    assert_equal(good["model"], after["model"], "model")
    assert_equal(good["optimizer"]["state"], after["optimizer"]["state"], "optimizer")
    assert read_log(folder)[-1]["skipped" if "skipped" in read_log(folder)[-1] else "loss"] in (4, "nan")


def test_weights_that_explode_stop_the_run(settings: Settings) -> None:
    changes = {"optimizer.learning_rate": 1e30, "optimizer.backbone_learning_rate": 1e30, "train.most_skipped": 1}
    with pytest.raises(TrainingError, match=r"step \d, image ids \d+, \d+: .*there is no checkpoint yet"):
        train(settings("run", changes))


def test_the_checkpoint_before_the_last_is_kept_and_offered(straight: Path, settings: Settings) -> None:
    folder = Path(settings("copy").train.output)
    shutil.copytree(straight, folder)
    content = bytearray((folder / "last.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "last.pth").write_bytes(content)
    offered = rf"last\.pth is damaged .* check sum .* whole, at step 4: --resume {folder / 'previous.pth'}"
    with pytest.raises(CheckpointError, match=offered):
        train(settings("copy"), resume=folder)
    path, reason = newest_whole(folder)
    assert path == folder / "previous.pth"
    assert reason is not None
    assert "check sum" in reason
    train(settings("copy"), resume=path)
    assert_same_run(straight, folder)
    assert (newest_whole(folder)[1], newest_whole(folder.parent / "nothing")) == (None, (None, None))
    (folder / "last.pth").unlink()
    train(settings("copy"), resume=folder)
    assert_same_run(straight, folder)


@pytest.mark.parametrize(("every", "places"), [(0, [(1, 8), (2, 16)]), (1, [(0, 8), (1, 8), (1, 16), (2, 16)])])
def test_an_epoch_is_saved_once_and_before_and_after_its_evaluation(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, every: int, places: list[tuple[int, int]]
) -> None:
    """The checkpoint before the last is one of an earlier step."""
    saved = []
    original = Run.save

    def noted(run: Run) -> None:
        original(run)
        previous = run.folder / "previous.pth"
        earlier = load_checkpoint(previous)["place"]["step"] if previous.exists() else None
        saved.append((run.place.epoch, run.place.step, earlier))

    monkeypatch.setattr(Run, "save", noted)
    train(settings("run", {"train.batch_size": 1, "evaluate.every": every}))
    assert [place[:2] for place in saved] == places
    assert [earlier for _, step, earlier in saved if step == 16] == [8] * (len(places) // 2)


def test_averaged_weights_are_evaluated_and_kept(straight: Path, settings: Settings) -> None:
    folder = train(settings("run", {"train.ema_decay": 0.9}))
    last, best = load_checkpoint(folder / "last.pth"), load_checkpoint(folder / "best.pth")
    assert_equal(load_checkpoint(straight / "last.pth")["model"], last["model"], "model")
    name = "class_embed.weight"
    assert not torch.equal(last["average"][name], last["model"][name])
    if best["place"]["epoch"] == 1:
        assert torch.equal(best["model"][name], last["average"][name])
    resumed = train(settings("resumed", {"train.ema_decay": 0.9, "train.epochs": 1}))
    train(settings("resumed", {"train.ema_decay": 0.9}), resume=resumed)
    assert_same_run(folder, resumed)


def test_training_ends_when_ap_gets_no_better(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    still = {"optimizer.learning_rate": 0, "optimizer.backbone_learning_rate": 0, "train.epochs": 9}
    folder = train(settings("run", {**still, "train.patience": 2, "model.train_backbone": False}))
    assert load_checkpoint(folder / "last.pth")["place"]["epoch"] == 3
    assert "no better AP than" in capsys.readouterr().out
    train(settings("run", {**still, "train.patience": 2, "model.train_backbone": False}), resume=folder)
    assert load_checkpoint(folder / "last.pth")["place"]["epoch"] == 3


def test_a_deterministic_run_is_the_same_on_a_cpu(straight: Path, settings: Settings) -> None:
    assert_same_run(straight, train(settings("run", {"train.deterministic": True})))
    assert not torch.are_deterministic_algorithms_enabled()


def test_switches_of_speed_change_rounding_only(settings: Settings) -> None:
    """Without dropout, which a graph draws for spare rows too."""
    common = {**MANY_SIZES, "model.dropout": 0.0, "train.log_steps": 1}
    plain = train(settings("plain", common))
    switches = {"speed.channels_last": False, "speed.fold_norms": False, "speed.graph": True}
    for one, two in zip(read_log(plain), read_log(train(settings("run", {**common, **switches}))), strict=True):
        assert one.keys() == two.keys()
        assert one["step"] == two["step"]
        # A rounding in one step is in the weights of all that follow: 5e-6 was seen after eight. With the cells of
        # another batch they differ by 1e-3 and more.
        assert one["loss"] == pytest.approx(two["loss"], rel=5e-5)
        assert one["loss_ce"] == pytest.approx(two["loss_ce"], rel=5e-5)


def test_a_continued_run_of_graphs_equals_a_straight_one(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, which draws other numbers in a graph: a canvas that had one before has it at once."""
    changes = {**MANY_SIZES, "speed.graph": True, "train.epochs": 3}
    straight = train(settings("straight", changes))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        with pytest.raises(Interrupted):
            train(settings("resumed", changes))
    folder = train(settings("resumed", changes), resume=Path(settings("resumed").train.output))
    assert load_checkpoint(folder / "last.pth")["graphs"]["kept"]
    assert_same_run(straight, folder)


def test_a_new_run_does_not_overwrite_an_old_one(straight: Path, settings: Settings) -> None:
    with pytest.raises(ConfigError, match="holds a run already"):
        train(settings("", {"train.output": str(straight)}))


def test_a_continued_run_does_not_overwrite_another_one(straight: Path, settings: Settings) -> None:
    other = train(settings("other", {"train.epochs": 1}))
    with pytest.raises(ConfigError, match="holds another run than"):
        train(settings("other"), resume=straight)
    assert load_checkpoint(other / "last.pth")["place"]["epoch"] == 1


def test_the_log_tells_how_batches_were_matched(straight: Path) -> None:
    steps = [
        entry for entry in map(json.loads, (straight / "log.jsonl").read_text().splitlines()) if entry["kind"] == "step"
    ]
    for entry in steps:
        assert 0 <= entry["matching_changed"] <= 1
        assert entry["matching_dropped"] >= 0
        assert entry["matching_cost_bbox"] > 0
        assert -2 <= entry["matching_cost_giou"] <= 2
    assert len({entry["matching_cost_class"] for entry in steps}) > 1


def test_a_new_run_does_not_continue_the_log_of_a_dead_one(straight: Path, settings: Settings) -> None:
    folder = Path(settings("run").train.output)
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"kind": "step", "step": 1, "epoch": 0, "loss": 7}\n')
    (folder / ".last.pth.0123abcd.part").write_bytes(b"half of it")
    assert_same_run(straight, train(settings("run")))
    assert not list(folder.glob(".*"))


def test_a_run_that_cannot_start_leaves_no_folder(settings: Settings) -> None:
    config = settings("run", {"model.name": "detr_small_panoptic", "model.hidden_dim": 128, "model.nheads": 8})
    with pytest.raises(ConfigError, match=r"model\.name must be a detection model, got 'detr_small_panoptic'"):
        train(config)
    assert not Path(config.train.output).exists()


def test_a_continued_run_does_not_read_the_files_it_started_from(straight: Path, settings: Settings) -> None:
    weights = Path(settings("weights").train.output).with_suffix(".pth")
    weights.write_bytes((straight / "best.pth").read_bytes())
    folder = train(settings("run", {"model.weights": str(weights), "train.epochs": 1}))
    weights.unlink()
    train(settings("run", {"model.weights": str(weights)}), resume=folder)
    assert load_checkpoint(folder / "last.pth")["place"]["epoch"] == 2


def test_other_classes_need_a_new_class_layer(straight: Path, settings: Settings) -> None:
    state = load_checkpoint(straight / "best.pth")["model"]
    state["class_embed.weight"], state["class_embed.bias"] = torch.zeros(6, 32), torch.zeros(6)
    weights = Path(settings("weights").train.output).with_suffix(".pth")
    torch.save(state, weights)
    changes = {"model.weights": str(weights), "train.epochs": 1}
    with pytest.raises(ConfigError, match=r"5 classes apart, the data set has 3: .* --model\.new_classes=true"):
        train(settings("run", changes))
    folder = train(settings("run", {**changes, "model.new_classes": True, "optimizer.learning_rate": 0}))
    tuned = load_checkpoint(folder / "last.pth")["model"]
    assert tuned["class_embed.bias"].shape == (4,)
    assert torch.equal(tuned["query_embed.weight"], state["query_embed.weight"])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_corrupt_image_is_one_line(
    shapes: Path, settings: Settings, tmp_path: Path, workers: int, split: str
) -> None:
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    (data / split / "000002.jpg").write_bytes(b"no image")
    with pytest.raises(DataFault, match=r"000002\.jpg: cannot be read") as caught:
        train(settings("run", {"data.path": str(data), "data.workers": workers, "train.epochs": 1}))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_published_backbone_from_nothing_is_warned_about() -> None:
    with torch.device("meta"):  # only the kinds of its modules matter
        config, model = Config(), build_model("detr_resnet50", 3, enc_layers=1, dec_layers=1)
    assert learns_from_nothing(config, model)
    assert not learns_from_nothing(config.with_overrides({"model.backbone_weights": "x.pth"}), model)
    assert not learns_from_nothing(config.with_overrides({"model.weights": "x.pth"}), model)
    assert not learns_from_nothing(config, build_model("detr_tiny", 3))


def test_weights_alone_cannot_be_continued(straight: Path, settings: Settings) -> None:
    with pytest.raises(CheckpointError, match="holds weights only"):
        train(settings("more"), resume=straight / "best.pth")


def test_another_model_cannot_be_continued(straight: Path, settings: Settings) -> None:
    said = r"does not fit these settings: model\.num_queries was 8 when it was saved, is 9 now; continue it with what"
    with pytest.raises(CheckpointError, match=said):
        train(settings("other", {"model.num_queries": 9}), resume=straight)


def test_another_order_or_data_set_cannot_be_continued(straight: Path, shapes: Path, settings: Settings) -> None:
    with pytest.raises(CheckpointError, match=r"settings: train\.seed was 42 when it was saved, is 3 now; continue"):
        train(settings("other", {"train.seed": 3}), resume=straight)
    said = r"data\.train_split was train when it was saved, is val now: it was trained on 8 images, the data set has 5;"
    with pytest.raises(CheckpointError, match=said):
        train(settings("other", {"data.train_split": "val"}), resume=straight)


def test_changed_settings_are_said(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(settings("run", {"train.epochs": 1}))
    assert "changed " not in capsys.readouterr().out
    train(settings("run", {"optimizer.learning_rate": 0.5}), resume=folder)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed")]
    assert said == ["changed    optimizer.learning_rate 0.0001 -> 0.5", "changed    train.epochs 1 -> 2"]


def test_a_run_starts_from_weights(straight: Path, settings: Settings) -> None:
    changes = {"model.weights": str(straight / "last.pth"), "optimizer.learning_rate": 0, "train.epochs": 1}
    folder = train(settings("tuned", {**changes, "optimizer.backbone_learning_rate": 0}))
    first, second = load_checkpoint(straight / "last.pth")["model"], load_checkpoint(folder / "last.pth")["model"]
    for name, value in first.items():
        if "running_" not in name and "num_batches" not in name:  # batch norm counts whatever the rate is
            assert torch.equal(value, second[name]), name
