"""A container that each task starts for itself: Apptainer, formerly Singularity.

Paper: none; https://apptainer.org.
Changes: the command of each task begins with `apptainer exec`; the batch script itself runs outside.
Cost: one mount of the image a task; keep the .sif on a file system that many nodes read well.
Limits: the nodes need the program; where it is a module, `lines` loads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from shardforge.core.options import REQUIRED, option
from shardforge.launch.environment import CONTAINER, environments, words


@environments.register("apptainer")
@dataclass(frozen=True, kw_only=True)
class Apptainer:
    image: str = option(REQUIRED, "the .sif file")
    python: str = option("python", "interpreter inside of the image")
    binds: tuple[str, ...] = option((), "SOURCE:TARGET[:ro] besides the working and the run directory")
    flags: tuple[str, ...] = option(("--nv",), "further flags; --nv brings the GPU driver in, --rocm AMD's")
    lines: tuple[str, ...] = option((), "lines of bash before anything else, outside of the container: module load ...")

    step: ClassVar[str] = ""
    prefix: ClassVar[str] = CONTAINER

    def setup(self) -> tuple[str, ...]:
        return self.lines

    def container(self, folders: Iterable[str]) -> tuple[str, ...]:
        folders = tuple(folders)
        binds = [f"--bind={bind}" for bind in (*(f"{folder}:{folder}" for folder in folders), *self.binds)]
        return tuple(map(words, ("apptainer", "exec", *self.flags, *binds, f"--pwd={folders[0]}", self.image)))

    def here(self) -> str:
        return f"{CONTAINER} {words(self.python)}"
