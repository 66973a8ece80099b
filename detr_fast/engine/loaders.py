"""Data sets and loaders of a run, as its settings say."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from detr_fast.data.batch import EvaluationSampler, TrainingSampler, collate
from detr_fast.data.coco import Categories, CocoDetection
from detr_fast.data.faults import DataFault
from detr_fast.data.layouts import find_split
from detr_fast.data.transforms import evaluation_transform, train_transform
from detr_fast.engine.config import Config, DataConfig
from detr_fast.engine.distributed import Processes
from detr_fast.engine.errors import ConfigError


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


def _given(data: DataConfig) -> str | None:
    if not data.path and not data.train_annotations and not data.evaluation_annotations:
        raise ConfigError("data.path must be the folder of a data set, got nothing")
    return data.path or None


class TrainingLoader:
    """Batches of the training split in an order that depends on seed and epoch only."""

    def __init__(self, dataset: CocoDetection, config: Config, processes: Processes):
        self.dataset = dataset
        self.sampler = TrainingSampler(
            len(dataset), config.train.batch_size, config.train.seed, processes.rank, processes.count
        )
        workers = config.data.workers
        self.loader = DataLoader(
            dataset,
            batch_sampler=self.sampler,
            collate_fn=functools.partial(collate, num_classes=dataset.categories.num_classes),
            **loader_options(workers, processes.device),
        )

    @property
    def batches(self) -> int:
        """Batches of a whole epoch."""
        return self.sampler.batches

    def start(self, epoch: int, batch: int = 0) -> DataLoader[Any]:
        """The batches of an epoch from batch ``batch`` on."""
        self.dataset.set_epoch(epoch)
        self.sampler.set_epoch(epoch, batch)
        return self.loader


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
        lead, _, message = str(fault).rpartition(f"{DataFault.__module__}.{DataFault.__qualname__}: ")
        if not lead.startswith("Caught DataFault in DataLoader worker"):
            raise
        raise DataFault(message.strip()) from fault


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
    """Signals to the whole process group must not kill the workers before the main process has saved.

    A second SIGTERM ends the worker, so that nothing can wait for one that hangs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
