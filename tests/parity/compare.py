"""A published model and ours with the same weights, what both are given, and how far apart two tensors are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shardforge.model.build import build
from shardforge.model.decoder import Decoder
from shardforge.nn.batch import IGNORE, PADDING
from shardforge.nn.sequence import Sequence, Shares
from tests.parity.models import Published, V, random_weights
from tests.tiny import tiny

TOLERANCE = 2e-5  # float32, relative to the norm of the expected tensor
B, S = 2, 19


def pair(published: Published) -> tuple[nn.Module, Decoder]:
    """(theirs, ours with the same weights)."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(published.config())
    random_weights(theirs)
    recipe = tiny(model=published.model)
    ours = build(recipe.model, recipe.objective.build())
    ours.to_empty(device="cpu")
    ours.load_state_dict(renamed(theirs.state_dict(), published))  # strict: every weight of ours has one of theirs
    return theirs.eval(), ours.eval()


def renamed(state: Mapping[str, Tensor], published: Published) -> dict[str, Tensor]:
    """Their weights, or gradients, as ours."""
    pairs = ((published.rename(key), value) for key, value in published.split(dict(state)).items())
    return {key: value.detach().clone() for key, value in pairs if key}


def inputs(padded: int = 0) -> tuple[Tensor, Tensor, Sequence]:
    """Tokens and labels [b, s], and where they stand; the last row ends in `padded` positions without a token."""
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(0, V, (2, B, S), generator=generator)
    labels[:, :2] = IGNORE
    positions = torch.arange(S).expand(B, -1)
    documents = torch.zeros_like(positions)
    if padded:
        labels[-1, -padded:], documents[-1, -padded:] = IGNORE, PADDING
    return tokens, labels, Sequence(positions, documents, torch.arange(B), shares=Shares(B * S - padded, B))


@contextmanager
def quiet() -> Iterator[None]:
    """The library warns of what it will change; here warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def distance(got: Tensor, expected: Tensor, least: float = 0.1) -> float:
    """Relative; a key bias has the gradient zero by symmetry, where only rounding is left to compare. An expected norm
    below `least` counts as `least`."""
    return ((got - expected).norm() / expected.norm().clamp(min=least)).item()


def wrong_gradients(
    theirs: nn.Module, grads: Mapping[str, Tensor], published: Published, least: float = 0.1
) -> dict[str, float]:
    """Weights of ours whose gradients are not theirs, with their distances."""
    expected = renamed({key: weight.grad for key, weight in theirs.named_parameters()}, published)
    assert grads.keys() == expected.keys()
    apart = {key: distance(grad, expected[key], least) for key, grad in grads.items()}
    return {key: far for key, far in apart.items() if not far < TOLERANCE}
