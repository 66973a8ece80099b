"""Where shards are written: never over their own source, nor over what someone else has put there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import pytest

from detr_fast.__main__ import main
from detr_fast.data.faults import DataFault
from detr_fast.data.layouts import CocoPaths, find_split
from detr_fast.data.remote import RemotePath
from detr_fast.data.shard_writer import write_shards
from tests.data.items import assert_same_items, content_of, items


@pytest.mark.parametrize("spelling", ["same", "relative", "roundabout", "link", "file URL"])
@pytest.mark.parametrize("given", ["same", "relative", "link"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_are_not_written_over_themselves(
    source: CocoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str, given: str, split: str
) -> None:
    place = tmp_path / "sh"
    write_shards(source, place, "train", images_per_shard=2)
    (tmp_path / "link").symlink_to(place)
    monkeypatch.chdir(tmp_path)
    spellings = {
        "same": str(place),
        "relative": "sh",
        "roundabout": f"{tmp_path}/link/../sh/.",
        "link": "link",
        "file URL": f"file://{place}",
    }
    before = content_of(place)
    with pytest.raises(ValueError, match="destination must be another place than the source, got "):
        write_shards(find_split(spellings[given], "train"), spellings[spelling], split, images_per_shard=3)
    assert content_of(place) == before


@pytest.mark.parametrize("place", ["memory://bucket/set", "memory:///bucket/set/", "memory://bucket/a/../set/."])
def test_shards_at_a_url_are_not_written_over_themselves(source: CocoPaths, memory: str, place: str) -> None:
    write_shards(source, memory, "train", images_per_shard=2)
    before = dict(fsspec.filesystem("memory").store)
    with pytest.raises(ValueError, match="destination must be another place than the source, got "):
        write_shards(find_split(memory, "train"), place, "train", images_per_shard=3)
    assert fsspec.filesystem("memory").store == before
    assert not RemotePath(memory).is_at(RemotePath("memory://bucket/other"))


@pytest.mark.parametrize("on_fault", ["--skip-faults", None])
def test_the_annotations_of_the_source_are_not_written_over(
    source: CocoPaths, tmp_path: Path, on_fault: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    root = source.annotations.parent.parent
    (tmp_path / "link").symlink_to(root)
    if on_fault:
        Path(source.images / "2.png").unlink()  # type: ignore[arg-type]
    before = content_of(root)
    for destination in (root, tmp_path / "link"):
        assert main(["shard", str(root), str(destination), *([on_fault] if on_fault else [])]) == 2
        assert "destination must be another place than the source" in capsys.readouterr().err
    assert content_of(root) == before


STRANGERS = {
    "train-000123.tar": b"somebody else's shard",
    "train-000000.tar": b"x" * 5000,
    "annotations/instances_train.json": b"somebody else's annotations",
    "train.index.json": b"somebody else's index",
}


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("at", ["folder", "memory"])
def test_what_others_have_written_stays(source: CocoPaths, tmp_path: Path, memory: str, name: str, at: str) -> None:
    if at == "folder":
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(STRANGERS[name])
        place = str(tmp_path / "out")
    else:
        fsspec.filesystem("memory").pipe(f"{memory}/{name}", STRANGERS[name])
        place = memory
    with pytest.raises(DataFault, match=rf"{name}: is (in the way|no index of shards)"):
        write_shards(source, place, "train", images_per_shard=2)
    if at == "folder":
        assert content_of(tmp_path / "out") == {name: STRANGERS[name]}
    else:
        assert fsspec.filesystem("memory").find(memory) == [f"/bucket/set/{name}"]


def test_what_detr_fast_has_written_is_replaced(source: CocoPaths, tmp_path: Path, memory: str) -> None:
    for place in (str(tmp_path / "out"), memory):
        write_shards(source, place, "train", images_per_shard=1)
    (tmp_path / "out" / "train-000003.tar").write_bytes(b"damaged since, and known to the index")
    (tmp_path / "out" / "train-000001.tar.gz").write_bytes(b"none of ours")
    content = json.loads(source.annotations.read_text())
    content["annotations"].pop()
    source.annotations.write_text(json.dumps(content))
    for place in (str(tmp_path / "out"), memory):
        write_shards(source, place, "train", images_per_shard=3)
        assert_same_items(items(find_split(place, "train")), items(source))
    assert sorted(file.name for file in (tmp_path / "out").glob("*.tar*")) == [
        "train-000000.tar",
        "train-000001.tar",
        "train-000001.tar.gz",
    ]
    (tmp_path / "out" / "train.index.json").unlink()  # as after an interruption
    content["annotations"].pop()
    source.annotations.write_text(json.dumps(content))
    write_shards(source, tmp_path / "out", "train", images_per_shard=2)
    assert_same_items(items(find_split(tmp_path / "out", "train")), items(source))


def test_names_of_all_splits_are_checked_before_the_first_is_written(
    source: CocoPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = source.annotations.parent.parent, tmp_path / "out"
    shutil.copytree(root / "train", root / "my split")
    shutil.copy(source.annotations, root / "annotations" / "instances_my split.json")
    assert main(["shard", str(root), str(out)]) == 2
    assert "give it another name: --split 'my split' --name NAME" in capsys.readouterr().err
    assert not out.exists()
    assert main(["shard", str(root), str(out), "--split", "my split", "--name", "mine"]) == 0
    assert_same_items(items(find_split(out, "mine")), items(source))
    assert main(["shard", str(root), str(out), "--name", "mine"]) == 2
    assert "--name goes with --split" in capsys.readouterr().err
