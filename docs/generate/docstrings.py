"""An extension of Griffe: signatures as they stand in the source, with their comments, and our docstrings as Markdown.

Shapes of tensors stand in comments of the parameters (``cost: Tensor,  # [L, T, Q]``). They are half of the
documentation, and no parser of signatures keeps them.
"""

from __future__ import annotations

import ast
import re
import textwrap
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):`~?([\w.]+)`")
_SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Attributes):\n((?:[ \t]+.*\n?|\n)+)", re.MULTILINE)
_ITEM = re.compile(r"^([\w, *.`]+?): ")
_TITLES = {"Args": "Arguments"}
_TABLE = re.compile(r"^(={4,} +=[= ]*\n(?:.*\n)*?={4,} +=[= ]*\n(?:(?:.+\n)+?={4,} +=[= ]*\n)?)", re.MULTILINE)
_IMPORT = re.compile(r"^((?:from|import) detr_fast.*)$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Runs when the whole package is known, so that names can be resolved."""

    def on_module(self, *, mod: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        _rewrite(mod, loader, "")

    def on_class(self, *, cls: griffe.Class, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        node = _node(cls)
        if isinstance(node, ast.ClassDef):
            _rewrite(cls, loader, _signature_of_class(cls.source.splitlines(), node))

    def on_function(self, *, func: griffe.Function, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        node = _node(func)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            _rewrite(func, loader, _signature(func.source.splitlines(), node))


def _node(obj: griffe.Object) -> ast.stmt | None:
    try:
        body = ast.parse(textwrap.dedent(obj.source)).body
    except SyntaxError:
        return None
    return body[0] if body else None


def _signature(lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return textwrap.dedent("\n".join(lines[node.lineno - 1 : max(node.body[0].lineno - 1, node.lineno)]))


def _signature_of_class(lines: list[str], node: ast.ClassDef) -> str:
    """The constructor, or the fields of a class that has none."""
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            signature = _signature(lines, statement).replace("def __init__", f"class {node.name}", 1)
            return re.sub(r"\(\s*self(,\s*)?", "(" if "\n" not in signature else "(\n    ", signature, count=1)
    fields = [
        "\n".join(lines[statement.lineno - 1 : statement.end_lineno])
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and not getattr(statement.target, "id", "_").startswith("_")
    ]
    if not fields:
        return ""
    return "\n".join([*lines[node.lineno - 1 : node.body[0].lineno - 1], textwrap.indent(_dedented(fields), "    ")])


def _dedented(fields: list[str]) -> str:
    return textwrap.dedent("\n".join(fields))


def _rewrite(obj: griffe.Object, loader: griffe.GriffeLoader, signature: str) -> None:
    if obj.docstring is None:
        return
    text = _SECTION.sub(_section, obj.docstring.value + "\n")
    text = _TABLE.sub(r"```text\n\1```\n", text)
    text = _IMPORT.sub(r"```python\n\1\n```", text)
    text = _ROLE.sub(lambda found: _reference(obj, loader, found[1]), text).replace("::\n", ":\n")
    obj.docstring.value = f"```python\n{signature}\n```\n\n{text}" if signature else text


def _section(found: re.Match[str]) -> str:
    """``Args:`` and the like as lists."""
    items: list[str] = []
    for line in textwrap.dedent(found[2]).splitlines():
        if line and not line[0].isspace():
            items.append("- " + _ITEM.sub(lambda name: f"`{name[1].strip('`')}`: ", line))
        elif line:
            items.append("  " + line)
    return f"**{_TITLES.get(found[1], found[1])}**\n\n" + "\n".join(items) + "\n\n"


def _reference(obj: griffe.Object, loader: griffe.GriffeLoader, name: str) -> str:
    """A link, if the name has a place on some page."""
    return f'<autoref identifier="{_path(obj, loader, name)}" optional><code>{name}</code></autoref>'


def _path(obj: griffe.Object, loader: griffe.GriffeLoader, name: str) -> str:
    scope: griffe.Object | None = obj
    while scope is not None and not name.startswith("detr_fast."):
        if name.partition(".")[0] in scope.members:
            return _canonical(loader, f"{scope.path}.{name}")
        scope = scope.parent if not scope.is_module else None
    return _canonical(loader, name if name.startswith("detr_fast.") else f"{obj.module.path}.{name}")


def _canonical(loader: griffe.GriffeLoader, path: str) -> str:
    try:
        return loader.modules_collection[path].canonical_path
    except (KeyError, griffe.GriffeError):
        return path
