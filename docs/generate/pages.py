"""A hook of MkDocs: a page for every public module, the examples, and parts of other documents of the repository.

Modules are found in the folder, so that a new file has its page by itself. A line ``<!-- from FILE -->`` in a page
stands for that file, ``<!-- from FILE, section HEADING -->`` for one section of it; with ``, without heading`` all but
the first line. What the line says before it ("See ...") is for those who read the page in the repository.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "detr_fast"

_PART = re.compile(r"^(?:See .+ )?<!-- from (\S+?)(?:, section (.+?))?(, without heading)? -->$", re.MULTILINE)
_FENCE = re.compile(r"^(```|~~~)")
_HEADING = re.compile(r"^(#+) (.*)$")
_LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:|#)([^)]+)\)")  # to a file, which the site does not have

# Folders in the order of the menu; of the engine only what others call.
_FOLDERS = {"": "Matching and losses", "ops": "ops", "integrations": "integrations", "models": "models"}
_FOLDERS |= {"layers": "layers", "data": "data", "engine": "engine"}
_ENTRY_POINTS = ("config", "train", "evaluate", "predict", "checkpoint", "profile", "report", "errors")


def modules(package: Path = PACKAGE) -> Iterator[tuple[str, Path]]:
    """Dotted names without the package's, and files, of all modules that have a page."""
    for folder in _FOLDERS:
        pattern = "*.py" if folder in ("", "ops", "engine") else "**/*.py"
        for file in sorted((package / folder).glob(pattern)):
            name = ".".join(file.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
            if file.stem.startswith("_") and file.stem != "__init__":
                continue
            if name == "__init__" or (folder == "engine" and file.stem not in _ENTRY_POINTS):
                continue
            # A code base is one page, however many files its adapter has.
            if folder == "integrations" and name.count(".") > 1:
                continue
            if ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))):
                yield name, file


def page_of(name: str) -> str:
    return f"api/{name}.md"


def content_of(name: str, file: Path) -> str:
    page = f"# detr_fast.{name}\n\n::: detr_fast.{name}\n"
    if file.stem == "__init__":
        page += f"    options:\n      members: {_members(name, file) or 'false'}\n"
    return page


def _members(name: str, file: Path) -> list[str]:
    """Of a package: what it defines; what it imports has its place on the pages of its modules, but for adapters."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    if name.startswith("integrations."):
        for statement in body:
            if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "__all__":
                return list(ast.literal_eval(statement.value))
    names = [statement.name for statement in body if isinstance(statement, (ast.FunctionDef, ast.ClassDef))]
    return [name for name in names if not name.startswith("_")]


def index() -> str:
    """A table of all modules with their first sentence."""
    lines = ["# API", "", "| module | what it is |", "|---|---|"]
    for name, file in modules():
        first = " ".join(_docstring(file).split("\n\n")[0].split()).replace("|", "\\|").removesuffix("::")
        lines.append(f"| [`{name}`]({page_of(name).removeprefix('api/')}) | {first} |")
    return "\n".join(lines) + "\n"


def examples() -> str:
    """All programs of docs/examples, with what they say about themselves as text."""
    lines = ["# Examples", "", "Programs in `docs/examples/`, which the tests run."]
    for file in sorted((REPOSITORY / "docs" / "examples").glob("*.py")):
        source = file.read_text(encoding="utf-8")
        body = ast.parse(source).body
        start = (body[0].end_lineno or 0) if _docstring(file) else 0
        code = "\n".join(source.splitlines()[start:]).strip()
        lines += ["", f"## {file.name}", "", _docstring(file), "", "```python", code, "```"]
    return "\n".join(lines) + "\n"


def _docstring(file: Path) -> str:
    found = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return found.replace("``", "`").replace("::\n", ":\n")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages of the API at the end of the menu, by folder."""
    menu: dict[str, list[Any]] = {title: [] for title in _FOLDERS.values()}
    for name, _ in modules():
        folder, _, rest = name.partition(".")
        title = _FOLDERS[folder] if folder in _FOLDERS else _FOLDERS[""]
        menu[title].append({rest or name: page_of(name)})
    sections = [{title: pages} for title, pages in menu.items() if pages]
    config.nav = [*(config.nav or []), {"API": ["api/index.md", *sections]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages that were written by hand win."""
    generated = {"examples.md": examples(), "api/index.md": index()}
    generated |= {page_of(name): content_of(name, file) for name, file in modules()}
    for path, content in generated.items():
        if files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _PART.sub(lambda found: part(found[1], found[2], not found[3]), markdown)


def part(path: str, section: str | None, with_heading: bool = True) -> str:
    """A file of the repository, or a section with all below it."""
    text = _LINK.sub(r"\1 (`\2`)", (REPOSITORY / path).read_text(encoding="utf-8"))
    if section is None:
        return text if with_heading else text.partition("\n")[2]
    taken: list[str] = []
    level, inside_fence = 0, False
    for line in text.splitlines():
        inside_fence ^= bool(_FENCE.match(line))
        heading = None if inside_fence else _HEADING.match(line)
        if heading and level and len(heading[1]) <= level:
            break
        if heading and not level and heading[2] == section:
            level = len(heading[1])
            taken += [line] if with_heading else []
        elif level:
            taken.append(line)
    if not level:
        raise ValueError(f"{path}: section must be one of its headings, got {section!r}")
    return "\n".join(taken)
