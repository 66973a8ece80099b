"""Data sets at URLs: over HTTP, through failures that pass, and past those that do not."""

from __future__ import annotations

import http.server
import io
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest

from detr_fast.data.check import check_data
from detr_fast.data.coco import CocoDetection
from detr_fast.data.faults import DataFault
from detr_fast.data.layouts import CocoPaths, find_split, find_splits
from detr_fast.data.remote import RemotePath
from detr_fast.data.shard_writer import write_shards
from tests.data.items import assert_same_items, items


def test_a_lost_connection_is_tried_again(source: CocoPaths, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(source, memory, "train")
    found = find_split(memory, "train")
    data = CocoDetection(found, on_fault="skip")
    files = type(fsspec.filesystem("memory"))
    original, failures = files.cat_file, [2]

    def unreliable(*args: Any, **options: Any) -> bytes:
        if failures[0]:
            failures[0] -= 1
            raise ConnectionError("reset by peer")
        return original(*args, **options)

    monkeypatch.setattr(files, "cat_file", unreliable)
    assert data[0][0].shape == (3, 30, 40)
    failures[0] = 100
    with pytest.raises(DataFault, match=r"train-000000\.tar: cannot be reached \(ConnectionError: reset by peer\)"):
        data[0]
    failures[0] = 100  # an image must not be left out on one process because of its network
    with pytest.raises(DataFault, match="cannot be reached"):
        CocoDetection(found, on_fault="skip")


class RangeServer(http.server.SimpleHTTPRequestHandler):
    """Python's file server with ranges, which object stores have and it has not."""

    ranges = True
    refusals: ClassVar[dict[str, list[int]]] = {}  # the next answers to requests for a file of this name

    def send_head(self) -> Any:
        if answers := self.refusals.get(self.path.rpartition("/")[2]):
            self.send_error(answers.pop(0))
            return None
        asked = self.headers.get("Range")
        file = Path(self.translate_path(self.path))
        if not asked or not self.ranges or not file.is_file():
            return super().send_head()
        first, last = (int(x) for x in asked.removeprefix("bytes=").split("-"))
        part = file.read_bytes()[first : last + 1]
        self.send_response(206 if part else 416)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return io.BytesIO(part)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a server of ``tmp_path``."""
    pytest.importorskip("aiohttp", reason="fsspec reads http:// with aiohttp")
    handler = type("Handler", (RangeServer,), {})
    RangeServer.refusals.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("workers", [0, 2])
def test_items_over_http(source: CocoPaths, tmp_path: Path, server: str, workers: int) -> None:
    write_shards(source, tmp_path / "shards", "val", images_per_shard=2)
    found = find_split(f"{server}/shards", "validation")
    assert list(find_splits(f"{server}/shards")) == ["val"]
    assert_same_items(items(found, workers), items(source))
    shard = tmp_path / "shards" / "val-000001.tar"
    data = CocoDetection(found)
    shard.write_bytes(shard.read_bytes()[:400])
    with pytest.raises(DataFault, match="the shard is truncated: 400 bytes of at least"):
        data[2]
    with pytest.raises(DataFault, match="the shard is truncated"):
        CocoDetection(found)


def test_a_server_that_does_not_answer_is_named(server: str) -> None:
    nobody = server.rpartition(":")[0] + ":9"
    with pytest.raises(DataFault, match=r":9/a/train\.index\.json: cannot be reached \(ClientConnectorError"):
        find_split(f"{nobody}/a", "train")
    with pytest.raises(FileNotFoundError, match=r"/a has no shards of split 'train'"):
        find_split(f"{server}/a", "train")


def test_a_server_without_ranges_is_named(
    source: CocoPaths, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(source, tmp_path / "shards", "train")
    monkeypatch.setattr(RangeServer, "ranges", False)
    with pytest.raises(DataFault, match=r"1\.png in .*the server sent \d+ bytes instead .*must serve ranges"):
        CocoDetection(find_split(f"{server}/shards", "train"))[0]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_fails_for_a_moment_is_asked_again(
    source: CocoPaths, tmp_path: Path, server: str, status: int
) -> None:
    write_shards(source, tmp_path / "shards", "train", images_per_shard=2)
    # Information takes two requests, HEAD and GET.
    for name, requests in (("train.index.json", 4), ("instances_train.json", 2), ("train-000001.tar", 4)):
        RangeServer.refusals[name] = [status] * requests
        data = CocoDetection(find_split(f"{server}/shards", "train"))
        assert not RangeServer.refusals[name]
    RangeServer.refusals["train-000001.tar"] = [status] * 2
    assert data[2][0].shape == (3, 20, 20)


def test_images_are_never_left_out_because_of_a_server(source: CocoPaths, tmp_path: Path, server: str) -> None:
    write_shards(source, tmp_path / "shards", "train", images_per_shard=2)
    found = find_split(f"{server}/shards", "train")
    data = CocoDetection(found)
    RangeServer.refusals["train-000001.tar"] = [503] * 1000
    reason = r"train-000001\.tar: cannot be reached \(ClientResponseError: 503"
    for ask in (lambda: CocoDetection(found, on_fault="skip"), lambda: CocoDetection(found), lambda: data[2]):
        with pytest.raises(DataFault, match=reason):
            ask()
    (fault,) = check_data(f"{server}/shards").faults
    assert re.search(reason, str(fault))
    del RangeServer.refusals["train-000001.tar"]
    RangeServer.refusals["instances_train.json"] = [503] * 3
    with pytest.raises(DataFault, match=r"instances_train\.json: cannot be reached \(ClientResponseError: 503"):
        CocoDetection(found)
    RangeServer.refusals["train-000001.tar"] = [404] * 1000  # this one is gone, and others are not
    assert CocoDetection(found, on_fault="skip").image_ids == (1, 2, 5)


class Answer(Exception):
    """Of a server, as the clients of stores keep it: each in its own place."""

    def __init__(self, status: int, place: str):
        super().__init__(f"status {status}")
        metadata = {"ResponseMetadata": {"HTTPStatusCode": status}}
        setattr(self, place, metadata if place == "response" else status)


@pytest.mark.parametrize("place", ["status", "status_code", "code", "response"])
@pytest.mark.parametrize(("status", "asked"), [(404, 1), (410, 1), (403, 1), (429, 3), (500, 3), (503, 3)])
def test_not_found_is_believed_if_the_server_said_so(
    memory: str, monkeypatch: pytest.MonkeyPatch, place: str, status: int, asked: int
) -> None:
    calls = []

    def info(self: Any, path: str, **options: Any) -> Any:
        calls.append(path)
        raise FileNotFoundError(path) from Answer(status, place)

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", info)
    if status in (404, 410):
        assert not RemotePath(f"{memory}/a").is_file()
    else:
        with pytest.raises(DataFault, match=rf"/a: cannot be reached \(Answer: status {status}\)"):
            RemotePath(f"{memory}/a").is_file()
    assert len(calls) == asked


def test_a_failure_that_nobody_explains_is_not_taken_for_a_missing_file(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def info(self: Any, path: str, **options: Any) -> Any:
        raise FileNotFoundError(path) from RuntimeError("payload is not completed")

    assert not RemotePath(f"{memory}/a").is_file()  # whose cause is a KeyError
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", info)
    with pytest.raises(DataFault, match="payload is not completed"):
        RemotePath(f"{memory}/a").is_file()


def test_stores_that_forbid_what_is_not_there(source: CocoPaths, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 without the right to list a bucket answers 403 for keys that do not exist."""
    files = type(fsspec.filesystem("memory"))
    info = files.info

    def forbidding(self: Any, path: str, **options: Any) -> Any:
        try:
            return info(self, path, **options)
        except FileNotFoundError:
            raise PermissionError("Forbidden") from None

    def forbidden(self: Any, path: str, **options: Any) -> Any:
        raise PermissionError("Forbidden")

    write_shards(source, memory, "train2017")
    monkeypatch.setattr(files, "info", forbidding)
    monkeypatch.setattr(files, "ls", forbidden)
    assert str(find_split(memory, "train").images) == f"{memory}/train2017-*.tar"
    assert list(find_splits(memory)) == ["train2017"]
    with pytest.raises(DataFault, match=r"val\.index\.json: cannot be reached \(PermissionError: Forbidden\)"):
        find_split(memory, "val")
    with pytest.raises(DataFault, match=r"train\.index\.json: cannot be reached \(PermissionError: Forbidden\)"):
        find_splits("memory://elsewhere/set")
