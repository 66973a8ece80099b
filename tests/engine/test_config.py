"""Settings: defaults of the paper, overrides, files and refusals."""

from __future__ import annotations

import json
import sys

import pytest

from detr_fast.engine.config import Config, changed_settings, settings, split_overrides
from detr_fast.engine.describe import describe_models, describe_settings
from detr_fast.engine.errors import ConfigError
from detr_fast.models import MODELS


def test_defaults_are_those_of_the_paper() -> None:
    config = Config()
    assert (config.optimizer.learning_rate, config.optimizer.backbone_learning_rate) == (1e-4, 1e-5)
    assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (1e-4, 0.1)
    assert (config.train.epochs, config.schedule.drop_epoch, config.train.batch_size) == (300, 200, 2)
    assert (config.matcher.cost_class, config.matcher.cost_bbox, config.matcher.cost_giou) == (1, 5, 2)
    assert (config.loss.ce, config.loss.bbox, config.loss.giou, config.loss.eos_coef) == (1, 5, 2, 0.1)


def test_overrides_are_read_as_their_type() -> None:
    words = ["--train.epochs=3", "--data.scales", "64,96", "--data.crop", "--optimizer.learning-rate=1e-3", "DATA"]
    overrides, rest = split_overrides([*words, "--train.tensorboard", "no", "--resume"])
    config = Config().with_overrides(overrides)
    assert rest == ["DATA", "--resume"]
    assert config.train.epochs == 3
    assert config.data.scales == (64, 96)
    assert config.data.crop is True
    assert config.train.tensorboard is False
    assert config.optimizer.learning_rate == 1e-3


def test_a_boolean_without_value_does_not_swallow_the_next_argument() -> None:
    assert split_overrides(["--data.flip", "DATA"]) == ([("data.flip", "true")], ["DATA"])


def test_options_of_the_model_follow_its_name_whatever_the_order() -> None:
    config = Config().with_overrides([("model.num_queries", "7"), ("model.name", "detr_tiny")])
    assert config.model.options == {"num_queries": 7}
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.epoch", 3, "no setting is called train.epoch; did you mean train.epochs?"),
        ("learning_rate", 3, "did you mean optimizer.learning_rate?"),
        ("optimizer.lr", 1, "no setting is called optimizer.lr; did you mean optimizer.learning_rate?"),
        ("train.lr", 1, "did you mean optimizer.learning_rate?"),
        ("train.batch", 1, "did you mean train.batch_size?"),
        ("mdoel.name", 1, "did you mean model.name?"),
        ("train.epochs", "many", "train.epochs must be an integer, got 'many'"),
        ("train.epochs", 2.5, "train.epochs must be an integer, got 2.5"),
        ("train.epochs", 0, "train.epochs must be at least 1, got 0"),
        ("loss.eos_coef", 0, "loss.eos_coef must be above 0, got 0.0: in a batch without objects nothing else weighs"),
        ("train.device", "gpu", "train.device must be auto|cpu|cuda, got 'gpu'"),
        ("train.precision", "bf61", "did you mean bf16?"),
        ("data.crop", "maybe", "data.crop must be true|false, got 'maybe'"),
        ("data.scales", "1,x", "data.scales must be integers separated by commas, got '1,x'"),
        ("data.crop_range", "5,3", "data.crop_range must be smallest,largest"),
        ("optimizer.learning_rate", "nan", "optimizer.learning_rate must be a number"),
        ("optimizer.learning_rate", "inf", "optimizer.learning_rate must be a number"),
        ("model.dropout", float("inf"), "model.dropout must be a number"),
        ("loss.giou", -1, "loss.giou must be at least 0, got -1"),
        ("matcher.cost_class", -0.5, "matcher.cost_class must be at least 0, got -0.5"),
        ("train.seed", -1, "train.seed must be at least 0, got -1"),
        ("model.num_queries", 0, "model.num_queries must be at least 1, got 0"),
        ("model.name", "detr_tinny", "did you mean detr_tiny?"),
        ("model.num_querys", 3, "did you mean model.num_queries?"),
        ("model.dropout", "much", "model.dropout must be a number, got 'much'"),
    ],
)
def test_a_bad_key_or_value_is_refused_with_what_is_valid(key: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config().with_overrides({key: value})
    assert said in str(caught.value)


@pytest.mark.parametrize("key", ["optimizer.zzz", "extra", "train"])
def test_nothing_is_suggested_where_nothing_is_close(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config().with_overrides({key: 1})
    assert str(caught.value) == f"no setting is called {key}"


def test_changed_settings_are_named_with_both_values() -> None:
    before = Config().with_overrides({"model.name": "detr_tiny", "model.num_queries": 7})
    after = before.with_overrides({"data.scales": "64,96", "optimizer.learning_rate": 0.5, "data.path": "x"})
    found = changed_settings(before, after)
    assert found.pop("data.scales")[1] == "64,96"
    assert found == {"optimizer.learning_rate": ("0.0001", "0.5"), "data.path": ("empty", "x")}
    other = Config().with_overrides({"model.name": "detr_tiny"})
    assert changed_settings(before, other) == {"model.num_queries": ("7", "the default")}


def test_a_key_without_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--train.epochs needs a value"):
        split_overrides(["--train.epochs", "--train.seed=1"])


def test_a_file_is_read_back_as_it_was_saved(tmp_path) -> None:
    config = Config().with_overrides({"data.scales": (5, 6), "model.name": "detr_tiny", "model.num_queries": 9})
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    assert Config.load(file) == config


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the standard library reads TOML since Python 3.11")
def test_toml_is_read(tmp_path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[train]\nepochs = 4\n[model]\nname = "detr_tiny"\nnum-queries = 8\n')
    config = Config.load(file)
    assert (config.train.epochs, config.model.options) == (4, {"num_queries": 8})


def test_a_damaged_file_is_named(tmp_path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"train": ')
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
        Config.load(file)


def test_a_file_of_a_list_is_refused(tmp_path) -> None:
    file = tmp_path / "config.json"
    file.write_text('[{"train": {"epochs": 3}}]')
    with pytest.raises(ConfigError, match=r"config\.json: must hold an object of sections"):
        Config.load(file)


def test_images_are_evaluated_as_large_as_they_are_trained() -> None:
    assert Config().data.shorter_side == 800
    assert Config().with_overrides({"data.scales": "64,96"}).data.shorter_side == 96
    assert Config().with_overrides({"data.scales": "64,96", "data.evaluation_size": 80}).data.shorter_side == 80


def test_help_lists_models_and_options() -> None:
    text = describe_models()
    assert all(name in text for name in MODELS)
    assert "--model.num_queries=100" in text
    assert "--model.position_embedding=sine" in text
    assert "--model.pre_norm=false" in text


def test_help_lists_every_setting_once() -> None:
    table = describe_settings()
    for key, (_, _, meaning) in settings().items():
        assert table.count(f"--{key}=") == 1
        assert meaning in table
