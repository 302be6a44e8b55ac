"""Numbers as people read them, and text of unknown origin made printable."""

from __future__ import annotations

from math import isfinite

_NOTHING = "–"
_LETTERS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
# A page that holds these invisibly would lie about its own order of letters.
_DIRECTION_MARKS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def compact(value: float, unit: str = "", billion: str = "B") -> str:
    """Three digits and a letter: 1.23 M, 2.60 B; `billion` is "G" for units of physics."""
    if not isfinite(value):
        return _NOTHING
    for size, letter in _LETTERS:
        if abs(value) >= size * 0.9995:
            scaled = value / size
            digits = max(0, 2 - (abs(scaled) >= 9.995) - (abs(scaled) >= 99.95))
            return f"{scaled:.{digits}f} {billion if letter == 'G' else letter}{unit}"
    small = f"{value:.3g}" if abs(value) >= 1e-3 or not value else f"{value:.1e}"
    return f"{small} {unit}".rstrip()


def fixed(value: float, digits: int = 3, sign: bool = False) -> str:
    """A fixed number of digits; a real minus; "–" where there is no finite number."""
    if not isfinite(value):
        return _NOTHING
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "−")


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %" if isfinite(share) else _NOTHING


def interval(ends: tuple[float, float], digits: int = 4) -> str:
    """ "2.310 to 2.334"; "–" where there is none."""
    if not all(map(isfinite, ends)):
        return _NOTHING
    return " to ".join(fixed(end, digits) for end in ends)


def percent_interval(ends: tuple[float, float], digits: int = 1) -> str:
    """Of shares, in percent: "92.1 to 96.0"."""
    return interval((100 * ends[0], 100 * ends[1]), digits)


def milliseconds(time_ms: float) -> str:
    """Three digits: 0.482 ms, 12.3 ms, 1,240 ms."""
    if not isfinite(time_ms):
        return _NOTHING
    return f"{time_ms:,.0f} ms" if abs(time_ms) >= 99.95 else f"{time_ms:.3g} ms"


def duration(seconds: float) -> str:
    """Two units: 2 d 3 h, 1 h 05 min, 4 min 10 s, 12.3 s."""
    if not isfinite(seconds):
        return _NOTHING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def file_size(size_bytes: float) -> str:
    """Decimal units, as disks are sold: 12.3 MB."""
    return compact(size_bytes, "B", billion="G")


def printable(text: str, limit: int) -> tuple[str, int]:
    """Text without invisible characters, cut at `limit`, and how many characters were cut.

    Control characters become their pictures (NUL is ␀), so that a model's odd output is seen
    and nothing in it can break the page or reorder what is around it.
    """
    shown = "".join(_visible(character) for character in text[:limit])
    return shown, max(0, len(text) - limit)


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if 0x80 <= code < 0xA0 or code in _DIRECTION_MARKS:
        return "\ufffd"
    return character
