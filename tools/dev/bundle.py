"""Build steps that pyproject.toml names: recipes/ and slurm/ travel inside the wheel and the source archive.

In the wheel they are shardforge/_recipes and shardforge/_slurm. An editable install copies nothing: it reads both
folders where they stand in the clone.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ("recipes", "slurm")


class BuildWithTemplates(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in TEMPLATES:
            target = Path(self.build_lib, "shardforge", f"_{folder}")
            shutil.rmtree(target, ignore_errors=True)  # build/ may hold a recipe that is gone by now
            shutil.copytree(ROOT / folder, target)


class SourceWithTemplates(sdist):
    def make_distribution(self) -> None:
        for folder in (*TEMPLATES, "tools"):
            self.filelist.graft(folder)
        self.filelist.global_exclude("*.pyc")
        super().make_distribution()
