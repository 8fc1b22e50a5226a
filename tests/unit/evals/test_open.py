from __future__ import annotations

import json

import pytest
import torch

from shardforge.core.errors import CheckpointError, DataError
from shardforge.core.layout import Layout
from shardforge.core.rundir import RunDir
from shardforge.evals.open import open_trained
from tests.unit.convert.folders import converted
from tests.unit.evals.conftest import model_of
from tests.unit.upcycle import dense


@pytest.mark.parametrize(("asked", "opened"), [(None, 5), (1, 1)])
def test_the_newest_checkpoint_is_opened_or_the_one_asked_for(trained, asked, opened):
    run_dir, recipe = trained(steps=(1, 5))
    found = open_trained(run_dir, asked)
    expected = dict(model_of(recipe, opened).named_parameters())
    assert found.step == opened
    assert all(torch.equal(weight.cpu(), expected[name]) for name, weight in found.model.named_parameters())


def test_whatever_layout_trained_it_one_process_opens_it(trained):
    run_dir, _ = trained(parallel={"dp_shard": 2, "tp": 2})
    assert open_trained(run_dir).recipe.parallel == Layout()


def test_the_tokenizer_is_that_of_the_corpus(trained):
    found = open_trained(trained()[0])
    assert found.tokenizer.encode("w3 w1").ids == [3, 1] and found.eos == 0


def test_a_converted_model_speaks_with_the_tokenizer_that_came_along(tmp_path):
    from shardforge.data.tokenizer import train

    source = dense.save(tmp_path / "source", model={"vocab": 300})
    made = converted(source, tmp_path / "published").path
    train(["some text to learn from"], 280).save(str(made / "tokenizer.json"))
    settings = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(settings | {"eos_token_id": 7}))
    found = open_trained(RunDir(converted(made, tmp_path / "ours", "shardforge").path))
    assert found.eos == 7 and found.tokenizer.decode(found.tokenizer.encode("some text").ids) == "some text"


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no recipe\.yaml"):
        open_trained(RunDir(tmp_path))


def test_a_run_without_a_checkpoint_is_refused(trained):
    with pytest.raises(CheckpointError, match="no committed checkpoint yet"):
        open_trained(trained(steps=())[0])


def test_a_step_that_is_not_there_is_refused_with_those_that_are(trained):
    with pytest.raises(CheckpointError, match=r"no committed checkpoint of step 3; there are \[1, 5\]"):
        open_trained(trained(steps=(1, 5))[0], 3)
