from __future__ import annotations

from pathlib import Path

import pytest

from tools.dev import layers


def test_every_import_of_the_repository_points_downward():
    assert layers.problems() == []


def test_every_package_has_a_level():
    packages = {path.parent.name for path in layers.FRAMEWORK.glob("*/__init__.py")}
    assert packages <= set(layers.LEVEL)


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("model/a.py", "from shardforge.parallel import mesh", "beside"),
        ("model/a.py", "def f():\n    from shardforge.parallel import mesh", "beside"),
        ("nn/a.py", "import shardforge.engine.native", "above"),
        ("train/a.py", "from shardforge import cli", "above"),
        ("core/a.py", "def f():\n    import torch", "may not import torch"),
        ("recipe/a.py", "import torch.nn as nn", "may not import torch"),
        ("core/a.py", "import numpy", "standard library only"),
        ("observe/a.py", "import wandb", "optional"),
        ("observe/a.py", "class A:\n    from wandb import sdk", "optional"),
        ("model/a.py", "from shardforge_kernels import rotary", "only nn/kernels.py"),
        ("engine/a.py", "from tests import ranks", "may not import tests"),
        ("engine/a.py", "from . import native", "relative import"),
        ("misc/a.py", "", "has no level"),
    ],
)
def test_a_broken_rule_is_named(tmp_path: Path, path: str, source: str, reason: str):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    found = layers.framework_problems(file, tmp_path)
    assert len(found) == 1 and reason in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "model/a.py",
            "import torch\nfrom shardforge.nn.module import local\nfrom shardforge.model.block import Block",
        ),
        ("nn/kernels.py", "def pick():\n    import shardforge_kernels"),
        ("observe/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import wandb"),
        ("observe/a.py", "def f():\n    import wandb"),
        ("cli/a.py", "def run(args):\n    from shardforge.train.run import train"),
        ("__main__.py", "from shardforge.cli.main import main"),
    ],
)
def test_a_kept_rule_is_not_named(tmp_path: Path, path: str, source: str):
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    assert layers.framework_problems(file, tmp_path) == []


def test_a_kernel_that_knows_the_framework_is_named(tmp_path: Path):
    file = tmp_path / "rotary.py"
    file.write_text("import torch\nfrom shardforge.core import dims")
    assert len(layers.kernel_problems(file)) == 1
