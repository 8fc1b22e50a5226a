from __future__ import annotations

from pathlib import Path

import pytest

from shardforge.families import ready
from shardforge.recipe.load import load
from shardforge.recipe.provenance import plain
from tests.tiny import tiny

TRAIN = [
    "schedule: {kind: constant, lr: 1.0e-04}",
    "train: {steps: 10, sequences: 2, seq_len: 16}",
]


def written(tmp_path, data=()):
    path = tmp_path / "recipe.yaml"
    model = plain(tiny().model)
    path.write_text(ready.recipe(Path("out: 1"), model, TRAIN, head="# hello\n", seed=5, data=data))
    return load(path).recipe, path.read_text()


def test_it_loads_to_the_model_seed_and_name(tmp_path):
    recipe, text = written(tmp_path)
    assert plain(recipe.model) == plain(tiny().model)
    assert (recipe.name, recipe.seed) == ("out: 1-train", 5) and text.startswith("# hello\n")


def test_a_corpus_is_named_or_asked_for(tmp_path):
    assert "put its path here" in written(tmp_path)[1]
    assert [each.path for each in written(tmp_path, ["a", "b"])[0].data.sources] == ["a", "b"]


@pytest.mark.parametrize(
    "embedding, most, expected",
    [({"kind": "learned", "length": 64}, 4096, 64), ({"kind": "plain"}, 100, 100), (None, 8192, 8192)],
)
def test_a_sequence_has_room_in_a_table_of_positions(embedding, most, expected):
    assert ready.length({"embedding": embedding}, most) == expected
