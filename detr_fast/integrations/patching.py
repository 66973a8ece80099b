"""Puts this package's losses and matchers into an installed code base, and takes them out again."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, MutableMapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from detr_fast.integrations.mode import Mode, check_mode

# Installed package -> module here, with replacements(mode) -> Sequence[Replacement] and check_version().
CODE_BASES = {
    "transformers": "detr_fast.integrations.transformers",
    "rfdetr": "detr_fast.integrations.rfdetr",
}


ABSENT = object()


class Replacement(NamedTuple):
    """One place of a code base and what belongs there instead: an attribute, or an entry if `owner` is a mapping."""

    owner: Any  # module, class or mapping
    attribute: str
    value: Any
    report: Callable[[], str | None] | None = None  # what `value` skipped since the last report; may wait for a device

    def current(self) -> Any:
        """What is there now; `ABSENT` if nothing is."""
        entries = self.owner if isinstance(self.owner, MutableMapping) else vars(self.owner)
        return entries.get(self.attribute, ABSENT)

    def put(self, value: Any) -> None:
        if isinstance(self.owner, MutableMapping):
            self.owner[self.attribute] = value
        else:
            setattr(self.owner, self.attribute, value)


class Patch:
    """What :func:`patch` changed. Take it back with :meth:`undo`, or by leaving a ``with`` block."""

    def __init__(self, code_base: str, mode: Mode, replacements: Sequence[Replacement]) -> None:
        self.code_base, self.mode = code_base, mode
        self._replacements = tuple(replacements)
        self._originals = [replacement.current() for replacement in self._replacements]
        for replacement, original in zip(self._replacements, self._originals, strict=True):
            if original is ABSENT:
                raise ImportError(f"patch: {replacement.owner!r} must have {replacement.attribute!r}", name=code_base)
        self._is_undone = False
        for replacement in self._replacements:
            replacement.put(replacement.value)

    @property
    def is_active(self) -> bool:
        return not self._is_undone

    def undo(self) -> None:
        """Puts back what was there. A second call does nothing; what others replaced or deleted since stays theirs.

        After an error, the patch is still active and may be undone again.
        """
        if self._is_undone:
            return
        for replacement, original in zip(self._replacements, self._originals, strict=True):
            if replacement.current() is replacement.value:
                replacement.put(original)
        self._is_undone = True
        if _active.get(self.code_base) is self:
            del _active[self.code_base]

    def report(self) -> str | None:
        """What the matchers skipped since the last report (predictions that are not finite), or None.

        Waits for the device.
        """
        reporters = dict.fromkeys(x.report for x in self._replacements if x.report is not None)
        found = [text for text in (reporter() for reporter in reporters) if text is not None]
        return "; ".join(found) or None

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        places = f"{len(self._replacements)} places" if self.is_active else "undone"
        return f"Patch({self.code_base!r}, mode={self.mode!r}, {places})"


class _NestedPatch(Patch):
    """A patch of what is patched already: changes nothing, nor does undoing it, and it ends with the other."""

    def __init__(self, outer: Patch) -> None:
        super().__init__(outer.code_base, outer.mode, ())
        self._outer = outer

    @property
    def is_active(self) -> bool:
        return self._outer.is_active and not self._is_undone

    def undo(self) -> None:
        self._is_undone = True

    def report(self) -> str | None:
        return self._outer.report()


_active: dict[str, Patch] = {}


def patch(code_base: str, mode: Mode = "stable") -> Patch:
    """Replaces the losses of an installed code base by this package's, in the whole process, until the patch is undone.

    ``detr_fast.patch("transformers")`` before training is all there is to do; ``with detr_fast.patch("transformers"):``
    undoes it at the end. What is replaced and every difference stands in the docstring of the code base's module,
    `detr_fast.integrations.transformers` and `detr_fast.integrations.rfdetr`.

    Patching again in the same mode changes nothing, and undoing that second patch neither: the first one decides.

    Args:
        code_base: "transformers" or "rfdetr".
        mode: "compat" computes the code base's own numbers, with its faults; "stable" the right ones.

    Raises:
        ValueError: an unknown code base or mode.
        ImportError: the code base is not installed, or in a version that is not known.
        RuntimeError: it is patched in the other mode; undo that first.
    """
    if code_base not in CODE_BASES:
        known = " or ".join(map(repr, CODE_BASES))
        raise ValueError(f"patch: code_base must be {known}, got {code_base!r}")
    check_mode("patch", mode)
    if code_base in _active:
        outer = _active[code_base]
        if outer.mode != mode:
            raise RuntimeError(
                f"patch: {code_base} is patched with mode={outer.mode!r}; undo that patch before mode={mode!r}"
            )
        return _NestedPatch(outer)
    if importlib.util.find_spec(code_base) is None:
        raise ImportError(f"patch: {code_base} must be installed, found no package of that name", name=code_base)
    module = importlib.import_module(CODE_BASES[code_base])
    module.check_version()
    _active[code_base] = Patch(code_base, mode, module.replacements(mode))
    return _active[code_base]


def require_version(package: str, found: str, supported: Sequence[str]) -> None:
    """Raises an ImportError unless `found` begins with one of the numbers in `supported`, such as "4.57" or "5"."""
    numbers = found.split(".")
    if not any(numbers[: len(prefix)] == prefix for prefix in (text.split(".") for text in supported)):
        versions = ", ".join(f"{prefix}.*" for prefix in supported)
        raise ImportError(f"patch: {package} must be of version {versions}, found {found}", name=package)
