from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardforge.core.errors import RecipeError
from shardforge.model.routers.noisy_topk import NoisyTopK, probabilities, slope, unevenness
from shardforge.model.routing import Routing
from shardforge.nn import counter
from shardforge.nn.batch import PADDING
from shardforge.nn.sequence import Sequence, Shares
from shardforge.nn.tokens import TokenSplit
from tests.tiny import assert_same
from tests.tiny_routers import ALONE, LAYER, E, K, routed, router, sequence, tokens

ROWS, LENGTH = 4, 8
NAMES = ("router_importance", "router_load")


def noisy(k: int = K, **options: Any) -> NoisyTopK:
    """A noisy router whose two matrices are drawn, where training would have taken them."""
    made = router("noisy_topk", k=k, **options)
    assert isinstance(made, NoisyTopK)
    for weight in made.parameters():
        weight.data = 0.3 * tokens(1, *weight.shape)[0]
    return made


def batch(rows: slice = slice(0, ROWS), step: int | None = 0) -> tuple[Tensor, Sequence]:
    """Rows of a batch whose second row has 3 places of padding."""
    seq = sequence(ROWS, LENGTH, step=step, shares=Shares(ROWS * LENGTH - 3, ROWS))
    seq.documents[1, -3:] = PADDING
    here = {name: getattr(seq, name)[rows] for name in ("positions", "documents", "rows")}
    return tokens(ROWS, LENGTH)[rows], replace(seq, records={}, **here)


def losses(
    made: NoisyTopK, rows: slice = slice(0, ROWS), step: int | None = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What these rows report, and the gradients of the losses alone."""
    made.zero_grad()
    x, seq = batch(rows, step)
    (made(x, seq, ALONE).weight.sum() * 0.0).backward()
    reported = {name: seq.records[name, LAYER] for name in NAMES}
    return reported, {name: weight.grad for name, weight in made.named_parameters()}


def formula(made: NoisyTopK, sequences: int) -> dict[str, Tensor]:
    """The losses as the paper writes them, pool by pool, with the padding cut out."""
    x, seq = batch()
    index = torch.arange(ROWS * LENGTH * E).view(ROWS, LENGTH, E)
    logits = x @ made.weight.T
    sigma = (x @ made.noise.weight.T).exp().log1p() + made.cfg.noise_eps
    top, order = (logits + sigma * counter.normal(seq.key ^ made.salt, index, torch.float64)).topk(K + 1)
    gates = torch.zeros_like(logits).scatter(-1, order[..., :K], top[..., :K].softmax(-1))
    chances, out = probabilities(logits, sigma, top, order[..., :K]), dict.fromkeys(NAMES, 0.0)
    for first in range(0, ROWS, sequences):
        rows = slice(first, first + sequences)
        real = seq.documents[rows] != PADDING
        for name, amounts in zip(NAMES, (gates, chances), strict=True):
            sums = amounts[rows][real].sum(0)
            out[name] = out[name] + 0.1 * sums.var(correction=0) / sums.mean() ** 2 * sequences / ROWS
    return out


def test_in_evaluation_it_is_the_softmax_over_the_largest_logits():
    made, other = noisy(), router(order="topk_first")
    other.weight.data = made.weight.data
    x, seq = batch(step=None)
    found, expected = made(x, seq, ALONE), other(x, seq, ALONE)
    assert torch.equal(found.expert, expected.expert) and torch.equal(found.weight, expected.weight)


def test_noise_changes_choices_in_training_and_from_step_to_step():
    made = noisy()
    choices = [made(*batch(step=step), ALONE).expert for step in (None, 0, 1)]
    assert not any(torch.equal(choices[first], choices[second]) for first, second in ((0, 1), (0, 2), (1, 2)))


def test_the_noise_is_standard_normal():
    made = noisy(noise_eps=1.0 - math.log(2.0), importance=0.0, load=0.0)
    for weight in made.parameters():
        weight.data.zero_()
    seq = sequence(16, 256, step=0)
    logs = made(torch.zeros(16, 256, 16, dtype=torch.float64), seq, ALONE).shares.log()
    apart = (logs[..., 0] - logs[..., 1]) / math.sqrt(2)
    assert abs(apart.mean().item()) < 5 / math.sqrt(4096) and abs(apart.var().item() - 1) < 0.1
    assert abs((apart.abs() < 1).double().mean().item() - math.erf(math.sqrt(0.5))) < 0.03


def test_both_matrices_start_at_zero():
    made = router("noisy_topk")
    assert [bool(weight.any()) for weight in made.parameters()] == [False, False]


def test_at_the_start_every_expert_expects_the_same_load():
    made = router("noisy_topk")
    x, seq = tokens(64, 64), sequence(64, 64, step=0)
    load = made(x, seq, ALONE).expert.flatten().bincount(minlength=E).double()
    assert (load / load.mean() - 1).abs().max() < 5 * math.sqrt(E / (64 * 64 * K))
    assert seq.records["router_load", LAYER] < 0.1 * 1e-2


def test_a_chance_is_that_of_being_among_the_largest_when_its_own_noise_is_drawn_again():
    generator, draws = torch.Generator().manual_seed(0), 20_000
    logits = torch.randn(E, generator=generator, dtype=torch.float64)
    sigma = 0.1 + torch.rand(E, generator=generator, dtype=torch.float64)
    noisy = logits + sigma * torch.randn(E, generator=generator, dtype=torch.float64)
    top, order = noisy.topk(K + 1)
    found = probabilities(logits, sigma, top, order[:K])
    for expert in range(E):
        again = noisy.repeat(draws, 1)
        again[:, expert] = logits[expert] + sigma[expert] * torch.randn(draws, generator=generator, dtype=torch.float64)
        chosen = (again.topk(K).indices == expert).any(-1).double().mean()
        assert abs(chosen - found[expert]) < 0.015


def test_the_slope_of_unevenness_is_its_gradient():
    sums = (1 + tokens(1, 3, E)[0].abs()).requires_grad_()
    (expected,) = torch.autograd.grad(unevenness(sums).sum(), sums)
    torch.testing.assert_close(slope(sums.detach()), expected)


def test_even_sums_have_no_unevenness():
    assert unevenness(torch.full((E,), 3.0)) == 0 == unevenness(torch.zeros(E))


@pytest.mark.parametrize("sequences", [1, 2, 4])
def test_losses_are_reported_as_the_paper_writes_them(sequences):
    made = noisy(sequences=sequences)
    expected = {name: value.detach() for name, value in formula(made, sequences).items()}
    torch.testing.assert_close(losses(made)[0], expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("sequences", [1, 2, 4])
def test_losses_have_the_gradients_of_the_papers_formulas(sequences):
    made = noisy(sequences=sequences)
    wanted = torch.autograd.grad(sum(formula(made, sequences).values()), list(made.parameters()))
    expected = dict(zip(dict(made.named_parameters()), wanted, strict=True))
    assert_same(losses(made)[1], expected, rtol=1e-7)


def test_the_deviations_learn_from_the_load_loss():
    made = noisy(importance=0.0)
    x, seq = batch(step=None)
    (made(x, seq, ALONE).weight.sum() * 0.0).backward()
    assert made.noise.weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("step", [None, 0])
@pytest.mark.parametrize("sequences", [1, 2])
def test_micro_batches_add_up_to_the_batch(sequences, step):
    made = noisy(sequences=sequences)
    whole, pieces = losses(made, step=step), [losses(made, slice(first, first + 2), step) for first in (0, 2)]
    for part in range(2):
        added = {name: sum(piece[part][name] for piece in pieces) for name in whole[part]}
        assert_same(added, whole[part])


def test_padding_counts_nowhere():
    made, losses = noisy(), []
    for padded in (0, 4):
        seq = sequence(2, 4 + padded, padded=padded)
        made(torch.cat([tokens(2, 4), 9 * tokens(2, padded)], 1), seq, ALONE)
        losses.append([seq.records[name, LAYER] for name in NAMES])
    torch.testing.assert_close(losses[0], losses[1])


def test_a_pool_of_nothing_but_padding_is_even():
    made, seq = noisy(), sequence(2, 4, padded=4)
    (made(tokens(2, 4), seq, ALONE).weight.sum() * 0.0).backward()
    assert [seq.records[name, LAYER].item() for name in NAMES] == [0.0, 0.0]
    assert all(weight.grad.isfinite().all() for weight in made.parameters())


@pytest.mark.parametrize(
    ("options", "said"), [({}, NAMES), ({"load": 0.0}, NAMES[:1]), ({"importance": 0.0}, NAMES[1:])]
)
def test_it_says_beforehand_what_it_records(options, said):
    made, seq = noisy(**options), sequence()
    made(tokens(), seq, ALONE)
    assert made.records == said and {name for name, _ in seq.records} == set(said)


def test_pools_that_a_micro_batch_does_not_fill_are_refused():
    with pytest.raises(RecipeError, match="pools of sequences=3 do not fill a micro-batch of 4 sequences"):
        noisy(sequences=3).prepare(batch()[1])


def test_rows_that_are_left_over_in_evaluation_are_a_pool_with_less_say():
    made, alone = noisy(sequences=3), noisy(sequences=1)
    made.prepare(batch(step=None)[1])
    found = losses(made, step=None)[0]
    three, one = losses(made, slice(0, 3), None)[0], losses(alone, slice(3, 4), None)[0]
    torch.testing.assert_close(found, {name: three[name] + one[name] for name in NAMES})


def test_all_experts_can_be_chosen_without_the_load_loss():
    assert isinstance(routed("noisy_topk", k=E, load=0.0), Routing)


def shared_over_ranks(layout: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients, added over two ranks that share every sequence."""
    rank, made = dist.get_rank(), noisy(sequences=2)
    x, seq = batch()
    if layout == "tp2":
        split, x = TokenSplit(rank, 2, dist.group.WORLD), x.chunk(2, 1)[rank]
    else:
        index = torch.tensor([[0, 1, 6, 7], [2, 3, 4, 5]][rank])
        split, x = TokenSplit(0, 1, dist.group.WORLD), x[:, index]
        places = {"documents": seq.documents[:, index], "positions": seq.positions[:, index]}
        seq = replace(seq, index=index, length=LENGTH, **places)
    (made(x, seq, split).weight.sum() * 0.0).backward()
    gradients = {name: weight.grad for name, weight in made.named_parameters()}
    reported = {name: seq.records[name, LAYER] for name in NAMES}
    for value in (*gradients.values(), *reported.values()):
        dist.all_reduce(value)
    return reported, gradients


@pytest.mark.parametrize("layout", ["tp2", "cp2"])
def test_ranks_that_share_sequences_add_up_to_one_process(ranks, layout):
    found, expected = ranks(2).run(shared_over_ranks, layout)[0], losses(noisy(sequences=2))
    for part in range(2):
        assert_same(found[part], expected[part])
