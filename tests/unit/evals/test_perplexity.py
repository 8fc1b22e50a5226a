from __future__ import annotations

import math

import pytest
import torch

from shardforge.data.loader import Loader
from shardforge.evals.open import open_trained
from shardforge.evals.perplexity import held_out
from tests.tiny import VOCAB


def trained_loss(recipe, sequences: int) -> float:
    """What the training loop reports for the same weights."""
    from shardforge.core.layout import Layout
    from tests.unit.evals.conftest import model_of

    engine = recipe.engine.build(recipe, torch.device("cpu"))
    engine.model.load_state_dict(model_of(recipe, 1).state_dict())
    data = Loader(recipe.data, recipe.train, recipe.seed, vocab=VOCAB)
    losses = [engine.evaluate(batch) for batch in data.held_out_batches(sequences)]
    data.close()
    assert recipe.parallel == Layout()
    return sum(each.loss * each.scored for each in losses) / sum(each.scored for each in losses)


@pytest.mark.parametrize("sequences", [1, 5, 1000])
def test_the_loss_is_the_one_that_training_reports(trained, ranks, sequences):
    run_dir, recipe = trained()
    found = held_out(open_trained(run_dir), sequences)
    assert found.loss == pytest.approx(ranks(1).run(trained_loss, recipe, sequences)[0], rel=1e-10)


def test_it_does_not_depend_on_how_the_sequences_are_cut(trained):
    run_dir, recipe = trained()
    whole = held_out(open_trained(run_dir), 7)
    run_dir.recipe.write_text(run_dir.recipe.read_text().replace("micro_batch: null", "micro_batch: 4"))
    assert open_trained(run_dir).recipe.train.micro_batch == 4
    cut = held_out(open_trained(run_dir), 7)
    assert cut.tokens == whole.tokens and cut.loss == pytest.approx(whole.loss, rel=1e-12)


def test_equal_logits_have_the_loss_of_a_uniform_guess(trained):
    opened = open_trained(trained()[0])
    opened.model.norm.weight.data.zero_()
    assert held_out(opened, 8).loss == pytest.approx(math.log(VOCAB), rel=1e-12)


def test_token_frequencies_alone_are_told_beside_it(trained):
    opened = open_trained(trained()[0])
    assert held_out(opened, 8).unigram == opened.corpus.manifest.unigram_nats
