from __future__ import annotations

import pytest
import torch
from torch import nn

from shardforge.model.build import build
from shardforge.optim.groups import groups
from tests.tiny import GLU, GQA, tiny
from tests.tiny_kinds import OPTIONS


def model(**changes: object) -> nn.Module:
    recipe = tiny(**changes)
    return build(recipe.model, recipe.objective.build())


def decaying(made: nn.Module, decayed: tuple[str, ...] = ("matrix", "table"), decay: float = 0.1) -> set[str]:
    names = {id(weight): name for name, weight in made.named_parameters()}
    return {
        names[id(weight)]
        for group in groups(made, decay, decayed)
        if group["weight_decay"] == decay
        for weight in group["params"]
    }


BIASED = {"mixer": GQA | {"bias": "all", "qk_norm": "rmsnorm"}, "ffn": GLU | {"bias": True}}


@pytest.mark.parametrize(
    "changes", [BIASED, OPTIONS["post-norm"], OPTIONS["offset-norm"]], ids=["all", "post", "offset"]
)
def test_norms_and_biases_never_decay(changes):
    made = model(**changes)
    assert {name for name in decaying(made) if "norm" in name or "bias" in name} == set()


def test_every_matrix_and_table_decays():
    made = model(**BIASED)
    assert decaying(made) == {name for name, weight in made.named_parameters() if weight.dim() == 2}


@pytest.mark.parametrize(
    ("role", "member"), [("matrix", "blocks.0.ffn.up.weight"), ("table", "embed.weight"), ("vector", "norm.weight")]
)
def test_the_recipe_says_which_roles_decay(role, member):
    made = model()
    assert member in decaying(made, (role,))
    assert member not in decaying(made, tuple({"matrix", "table", "vector"} - {role}))


def test_the_head_is_a_table_as_the_embedding_is():
    assert decaying(model(), ("table",)) == {"embed.weight", "head.weight"}


@pytest.mark.parametrize("head", ["linear", "tied", {"kind": "softcap", "head": "tied"}], ids=str)
def test_every_weight_is_in_one_group_once(head):
    made = model(model={"head": head})
    grouped = [id(weight) for group in groups(made, 0.1, ("matrix",)) for weight in group["params"]]
    assert sorted(grouped) == sorted(id(weight) for weight in made.parameters())


def test_empty_groups_are_left_out():
    assert [group["weight_decay"] for group in groups(model(), 0.1, ())] == [0.0]


def test_a_weight_decays_by_rate_times_decay():
    recipe = tiny(optim={"kind": "adamw", "weight_decay": 0.5})
    made = build(recipe.model, recipe.objective.build(), torch.float64).to_empty(device="cpu")
    for weight in made.parameters():
        weight.data.fill_(1.0)
        weight.grad = torch.zeros_like(weight)
    optimizer = recipe.optim.build(made)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    assert {round(w.unique().item(), 12) for n, w in made.named_parameters() if "norm" in n} == {1.0}
    assert {round(w.unique().item(), 12) for n, w in made.named_parameters() if "norm" not in n} == {0.95}
