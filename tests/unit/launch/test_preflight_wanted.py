from __future__ import annotations

import json

import pytest

from shardforge.core.errors import LaunchError
from shardforge.core.rundir import RunDir
from shardforge.launch import preflight_wanted
from shardforge.launch.preflight_config import PreflightConfig
from shardforge.launch.preflight_wanted import Wanted
from shardforge.recipe.load import load


def test_a_recipe_wants_its_corpora_at_absolute_places_and_its_checkpoints():
    recipe = load("first", ["data.sources=[{path: corpora/web}, {path: /data/code}]", "checkpoint.every=40"]).recipe
    wanted = preflight_wanted.of(recipe, PreflightConfig(clock_s=2.0), nodes=3, gpus=8, lead_s=60.0)
    assert wanted.data[0].startswith("/") and wanted.data[0].endswith("corpora/web") and wanted.data[1] == "/data/code"
    assert (wanted.nodes, wanted.gpus, wanted.checkpoint_every, wanted.lead_s) == (3, 8, 40, 60.0)
    assert wanted.config.clock_s == 2.0


def test_what_is_written_is_read(tmp_path):
    wanted = Wanted(nodes=4, gpus=8, data=("/a", "/b"), lead_s=9.0, config=PreflightConfig(pair_gb_s=40.0))
    assert preflight_wanted.write(wanted, RunDir(tmp_path)) == tmp_path / "launch" / "preflight.json"
    assert preflight_wanted.read(RunDir(tmp_path)) == wanted


@pytest.mark.parametrize("text", [None, "{", "[]", '{"nodes": 1}', '{"nodes": 1, "data": [], "config": {"x": 1}}'])
def test_a_file_that_is_not_there_or_not_ours_is_an_error_with_its_path(tmp_path, text):
    if text is not None:
        preflight_wanted.write(Wanted(nodes=1), RunDir(tmp_path)).write_text(text)
    with pytest.raises(LaunchError, match="cannot be read") as error:
        preflight_wanted.read(RunDir(tmp_path))
    assert error.value.where == str(tmp_path / "launch" / "preflight.json")


def test_gpus_are_checked_where_there_are_some_and_nvidia_smi_knows_them():
    assert Wanted(nodes=1, gpus=8).checks_gpus
    assert not Wanted(nodes=1).checks_gpus
    assert not Wanted(nodes=1, gpus=8, config=PreflightConfig(gpus="unchecked")).checks_gpus


def test_the_file_is_plain_json(tmp_path):
    text = preflight_wanted.write(Wanted(nodes=2), RunDir(tmp_path)).read_text()
    assert json.loads(text)["config"]["patience_s"] == PreflightConfig().patience_s
