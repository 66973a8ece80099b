"""Data sets and loaders of a run, as its settings say."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from detr_fast.data.batch import Batch, EvaluationSampler, TrainingSampler, collate
from detr_fast.data.coco import Categories, CocoDetection
from detr_fast.data.faults import DataFault
from detr_fast.data.layouts import find_split
from detr_fast.data.raw_batch import RawBatch, collate_raw
from detr_fast.data.sketch import RawImage
from detr_fast.data.transforms import Target, evaluation_transform, train_transform
from detr_fast.engine.config import Config, DataConfig
from detr_fast.engine.distributed import Processes
from detr_fast.engine.errors import ConfigError

LOOK_SECONDS = 5.0  # after which a worker looks whether its reader is still there


def training_dataset(config: Config) -> CocoDetection:
    """The training split with the paper's random transforms."""
    data = config.data
    transform = train_transform(
        data.scales,
        data.max_size or None,
        flip=data.flip,
        crop=data.crop,
        crop_scales=data.crop_scales or None,
        crop_range=(data.crop_range[0], data.crop_range[1]) if data.crop_range else None,
    )
    paths = find_split(
        _given(data), data.train_split, images=data.train_images or None, annotations=data.train_annotations or None
    )
    return CocoDetection(
        paths, transform, on_fault=data.on_fault, published_ids=data.published_ids, seed=config.train.seed
    )


def evaluation_dataset(data: DataConfig, categories: Categories | None = None) -> CocoDetection:
    """The evaluation split; its categories must be among ``categories``, those of the model, where they are given."""
    paths = find_split(
        _given(data),
        data.evaluation_split,
        images=data.evaluation_images or None,
        annotations=data.evaluation_annotations or None,
    )
    transform = evaluation_transform(data.shorter_side, data.max_size or None)
    return CocoDetection(paths, transform, categories, on_fault=data.on_fault, published_ids=data.published_ids)


def check_same_images(dataset: CocoDetection, processes: Processes) -> None:
    """Called by all processes.

    Raises:
        DataFault: another process has other images, as where each reads its own copy and leaves out what is damaged.
    """
    digest = hashlib.blake2b(repr(dataset.image_ids).encode()).hexdigest()
    counts, digests = zip(*processes.gather((len(dataset), digest)), strict=True)
    for rank, (count, other) in enumerate(zip(counts, digests, strict=True)):
        if other != digests[0]:
            found = f"process 0 has {counts[0]}, process {rank} has {count}{' others' * (count == counts[0])}"
            raise DataFault(
                f"{dataset.paths.annotations.name}: all processes must have the same images, {found}: compare their "
                "files with detr-fast check-data"
            )


def _given(data: DataConfig) -> str | None:
    if not data.path and not data.train_annotations and not data.evaluation_annotations:
        raise ConfigError("data.path must be the folder of a data set, got nothing")
    return data.path or None


class TrainingLoader:
    """Batches of the training split on the run's device, in an order that depends on seed and epoch only.

    Images are transformed by the workers or, with ``data.transform_on``, on the device, to the same bits.
    """

    def __init__(self, dataset: CocoDetection, config: Config, processes: Processes):
        self.dataset, self.device = dataset, processes.device
        data = config.data
        self.sampler = TrainingSampler(
            len(dataset),
            config.train.batch_size,
            config.train.seed,
            processes.rank,
            processes.count,
            group=config.train.accumulate,
            bucket_images=data.bucket_images,
            shape_of=dataset.size_of,
        )
        is_raw = transforms_on_device(data.transform_on, dataset, self.device)
        self.loader = DataLoader(
            RawItems(dataset) if is_raw else dataset,
            batch_sampler=self.sampler,
            collate_fn=functools.partial(
                collate_raw if is_raw else collate,
                num_classes=dataset.categories.num_classes,
                canvas_multiple=data.canvas_multiple,
            ),
            **loader_options(data.workers, self.device),
        )

    @property
    def batches(self) -> int:
        """Batches of a whole epoch, of this process."""
        return self.sampler.batches

    def batches_left(self, images: int) -> int:
        """Batches of an epoch, of this process, after ``images`` images of all processes."""
        return self.sampler.batches_left(images)

    def start(self, epoch: int, images: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, on the device, after ``images`` images of all processes.

        On a GPU the next batch is uploaded and transformed while the current one is used. A damaged image file raises a
        DataFault that names it.
        """
        self.dataset.set_epoch(epoch)
        self.sampler.set_epoch(epoch, images)
        return ahead(naming_faults(self.loader), self.device)


class RawItems(Dataset[Any]):
    """The items of a data set with their pixels as they are in the files."""

    def __init__(self, dataset: CocoDetection):
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[RawImage, Target]:
        return self.dataset.raw(index)

    def __len__(self) -> int:
        return len(self.dataset)


def transforms_on_device(
    choice: Literal["auto", "workers", "device"], dataset: CocoDetection, device: torch.device
) -> bool:
    """What ``data.transform_on`` means here: ``auto`` is the device if that is a GPU and there are no masks.

    Raises:
        ConfigError: the device is asked for and the targets have masks.
    """
    if choice == "device" and dataset.with_masks:
        raise ConfigError("data.transform_on must be workers or auto where targets have masks, got device")
    return choice == "device" or (choice == "auto" and device.type == "cuda" and not dataset.with_masks)


def ahead(batches: Iterable[Batch | RawBatch], device: torch.device) -> Iterator[Batch]:
    """The same batches on a device, transformed where that is still to do.

    On CUDA the next one is uploaded and transformed on a stream of its own before the current one is handed over:
    nothing waits for it on the host, and the current stream only once it is due.
    """
    if device.type != "cuda":
        yield from (finished(batch, device) for batch in batches)
        return
    stream = torch.cuda.Stream(device)
    iterator = iter(batches)

    def upload() -> Batch | None:
        batch = next(iterator, None)
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            return finished(batch, device)

    following = upload()
    while following is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        batch = following
        for tensor in batch.tensors():
            tensor.record_stream(current)
        following = upload()
        yield batch


def finished(batch: Batch | RawBatch, device: torch.device) -> Batch:
    moved = batch.to(device)
    return moved.finished() if isinstance(moved, RawBatch) else moved


def evaluation_loader(dataset: CocoDetection, batch_size: int, workers: int, processes: Processes) -> DataLoader[Any]:
    """Every image on exactly one process."""
    sampler = EvaluationSampler(len(dataset), batch_size, processes.rank, processes.count)
    options = loader_options(workers, processes.device) | {"persistent_workers": False}
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, **options)


def naming_faults(batches: Iterable[Any]) -> Iterator[Any]:
    """The same batches; a fault of the data found by a worker is raised as it was there, not as a copied traceback."""
    try:
        yield from batches
    except DataFault as fault:
        kind = type(fault)
        lead, _, message = str(fault).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")
        if not lead.startswith(f"Caught {kind.__name__} in DataLoader worker"):
            raise
        raise kind(message.strip()) from fault


def loader_options(workers: int, device: torch.device) -> dict[str, Any]:
    """Its own generator, because a loader without one draws from the global generator, which belongs to the model."""
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": device.type == "cuda",
        "generator": torch.Generator(),
        "worker_init_fn": _outlive_signals,
    }


def _outlive_signals(worker: int) -> None:
    """Signals to the whole process group must not end a worker before the process that reads from it has saved.

    Only that process ends it. Others may ask several times: Slurm signals every process, and torchrun hands it on.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    # In a thread, so that also a worker that hangs can be ended.
    threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    """Ends this process when the reader says so, or is gone itself: killed, it says nothing."""
    reader = multiprocessing.parent_process()
    assert reader is not None
    # A forked worker's reader is its parent; whether that lives is not seen in the pipe, which later workers have too.
    while os.getppid() == parent and reader.is_alive():
        said = signal.sigtimedwait({signal.SIGTERM}, LOOK_SECONDS)
        if said is not None and said.si_pid == reader.pid:
            break
    os._exit(0)
