from __future__ import annotations

import math

import pytest
import torch

from shardforge.evals.generate import _draw, generate
from shardforge.evals.open import Trained, open_trained
from shardforge.nn.module import tagged
from shardforge.nn.sequence import Sequence
from tests.tiny import LENGTH, VOCAB

LOGITS = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()


@pytest.fixture
def model(trained) -> Trained:
    return open_trained(trained()[0])


def say(model: Trained, prompt: str = "w1 w2", tokens: int = 8, seed: int = 0, **options: float) -> list[int]:
    """Token ids of a continuation."""
    settings = {"temperature": 1.0, "top_p": 1.0} | options
    (text,) = generate(model, [prompt], tokens, seed=seed, **settings)
    return model.tokenizer.encode(text).ids


def draws(count: int = 4000, **options: float) -> list[float]:
    """Share of each token."""
    settings = {"temperature": 1.0, "top_p": 1.0} | options
    generator = torch.Generator().manual_seed(0)
    found = torch.tensor([_draw(LOGITS, generator=generator, **settings) for _ in range(count)])
    return (found.bincount(minlength=4) / count).tolist()


def test_temperature_0_takes_the_likeliest_token_every_time():
    assert draws(10, temperature=0.0) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probability_at_the_temperature(temperature):
    expected = (LOGITS / temperature).softmax(-1).tolist()
    assert draws(temperature=temperature) == pytest.approx(expected, abs=5 * math.sqrt(0.25 / 4000))


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, {0}), (0.1, {0}), (0.39, {0}), (0.41, {0, 2}), (0.75, {0, 2, 3}), (1.0, {0, 1, 2, 3})]
)
def test_the_likeliest_tokens_that_reach_top_p_stay(top_p, kept):
    assert {token for token, share in enumerate(draws(500, top_p=top_p)) if share} == kept


def test_latents_in_place_of_keys_and_values_say_the_same(trained):
    widths = {"kv_lora_rank": 6, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 5}
    model = open_trained(trained(mixer={"kind": "mla", "heads": 4, "evaluation": "absorbed"} | widths)[0])
    absorbed = say(model, temperature=0.0)
    mixers = list(tagged(model.model, "mixer"))
    assert all(mixer.absorbs for mixer in mixers)
    for mixer in mixers:
        mixer.absorbs = False
    assert absorbed == say(model, temperature=0.0)


def test_the_same_seed_says_the_same(model):
    assert say(model, seed=3) == say(model, seed=3)
    assert len({tuple(say(model, seed=seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_continuation_has_no_more_tokens_than_asked_for(model, tokens):
    assert len(say(model, tokens=tokens)) <= tokens


def test_each_token_is_the_likeliest_after_those_before(model):
    known = [1, 2, *say(model, temperature=0.0)]
    positions = torch.arange(len(known))[None]
    rows = torch.zeros(1, dtype=torch.int64)
    seq = Sequence(positions, torch.zeros_like(positions), rows, dtype=torch.float64)
    likeliest = model.model(torch.tensor([known]), seq)[0].argmax(-1).tolist()
    assert known[2:] == likeliest[1 : len(known) - 1]


def test_a_text_longer_than_the_context_is_continued_from_its_end(model):
    long = " ".join(f"w{1 + number % (VOCAB - 1)}" for number in range(3 * LENGTH))
    end = " ".join(long.split()[-LENGTH:])
    assert say(model, long, tokens=1, temperature=0.0) == say(model, end, tokens=1, temperature=0.0)


def test_a_document_that_ends_is_not_continued(model):
    ends = model.model.head.weight.data
    ends.zero_()
    model.model.norm.weight.data.zero_()  # all logits are equal, so the first token, the end, is the likeliest
    assert say(model, temperature=0.0) == []


def test_an_empty_prompt_begins_a_document(model):
    assert isinstance(say(model, "", tokens=3), list)
