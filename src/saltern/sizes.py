"""Sizes and durations as people write them: "64 GiB", "1.5 MB", 4096; "7 days", "90 s", 3600."""

import re

_BYTES_BY_UNIT = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for suffix, base in (("iB", 1024), ("B", 1000))
    for power, prefix in enumerate("KMGT", start=1)
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Return a size in bytes. Raises `ValueError` with a text for a person."""
    match = _SIZE.fullmatch(text)
    unit = match and next((unit for unit in _BYTES_BY_UNIT if unit.lower() == match[2].lower()), None)
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size: write a number and a unit, such as 64 GiB")
    if len(match[1]) > 30:
        raise ValueError(f"{text!r} is not a size: no machine has that much")
    return int(float(match[1]) * _BYTES_BY_UNIT[unit]) if "." in match[1] else int(match[1]) * _BYTES_BY_UNIT[unit]


def format_size(size: int) -> str:
    """Write a size with at most one decimal in the largest unit that keeps it above one."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"


_SECONDS_BY_UNIT = {
    **dict.fromkeys(("", "s", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hour", "hours"), 3_600),
    **dict.fromkeys(("d", "day", "days"), 86_400),
    **dict.fromkeys(("w", "week", "weeks"), 604_800),
}
_DURATION = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)\s*")


def parse_duration(text: str) -> float:
    """Return a duration in seconds. Raises `ValueError` with a text for a person."""
    match = _DURATION.fullmatch(text)
    seconds = match and _SECONDS_BY_UNIT.get(match[2].lower())
    if match is None or seconds is None:
        raise ValueError(f"{text!r} is not a duration: write a number and a unit, such as 7 days")
    return float(match[1]) * seconds


def format_duration(seconds: float) -> str:
    """Write a duration in the largest unit that it is a whole number of."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:g} s"
