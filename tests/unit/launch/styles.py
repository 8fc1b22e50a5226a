"""Jobs of five cluster styles, whose scripts are tests/golden/slurm.

`python -m tests.unit.launch.styles` writes those anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardforge.launch import cluster
from shardforge.launch.job import Job, Wishes, plan
from shardforge.launch.sbatch import render
from tests.tiny import tiny

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden" / "slurm"
HOME = Path("/shared/ada/train")
STYLES: Mapping[str, tuple[str, int, dict[str, Any]]] = {
    "gpus-per-node": ("h100-1k", 32, {"nodes": 4}),
    "gres": ("1xh200", 2, {"profile": ["node.gpu_request=gres"]}),
    "pyxis": ("pyxis", 16, {"style": "torchrun"}),
    "apptainer": ("apptainer", 8, {}),
    "cpu": ("cpu", 16, {"walltime": "00:30:00"}),
}
"""Name of a style -> profile, ranks, and what else is wished for."""


def made(style: str) -> Job:
    profile, ranks, wishes = STYLES[style]
    wishes = dict(wishes)
    loaded = cluster.load(ROOT / "recipes" / "clusters" / f"{profile}.yaml", wishes.pop("profile", ()))
    one = tiny(parallel={"dp_shard": ranks}, train={"steps": 2, "sequences": ranks, "seq_len": 16})
    return plan({"tiny": one}, loaded, Wishes(**wishes), name="tiny", folder=HOME)


if __name__ == "__main__":
    for style in STYLES:
        (GOLDEN / f"{style}.sbatch").write_text(render(made(style)))
