"""Several processes make the steps of one, whatever their share of the objects, and a run continues on any number."""

from __future__ import annotations

import functools
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_as_accurate
from engine.conftest import smallest
from engine.launch import SAME_CANVAS, Exact, Recorded, constant_norms, train_exactly, train_recorded
from torch.multiprocessing import ProcessRaisedException

from detr_fast.data.shapes import write_shapes
from detr_fast.engine import build
from detr_fast.engine import train as loop
from detr_fast.engine.checkpoint import load_checkpoint
from detr_fast.engine.config import Config
from detr_fast.engine.distributed import SharedFlag
from detr_fast.engine.errors import CheckpointError, Interrupted
from detr_fast.engine.resume import load_to_continue, load_whole, newest_whole
from detr_fast.engine.run import Run

LOSSES = ("loss", "loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "gradient_norm")
STEPS = 4  # of 4 images, in an epoch of 18: two are left over
WAYS = {  # processes, images in a pass, passes: all make steps of 4 images
    "two processes": (2, 2, 1),
    "four processes": (4, 1, 1),
    "two passes": (1, 2, 2),
    "two processes, two passes": (2, 1, 2),
}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def _constant_norms() -> Iterator[None]:
    """Statistics of norms are of each process; without them an image's result depends on that image alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_model", constant_norms)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", {"train": 18, "val": 5}, 64, seed=1)


def settings_of(images: Path, folder: Path, way: tuple[int, int, int], changes: dict[str, Any]) -> Config:
    _, batch_size, passes = way
    own = {"train.batch_size": batch_size, "train.accumulate": passes, "train.epochs": 1, "evaluate.every": 0}
    return smallest(images, folder, {**SAME_CANVAS, "optimizer.clip_norm": 0.0, **own, **changes})


@pytest.fixture
def recorded(images: Path, tmp_path: Path) -> Callable[..., Recorded]:
    """``recorded("name", (processes, images in a pass, passes), {"train.epochs": 2})``, a run in its own folder."""

    def run(name: str, way: tuple[int, int, int], changes: dict[str, Any] | None = None, **options: Any) -> Recorded:
        return train_recorded(settings_of(images, tmp_path / name, way, changes or {}), way[0], **options)

    return run


def alone(images: Path, folder: Path) -> tuple[Recorded, Exact]:
    """One process with the joint batch, in float32 and float64."""
    config = settings_of(images, folder, (1, 4, 1), {})
    run = train_recorded(config, 1)
    return run, train_exactly(config, run.ranks[0])


@pytest.fixture(scope="module")
def one(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorded, Exact]:
    return alone(images, tmp_path_factory.mktemp("alone") / "run")


def assert_same_steps(run: Recorded, one: Recorded, exact: Exact) -> None:
    """The steps of ``run`` are as close to those of float64 as those of one process are."""
    assert run.steps == one.steps
    assert len(run.steps) == STEPS
    for name in LOSSES:
        assert_as_accurate(run.logged(name).float(), one.logged(name).float(), exact.logged(name))
    assert_as_accurate(torch.stack(run.gradients), torch.stack(one.gradients), torch.stack(exact.gradients))
    # AdamW's first steps are as long for a gradient that is zero but for rounding (the biases of keys, which a softmax
    # does not see) as for a large one, so no weight has a small bound of its own; all together stay as near to float64
    # as one process does.
    own, found = ((weights.double() - exact.weights).norm() for weights in (one.weights[0], run.weights[0]))
    assert found <= 2 * own
    assert all(torch.equal(weights, run.weights[0]) for weights in run.weights)


@pytest.mark.parametrize("way", WAYS)
def test_the_steps_are_those_of_one_process_with_the_joint_batch(
    one: tuple[Recorded, Exact], recorded: Callable[..., Recorded], way: str
) -> None:
    assert_same_steps(recorded("run", WAYS[way]), *one)


@pytest.mark.parametrize("way", ["two processes", "two passes", slow("two processes, two passes")])
@pytest.mark.parametrize("empty", ["second half", "all"])
def test_images_without_objects_neither_hang_nor_skew(
    images: Path, one: tuple[Recorded, Exact], tmp_path: Path, way: str, empty: str
) -> None:
    """The second half of each step is all that the second process, or the second pass, sees."""
    data = tmp_path / "data"
    shutil.copytree(images, data)
    file = data / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    seen = [step.images[2 if empty == "second half" else 0 :] for step in one[0].ranks[0]]
    without = {image for step in seen for image in step}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] not in without]
    file.write_text(json.dumps(content))
    run = train_recorded(settings_of(data, tmp_path / "run", WAYS[way], {}), WAYS[way][0])
    assert_same_steps(run, *alone(data, tmp_path / "alone"))
    assert (run.logged("loss_bbox") == 0).all() == (empty == "all")


def test_a_sharded_optimizer_gives_the_same_bits(begun: dict[bool, Recorded]) -> None:
    assert "shards" in load_checkpoint(begun[True].folder / "last.pth")["optimizer"]
    assert all(torch.equal(weights, begun[False].weights[0]) for weights in begun[True].weights)


@pytest.fixture(scope="module")
def begun(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Recorded]:
    """An epoch of two processes with a sharded optimizer and with a whole one."""
    folder = tmp_path_factory.mktemp("begun")
    changes = {"train.checkpoint_steps": 2}
    return {
        sharded: train_recorded(
            settings_of(images, folder / name, (2, 2, 1), {**changes, "distributed.shard_optimizer": sharded}), 2
        )
        for name, sharded in (("sharded", True), ("whole", False))
    }


@pytest.mark.parametrize("way", [slow((2, 2, 1)), (1, 4, 1), slow((4, 1, 1))])
def test_a_run_continues_whether_its_optimizer_was_or_is_sharded(
    begun: dict[bool, Recorded], images: Path, tmp_path: Path, way: tuple[int, int, int]
) -> None:
    """The same bits as a run that never was."""
    ends = {}
    for was, becomes in [(False, False), (True, True), (True, False), (False, True)]:
        if way[0] == 4 and was != becomes:
            continue  # shown by the two processes
        folder = tmp_path / f"{was}-{becomes}"
        shutil.copytree(begun[was].folder, folder)
        changes = {"distributed.shard_optimizer": becomes, "train.epochs": 2, "train.checkpoint_steps": 2}
        ends[was, becomes] = train_recorded(settings_of(images, folder, way, changes), way[0], resume=folder)
        kept = [load_checkpoint(folder / name)["optimizer"] for name in ("last.pth", "previous.pth")]
        assert {file.name for file in folder.glob("optimizer-*")} == {state.get("shards") for state in kept} - {None}
        assert ("shards" in kept[0]) == (becomes and way[0] > 1)
    assert len({hash(end.weights[0].numpy().tobytes()) for end in ends.values()}) == 1


@pytest.mark.slow
def test_shards_that_a_checkpoint_needs_are_not_written_over(
    recorded: Callable[..., Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was stopped in the evaluation saves again where it was saved."""

    def stopped(run: Run, stop: SharedFlag) -> None:
        raise Interrupted(signal.SIGTERM, run.folder)

    changes = {"distributed.shard_optimizer": True, "evaluate.every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_evaluate", stopped)
        folder = recorded("run", (2, 2, 1), changes).folder
    needed = load_checkpoint(folder / "last.pth")["optimizer"]["shards"]
    recorded("run", (2, 2, 1), changes, resume=folder)
    found = [load_whole(folder / name) for name in ("last.pth", "previous.pth")]
    assert [state["place"]["step"] for state in found] == [STEPS, STEPS]
    assert [state["place"]["epoch"] for state in found] == [1, 0]
    assert found[0]["optimizer"]["shards"] != needed


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut off", "gone", "zeroed"])
def test_a_checkpoint_whose_shards_are_damaged_is_refused_and_the_one_before_it_taken(
    recorded: Callable[..., Recorded], damage: str
) -> None:
    changes = {"distributed.shard_optimizer": True, "train.checkpoint_steps": 3}
    folder = recorded("run", (2, 2, 1), changes).folder
    assert newest_whole(folder) == (folder / "last.pth", None)
    shards = folder / load_checkpoint(folder / "last.pth")["optimizer"]["shards"]
    if damage == "gone":
        shutil.rmtree(shards)
    else:
        largest = max(shards.glob("*.distcp"), key=lambda file: file.stat().st_size)
        content = largest.read_bytes()
        largest.write_bytes(content[:-1] if damage == "cut off" else bytes(len(content)))
    with pytest.raises(CheckpointError, match=rf"{shards} cannot be read: .*previous\.pth"):
        load_to_continue(folder / "last.pth")
    path, reason = newest_whole(folder)
    assert path == folder / "previous.pth"
    assert reason is not None
    assert str(shards) in reason
    with pytest.raises(ProcessRaisedException, match=rf"CheckpointError: .*{shards} cannot be read: .*previous\.pth"):
        recorded("run", (2, 2, 1), {**changes, "train.epochs": 2}, resume=folder / "last.pth")


def test_compressed_gradients_are_near_and_equal_everywhere(
    recorded: Callable[..., Recorded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = build.compressed_mean

    @functools.wraps(original)
    def noted(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        own = bucket.buffer().clone()

        def write(future: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
            torch.save((own, future.value().clone()), tmp_path / f"{dist.get_rank()}-{bucket.index()}.pth")
            return future.value()

        return original(state, bucket).then(write)

    monkeypatch.setattr(build, "compressed_mean", noted)
    run = recorded("run", WAYS["two processes"], {"distributed.compress_gradients": True})
    monkeypatch.undo()
    assert torch.equal(run.weights[0], run.weights[1])
    one_rounding = torch.finfo(torch.bfloat16).eps / 2
    for file in tmp_path.glob("0-*.pth"):
        (own, mean), (other, same) = torch.load(file), torch.load(file.with_name(file.name.replace("0-", "1-")))
        assert torch.equal(mean, same)
        exact, size = (own.double() + other.double()) / 2, (own.double().abs() + other.double().abs()) / 2
        # One rounding where each is sent, one where they are added.
        assert ((mean - exact).abs() <= size * ((1 + one_rounding) ** 2 - 1)).all()
        assert not torch.equal(mean, exact.float())
    assert run.logged("loss")[0] == recorded("plain", WAYS["two processes"]).logged("loss")[0]
    assert run.logged("loss").isfinite().all()


@pytest.mark.parametrize(
    ("before", "after"), [((2, 2, 1), (1, 4, 1)), ((1, 4, 1), (2, 2, 1)), slow((2, 1, 2), (4, 1, 1))]
)
def test_a_run_continued_inside_an_epoch_on_other_processes_makes_the_same_steps(
    one: tuple[Recorded, Exact],
    recorded: Callable[..., Recorded],
    before: tuple[int, int, int],
    after: tuple[int, int, int],
) -> None:
    begun = recorded("run", before, stop_after=1)
    assert 0 < len(begun.steps) < STEPS
    ended = recorded("run", after, resume=begun.folder)
    assert begun.steps + ended.steps == one[0].steps
    assert_as_accurate(ended.logged("loss").float(), one[0].logged("loss").float(), one[1].logged("loss"))


@pytest.mark.parametrize(
    ("before", "after"), [((2, 2, 1), (1, 2, 1)), slow((1, 2, 1), (2, 3, 1)), slow((2, 1, 1), (1, 3, 2))]
)
def test_every_image_comes_once_also_when_the_joint_batch_changes(
    recorded: Callable[..., Recorded], before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    begun = recorded("run", before, stop_after=2)
    ended = recorded("run", after, resume=begun.folder)
    seen = [image for step in begun.steps + ended.steps for image in step]
    left = 18 - sum(map(len, begun.steps))
    assert len(seen) == len(set(seen)), "an image came twice"
    step = after[0] * after[1] * after[2]
    assert len(seen) == 18 - left % step, "more is left out than what fills no step"


@pytest.mark.parametrize("count", [2, slow(4)])
def test_evaluation_counts_each_image_once(recorded: Callable[..., Recorded], count: int) -> None:
    """Five images, so that some processes have one more than others."""
    changes = {"evaluate.every": 1, "evaluate.batch_size": 2, "optimizer.learning_rate": 0.0}
    changes |= {"optimizer.backbone_learning_rate": 0.0}
    found = {}
    for name, way in {"one": (1, 4, 1), "many": (count, 4 // count, 1)}.items():
        found[name] = json.loads((recorded(name, way, changes).folder / "evaluation.json").read_text())
    assert found["many"]["images"] == 5
    # Other batches round differently; no number of five images moves by so little.
    assert found["many"]["numbers"] == pytest.approx(found["one"]["numbers"], abs=1e-6)
