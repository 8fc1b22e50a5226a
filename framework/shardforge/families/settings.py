"""What a model's own settings file says, asked field by field; what it lacks or cannot mean is told at the end."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from shardforge.core.errors import CheckpointError, ForgeError, Problems


class Settings:
    """A mapping of settings. Ask for all of them, then `settle`."""

    def __init__(self, data: Mapping[str, Any], path: Path):
        self.data, self.path = data, path
        self.problems: list[ForgeError] = []

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` where there is none or null."""
        found = self.data.get(key)
        return default if found is None else found

    def need(self, key: str) -> Any:
        """A positive integer that has to be there; 1 stands for it, with a problem noted, when it is not."""
        found = self.data.get(key)
        if type(found) is int and found > 0:
            return found
        told = "is missing" if found is None else f"is {found!r}, not a positive integer"
        self.wrong(f"{key} {told}")
        return 1

    def only(self, key: str, *allowed: Any) -> None:
        """Note a problem unless the value is absent, null, or one that ShardForge computes."""
        found = self.data.get(key)
        if found is not None and found not in allowed:
            self.wrong(f"{key}={found!r} is not supported, only {' or '.join(map(repr, allowed))}")

    def choose(self, key: str, table: Mapping[str, str], default: str) -> str:
        """Our word for one of theirs."""
        found = self.get(key, default)
        if found not in table:
            self.wrong(f"{key}={found!r} is not supported, only {', '.join(table)}")
        return table.get(found, table[default])

    def unknown(self, keys: Collection[str], why: str) -> None:
        """Note those of `keys` that are set."""
        for key in keys:
            if self.get(key):
                self.wrong(f"{key}={self.data[key]!r}: {why}")

    def wrong(self, what: str) -> None:
        self.problems.append(CheckpointError(what, self.path))

    def settle(self) -> None:
        """Problems when there were any."""
        if self.problems:
            raise Problems(self.problems, str(self.path))
