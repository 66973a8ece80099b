"""What can be wrong with a data set: one fault, and the exception raised for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

STOPS = 'training stops; on_fault="skip" (--data.on_fault=skip) leaves them out'
CONSEQUENCES = {  # of each kind of fault
    "unusable annotation file": "the split cannot be used",
    "malformed image entry": STOPS,
    "duplicate image id": STOPS,
    "malformed annotation": STOPS,
    "unknown category": STOPS,
    "unknown image": "left out",
    "box without area": "not learned; evaluation counts them as missed",
    "duplicate annotation id": "annotations are numbered anew; other tools may drop some",
    "categories differ": "a model of one split cannot be evaluated on the other",
    "missing file": STOPS,
    "unreadable file": STOPS,
    "size differs": STOPS,
}


class DataFault(ValueError):
    """A data set cannot be used as it is; the message names the file or image and the reason."""


@dataclass(frozen=True)
class Fault:
    """Something wrong with one image or annotation."""

    kind: str  # a key of CONSEQUENCES
    image: str  # file name of the image, or of the annotation file
    detail: str  # what was found, with the numbers

    def __str__(self) -> str:
        return f"{self.image}: {self.detail}"


def count_by_kind(faults: Iterable[Fault]) -> dict[str, int]:
    """Number of faults of each kind, in order of first appearance."""
    return dict(Counter(fault.kind for fault in faults))
