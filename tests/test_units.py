"""Sizes and shares as people write them, and as comoe prints them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comoe.types import UsageError
from comoe.units import format_loss, format_seconds, format_size, parse_budget, parse_link, parse_share, parse_size

SIZES = {
    "4GiB": 4 << 30, "4G": 4 << 30, "4gib": 4 << 30, "1.5GB": 1_500_000_000, " 4.7 GB ": 4_700_000_000,
    "800M": 800 << 20, "1MB": 1_000_000, "2k": 2048, "2KB": 2000, "1TiB": 1 << 40, "1TB": 10**12, "123": 123, "7B": 7,
    "0": 0, "0.5K": 512, "9007199254740993": 9007199254740993, "4.7GB": 4_700_000_000, "1.1KB": 1100,
}  # fmt: skip


@pytest.mark.parametrize(("text", "nbytes"), SIZES.items())
def test_a_size_is_read_to_the_byte(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1G", "4 Gigs", "1,5GB", "1e9", "4GiB!", "30%", "0x10", ".5G", "nan", "inf"]
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="write for example 4GiB"):
        parse_size(text)


def test_a_number_is_taken_as_bytes() -> None:
    assert parse_size(1 << 33) == 1 << 33


@pytest.mark.parametrize(("text", "share"), [("2%", 0.02), ("0.5 %", 0.005), ("2", 0.02), (" 100% ", 1.0), ("0", 0.0)])
def test_a_share_is_a_percentage_with_or_without_its_sign(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("number", [0.02, 0.0, 0, 1])
def test_a_number_is_taken_as_a_fraction(number: float) -> None:
    assert parse_share(number) == number


@pytest.mark.parametrize("text", ["", "%", "-2%", "2%%", "two", "2 percent", "nan%", "1e-2"])
def test_what_is_no_share_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="write for example 2%"):
        parse_share(text)


def test_a_budget_is_a_size_or_a_share_of_the_whole() -> None:
    assert parse_budget("30%", 1000) == 300
    assert parse_budget(" 2.5 % ", 1000) == 25
    assert parse_budget("30K", 1000) == 30720
    assert parse_budget(30, 1000) == 30


def test_a_budget_that_is_neither_is_refused() -> None:
    with pytest.raises(UsageError):
        parse_budget("a third", 1000)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1536, "1.5 KiB"), (1 << 20, "1 MiB"),
        (1.24 * (1 << 30), "1.24 GiB"), (999.7, "0.976 KiB"), (999.9 * 1024, "0.976 MiB"), (5 << 50, "5 PiB"),
        (-3 << 20, "-3 MiB"),
    ],
)  # fmt: skip
def test_a_size_is_printed_with_three_figures_and_a_binary_unit(nbytes: float, text: str) -> None:
    assert format_size(nbytes) == text


@given(st.integers(0, 1 << 49))
def test_a_printed_size_is_within_half_a_percent_and_can_be_read_back(nbytes: int) -> None:
    assert parse_size(format_size(nbytes)) == pytest.approx(nbytes, rel=0.006, abs=1)


LINKS = {
    "40Mbit,20ms": (5e6, 0.02), "1Gbit/s, 0.5 s": (1.25e8, 0.5), " 800 kbit , 0ms ": (1e5, 0.0),
    "2.5Mbit,1.5ms": (312_500, 0.0015),
}  # fmt: skip


@pytest.mark.parametrize(("text", "link"), LINKS.items())
def test_a_link_is_bytes_per_second_and_seconds(text: str, link: tuple[float, float]) -> None:
    assert parse_link(text) == pytest.approx(link)


@pytest.mark.parametrize(
    "text", ["", "40Mbit", "40MB,20ms", "40mbit,20ms", "-1Mbit,1ms", "0Mbit,1ms", "1Mbit,1m", "fast"]
)
def test_what_is_no_link_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="for example 40Mbit,20ms"):
        parse_link(text)


def test_a_loss_is_printed_as_a_signed_percentage() -> None:
    assert [format_loss(loss) for loss in (0.0016, -0.02, 0.0)] == ["+0.16 %", "-2.00 %", "+0.00 %"]


def test_a_duration_is_printed_roughly_and_never_as_nothing() -> None:
    durations = [format_seconds(seconds) for seconds in (0, 0.4, 12.4, 89, 90, 200, 5399, 5400, 9000)]
    assert durations == ["1 s", "1 s", "12 s", "89 s", "2 min", "3 min", "90 min", "1.5 h", "2.5 h"]
