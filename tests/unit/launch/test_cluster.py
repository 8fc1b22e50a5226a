from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shardforge.core.errors import Problems, RecipeError
from shardforge.launch import cluster
from shardforge.recipe.load import shipped

SHIPPED = sorted((shipped() / "clusters").glob("*.yaml"))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_profile_loads_and_is_written_back_as_it_is(file: Path, tmp_path: Path):
    loaded = cluster.load(file)
    assert cluster.load(written(tmp_path, cluster.dump(loaded))).config == loaded.config


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_profile_begins_by_saying_what_it_is(file: Path):
    assert file.read_text().startswith("# ")


def test_a_profile_is_found_by_name():
    assert cluster.load("8xh100").path.name == "8xh100.yaml"


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(RecipeError) as error:
        cluster.load("8xh10")
    assert error.value.fix == "did you mean '8xh100'?"


def test_all_mistakes_of_a_profile_come_at_once_with_their_lines(tmp_path: Path):
    text = 'scheduler: slurm\nqueue: {particion: gpu, walltime: "soon"}\nnode: {cpus: 0}\n'
    with pytest.raises(Problems) as error:
        cluster.load(written(tmp_path, text))
    said = str(error.value)
    assert "site.yaml:2:9  queue: no field 'particion'" in said and "did you mean 'partition'?" in said
    assert "site.yaml:3:14  node.cpus: 0 is not at least 1" in said


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('queue: {walltime: "soon"}', "'soon' is no time that Slurm reads"),
        ('queue: {options: {time: "5"}}', "--time is decided by ShardForge"),
        ("network: {ports: [20000, 20010]}", "leaves no room for the ports"),
        ("network: {variables: {NCCL-DEBUG: {value: INFO, reason: to see}}}", "cannot be a variable"),
        ("environment: {kind: docker}", "no environment is called 'docker'"),
        ("environment: {kind: pyxis}", "field 'image' is missing"),
    ],
)
def test_what_cannot_work_is_named_where_it_stands(tmp_path: Path, line: str, what: str):
    with pytest.raises(Problems) as error:
        cluster.load(written(tmp_path, f"scheduler: slurm\nnode: {{cpus: 4}}\n{line}\n"))
    assert what in str(error.value) and "site.yaml:3:" in str(error.value)


def test_a_profile_stands_on_another():
    loaded = cluster.load("h100-1k")
    assert loaded.config.queue.spares == 2 and loaded.config.node.gpus == 8
    assert "8xh100.yaml:" in loaded.where("node.gpus") and "h100-1k.yaml:" in loaded.where("queue.spares")


def test_a_field_that_a_profile_leaves_out_points_to_the_file():
    assert cluster.load("cpu").where("queue.account").endswith("cpu.yaml  queue.account")


def test_the_command_line_changes_a_field():
    loaded = cluster.load("cpu", ["queue.partition=short"])
    assert loaded.config.queue.partition == "short"
    assert loaded.where("queue.partition") == "--profile-set queue.partition=short  queue.partition"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:30", 330), ("1:00:00", 3600), ("2-0", 172800), ("1-12", 129600), ("1-00:30", 88200)],
)
def test_times_are_read_as_slurm_reads_them(text: str, seconds: int):
    assert cluster.seconds(text) == seconds


def test_a_profile_is_no_recipe():
    from shardforge.recipe.load import find

    with pytest.raises(RecipeError):
        find("8xh100")


def test_reading_a_profile_does_not_import_torch():
    import subprocess

    code = "import sys; from shardforge.launch import cluster, job, sbatch, submit, chain; cluster.load('8xh100'); "
    done = subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], timeout=60)
    assert done.returncode == 0
