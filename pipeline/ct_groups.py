"""What a multi-frame CT says of each of its frames: shared and per-frame functional groups (PS3.3 C.7.6.16).

Values are hostile input: whatever cannot be read is as good as absent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydicom import Dataset

# Volume Based Calculation Technique (PS3.3 C.8.16.2.1.5): pictures of a volume. MPR are slices through it.
PROJECTIONS = frozenset({"MAX_IP", "MIN_IP", "VOLUME_RENDER", "SURFACE_RENDER", "CURVED_MPR"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Concatenation:
    """One part of a multi-frame image that was sent in several instances; `number` and `total` are 0 where unknown."""

    uid: str
    number: int
    total: int


class FunctionalGroups:
    """The functional groups of one data set; a classic CT has none, and is its own and only frame."""

    def __init__(self, ds: Dataset) -> None:
        self.ds = ds
        self._per_frame = values_of(ds, "PerFrameFunctionalGroupsSequence")
        self._shared = values_of(ds, "SharedFunctionalGroupsSequence")[:1]

    def of(self, index: int, keyword: str) -> Dataset:
        """The item of a group for frame `index`: per frame, else shared, else (classic CT) the data set itself."""
        for group in (*self._per_frame[index : index + 1], *self._shared):
            items = values_of(group, keyword)
            if items:
                return items[0]
        return self.ds

    def frame_type(self, index: int) -> tuple[str, ...]:
        """Frame Type, upper case (PS3.3 C.8.16.1); () for a classic CT."""
        kind = values_of(self.of(index, "CTImageFrameTypeSequence"), "FrameType")
        return tuple(str(value).strip().upper() for value in kind)

    def projection(self, index: int) -> str | None:
        """Which of PROJECTIONS the frame is."""
        kinds = values_of(self.of(index, "CTImageFrameTypeSequence"), "VolumeBasedCalculationTechnique")
        return next((kind for kind in (str(value).strip().upper() for value in kinds) if kind in PROJECTIONS), None)


def missing_parts(parts: Iterable[Concatenation]) -> tuple[int, int]:
    """How many parts of concatenations are not there, and how many there should be.

    Total Number is optional (Type 3): without it only the parts below the highest are known to be missing. Of parts
    without a number nothing is known.
    """
    found: dict[str, set[int]] = defaultdict(set)
    whole: dict[str, int] = defaultdict(int)
    for part in parts:
        if part.number > 0:
            found[part.uid].add(part.number)
            whole[part.uid] = max(whole[part.uid], part.number, part.total)
    wanted = sum(whole.values())
    return wanted - sum(map(len, found.values())), wanted


def values_of(ds: Dataset, keyword: str) -> list[Any]:
    """All values of an element as a list; empty where it is absent, empty or unreadable."""
    try:
        value = ds.get(keyword)
    except Exception:  # a malformed value: as good as absent, and reported as missing where it is needed
        return []
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
