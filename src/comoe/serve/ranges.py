"""The Range header of one request (RFC 9110, section 14). Pure.

Lists of ranges are answered with the whole file, which the RFC allows: no client of comoe sends them, and many small
ranges are a known attack.
"""

import re
from typing import NamedTuple

MAX_DIGITS = 18


class Span(NamedTuple):
    """Bytes from `start` up to, not including, `stop`."""

    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def parse_range(header: str | None, size: int) -> Span | None:
    """The bytes that `header` asks for of a file of `size` bytes; none of them where it asks for what lies outside.

    None without a header, or where it is no range: then the whole file is sent.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header.strip(), re.ASCII) if header else None
    if match is None or not any(match.groups()) or max(map(len, match.groups())) > MAX_DIGITS:
        return None
    first, last = match.groups()
    if not first:
        return Span(max(0, size - int(last)), size)
    if last and int(last) < int(first):
        return None
    start = min(int(first), size)
    return Span(start, max(start, min(int(last) + 1, size) if last else size))
