"""The guides are true: their Python is run, their commands are parsed, the files they name exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from detr_fast.__main__ import _parser
from detr_fast.engine.config import Config, split_overrides

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted((REPOSITORY / "docs").rglob("*.md"))
NAMES = [str(page.relative_to(REPOSITORY / "docs")) for page in PAGES]

_FENCE = re.compile(r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
# Programs whose arguments are not ours to judge.
_FOREIGN = ("pip", "pipx", "tests/packaging/wheel_smoke.sh")


class Block(NamedTuple):
    language: str
    text: str
    line: int  # of the first of its text
    reason: str | None  # why it is not run


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["text"], text.count("\n", 0, found.start("text")) + 1, found["reason"])
        for found in _FENCE.finditer(text)
    ]


def commands(page: Path) -> list[list[str]]:
    texts = [block.text.replace("\\\n", " ") for block in blocks(page) if block.language == "sh"]
    lines = [shlex.split(line, comments=True) for text in texts for line in text.splitlines()]
    return [words for words in lines if words]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, one after the other, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "documentation"}
    for block in blocks(page):
        if block.language == "python" and block.reason is None:
            padding = "\n" * (block.line - 1)  # so that an error names the line of the page
            exec(compile(padding + block.text, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist(page: Path) -> None:
    for words in commands(page):
        line = shlex.join(words)
        while "=" in words[0] and not words[0].startswith("-"):
            words = words[1:]
        if words[0] == "torchrun":
            words = ["detr-fast", *words[words.index("detr_fast") + 1 :]]
        if words[0] == "detr-fast":
            check_command(line, words[1:])
        elif words[0] == "make":
            targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
            assert set(words[1:]) <= set(targets), f"{line}: the Makefile has no such target"
        elif words[:2] == [".venv/bin/python", "-m"]:
            check_benchmark(line, words[2:])
        else:
            assert words[0] in _FOREIGN, f"{line}: a command that this test does not know"


def check_command(line: str, words: list[str]) -> None:
    overrides, rest = split_overrides(words)
    _, unknown = _parser().parse_known_args(rest)
    assert not unknown, f"{line}: no argument is called {unknown[0]}"
    Config().with_overrides(overrides)


def check_benchmark(line: str, words: list[str]) -> None:
    if words[0] == "benchmarks.run":
        from benchmarks.run import parser

        parser().parse_args(words[1:])
    else:
        assert (REPOSITORY / f"{words[0].replace('.', '/')}.py").is_file(), f"{line}: no such module"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_exist(page: Path) -> None:
    """What stands between backticks and begins with a folder of the repository, up to the first word in capitals."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for name in re.findall(r"`((?:benchmarks|csrc|detr_fast|docs|tests)/[\w./-]*)[^`]*`", text):
        path = re.split(r"[A-Z]{3,}", name)[0]
        assert (REPOSITORY / path).exists(), f"{page.name}: {name} must exist"


def test_a_block_that_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- not run: no -->\n```python\n1 / 0\n```\n\n```python\nassert 1 == 2\n```\n")
    with pytest.raises(AssertionError):
        test_python_runs(page, tmp_path, monkeypatch)
    page.write_text("```sh\ndetr-fast train DATA --train.epoch=1\n```\n")
    with pytest.raises(ValueError, match=r"did you mean train\.epochs"):
        test_commands_exist(page)
    page.write_text("`tests/no_such_file.py`\n")
    with pytest.raises(AssertionError, match="must exist"):
        test_files_exist(page)
