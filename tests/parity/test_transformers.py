"""Our kinds, put together as published models, compute what the transformers library computes: logits and gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardforge.model.build import build
from shardforge.nn.batch import IGNORE
from shardforge.nn.sequence import Sequence
from tests.parity.models import PUBLISHED, V, random_weights
from tests.tiny import tiny

pytest.importorskip("transformers", reason="the transformers package is the reference")

TOLERANCE = 2e-5  # float32, relative to the norm of the expected tensor


def pair(name: str) -> tuple[nn.Module, nn.Module, PUBLISHED]:
    """(theirs, ours with the same weights, the description)."""
    from transformers import AutoModelForCausalLM

    published = PUBLISHED[name]()
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(published.config())
    random_weights(theirs)
    recipe = tiny(model=published.model)
    ours = build(recipe.model, recipe.objective.build())
    ours.to_empty(device="cpu")
    state = published.split(dict(theirs.named_parameters()))
    renamed = {published.rename(key): value.detach().clone() for key, value in state.items() if published.rename(key)}
    ours.load_state_dict(renamed)  # strict: every weight of ours has one of theirs
    return theirs.eval(), ours.eval(), published


def inputs() -> tuple[Tensor, Tensor, Sequence]:
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(0, V, (2, 2, 19), generator=generator)
    labels[:, :2] = IGNORE
    positions = torch.arange(19).expand(2, -1)
    return tokens, labels, Sequence(positions, torch.zeros_like(positions), torch.arange(2))


def distance(got: Tensor, expected: Tensor) -> float:
    """Relative; a key bias has the gradient zero by symmetry, where only rounding is left to compare."""
    return ((got - expected).norm() / expected.norm().clamp(min=0.1)).item()


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_equal_the_published_model(name):
    theirs, ours, _ = pair(name)
    tokens, _, seq = inputs()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = theirs(tokens).logits
        assert distance(ours(tokens, seq), expected) < TOLERANCE


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_gradient_equals_the_published_model(name):
    theirs, ours, published = pair(name)
    tokens, labels, seq = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = theirs(tokens).logits
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum").backward()
    ours(tokens, seq, labels)["total"].backward()
    grads = published.split({key: weight.grad for key, weight in theirs.named_parameters()})
    expected = {published.rename(key): grad for key, grad in grads.items()}
    wrong = {
        key: distance(weight.grad, expected[key])
        for key, weight in ours.named_parameters()
        if not distance(weight.grad, expected[key]) < TOLERANCE
    }
    assert not wrong
