"""The training loader: the same batches whoever makes them, whole or resumed, on one process or several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from detr_fast.data.batch import Batch
from detr_fast.data.coco import CocoDetection
from detr_fast.data.faults import DataFault
from detr_fast.data.remote import Refused
from detr_fast.data.shapes import write_shapes
from detr_fast.engine.config import Config
from detr_fast.engine.distributed import Processes
from detr_fast.engine.errors import ConfigError
from detr_fast.engine.loaders import (
    TrainingLoader,
    ahead,
    check_same_images,
    naming_faults,
    training_dataset,
    transforms_on_device,
)

Settings = Callable[..., Config]
ROOT = Path(__file__).parents[2]
OFTEN = {"data.scales": tuple(range(32, 65)), "train.batch_size": 2}


def loader_of(config: Config, rank: int = 0, count: int = 1, device: str = "cpu") -> TrainingLoader:
    return TrainingLoader(training_dataset(config), config, Processes(rank, count, torch.device(device)))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch.image_ids for batch in found] == [batch.image_ids for batch in expected]
    for own, other in zip(found, expected, strict=True):
        assert own.images.sizes == other.images.sizes
        assert own.targets.max_count == other.targets.max_count
        for a, b in zip(own.tensors(), other.tensors(), strict=True):
            assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("place", ["workers", "device"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_do_not_depend_on_who_makes_them(settings: Settings, place: str, workers: int) -> None:
    expected = loader_of(settings("run", {**OFTEN, "data.transform_on": "workers"}))
    found = loader_of(settings("run", {**OFTEN, "data.transform_on": place, "data.workers": workers}))
    for epoch in range(2):  # workers live on
        assert_same(list(found.start(epoch)), list(expected.start(epoch)))
    assert len(list(found.start(2, 4))) == found.batches_left(4) == 2
    assert_same(list(found.start(2, 4)), list(expected.start(2))[2:])


@pytest.mark.parametrize("place", ["workers", "device"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_can_be_left_in_the_middle(settings: Settings, place: str, workers: int) -> None:
    loader = loader_of(settings("run", {**OFTEN, "data.transform_on": place, "data.workers": workers}))
    whole = list(loader.start(1))
    next(loader.start(0))
    assert_same(list(loader.start(1)), whole)


def test_steps_have_the_same_images_however_they_are_shared(settings: Settings) -> None:
    def steps(batch_size: int, ranks: int, accumulate: int) -> list[set[int]]:
        overrides = {**OFTEN, "train.batch_size": batch_size, "train.accumulate": accumulate}
        loaders = [loader_of(settings("run", overrides), rank, ranks) for rank in range(ranks)]
        ids: list[list[int]] = []
        for loader in loaders:
            batches = list(loader.start(3))
            assert len(batches) == loader.batches
            for index, batch in enumerate(batches):
                if index // accumulate == len(ids):
                    ids.append([])
                ids[index // accumulate] += batch.image_ids
        return [set(step) for step in ids]

    expected = steps(4, 1, 1)
    assert [len(step) for step in expected] == [4, 4]
    assert all(steps(*split) == expected for split in ((1, 1, 4), (1, 4, 1), (1, 2, 2), (2, 2, 1)))


def test_resume_with_other_processes(settings: Settings) -> None:
    first = loader_of(settings("run", OFTEN))
    done = [batch.image_ids for batch in first.start(1)][:1]
    state = first.sampler.state_dict(2)
    seen = [i for ids in done for i in ids]
    for rank in range(3):
        loader = loader_of(settings("run", {**OFTEN, "train.batch_size": 1}), rank, 3)
        loader.sampler.load_state_dict(state)
        assert loader.sampler.start_image == 2
        assert loader.batches_left(2) == 2
        seen += [i for batch in loader.start(1, loader.sampler.start_image) for i in batch.image_ids]
    assert sorted(seen) == sorted(first.dataset.image_ids)


@pytest.mark.parametrize("place", ["workers", "device"])
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_file_is_named(tmp_path: Path, settings: Settings, place: str, workers: int) -> None:
    folder = write_shapes(tmp_path / "damaged", {"train": 4, "val": 1}, 64, seed=1)
    overrides = {**OFTEN, "data.path": str(folder), "data.transform_on": place, "data.workers": workers}
    loader = loader_of(settings("run", overrides))
    path = loader.dataset.path_of(loader.dataset.image_ids[2])
    assert isinstance(path, Path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataFault) as fault:
        list(loader.start(0))
    assert str(fault.value).startswith(f"{path}: cannot be read")


@pytest.mark.parametrize("place", ["workers", "device"])
def test_canvas_multiple(settings: Settings, place: str) -> None:
    overrides = {**OFTEN, "data.transform_on": place, "data.canvas_multiple": 24}
    plain = list(loader_of(settings("run", OFTEN)).start(0))
    rounded = list(loader_of(settings("run", overrides)).start(0))
    assert [batch.images.pixels.shape for batch in plain] != [batch.images.pixels.shape for batch in rounded]
    for batch, other in zip(plain, rounded, strict=True):
        _, _, height, width = batch.images.pixels.shape
        assert all(side % 24 == 0 for side in other.images.pixels.shape[2:])
        assert torch.equal(other.images.pixels[..., :height, :width], batch.images.pixels)
        assert (~other.images.padding).sum() == (~batch.images.padding).sum()
        assert torch.equal(other.images.padding[:, :height, :width], batch.images.padding)


def test_buckets_save_padding(tmp_path: Path, settings: Settings) -> None:
    folder = write_shapes(tmp_path / "many", {"train": 64, "val": 1}, 64, seed=1)
    shares = []
    for images in (0, 64):
        overrides = {**OFTEN, "data.path": str(folder), "data.bucket_images": images, "train.batch_size": 4}
        paddings = [batch.images.padding for batch in loader_of(settings("run", overrides)).start(0)]
        shares.append(sum(int(x.sum()) for x in paddings) / sum(x.numel() for x in paddings))
    assert shares[1] < shares[0] / 2


def test_where_images_are_transformed(settings: Settings) -> None:
    class Masks:
        with_masks = True

    plain: Any = training_dataset(settings("run"))
    masks: Any = Masks()
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [transforms_on_device("auto", plain, device) for device in (cpu, cuda)] == [False, True]
    assert [transforms_on_device("device", plain, device) for device in (cpu, cuda)] == [True, True]
    assert [transforms_on_device("workers", plain, device) for device in (cpu, cuda)] == [False, False]
    assert not transforms_on_device("auto", masks, cuda)
    with pytest.raises(ConfigError, match=r"data\.transform_on must be workers or auto where targets have masks"):
        transforms_on_device("device", masks, cpu)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("data.bucket_images", -1, r"data\.bucket_images must be at least 0, got -1"),
        ("data.canvas_multiple", 0, r"data\.canvas_multiple must be at least 1, got 0"),
        ("data.transform_on", "gpu", r"data\.transform_on"),
    ],
)
def test_settings_are_checked(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config().with_overrides({name: value})


def test_nothing_is_fetched_before_it_is_asked_for_on_a_cpu(settings: Settings) -> None:
    batches = list(loader_of(settings("run", OFTEN)).start(0))
    taken = []

    def source() -> Iterator[Batch]:
        for batch in batches:
            taken.append(batch.image_ids)
            yield batch

    stream = ahead(source(), torch.device("cpu"))
    next(stream)
    assert taken == [batches[0].image_ids]
    assert_same([batches[0], *stream], batches)


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["workers", "device"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_a_gpu(settings: Settings, place: str, workers: int) -> None:
    expected = list(loader_of(settings("run", OFTEN)).start(0))
    overrides = {**OFTEN, "data.transform_on": place, "data.workers": workers}
    loader = loader_of(settings("run", overrides), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = []
        for batch in loader.start(0):
            found.append(batch)
            torch.ones(4096, 4096, device="cuda").sin()  # a step that is still running when the next batch is made
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(tensor.is_cuda for batch in found for tensor in batch.tensors())
    assert_same(found, expected)


@pytest.mark.slow
def test_python_ends_while_workers_live(shapes: Path) -> None:
    """And a generator of the middle of an epoch holds them."""
    code = f"""
from detr_fast.engine.config import Config
from detr_fast.engine.distributed import Processes
from detr_fast.engine.loaders import TrainingLoader, training_dataset
config = Config().with_overrides({{"data.path": {str(shapes)!r}, "data.scales": (48,), "train.batch_size": 1}})
loader = TrainingLoader(training_dataset(config), config, Processes())
batches = loader.start(0)
print(len(next(batches)))
"""
    # Workers that miss the end are waited for as long as the time allows.
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout.strip()) == (0, "1"), found.stderr
    assert not found.stderr


def test_a_data_set_is_not_read_to_learn_its_sizes(settings: Settings) -> None:
    dataset = training_dataset(settings("run", OFTEN))
    assert isinstance(dataset, CocoDetection)
    expected = [tuple(dataset[index][0].shape[1:]) for index in range(len(dataset))]
    dataset.paths = type(dataset.paths)(Path("nowhere"), dataset.paths.annotations)
    assert [dataset.size_of(index) for index in range(len(dataset))] == expected


class Refusing(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        raise Refused("s3://bucket/a.tar: cannot be reached")

    def __len__(self) -> int:
        return 1


def test_a_fault_of_a_worker_keeps_its_kind() -> None:
    with pytest.raises(Refused, match=r"^s3://bucket/a\.tar: cannot be reached$"):
        list(naming_faults(DataLoader(Refusing(), num_workers=1)))


class Two(Processes):
    """This process and another one, whose values are those that were gathered last."""

    others: ClassVar[dict[str, Any]] = {}

    def gather(self, value: Any) -> list[Any]:
        return [self.others.setdefault("value", value), value]


def test_processes_with_other_images_are_refused(tmp_path: Path, settings: Settings) -> None:
    """They would wait for one another for ever at the end of an epoch."""
    folder = write_shapes(tmp_path / "own", {"train": 4, "val": 1}, 64, seed=1)
    dataset = training_dataset(settings("run", {"data.path": str(folder)}))
    processes = Two(1, 2)
    for _ in range(2):
        check_same_images(dataset, processes)
    (folder / "train" / dataset.coco.imgs[2]["file_name"]).unlink()
    fewer = training_dataset(settings("run", {"data.path": str(folder), "data.on_fault": "skip"}))
    expected = r"^instances_train\.json: all processes must have the same images, process 0 has 4, process 1 has 3"
    with pytest.raises(DataFault, match=expected):
        check_same_images(fewer, processes)
    processes.others.clear()
    check_same_images(fewer, processes)
    fewer.image_ids = (1, 2, 4)
    with pytest.raises(DataFault, match="process 0 has 3, process 1 has 3 others"):
        check_same_images(fewer, processes)
    check_same_images(fewer, Processes())


@pytest.mark.parametrize("start", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_a_worker_leaves_when_its_reader_is_gone(tmp_path: Path, start: str) -> None:
    """Also one that hangs in a read, and without being asked."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, time, torch
from torch.utils.data import DataLoader, Dataset
from detr_fast.engine import loaders
class Hanging(Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        with open({str(tmp_path / "worker")!r}, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)
loaders.LOOK_SECONDS = 0.2
if __name__ == "__main__":
    options = loaders.loader_options(1, torch.device("cpu"))
    next(iter(DataLoader(Hanging(), 1, multiprocessing_context={start!r}, **options)))
""")
    reader = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        wait_until(lambda: (tmp_path / "worker").exists() and bool((tmp_path / "worker").read_text()))
        time.sleep(1.0)
        assert not has_ended(int((tmp_path / "worker").read_text()))
    finally:
        reader.kill()
        reader.wait()
    worker = int((tmp_path / "worker").read_text())
    try:
        wait_until(lambda: has_ended(worker))
    finally:
        if not has_ended(worker):
            os.kill(worker, signal.SIGKILL)


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


def has_ended(process: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{process}/status").read_text()  # nobody may be there to wait for it
    except FileNotFoundError:
        return True
