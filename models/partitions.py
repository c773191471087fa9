"""Which folders below a source are meant: patterns over their names, ranges of dates and numbers, hive keys.

A pattern is a path below the source. Each of its segments is
  date=2026-01-*             a pattern of shell: * and ? and [0-9], over one name
  date=2026-01-01..2026-03-31   a range, both ends included: of dates, of months, of numbers with the same key
  2026-01-01..2026-03-31     the same for folders without a key, or with any
A value is compared as far as the ends say: 2026-01-15 lies in 2025-12..2026-01. The folder of a whole year does not.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatchcase

Number = tuple[int, ...]  # 2026-01-15 is (2026, 1, 15), and 7 is (7,)

_NUMBER = re.compile(r"\d+(-\d+){0,2}")
_RANGE = re.compile(r"(?:([^=]+)=)?(\d[\d-]*)\.\.(\d[\d-]*)")
_WILD = re.compile(r"[*?\[]")
_DATE = re.compile(r"\d{4}-\d{1,2}(-\d{1,2})?|\d{8}")
_DATE_KEYS = {"year": 0, "y": 0, "month": 1, "m": 1, "day": 2, "d": 2}


@dataclass(frozen=True)
class Segment:
    """One level of a pattern."""

    text: str
    bounds: tuple[Number, Number] | None = None  # of a range
    key: str | None = None  # of a range: that of the folders, None for any

    @property
    def is_literal(self) -> bool:
        """Whether it names one folder, which need not be looked for."""
        return self.bounds is None and not _WILD.search(self.text)

    def fits(self, name: str) -> bool:
        """Whether a folder of this name is meant."""
        if self.bounds is None:
            return fnmatchcase(name, self.text)
        key, value = hive(name)
        if self.key is not None and key != self.key:
            return False
        if not _NUMBER.fullmatch(value):
            return False
        first, last = self.bounds
        number = (date_of([value]) if len(first) > 1 else None) or _number(value)
        return len(number) >= min(len(first), len(last)) and within(number, first, last)


def parse_pattern(text: str) -> tuple[Segment, ...]:
    """The segments of a pattern. Raises ValueError that says what was expected."""
    names = text.strip("/").split("/")
    if not all(names) or {".", ".."} & set(names) or "://" in text or text.startswith("/"):
        raise ValueError(f"expected folder names below the source, like date=2026-01-* or year=*/month=*, got {text!r}")
    return tuple(_segment(name) for name in names)


def _segment(name: str) -> Segment:
    match = _RANGE.fullmatch(name)
    if match is None:
        if ".." in name:
            raise ValueError(f"a range is like 2026-01-01..2026-03-31 or year=2024..2026, got {name!r}")
        return Segment(name)
    key, first, last = match.groups()
    bounds = parse_bound(first), parse_bound(last)
    if not _not_after(*bounds):
        raise ValueError(f"a range goes from the earlier to the later, got {name!r}")
    return Segment(name, bounds, key)


def parse_bound(text: str) -> Number:
    """2026-01-15, 2026-01, 2026 or another number. Raises ValueError also for dates that do not exist."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"expected a date like 2026-01-15, a month like 2026-01, or a number, got {text!r}")
    parts = _number(text)
    if len(parts) > 1:
        try:
            date(*(*parts, 1)[:3])
        except ValueError as error:
            raise ValueError(f"there is no date {text}: {error}") from None
    return parts


def _number(text: str) -> Number:
    return tuple(map(int, text.split("-")))


def within(number: Number, first: Number | None, last: Number | None) -> bool:
    """Whether a number lies between two, both included; it is compared as far as both say, None does not limit."""
    return _not_after(first, number) and _not_after(number, last)


def _not_after(one: Number | None, other: Number | None) -> bool:
    if one is None or other is None:
        return True
    length = min(len(one), len(other))
    return one[:length] <= other[:length]


def hive(name: str) -> tuple[str | None, str]:
    """Key and value of a folder's name: ("date", "2026-01-15") of date=2026-01-15, None and the name of any other."""
    key, sign, value = name.partition("=")
    return (key, value) if sign else (None, name)


def date_of(names: Sequence[str]) -> Number | None:
    """The date in the names of nested folders, as far as they say: of date=2026-01-15, of year=2026/month=01, of
    2026/01/15, of 20260115. None when they hold none."""
    parts: dict[int, int] = {}
    for name in names:
        key, value = hive(name)
        if _DATE.fullmatch(value):
            digits = value if "-" in value else f"{value[:4]}-{value[4:6]}-{value[6:]}"
            return _number(digits)
        if value.isdecimal():
            plain = len(parts) if key is None and (parts or len(value) == 4) else None
            place = plain if key is None else _DATE_KEYS.get(key.lower())
            if place is not None:
                parts[place] = int(value)
    found = tuple(parts[place] for place in range(3) if place in parts)
    return found if set(parts) == set(range(len(parts))) and found else None
