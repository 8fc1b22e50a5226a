"""The batch script: what five styles of clusters get, letter by letter, and that it is bash without a flaw."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from shardforge.core.errors import LaunchError
from shardforge.launch.sbatch import header, render
from tests.unit.launch.styles import GOLDEN, STYLES, made

SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

styles = pytest.mark.parametrize("style", STYLES)


@styles
def test_a_script_is_its_golden_file(style: str):
    assert render(made(style)) == (GOLDEN / f"{style}.sbatch").read_text(), "python -m tests.unit.launch.styles"


@styles
def test_shellcheck_finds_nothing(style: str):
    assert SHELLCHECK, "pip install -e .[dev] brings shellcheck"
    done = subprocess.run([SHELLCHECK, GOLDEN / f"{style}.sbatch"], capture_output=True, text=True)
    assert done.stdout == ""


def test_shellcheck_finds_nothing_in_a_chain_and_an_array():
    assert SHELLCHECK
    one = made("cpu")
    twin = replace(one.recipe, run_dir="/shared/ada/train/runs/twin")
    both = replace(one, chained=True, array=True, recipes={"a": one.recipe, "b": twin})
    done = subprocess.run([SHELLCHECK, "-"], input=render(both), capture_output=True, text=True)
    assert done.stdout == ""


def test_a_script_names_no_path_of_the_framework():
    """The environment that the profile names is all that the nodes need."""
    for style in STYLES:
        assert str(GOLDEN.parents[2]) not in render(made(style))


def test_every_exported_variable_has_its_reason_above_or_behind_it():
    lines = render(made("gpus-per-node")).splitlines()
    begin = next(i for i, line in enumerate(lines) if "---- environment" in line)
    end = next(i for i, line in enumerate(lines) if "---- tools" in line)
    bare = [line for above, line in zip(lines[begin:end], lines[begin + 1 : end], strict=False)
            if line.startswith("export") and "#" not in line and not above.startswith("#")]  # fmt: skip
    assert bare == []


def test_nodes_that_are_spare_are_asked_for_and_survive_a_loss():
    options = header(made("gpus-per-node"))
    assert "--nodes=6" in options and "--no-kill" in options
    assert not any(option.startswith("--no-kill") for option in header(made("cpu")))


@pytest.mark.parametrize(
    ("style", "option"), [("gpus-per-node", "--gpus-per-node=h100:8"), ("gres", "--gres=gpu:h200:2")]
)
def test_gpus_are_requested_as_the_site_wants(style: str, option: str):
    assert option in header(made(style))


def test_no_node_is_pinned_when_a_job_is_submitted():
    """--nodelist of a job cannot be cleared: with a dead node in it the job would wait for ever."""
    assert not any("nodelist" in option for style in STYLES for option in header(made(style)))


def test_values_with_spaces_reach_sbatch_whole():
    job = made("cpu")
    assert '--chdir="/shared/two words"' in header(replace(job, folder=Path("/shared/two words")))


def test_unknown_lines_of_environment_are_a_mistake_of_the_profile():
    job = made("cpu")
    network = replace(job.cluster.config.network, files=("infinband",))
    cluster = replace(job.cluster, config=replace(job.cluster.config, network=network))
    with pytest.raises(LaunchError) as error:
        render(replace(job, cluster=cluster))
    assert "cpu.yaml" in error.value.where and "did you mean 'infiniband'?" in error.value.fix
