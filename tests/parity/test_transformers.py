"""Our kinds, put together as published models, compute what the transformers library computes: logits and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shardforge.nn.batch import IGNORE
from tests.parity.compare import TOLERANCE, distance, inputs, pair, quiet, wrong_gradients
from tests.parity.models import PUBLISHED
from tests.parity.models_moe import MIXTURES

pytest.importorskip("transformers", reason="the transformers package is the reference")

MODELS = PUBLISHED | MIXTURES


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_published_model(name):
    theirs, ours = pair(MODELS[name]())
    tokens, _, seq = inputs()
    with quiet(), torch.no_grad():
        assert distance(ours(tokens, seq), theirs(tokens).logits) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_equals_the_published_model(name):
    published = MODELS[name]()
    theirs, ours = pair(published)
    tokens, labels, seq = inputs()
    with quiet():
        logits = theirs(tokens).logits
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum").backward()
    ours(tokens, seq, labels)["total"].backward()
    grads = {name: weight.grad for name, weight in ours.named_parameters()}
    assert not wrong_gradients(theirs, grads, published)
