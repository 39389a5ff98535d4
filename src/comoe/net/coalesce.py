"""Ranges of a file that lie side by side, as few larger ones: a round trip for each, not for every blob. Pure."""

from collections.abc import Iterable
from typing import NamedTuple

GAP_NBYTES, MOST_NBYTES = 16 * 1024, 1 << 20
"""So much that nobody asked for may lie between two ranges that are fetched together, and so large may that be."""


class Range(NamedTuple):
    """Bytes of a file, from `start`; `digest` is the BLAKE3 of them."""

    start: int
    nbytes: int
    digest: str

    @property
    def stop(self) -> int:
        return self.start + self.nbytes


def coalesced(ranges: Iterable[Range]) -> list[list[Range]]:
    """The ranges by where they start, those together that are fetched together: from the first to the last of them.

    Every range is in one of the lists, once; a list is longer than `MOST_NBYTES` only if it has but one.
    """
    found: list[list[Range]] = []
    for one in sorted(set(ranges)):
        together = found[-1] if found else []
        near = together and one.start - together[-1].stop <= GAP_NBYTES
        if near and one.stop - together[0].start <= MOST_NBYTES:
            together.append(one)
        else:
            found.append([one])
    return found
