"""Numbers as people read them."""

from __future__ import annotations


def short_number(value: float, units: str = "kMGTPE") -> str:
    """12_600_000 as 12.6M."""
    for unit in ("", *units[:-1]):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}{units[-1]}"


def short_count(value: float) -> str:
    """Parameters or tokens: 2_600_000_000 as 2.6B."""
    return short_number(value, "kMBT")


def short_bytes(value: float) -> str:
    """3_221_225_472 as 3 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1023.5:
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def one_of(unit: str) -> str:
    """tokens as "a token", images as "an image"."""
    return f"{'an' if unit[0] in 'aeiou' else 'a'} {unit.removesuffix('s')}"


def short_time(seconds: float) -> str:
    """3_725 seconds as 1h02m; days from two on."""
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.3g} days"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
