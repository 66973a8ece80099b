"""Settings of a training run as typed dataclasses: defaults of the DETR paper, overrides, files.

Every value has one name, ``section.name``: on the command line as ``--section.name=value``, in JSON, TOML and Python.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from detr_fast.engine.errors import ConfigError
from detr_fast.engine.values import FALSE_WORDS, TRUE_WORDS, as_json, as_text, convert


def setting(default: Any, meaning: str) -> Any:
    """A dataclass field with a default and the line that ``--help`` prints."""
    return field(default=default, metadata={"help": meaning})


@dataclass
class DataConfig:
    """Where the images are and how they are prepared."""

    path: str = setting("", "folder with a COCO-format data set")
    train_images: str = setting("", "folder of the training images, where the layout is unusual")
    train_annotations: str = setting("", "annotation file of the training split, where the layout is unusual")
    evaluation_images: str = setting("", "folder of the evaluation images, where the layout is unusual")
    evaluation_annotations: str = setting("", "annotation file of the evaluation split, where the layout is unusual")
    train_split: str = setting("train", "split to train on")
    evaluation_split: str = setting("val", "split to evaluate on")
    published_ids: bool = setting(False, "class index = COCO category id (91 classes), as the published checkpoints")
    on_fault: Literal["raise", "skip"] = setting("raise", "an unreadable image stops, or is skipped and counted")
    workers: int = setting(2, "processes that read images (0: none)")
    transform_on: Literal["auto", "workers", "device"] = setting(
        "auto", "where training images are resized, to the same pixels (auto: on a GPU, where there is one)"
    )
    bucket_images: int = setting(4096, "images among which batches of like shapes are made (0: purely random)")
    canvas_multiple: int = setting(1, "height and width of a training batch are rounded up to a multiple of it")
    scales: tuple[int, ...] = setting(tuple(range(480, 801, 32)), "shorter sides to draw from in training")
    max_size: int = setting(1333, "longest side, in training and evaluation")
    crop: bool = setting(True, "half the time: resize, crop, resize")
    crop_scales: tuple[int, ...] = setting(
        (), "shorter sides before the crop (empty: 1/2, 5/8, 3/4 of the largest scale)"
    )
    crop_range: tuple[int, ...] = setting(
        (), "smallest and largest side of the crop (empty: 0.48 and 3/4 of the scale)"
    )
    flip: bool = setting(True, "half the time: mirror left and right")
    evaluation_size: int = setting(0, "shorter side in evaluation and prediction (0: the largest of data.scales)")

    @property
    def shorter_side(self) -> int:
        """Of images in evaluation and prediction."""
        return self.evaluation_size or max(self.scales)


@dataclass
class ModelConfig:
    """Which model; further options of the model's builder are ``--model.OPTION=value``."""

    name: str = setting("detr_resnet50", "name in detr_fast.models.MODELS")
    weights: str = setting("", "checkpoint to start from, published or own")
    new_classes: bool = setting(False, "model.weights know other classes: start with a new class layer")
    backbone_weights: str = setting("", "ImageNet ResNet to start from, torchvision's or timm's names")
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class MatcherConfig:
    """Costs of the bipartite matching."""

    cost_class: float = setting(1.0, "weight of the class probability")
    cost_bbox: float = setting(5.0, "weight of the L1 distance of boxes")
    cost_giou: float = setting(2.0, "weight of the generalised IoU")


@dataclass
class LossConfig:
    """Coefficients of the losses."""

    ce: float = setting(1.0, "coefficient of the classification loss")
    bbox: float = setting(5.0, "coefficient of the L1 loss of boxes")
    giou: float = setting(2.0, "coefficient of the generalised IoU loss")
    eos_coef: float = setting(0.1, "weight of the class no-object, above 0")


@dataclass
class OptimizerConfig:
    """AdamW in two groups."""

    learning_rate: float = setting(1e-4, "learning rate of the transformer and the heads")
    backbone_learning_rate: float = setting(1e-5, "learning rate of the backbone")
    weight_decay: float = setting(1e-4, "decoupled weight decay, on every parameter")
    clip_norm: float = setting(0.1, "largest norm of the gradient (0: no clipping)")
    reference_batch: int = setting(0, "images a step that the rates are meant for; others scale them (0: never)")


@dataclass
class ScheduleConfig:
    """Learning rate over time, as a factor of both groups."""

    drop_epoch: int = setting(200, "epochs between drops of the learning rate (0: no drop)")
    drop_factor: float = setting(0.1, "factor of each drop")
    warmup_steps: int = setting(0, "steps in which the learning rate grows from 0, linearly")


@dataclass
class TrainConfig:
    """The loop."""

    epochs: int = setting(300, "passes over the training split")
    batch_size: int = setting(2, "images of each process in one forward pass")
    accumulate: int = setting(1, "passes that make one step: that of one larger batch, but for norms that learn")
    ema_decay: float = setting(0.0, "decay of averaged weights, which are evaluated and kept as the best (0: none)")
    patience: int = setting(0, "evaluations without a better AP after which training ends (0: never)")
    most_skipped: int = setting(10, "steps in a row that may be left out, being not finite, before the run stops")
    seed: int = setting(42, "of weights, dropout, order and transforms")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")
    precision: Literal["auto", "float32", "bf16"] = setting("auto", "auto: bf16 on a GPU that has it, else float32")
    deterministic: bool = setting(
        False, "refuse what may differ from run to run: operators, tiles chosen by time; slower"
    )
    output: str = setting("", "folder of the run (default: runs/MODEL-DATE)")
    log_steps: int = setting(50, "steps between lines of log.jsonl")
    checkpoint_steps: int = setting(1000, "steps between checkpoints inside an epoch (0: only at its end)")
    tensorboard: bool = setting(True, "write TensorBoard logs")
    profile_steps: int = setting(0, "steps to profile, after five, in this start only; writes profile/ in its folder")


@dataclass
class SpeedConfig:
    """How a step is computed; nothing but rounding depends on it."""

    tf32: bool = setting(True, "products of float32 matrices on tensor cores, with 10 bits of mantissa")
    channels_last: bool = setting(True, "channels of the backbone's maps next to each other in memory")
    fold_norms: bool = setting(
        True, "constant batch norm inside the convolution before it (slower on a CPU: 7 % with images of 96-173 pixels)"
    )
    compile: bool = setting(False, "torch.compile, in training: the backbone for each canvas, the transformer once")
    graph: bool = setting(False, "whole steps as CUDA graphs, one for each canvas; on one GPU")
    most_canvases: int = setting(16, "canvases that are compiled or have a graph, the others run without; see data")


@dataclass
class DistributedConfig:
    """Several processes."""

    timeout_seconds: int = setting(1800, "a process that answers no longer than this is taken for dead")
    compress_gradients: bool = setting(False, "exchange gradients as bf16: half the traffic, 8 bits of mantissa")
    shard_optimizer: bool = setting(False, "each process keeps the moments of its part of the parameters only")


@dataclass
class EvaluateConfig:
    """Evaluation while training."""

    every: int = setting(1, "epochs between evaluations (0: never)")
    batch_size: int = setting(2, "images a step, of each process")


@dataclass
class Config:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    matcher: MatcherConfig = field(default_factory=MatcherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def with_overrides(self, overrides: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Config:
        """A copy with ``{"section.name": value}`` replaced; values are typed or text as on a command line.

        Raises:
            ConfigError: a name does not exist or a value has the wrong type; the message names it.
        """
        config = Config.from_dict(self.to_dict())
        items = list(overrides.items() if isinstance(overrides, Mapping) else overrides)
        # The model's name decides which options exist.
        for key, value in sorted(items, key=lambda item: item[0] != "model.name"):
            _assign(config, _plain(key), value)
        config.check()
        return config

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary of plain values; options of the model stand beside its other settings."""
        sections = {name: dict(section) for name, section in dataclasses.asdict(self).items()}
        sections["model"] |= sections["model"].pop("options")
        return {name: {k: as_json(v) for k, v in section.items()} for name, section in sections.items()}

    @classmethod
    def from_dict(cls, sections: Mapping[str, Any]) -> Config:
        """The inverse of :meth:`to_dict`; what is not given keeps its default."""
        config = cls()
        for key, value in sorted(flat(sections), key=lambda item: item[0] != "model.name"):
            _assign(config, key, value)
        config.check()
        return config

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Reads a ``.json`` or ``.toml`` file."""
        return cls.from_dict(read_settings(path))

    def check(self) -> None:
        """What a type does not express: ranges, and names of models."""
        _options_of_model(self.model.name)
        at_least: dict[int, tuple[str, ...]] = {
            1: ("train.epochs", "train.batch_size", "train.log_steps", "train.accumulate", "evaluate.batch_size"),
            0: ("data.workers", "data.max_size", "optimizer.learning_rate", "optimizer.backbone_learning_rate"),
        }
        at_least[1] += ("data.canvas_multiple",)
        at_least[0] += ("data.bucket_images",)
        at_least[0] += ("data.evaluation_size", "train.seed", "loss.ce", "loss.bbox", "loss.giou")
        at_least[0] += ("matcher.cost_class", "matcher.cost_bbox", "matcher.cost_giou")
        at_least[0] += ("optimizer.weight_decay", "optimizer.clip_norm", "schedule.drop_epoch", "schedule.drop_factor")
        at_least[0] += ("schedule.warmup_steps", "train.checkpoint_steps", "evaluate.every")
        at_least[0] += ("train.ema_decay", "train.patience", "train.most_skipped", "train.profile_steps")
        at_least[0] += ("optimizer.reference_batch",)
        at_least[1] += ("speed.most_canvases", "distributed.timeout_seconds")
        for least, keys in at_least.items():
            for key in keys:
                section, name = key.split(".")
                value = getattr(getattr(self, section), name)
                if not value >= least:
                    raise ConfigError(f"{key} must be at least {least}, got {value!r}")
        if not self.loss.eos_coef > 0:
            reason = "in a batch without objects nothing else weighs"
            raise ConfigError(f"loss.eos_coef must be above 0, got {self.loss.eos_coef!r}: {reason}")
        if self.train.ema_decay >= 1:
            raise ConfigError(f"train.ema_decay must be below 1, got {self.train.ema_decay!r}")
        for name in ("num_queries", "hidden_dim", "nheads", "dec_layers", "dim_feedforward"):
            if self.model.options.get(name, 1) < 1:
                raise ConfigError(f"model.{name} must be at least 1, got {self.model.options[name]!r}")
        for name in ("scales", "crop_scales", "crop_range"):
            values = getattr(self.data, name)
            if any(value < 1 for value in values) or (name == "scales" and not values):
                raise ConfigError(f"data.{name} must be positive numbers, got {as_text(values)!r}")
        crop_range = self.data.crop_range
        if crop_range and (len(crop_range) != 2 or crop_range[0] > crop_range[1]):
            raise ConfigError(f"data.crop_range must be smallest,largest, got {as_text(crop_range)!r}")


def flat(sections: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """``{"train": {"seed": 1}}`` as ``[("train.seed", 1)]``."""
    items: list[tuple[str, Any]] = []
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            raise ConfigError(f"{name} must be a section of settings, got {section!r}{_nearest(_plain(name))}")
        items += [(f"{_plain(name)}.{_plain(key)}", value) for key, value in section.items()]
    return items


def changed_settings(before: Config, after: Config) -> dict[str, tuple[str, str]]:
    """``{"train.seed": ("42", "3")}`` for every setting whose value is another, as text."""
    was, now = dict(flat(before.to_dict())), dict(flat(after.to_dict()))
    changed = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    return {key: (_shown(was, key), _shown(now, key)) for key in changed}


def _shown(values: Mapping[str, Any], key: str) -> str:
    """Options of a model that are not given have no value here."""
    if key not in values:
        return "the default"
    value = values[key]
    return as_text(tuple(value) if isinstance(value, list) else value) or "empty"


def read_settings(path: str | Path) -> dict[str, Any]:
    """Nested settings from a ``.json`` or ``.toml`` file (TOML: Python 3.11 or newer)."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".toml":
            import tomllib

            return tomllib.loads(text)
        content = json.loads(text)
    except ModuleNotFoundError:
        raise ConfigError(f"{path}: TOML files need Python 3.11 or newer; write it as JSON") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid {path.suffix[1:].upper() or 'JSON'}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold an object of sections of settings, got {type(content).__name__}")
    return content


def settings() -> dict[str, tuple[Any, Any, str]]:
    """Every ``section.name`` with its type, default and meaning."""
    found = {}
    for section in dataclasses.fields(Config):
        section_type = typing.get_type_hints(Config)[section.name]
        hints = typing.get_type_hints(section_type)
        for item in dataclasses.fields(section_type):
            if item.metadata:
                found[f"{section.name}.{item.name}"] = (hints[item.name], item.default, item.metadata["help"])
    return found


def split_overrides(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Separates ``--section.name=value`` and ``--section.name value`` from all other arguments.

    A boolean may stand alone: ``--train.tensorboard``. Other keys without a value are refused.
    """
    known = settings()
    overrides, rest = [], []
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        key, has_value, value = word[2:].partition("=")
        if not word.startswith("--") or "." not in key:
            rest.append(word)
            continue
        key = _plain(key)
        is_boolean = key in known and known[key][0] is bool
        if not has_value:
            follows = bool(queue) and not queue[0].startswith("--")
            if is_boolean:
                value = queue.pop(0) if follows and queue[0].lower() in TRUE_WORDS + FALSE_WORDS else "true"
            elif follows:
                value = queue.pop(0)
            else:
                raise ConfigError(f"--{key} needs a value: --{key}=VALUE")
        overrides.append((key, value))
    return overrides, rest


def _plain(key: str) -> str:
    return key.replace("-", "_").strip()


def _assign(config: Config, key: str, value: Any) -> None:
    """Sets one value after checking its name and type."""
    known = settings()
    if key in known:
        section, name = key.split(".")
        setattr(getattr(config, section), name, convert(value, known[key][0], key))
        return
    section, _, name = key.partition(".")
    if section != "model" or not name:
        raise ConfigError(f"no setting is called {key}{_nearest(key)}")
    options = _options_of_model(config.model.name)
    if name not in options:
        raise ConfigError(f"{config.model.name} has no option {key}{_nearest(key, options)}")
    config.model.options[name] = convert(value, options[name], key)


def _options_of_model(name: str) -> dict[str, Any]:
    """Names and types of what a model's builder accepts."""
    from detr_fast.models import MODELS, options_of_model

    if name not in MODELS:
        nearest = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.3)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ConfigError(f"model.name must be one of {', '.join(sorted(MODELS))}, got {name!r}{hint}")
    return options_of_model(name)


def _nearest(key: str, options: Iterable[str] = ()) -> str:
    """``; did you mean X?`` for the valid name closest to the given one, or nothing.

    The section is taken for right, if there is one; a name that is cut off or in initials comes before one misspelled.
    """
    names = [*settings(), *(f"model.{option}" for option in options)]
    section, _, word = key.rpartition(".")
    own = [name for name in names if section and name.startswith(f"{section}.")]
    if not word or any(name.startswith(f"{key}.") for name in names):
        return ""
    for some in (own, names):
        for name in some:
            last = name.split(".")[1]
            if (len(word) > 2 and last.startswith(word)) or "".join(part[0] for part in last.split("_")) == word:
                return f"; did you mean {name}?"
    for some in (own, names):
        of_last = {name.split(".")[1]: name for name in reversed(some)}
        if found := difflib.get_close_matches(word, of_last, n=1, cutoff=0.6):
            return f"; did you mean {of_last[found[0]]}?"
    return ""
