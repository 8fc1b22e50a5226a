"""Print counts, bytes and times for people."""

from __future__ import annotations


def _scaled(value: float, step: float, names: tuple[str, ...]) -> str:
    index = 0
    while abs(value) >= step and index < len(names) - 1:
        value /= step
        index += 1
    digits = 0 if index == 0 and value == int(value) else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}{names[index]}"


def count(value: float) -> str:
    """1234567 -> "1.23M" (decimal thousands): tokens, weights, FLOP."""
    return _scaled(value, 1000.0, ("", "K", "M", "G", "T", "P", "E"))


def bytes_(value: float) -> str:
    """1536 -> "1.50 KiB" (powers of 1024)."""
    return _scaled(value, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def seconds(value: float) -> str:
    """0.0123 -> "12.3 ms"; 75 -> "1m15s"; 7322 -> "2h02m"; 100000 -> "1d03h"."""
    if value < 60:
        return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes:02d}m"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02d}h"
