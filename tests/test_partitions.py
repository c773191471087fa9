"""Which folders a pattern means."""

import pytest

from models.partitions import date_of, parse_bound, parse_pattern, within


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        pytest.param("photos", "photos", True, id="literal"),
        pytest.param("photos", "photos2", False, id="another name"),
        pytest.param("date=2026-01-*", "date=2026-01-15", True, id="star"),
        pytest.param("date=2026-01-*", "date=2026-02-15", False, id="star, another month"),
        pytest.param("date=2026-0[12]-*", "date=2026-02-15", True, id="class"),
        pytest.param("date=2026-01-01..2026-03-31", "date=2026-01-01", True, id="first of a range"),
        pytest.param("date=2026-01-01..2026-03-31", "date=2026-03-31", True, id="last of a range"),
        pytest.param("date=2026-01-01..2026-03-31", "date=2026-04-01", False, id="after a range"),
        pytest.param("date=2026-01-01..2026-03-31", "day=2026-02-01", False, id="range of another key"),
        pytest.param("date=2026-01-01..2026-03-31", "2026-02-01", False, id="range with a key, folder without"),
        pytest.param("2026-01-01..2026-03-31", "date=2026-02-01", True, id="range without a key"),
        pytest.param("2026-01-01..2026-03-31", "2026-02-01", True, id="range, plain folder"),
        pytest.param("2026-01-01..2026-03-31", "20260201", True, id="range, folder without dashes"),
        pytest.param("2026-01-01..2026-03-31", "20260401", False, id="after a range, folder without dashes"),
        pytest.param("2026-01-01..2026-03-31", "thumbnails", False, id="range, no date"),
        pytest.param("2025-12..2026-01", "date=2026-01-31", True, id="range of months"),
        pytest.param("2025-12..2026-01", "year=2026", False, id="range of months, a year"),
        pytest.param("2025-12..2026-01", "date=2026-02-01", False, id="after a range of months"),
        pytest.param("year=2024..2026", "year=2025", True, id="years"),
        pytest.param("month=1..3", "month=02", True, id="leading zero"),
        pytest.param("month=1..3", "month=12", False, id="numbers, not letters"),
    ],
)
def test_fits(pattern, name, fits):
    (segment,) = parse_pattern(pattern)
    assert segment.fits(name) is fits


def test_a_pattern_has_a_segment_for_each_level():
    segments = parse_pattern("camera/year=*/month=1..3/")
    assert [(segment.text, segment.is_literal) for segment in segments] == [
        ("camera", True),
        ("year=*", False),
        ("month=1..3", False),
    ]


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        pytest.param("", "expected folder names below the source", id="empty"),
        pytest.param("/data/date=*", "expected folder names below the source", id="absolute"),
        pytest.param("s3://bucket/date=*", "expected folder names below the source", id="URI"),
        pytest.param("a//b", "expected folder names below the source", id="empty name"),
        pytest.param("../other", "expected folder names below the source", id="up"),
        pytest.param("date=2026-01-01..", "a range is like 2026-01-01..2026-03-31", id="half a range"),
        pytest.param("date=2026-03-01..2026-01-31", "from the earlier to the later", id="backwards"),
        pytest.param("date=2026-02-30..2026-03-31", "there is no date 2026-02-30", id="no date"),
        pytest.param("date=2026-13..2027-01", "there is no date 2026-13", id="no month"),
    ],
)
def test_wrong_patterns(pattern, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_pattern(pattern)


@pytest.mark.parametrize(
    ("names", "date"),
    [
        pytest.param([], None, id="none"),
        pytest.param(["photos"], None, id="no date"),
        pytest.param(["date=2026-01-15"], (2026, 1, 15), id="hive"),
        pytest.param(["year=2026", "month=01"], (2026, 1), id="hive, nested"),
        pytest.param(["month=01"], None, id="a month of no year"),
        pytest.param(["2026", "01", "15"], (2026, 1, 15), id="plain, nested"),
        pytest.param(["20260115"], (2026, 1, 15), id="without dashes"),
        pytest.param(["camera=07", "date=2026-01-15"], (2026, 1, 15), id="another number before"),
        pytest.param(["camera", "7", "2026-01"], (2026, 1), id="a month"),
    ],
)
def test_date_of(names, date):
    assert date_of(names) == date


@pytest.mark.parametrize(
    ("first", "last", "is_within"),
    [
        pytest.param(None, None, True, id="no bounds"),
        pytest.param("2026-01-15", None, True, id="from the day itself"),
        pytest.param("2026-01-16", None, False, id="from the day after"),
        pytest.param(None, "2026-01-15", True, id="to the day itself"),
        pytest.param(None, "2026-01", True, id="to the end of the month"),
        pytest.param(None, "2025", False, id="to the end of the year before"),
        pytest.param("2026", "2026", True, id="the whole year"),
    ],
)
def test_within(first, last, is_within):
    assert within((2026, 1, 15), first and parse_bound(first), last and parse_bound(last)) is is_within
