"""Python as it is installed on the nodes: a virtual environment, modules, or both.

Paper: none; how most clusters without containers work.
Changes: the batch script runs `setup` (module load, source .../activate); all steps inherit what that exports.
Cost: nothing. A virtual environment on a network file system is read by every rank at start: minutes at 1,000 nodes.
Limits: the nodes must see the same interpreter under the same path.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from shardforge.core.options import option
from shardforge.launch.environment import environments, words


@environments.register("host")
@dataclass(frozen=True, kw_only=True)
class Host:
    python: str = option("python", "interpreter that has ShardForge, a path or a name that `setup` puts into PATH")
    lines: tuple[str, ...] = option((), "lines of bash before anything else: module load ..., source .../activate")

    step: ClassVar[str] = ""
    prefix: ClassVar[str] = ""

    def setup(self) -> tuple[str, ...]:
        return self.lines

    def container(self, folders: Iterable[str]) -> tuple[str, ...]:
        return ()

    def here(self) -> str:
        return words(self.python)
