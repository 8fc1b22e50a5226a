"""The part that all learning-rate schedules share: warm-up, then a kind's own course."""

from __future__ import annotations


def warmed(step: int, warmup: int) -> float:
    """Linear from 1/warmup at step 0 to 1 at step warmup - 1, then 1."""
    return 1.0 if step >= warmup else (step + 1) / warmup


def progress(step: int, begin: int, end: int) -> float:
    """0 up to `begin`, 1 from `end` on, linear between."""
    if step >= end:
        return 1.0
    return (step - begin) / (end - begin) if step > begin else 0.0
