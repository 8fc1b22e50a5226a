"""DeepSeek-V3's choice: sigmoid affinities, groups, and a bias that moves the choice and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardforge.core.phases import Phase, Phases
from shardforge.model import routing
from shardforge.model.build import build
from shardforge.model.groups import highest
from shardforge.model.routers import topk
from shardforge.model.routers.topk import SelectionBias, TopK
from shardforge.nn.init import fill
from tests import tiny_experts
from tests.tiny import tiny
from tests.tiny_kinds import EVEN, MOE
from tests.tiny_routers import ALONE, LAYER, B, E, K, S, plain, router, sequence, sets, spread, tokens

GROUPS = {"score": "sigmoid", "groups": 4, "group_topk": 2, "scale": 2.5}


def biased(*, rate: float | Phases = 1e-3, centered: bool = False, **options: object) -> TopK:
    made = plain(score="sigmoid", selection_bias=SelectionBias(rate=rate, centered=centered), **options)
    assert isinstance(made, TopK)
    return made


def loads(made: TopK, x: Tensor) -> Tensor:
    """Tokens of each expert."""
    expert = made(x, sequence(*x.shape[:2]), ALONE).expert
    return expert.flatten().bincount(minlength=x.shape[-1]).double()


def skewed(experts: int = 16, count: int = 2048) -> Tensor:
    """Logits [1, count, experts] that like some experts more than others."""
    likes = torch.linspace(-0.6, 0.6, experts, dtype=torch.float64)
    return 0.5 * (tokens(1, count, experts) + likes)


def test_the_bias_decides_who_is_chosen_and_not_their_weight():
    made, x = biased(), tokens(hidden=E)
    made.selection_bias[5] = 2.0
    routing = made(x, sequence(), ALONE)
    assert (routing.expert == 5).any(-1).all()
    affinity = routing.logits.sigmoid().gather(-1, routing.expert)
    torch.testing.assert_close(routing.weight, affinity / affinity.sum(-1, keepdim=True))


@pytest.mark.parametrize("shift", [0.0, -2.0, -50.0])
def test_no_choice_is_outside_the_kept_groups_where_all_scores_are_negative(shift):
    """A mask of zeros would choose the banned experts there."""
    made = router(experts=16, k=4, selection_bias=SelectionBias(), **GROUPS)
    made.selection_bias += shift
    expert = made(tokens(), sequence(), ALONE).expert
    assert max(len(set(row)) for row in (expert // 4).flatten(0, 1).tolist()) <= 2


def test_a_bias_that_is_the_same_for_all_changes_nothing():
    made = router(experts=16, k=4, selection_bias=SelectionBias(), **GROUPS)
    before = made(tokens(), sequence(), ALONE)
    made.selection_bias -= 2.0
    after = made(tokens(), sequence(), ALONE)
    assert torch.equal(before.expert, after.expert) and torch.equal(before.weight, after.weight)


def test_one_group_equals_no_groups():
    free = router(k=4, score="sigmoid")(tokens(), sequence(), ALONE)
    one = router(k=4, score="sigmoid", groups=1, group_topk=1)(tokens(), sequence(), ALONE)
    assert torch.equal(free.expert, one.expert) and torch.equal(free.weight, one.weight)


def test_the_scale_comes_after_renormalizing():
    weight = router(k=4, **GROUPS)(tokens(), sequence(), ALONE).weight
    torch.testing.assert_close(weight.sum(-1), torch.full((B, S), 2.5, dtype=torch.float64))


def test_the_balance_loss_counts_the_largest_affinities_whatever_was_dispatched():
    made = router(experts=16, k=4, selection_bias=SelectionBias(), **GROUPS)
    made.selection_bias[0] = 2.0
    routing = made(tokens(), sequence(), ALONE)
    assert torch.equal(routing.counted, highest(routing.logits, 4))
    assert not torch.equal(sets(routing.counted), sets(routing.expert))


@pytest.mark.parametrize(
    ("balance", "choices"),
    [((), 1), ([{"scope": "batch", "weight": 0.1}], 1), ([*EVEN, {"scope": "batch", "weight": 0.1}], 2)],
    ids=["no-loss", "batch", "sequence"],
)
def test_there_is_a_choice_without_the_bias_where_a_loss_over_sequences_counts_it(monkeypatch, balance, choices):
    made = []
    for module in (topk, routing):
        monkeypatch.setattr(module, "highest", lambda *args: made.append(args) or highest(*args))
    biased_router = {"kind": "topk", "selection_bias": {"rate": 0.01}}
    tiny_experts.moe(router=biased_router, balance=balance)(tiny_experts.tokens(), tiny_experts.sequence(key=0))
    assert len(made) == choices


@pytest.mark.parametrize("options", [{}, {"groups": 4, "group_topk": 3}], ids=str)
def test_without_a_bias_the_balance_loss_counts_what_was_chosen(options):
    routing = router(**options)(tokens(), sequence(), ALONE)
    assert routing.counted is routing.expert


def test_the_bias_is_no_weight_and_is_saved():
    made = biased()
    assert [name for name, _ in made.named_parameters()] == ["weight"]
    assert "selection_bias" in made.state_dict()


def test_the_bias_keeps_its_type_in_a_narrow_model():
    recipe = tiny(ffn=MOE | {"router": {"kind": "topk", "selection_bias": {"rate": 0.01}}})
    model = build(recipe.model, recipe.objective.build(), torch.bfloat16).to_empty(device="cpu")
    fill(model, 0)
    biases = {name: value for name, value in model.named_buffers() if name.endswith("router.selection_bias")}
    assert len(biases) == 2
    assert all(value.dtype == torch.float32 and not value.any() for value in biases.values())


@pytest.mark.parametrize("step", [None, 0])
def test_routing_leaves_the_bias_alone(step):
    made = biased()
    made.selection_bias += 0.5
    made(tokens(hidden=E), sequence(step=step), ALONE)
    assert (made.selection_bias == 0.5).all()


def test_after_a_step_the_bias_moves_by_its_rate_towards_even_loads():
    made = biased(rate=0.25)
    made.settle({LAYER: torch.tensor([4.0, 0, 2, 2, 2, 2, 3, 1], dtype=torch.float64), 0: torch.ones(E)}, 0.0)
    assert made.selection_bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, -0.25, 0.25]


def test_centered_moves_add_up_to_nothing_and_choose_alike():
    load = torch.tensor([9.0, 0, 1, 1, 1, 1, 1, 2], dtype=torch.float64)
    free, centered = biased(rate=0.25), biased(rate=0.25, centered=True)
    for made in (free, centered):
        made.settle({LAYER: load}, 0.0)
    assert abs(centered.selection_bias.sum().item()) < 1e-6 < abs(free.selection_bias.sum().item())
    x = tokens(hidden=E)
    assert torch.equal(free(x, sequence(), ALONE).expert, centered(x, sequence(), ALONE).expert)


def test_the_rate_follows_its_phases():
    made = biased(rate=Phases(start=0.5, then=(Phase(at=0.9, value=0.0),)))
    uneven = {LAYER: torch.arange(E).double()}
    made.settle(uneven, 0.89)
    moved = made.selection_bias.clone()
    made.settle(uneven, 0.9)
    assert moved.abs().min() == 0.5 and torch.equal(made.selection_bias, moved)


def test_a_router_without_a_bias_has_nothing_to_settle():
    made = router()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    made.settle({}, 0.0)
    torch.testing.assert_close(dict(made.state_dict()), before, rtol=0, atol=0)


def test_a_bias_can_empty_an_expert_and_its_rate_fills_it_again():
    x = tokens(1, 256, E)
    made = biased(rate=0.05)
    made.selection_bias[0] = -1.5
    assert loads(made, x)[0] == 0
    for _ in range(60):
        made.settle({LAYER: loads(made, x)}, 0.0)
    load = loads(made, x)
    assert 0.7 < load[0] / load.mean() < 1.3


def excess(rate: float, steps: int) -> list[float]:
    """(largest load / mean) - 1 before each step, of 16 experts, 4 a token, some of which are liked more."""
    x, made, out = skewed(), biased(rate=rate, experts=16, k=4), []
    for _ in range(steps):
        load = loads(made, x)
        out.append((load.max() / load.mean() - 1).item())
        made.settle({LAYER: load}, 0.0)
    return out


def test_the_bias_takes_the_excess_load_away():
    """The curve of arXiv:2408.15664, figure 3, in small."""
    curve = excess(1e-3, 101)
    assert curve[0] > 0.8 and curve[0] > curve[25] > curve[50] > curve[75] and curve[100] < 0.03, curve[::25]


def test_a_faster_rate_is_sooner_there_and_stays_farther_off():
    """Why the rate ends at 0."""
    slow, fast = excess(1e-3, 101), excess(1e-2, 101)
    assert fast[10] < slow[10] / 4 and fast[100] > 4 * slow[100]


def test_group_limited_softmax_is_deepseek_v2s():
    options = {"groups": 4, "group_topk": 2, "group_score": "max", "weights": "raw"}
    routing = plain(experts=16, k=4, **options)(tokens(hidden=16), sequence(), ALONE)
    shares = routing.logits.softmax(-1)
    best = shares.unflatten(-1, (4, 4)).amax(-1).topk(2).indices
    open_to = torch.zeros(B, S, 4).scatter(-1, best, 1.0).repeat_interleave(4, -1)
    expected = (shares * open_to).topk(4)
    torch.testing.assert_close(spread(routing), torch.zeros_like(shares).scatter(-1, expected.indices, expected.values))


def test_choices_are_as_many_as_asked_for_and_all_different():
    expert = router(experts=16, k=4, selection_bias=SelectionBias(), **GROUPS)(tokens(), sequence(), ALONE).expert
    assert all(len(set(row)) == 4 for row in expert.flatten(0, 1).tolist()) and K < 4
