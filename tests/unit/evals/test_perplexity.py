from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardforge.core.layout import Layout
from shardforge.data.loader import Loader
from shardforge.evals.open import open_trained
from shardforge.evals.perplexity import held_out
from shardforge.nn.batch import Batch
from tests.tiny import VOCAB
from tests.unit.evals.conftest import model_of

BF16 = {"precision": {"master": "fp32", "compute": "bf16", "reduce": "fp32"}}


def trained_loss(recipe, sequences: int) -> float:
    """What the training loop reports for the same weights."""
    engine = recipe.engine.build(recipe, torch.device("cpu"))
    engine.load(lambda tensors: fill(tensors, model_of(recipe, 1)))
    data = Loader(recipe.data, recipe.train, recipe.seed, vocab=VOCAB)
    losses = [engine.evaluate(batch) for batch in data.held_out_batches(sequences)]
    data.close()
    assert recipe.parallel == Layout()
    return sum(each.loss * each.scored for each in losses) / sum(each.scored for each in losses)


def fill(tensors: dict[str, torch.Tensor], model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        held = tensors[f"model.{name}"]
        (held.to_local() if isinstance(held, DTensor) else held).copy_(weight.detach())


@pytest.mark.parametrize("sequences", [1, 5, 1000])
def test_the_loss_is_the_one_that_training_reports(trained, ranks, sequences):
    run_dir, recipe = trained()
    found = held_out(open_trained(run_dir), sequences)
    assert found.loss == pytest.approx(ranks(1).run(trained_loss, recipe, sequences)[0], rel=1e-10)


def test_it_is_so_in_the_type_that_training_computes_in(trained, ranks):
    run_dir, recipe = trained(**BF16)
    found = held_out(open_trained(run_dir), 5)
    assert found.loss == pytest.approx(ranks(1).run(trained_loss, recipe, 5)[0], rel=1e-6)


def test_batches_go_to_the_device_of_the_model(trained, monkeypatch):
    opened, moved, to = open_trained(trained()[0]), [], Batch.to
    monkeypatch.setattr(Batch, "to", lambda self, device: moved.append(device) or to(self, device))
    held_out(opened, 4)
    assert moved == [opened.model.head.weight.device]


def test_it_does_not_depend_on_how_the_sequences_are_cut(trained):
    run_dir, _ = trained()
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
