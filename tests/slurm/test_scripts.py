"""Scripts for clusters of every style are what a Slurm that knows their nodes would take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.lab import Lab
from tests.slurm.settings import Shape

pytestmark = pytest.mark.slurm

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "slurm").glob("*.sbatch"))


@pytest.fixture(scope="module")
def site(lab: Lab, tmp_path_factory) -> Iterator[Lab]:
    """A larger cluster, with what the golden scripts ask for."""
    gpus = {"h100": 8, "a100": 8, "h200": 8}
    shape = Shape(nodes=8, cpus=128, gpus=gpus, memory_mb=1_000_000, partitions=("gpu", "batch"))
    with Lab(tmp_path_factory.mktemp("site"), shape, port=19000) as cluster:
        yield cluster


@pytest.mark.parametrize("script", GOLDEN, ids=lambda path: path.stem)
def test_a_golden_script_is_taken(site, script):
    done = site.call("sbatch", "--test-only", str(script))
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


def test_there_are_golden_scripts_of_five_styles():
    assert len(GOLDEN) >= 5


def test_a_script_that_asks_for_more_than_there_is_is_refused(site):
    assert site.call("sbatch", "--test-only", "--nodes=9", str(GOLDEN[0])).returncode != 0
