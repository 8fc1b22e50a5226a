"""An environment answers how the batch script runs Python: on the nodes as they are, or inside of a container."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Protocol

from shardforge.core.slots import Slot

environments = Slot("environment", "shardforge.launch.environments")
Environment = Annotated[Any, environments]


class Answers(Protocol):
    """What a kind of environment must have. All of it is bash that is put into the script as it stands; the words of
    `container` are its array CONTAINER."""

    python: str  # the interpreter, as a task calls it
    step: str  # options of srun for every step: nothing, or "${CONTAINER[@]}"
    prefix: str  # words before the command of a task: nothing, or "${CONTAINER[@]}"

    def setup(self) -> tuple[str, ...]:
        """Lines that the batch script runs once, on the first node, before anything else."""

    def container(self, folders: Iterable[str]) -> tuple[str, ...]:
        """Words that start a container in which `folders` are seen under their own paths; empty without one."""

    def here(self) -> str:
        """Words that, followed by `-m MODULE`, run Python from the batch script itself, on the first node."""


PLAIN = re.compile(r"[\w./:@%+-][\w./:@%+=-]*")
CONTAINER = '"${CONTAINER[@]}"'


def words(*parts: str) -> str:
    """Words of a command, each of which means nothing but itself: quoted unless it is plain."""
    return " ".join(part if PLAIN.fullmatch(part) else quoted(part) for part in parts)


def quoted(value: str) -> str:
    """A word of bash in single quotes."""
    return "'" + value.replace("'", "'\\''") + "'"
