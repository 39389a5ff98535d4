"""The Range header: what RFC 9110 says, and nothing outside the file."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comoe.serve.ranges import Span, parse_range


@pytest.mark.parametrize(
    ("header", "span"),
    [
        (None, None),
        ("bytes=0-0", (0, 1)),
        ("bytes=10-19", (10, 20)),
        ("bytes=90-", (90, 100)),
        ("bytes=90-1000", (90, 100)),
        ("bytes=-10", (90, 100)),
        ("bytes=-1000", (0, 100)),
        ("bytes=0-99", (0, 100)),
        ("bytes=100-", (100, 100)),
        ("bytes=100-200", (100, 100)),
        ("bytes=-0", (100, 100)),
        ("bytes=20-10", None),
        ("bytes=-", None),
        ("bytes=0-1,5-6", None),
        ("rows=0-1", None),
        ("bytes=a-b", None),
        ("bytes=\u0661-\u0662", None),
        (f"bytes=0-{'9' * 5000}", None),
    ],
)
def test_a_range_is_what_the_rfc_says(header: str | None, span: tuple[int, int] | None) -> None:
    assert parse_range(header, 100) == (Span(*span) if span else None)


@given(st.text(max_size=40) | st.from_regex(r"bytes=\d{0,20}-\d{0,20}", fullmatch=True), st.integers(0, 10**12))
def test_no_header_leads_outside_the_file(header: str, size: int) -> None:
    span = parse_range(header, size)
    assert span is None or 0 <= span.start <= span.stop <= size
