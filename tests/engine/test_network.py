"""Two hosts, that is two network namespaces joined by a virtual cable, which is pulled out in mid-training."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from detr_fast.engine.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow
TIMEOUT = 8  # seconds that a process waits for the other
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces; skips where they may not be made."""
    if shutil.which("ip") is None:
        pytest.skip("there is no ip (package iproute2)")
    names = f"detr-one-{os.getpid()}", f"detr-two-{os.getpid()}"
    cables = f"veth1-{os.getpid()}", f"veth2-{os.getpid()}"
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted: {error.stderr.strip()}")
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "link", "set", cable, "name", "eth0")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start(host: str, rank: int, words: list[str]) -> subprocess.Popen[str]:
    place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": 29555}
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "detr_fast", "train", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(folder: Path, count: int, running: list[subprocess.Popen[str]]) -> None:
    until = time.monotonic() + 90
    log = folder / "log.jsonl"
    while not (log.exists() and log.read_text().count('"kind": "step"') >= count):
        assert all(process.poll() is None for process in running), running[0].communicate()
        assert time.monotonic() < until, "training did not start"
        time.sleep(0.05)


def test_a_cut_network_ends_both_with_one_line_and_they_continue(
    hosts: tuple[str, str], arguments: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = [*arguments, f"--train.output={folder}", "--resume=auto", "--train.log_steps=1", "--evaluate.every=0"]
    words += ["--train.checkpoint_steps=1", f"--distributed.timeout_seconds={TIMEOUT}"]
    endless = [*words, "--train.epochs=100000"]
    running = [start(host, rank, endless) for rank, host in enumerate(hosts)]
    try:
        wait_for_steps(folder, 4, running)
        ip("-n", hosts[0], "link", "set", "eth0", "down")
        cut = time.monotonic()
        for process in running:
            _, errors = process.communicate(timeout=10 * TIMEOUT)
            assert process.returncode == 2, errors
            lines = [line for line in errors.splitlines() if line.startswith("detr-fast: error")]
            assert len(lines) == 1, errors
            assert "another process ended or does not answer" in lines[0]
            assert "Traceback" not in errors
        assert time.monotonic() - cut < 5 * TIMEOUT
    finally:
        for process in running:
            process.kill()
    place = load_checkpoint(folder / "last.pth")["place"]
    ip("-n", hosts[0], "link", "set", "eth0", "up")
    more = [*words, f"--train.epochs={place['epoch'] + 1}"]
    running = [start(host, rank, more) for rank, host in enumerate(hosts)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert load_checkpoint(folder / "last.pth")["place"]["epoch"] == place["epoch"] + 1
