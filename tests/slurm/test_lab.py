"""The cluster that the other tests of this folder run on is one, and it ends when the tests do, however they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, can_be_apart, end_abandoned, started, wait
from tests.slurm.settings import Shape

pytestmark = pytest.mark.slurm

HOLD = """
import signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.slurm.lab import Lab, Shape
with Lab(Path({folder!r}), Shape(nodes=2), apart={apart}, port=18000) as lab:
    print(lab._keeper.pid, flush=True)
    signal.pause()
"""


def belonging(folder: Path) -> Iterator[str]:
    """Commands of the processes that were started for the lab in `folder`."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
        except OSError:
            continue
        if f"SLURM_CONF={folder}/slurm.conf".encode() in environment.split(b"\0"):
            yield command.replace(b"\0", b" ").decode()


def test_every_node_has_its_own_name_and_its_fake_gpus(lab):
    say = "echo $SLURMD_NODENAME $(hostname) $CUDA_VISIBLE_DEVICES"
    said = lab.ask("srun", "--nodes=4", "--gpus-per-node=2", "bash", "-c", say).splitlines()
    name = (lambda node: node) if lab.apart else (lambda node: os.uname().nodename)
    assert sorted(said) == [f"{node} {name(node)} 0,1" for node in lab.nodes]


@pytest.mark.skipif(not can_be_apart(), reason="this kernel gives tests no namespaces of their own")
def test_nodes_reach_each_other_by_name_and_see_only_their_own_processes(lab):
    look = 'test "$(hostname -i)" = "$(getent hosts $(hostname) | cut -d" " -f1)" && ps -e | wc -l && ls -A "$LAB"'
    said = lab.ask("srun", "--nodes=4", f"--export=ALL,LAB={lab.folder / 'local'}", "bash", "-c", look).split()
    assert len(said) == 4 and all(int(processes) < 20 for processes in said)


@pytest.mark.parametrize("apart", [pytest.param(True, marks=pytest.mark.skipif(not can_be_apart(), reason="")), False])
def test_nothing_is_left_of_a_cluster_whose_tests_were_killed(tmp_path, apart):
    root = str(Path(__file__).resolve().parents[2])
    hold = HOLD.format(root=root, folder=str(tmp_path / "lab"), apart=apart)
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        keeper = int(holder.stdout.readline())
        assert any("slurmctld" in command for command in belonging(tmp_path / "lab"))
        os.kill(keeper, signal.SIGKILL)
        holder.kill()
    wait(lambda: not started(keeper), "the keeper's end")
    end_abandoned()  # as the next start does
    wait(lambda: not list(belonging(tmp_path / "lab")), "all of it ended")


def test_a_cluster_whose_tests_end_without_closing_it_ends_too(tmp_path):
    root = str(Path(__file__).resolve().parents[2])
    hold = HOLD.format(root=root, folder=str(tmp_path / "lab"), apart=False)
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        holder.kill()
    wait(lambda: not list(belonging(tmp_path / "lab")), "all of it ended")


def test_two_clusters_run_side_by_side(lab, tmp_path):
    with Lab(tmp_path, Shape(nodes=1), port=18000) as other:
        assert other.ask("srun", "echo", "here") == "here\n"
        assert lab.ask("srun", "echo", "there") == "there\n"
