"""A container that Slurm itself starts, by NVIDIA's plugin pyxis with enroot.

Paper: none; https://github.com/NVIDIA/pyxis.
Changes: each step gets --container-image and --container-mounts; the batch script itself runs outside, and calls
Python by a step of one task on the first node. --container-name lets later steps of a job find the unpacked image.
Cost: the image is unpacked once a node and job; a .sqsh file on a shared file system is faster than a registry.
Limits: sbatch must know the plugin's options. What an image sets in its own environment wins over the script's
variables unless `exported` names them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from shardforge.core.options import REQUIRED, option
from shardforge.launch.environment import CONTAINER, environments, words


@environments.register("pyxis")
@dataclass(frozen=True, kw_only=True)
class Pyxis:
    image: str = option(REQUIRED, "a .sqsh file, or REGISTRY#NAME:TAG as enroot writes it")
    python: str = option("python", "interpreter inside of the image")
    mounts: tuple[str, ...] = option((), "SOURCE:TARGET[:ro] besides the working and the run directory")
    exported: tuple[str, ...] = option((), "variables of the script that win over those of the image")
    lines: tuple[str, ...] = option((), "lines of bash before anything else, outside of the container")

    step: ClassVar[str] = CONTAINER
    prefix: ClassVar[str] = ""

    def setup(self) -> tuple[str, ...]:
        return self.lines

    def container(self, folders: Iterable[str]) -> tuple[str, ...]:
        folders = tuple(folders)
        mounts = ",".join((*(f"{folder}:{folder}" for folder in folders), *self.mounts))
        given = [f"--container-image={self.image}", f"--container-mounts={mounts}"]
        given += [f"--container-workdir={folders[0]}", "--no-container-mount-home"]
        given += [f"--container-env={','.join(self.exported)}"] if self.exported else []
        return (*map(words, given), '--container-name="shardforge-$SLURM_JOB_ID"')

    def here(self) -> str:
        step = 'srun --export=ALL --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$SLURMD_NODENAME"'
        return f"{step} {CONTAINER} {words(self.python)}"
