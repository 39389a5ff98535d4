"""The Range header: what RFC 9110 says, and nothing outside the file."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comoe.serve.ranges import Span, parse_range


@pytest.mark.parametrize(
    ("header", "span"),
    [
        (None, (0, 100)),
        ("bytes=0-0", (0, 1)),
        ("bytes=10-19", (10, 20)),
        ("bytes=90-", (90, 100)),
        ("bytes=90-1000", (90, 100)),
        ("bytes=-10", (90, 100)),
        ("bytes=-1000", (0, 100)),
        ("bytes=100-", None),
        ("bytes=100-200", None),
        ("bytes=-0", None),
        ("bytes=20-10", (0, 100)),
        ("bytes=-", (0, 100)),
        ("bytes=0-1,5-6", (0, 100)),
        ("rows=0-1", (0, 100)),
        ("bytes=a-b", (0, 100)),
        ("bytes=\u0661-\u0662", (0, 100)),
        (f"bytes=0-{'9' * 5000}", (0, 100)),
    ],
)
def test_a_range_is_what_the_rfc_says(header: str | None, span: tuple[int, int] | None) -> None:
    assert parse_range(header, 100) == (Span(*span) if span else None)


@given(st.text(max_size=40) | st.from_regex(r"bytes=\d{0,20}-\d{0,20}", fullmatch=True), st.integers(0, 10**12))
def test_no_header_leads_outside_the_file(header: str, size: int) -> None:
    span = parse_range(header, size)
    assert span is None or 0 <= span.start <= span.stop <= size
