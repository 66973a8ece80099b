"""Data sets in shards: the same items as from the folder, conversions that go on, and faults that are named."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from detr_fast.data import shard_writer
from detr_fast.data.check import check_data
from detr_fast.data.coco import CocoDetection
from detr_fast.data.faults import DataFault
from detr_fast.data.layouts import CocoPaths, find_split, find_splits
from detr_fast.data.remote import RemotePath
from detr_fast.data.shard_writer import write_shards
from detr_fast.data.shards import Shards
from tests.data.items import assert_same_items, content_of, items

NOT_UTF_8 = os.fsdecode(b"caf\xe9.png")
UNUSUAL = ["sub/folder/a.b.png", "with space.png", "grüße-日本.png", "UPPER.PNG", "no_suffix", "x.json", ".png"]


@pytest.mark.parametrize("workers", [0, 2])
def test_items_are_those_of_the_folder(source: CocoPaths, tmp_path: Path, memory: str, workers: int) -> None:
    for place in (str(tmp_path / "shards"), memory):
        written = write_shards(source, place, "train", images_per_shard=2)
        assert (written.images, written.shards, written.kept, written.faults) == (5, 3, 0, ())
        found = find_split(place, "train")
        assert found.annotations.read_bytes() == source.annotations.read_bytes()
        assert_same_items(items(found, workers), items(source))
        copied = pickle.loads(pickle.dumps(found))  # workers that are spawned get a copy
        assert_same_items(items(copied), items(source))


def test_a_shard_is_read_by_tarfile_in_pairs(source: CocoPaths, tmp_path: Path) -> None:
    write_shards(source, tmp_path, "train", images_per_shard=3)
    names = []
    for shard in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
            names += [member.name for member in members]
            for picture, labels in zip(members[::2], members[1::2], strict=True):
                said = json.load(tar.extractfile(labels))  # type: ignore[arg-type]
                folder = source.images / said["image"]["file_name"]
                assert tar.extractfile(picture).read() == folder.read_bytes()  # type: ignore[union-attr]
                assert all(a["image_id"] == said["image"]["id"] for a in said["annotations"])
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert names == [f"{image:012d}.{suffix}" for image in range(1, 6) for suffix in ("png", "json")]


def test_unusual_file_names(source: CocoPaths, tmp_path: Path) -> None:
    names = [*UNUSUAL, NOT_UTF_8]
    content = json.loads(source.annotations.read_text())
    pixels = (source.images / "1.png").read_bytes()
    content["images"] = [{"id": i, "file_name": n, "width": 40, "height": 30} for i, n in enumerate(names, start=1)]
    content["images"].append({"id": 2**40, "file_name": UNUSUAL[0], "width": 40, "height": 30})  # listed twice
    source.annotations.write_text(json.dumps(content))
    for name in names:
        (source.images / name).parent.mkdir(parents=True, exist_ok=True)
        (source.images / name).write_bytes(pixels)
    write_shards(source, tmp_path / "shards", "train")
    found = find_split(tmp_path / "shards", "train")
    assert_same_items(items(found), items(source))
    with tarfile.open(tmp_path / "shards" / "train-000000.tar") as tar:
        keys = [name.split(".") for name in tar.getnames()]
    assert all(len(key) == 2 for key in keys)
    assert [suffix for _, suffix in keys[::2]] == ["png", "png", "png", "PNG", "image", "image", "image", "png", "png"]
    assert len({tuple(key) for key in keys}) == len(keys)


def test_an_interrupted_conversion_keeps_complete_shards(
    source: CocoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(source, tmp_path / "straight", "train", images_per_shard=2)
    original, written = shard_writer._write_shard, []

    def write_two(file: Any, pairs: Any, advance: Any) -> None:
        if len(written) == 2:
            file.write(b"a part")
            raise KeyboardInterrupt
        written.append(pairs)
        original(file, pairs, advance)

    broken = tmp_path / "broken"
    monkeypatch.setattr(shard_writer, "_write_shard", write_two)
    with pytest.raises(KeyboardInterrupt):
        write_shards(source, broken, "train", images_per_shard=2)
    monkeypatch.setattr(shard_writer, "_write_shard", original)
    assert sorted(content_of(broken)) == ["train-000000.tar", "train-000001.tar"]
    with pytest.raises(FileNotFoundError, match="has no annotations of split 'train'"):
        find_split(broken, "train")
    (broken / "train-000001.tar").write_bytes((broken / "train-000001.tar").read_bytes()[:-600])
    with pytest.raises(DataFault, match=r"train-000001\.tar: is in the way"):  # nothing says any more whose it is
        write_shards(source, broken, "train", images_per_shard=2)
    (broken / "train-000001.tar").unlink()
    (broken / ".train-000002.tar.abc.part").write_bytes(b"of a process that was killed")
    kept = (broken / "train-000000.tar").stat().st_ino
    assert write_shards(source, broken, "train", images_per_shard=2).kept == 1
    assert (broken / "train-000000.tar").stat().st_ino == kept
    assert content_of(broken) == content_of(tmp_path / "straight")
    assert write_shards(source, broken, "train", images_per_shard=2).kept == 3

    monkeypatch.setattr(shard_writer, "_write_shard", write_two)
    with pytest.raises(KeyboardInterrupt):
        write_shards(source, broken, "train", images_per_shard=3)
    with pytest.raises(FileNotFoundError, match=r"no folder of its images; looked for .*train\.index\.json"):
        find_split(broken, "train")  # what is left of two conversions is not taken for a data set


def test_shards_with_other_members_are_written_anew(source: CocoPaths, tmp_path: Path, memory: str) -> None:
    for place in (str(tmp_path), memory):
        write_shards(source, place, "train", images_per_shard=1)
    content = json.loads(source.annotations.read_text())
    content["annotations"][0]["bbox"] = [2, 1, 9, 8]  # as long as before
    source.annotations.write_text(json.dumps(content))
    assert write_shards(source, tmp_path, "train", images_per_shard=1).kept == 4
    for place in (str(tmp_path), memory):  # fewer, larger shards: the others must not stay
        assert write_shards(source, place, "train", images_per_shard=4).kept == 0
        assert_same_items(items(find_split(place, "train")), items(source))
    assert sorted(file.name for file in tmp_path.glob("*.tar")) == ["train-000000.tar", "train-000001.tar"]
    assert sum(name.endswith(".tar") for name in RemotePath(memory).names()) == 2


def test_faults_of_the_source_are_named_or_left_out(source: CocoPaths, tmp_path: Path) -> None:
    (source.images / "2.png").unlink()
    (source.images / "5.png").write_bytes((source.images / "5.png").read_bytes()[:-30])
    with pytest.raises(DataFault, match=r"2\.png: file not found"):
        write_shards(source, tmp_path / "a", "train", images_per_shard=2)
    assert not (tmp_path / "a").exists()
    written = write_shards(source, tmp_path / "a", "train", images_per_shard=2, on_fault="skip")
    assert [fault.image for fault in written.faults] == ["2.png", "5.png"]
    skipped = CocoDetection(source, on_fault="skip")
    data = CocoDetection(find_split(tmp_path / "a", "train"))
    assert data.image_ids == skipped.image_ids == (1, 3, 4)
    assert_same_items(list(DataLoader(data, None)), list(DataLoader(skipped, None)))

    Image.new("RGB", (50, 60)).save(source.images / "2.png")
    with pytest.raises(DataFault, match=r"5\.png: cannot be read"):
        write_shards(source, tmp_path / "b", "train", images_per_shard=2)
    assert sorted(content_of(tmp_path / "b")) == ["train-000000.tar", "train-000001.tar"]


def test_splits_are_found_under_their_other_names(source: CocoPaths, tmp_path: Path, memory: str) -> None:
    for place in (str(tmp_path), memory):
        for split in ("valid", "train2017"):
            write_shards(source, place, split)
        assert str(find_split(place, "val").images) == f"{place}/valid-*.tar"
        assert str(find_split(place, "train").images) == f"{place}/train2017-*.tar"
        assert list(find_splits(place)) == ["train2017", "valid"]
    assert find_split(f"file://{tmp_path}", "val") == find_split(tmp_path, "val")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("memory://nowhere/at-all", "has no shards of split 'train'; looked for train.index.json, train2017.index"),
        ("nothing-known://a/b", r"nothing-known://a/b/train\.index\.json: cannot be reached \(ValueError: Protocol"),
    ],
)
def test_urls_without_shards(path: str, reason: str) -> None:
    with pytest.raises((FileNotFoundError, DataFault), match=reason):
        find_split(path, "train")
    with pytest.raises((FileNotFoundError, DataFault)):
        find_splits(path)


def truncate(root: Path) -> None:
    (root / "train-000001.tar").write_bytes((root / "train-000001.tar").read_bytes()[:600])


def remove(root: Path) -> None:
    (root / "train-000001.tar").unlink()


def change_index(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((root / "train.index.json").read_text())
    change(content)
    (root / "train.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, r"train-000001\.tar: the shard is truncated: 600 bytes of \d+$"),
        (remove, r"train-000001\.tar: the shard is missing$"),
        (partial(change_index, change=lambda c: c.update(version=2)), r"train\.index\.json: has version 2, .* update"),
        (
            partial(change_index, change=lambda c: c["images"].pop("3.png")),
            r"train\.index\.json: does not fit .*'3\.png'",
        ),
        (partial(change_index, change=lambda c: c.pop("images")), r"train\.index\.json: is no index .*'images'"),
        (partial(change_index, change=lambda c: c["images"].update(x=[7, 0, 1])), r"train\.index\.json: is no index"),
        (partial(change_index, change=lambda c: c["images"].update(x=["a"])), r"train\.index\.json: is no index"),
        (lambda root: (root / "train.index.json").write_text("{"), r"train\.index\.json: is no index"),
    ],
)
def test_damage_is_named_before_training(
    source: CocoPaths, tmp_path: Path, damage: Callable[[Path], Any], reason: str
) -> None:
    write_shards(source, tmp_path, "train", images_per_shard=2)
    damage(tmp_path)
    with pytest.raises(DataFault, match=reason) as error:
        CocoDetection(find_split(tmp_path, "train"))
    assert "\n" not in str(error.value)


def test_damaged_shards_lose_their_images_only(source: CocoPaths, tmp_path: Path) -> None:
    write_shards(source, tmp_path, "train", images_per_shard=2)
    found = find_split(tmp_path, "train")
    assert isinstance(found.images, Shards)
    whole = CocoDetection(found)
    truncate(tmp_path)
    with pytest.raises(DataFault, match=r"3\.png in .*train-000001\.tar: cannot be read \(the shard is truncated: 600"):
        whole[2]
    assert CocoDetection(found, on_fault="skip").image_ids == (1, 2, 5)
    remove(tmp_path)
    with pytest.raises(DataFault, match=r"3\.png in .*train-000001\.tar: cannot be read \(the shard is missing"):
        whole[2]
    faults = check_data(tmp_path).faults
    assert [fault.kind for fault in faults] == ["unreadable file"] * 2
    assert [fault.image for fault in faults] == ["train/3.png", "train/4.png"]
    with pytest.raises(FileNotFoundError, match=r"train\.index\.json has no image 'x\.png'"):
        (found.images / "x.png").read_bytes()


def test_check_data_of_shards_and_of_their_url(source: CocoPaths, tmp_path: Path, memory: str) -> None:
    folder = check_data(source.annotations.parent.parent)
    for place in (str(tmp_path), memory):
        write_shards(source, place, "train", images_per_shard=2)
        report = check_data(place)
        assert "images in train-*.tar\n" in str(report)
        assert report.splits[0].digests == folder.splits[0].digests
        assert (report.faults, report.notes) == (folder.faults, folder.notes)


def test_shards_of_shards(source: CocoPaths, tmp_path: Path) -> None:
    write_shards(source, tmp_path / "a", "train", images_per_shard=2)
    write_shards(find_split(tmp_path / "a", "train"), tmp_path / "b", "train", images_per_shard=3)
    write_shards(source, tmp_path / "c", "train", images_per_shard=3)
    assert content_of(tmp_path / "b") == content_of(tmp_path / "c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "a/b"}, "split must be letters, digits, '_' and '-', got 'a/b'"),
        ({"split": "a", "images_per_shard": 0}, "images_per_shard must be at least 1, got 0"),
        ({"split": "a", "on_fault": "x"}, "on_fault must be 'raise' or 'skip', got 'x'"),
    ],
)
def test_arguments(source: CocoPaths, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards(source, tmp_path, **options)
