"""One field of a recipe: its default, its meaning and its limits, next to its type."""

from __future__ import annotations

import dataclasses
from typing import Any

REQUIRED: Any = dataclasses.MISSING


def option(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field. `REQUIRED` as default makes it mandatory; limits are checked when the recipe is read."""
    limits = {"at_least": at_least, "at_most": at_most, "above": above}
    metadata = {"meaning": meaning, "unit": unit, **{k: v for k, v in limits.items() if v is not None}}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
