from __future__ import annotations

from pathlib import Path

from shardforge.recipe.load import load
from shardforge.recipe.provenance import plain
from shardforge.upcycle.options import read_options
from shardforge.upcycle.ready import recipe
from shardforge.upcycle.target import target
from tests.unit.upcycle.test_target import model


def written(tmp_path, section, data=()):
    given = read_options(flags={"experts": 4, "shared": 6})
    goal = target(section, given, "source")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(Path("out put: 1"), goal, given.options, data))
    return load(path).recipe, goal, path.read_text()


def test_it_loads_to_the_very_model(tmp_path):
    loaded, goal, _ = written(tmp_path, model())
    from shardforge.upcycle.target import config

    assert plain(loaded.model) == plain(config(goal.model, "x"))


def test_it_has_the_published_start(tmp_path):
    loaded, _, _ = written(tmp_path, model())
    assert (loaded.schedule.lr, loaded.schedule.floor, loaded.schedule.warmup) == (2e-4, 0.1, 2000)
    assert (loaded.train.sequences, loaded.train.seq_len, loaded.train.steps) == (1024, 4096, 119210)
    assert (loaded.optim.beta1, loaded.optim.beta2, loaded.optim.eps, loaded.optim.clip) == (0.9, 0.95, 1e-8, 1.0)
    assert loaded.train.start == "out put: 1"


def test_its_run_is_not_in_the_folder_of_the_weights(tmp_path):
    loaded, _, _ = written(tmp_path, model())
    assert loaded.name == "out put: 1-train" and loaded.run_dir is None


def test_sequences_fit_learned_positions(tmp_path):
    loaded, _, _ = written(tmp_path, model(model={"embedding": {"kind": "learned", "length": 64}}))
    assert loaded.train.seq_len == 64


def test_a_corpus_is_named_or_asked_for(tmp_path):
    loaded, _, text = written(tmp_path, model(), ["data/a", "data/b"])
    assert [each.path for each in loaded.data.sources] == ["data/a", "data/b"] and "CORPUS" not in text
    assert "CORPUS" in written(tmp_path, model())[2]
