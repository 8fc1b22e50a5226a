from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shardforge.core.dims import Dim, role
from shardforge.model import flops
from shardforge.model.context import BuildContext
from shardforge.model.experts import Experts
from shardforge.nn.init import fill
from shardforge.nn.module import declared
from shardforge.optim.groups import groups
from shardforge.recipe.model import InitConfig

E, H, F = 3, 5, 4
COUNTS = torch.tensor([2, 0, 3])


def experts(**options: Any) -> Experts:
    ctx = BuildContext(Dim("hidden", H), Dim("vocab", 32), 2, InitConfig(std=0.3))
    made = Experts(ctx, experts=E, chosen=2, inner=F, **options).double()
    fill(made, 0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in made.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_(generator=generator)
    return made


def rows() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(int(COUNTS.sum()), H, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["gate", "up", "down"]),
        ({"form": "mlp"}, ["up", "down"]),
        ({"bias": True}, ["gate", "up", "down", "gate_bias", "up_bias", "down_bias"]),
        ({"form": "mlp", "bias": True}, ["up", "down", "up_bias", "down_bias"]),
    ],
    ids=str,
)
def test_weights_are_those_of_the_form(options, names):
    made = experts(**options)
    assert [name for name, _ in made.named_parameters()] == names
    shapes = {"gate": (E, H, F), "up": (E, H, F), "down": (E, F, H)}
    shapes |= {"gate_bias": (E, F), "up_bias": (E, F), "down_bias": (E, H)}
    assert all(weight.shape == shapes[name] for name, weight in made.named_parameters())


def test_a_clamped_expert_is_the_one_of_gpt_oss():
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    from transformers import GptOssConfig

    theirs = modeling.GptOssExperts(GptOssConfig(hidden_size=H, intermediate_size=F, num_local_experts=E)).double()
    ours, x = experts(bias=True, clamp=7.0), (40 * rows()).requires_grad_()  # far beyond the limit
    with torch.no_grad():
        for pair, parts in {"gate_up_proj": ("gate", "up"), "gate_up_proj_bias": ("gate_bias", "up_bias")}.items():
            getattr(theirs, pair)[..., ::2] = getattr(ours, parts[0])
            getattr(theirs, pair)[..., 1::2] = getattr(ours, parts[1])
        theirs.down_proj.copy_(ours.down)
        theirs.down_proj_bias.copy_(ours.down_bias)
    other = x.detach().clone().requires_grad_()
    index = torch.arange(E).repeat_interleave(COUNTS)[:, None]
    wanted = theirs(other, index, torch.ones(len(x), 1, dtype=torch.float64))
    found = ours(x, COUNTS)
    torch.testing.assert_close(found, wanted)
    grad = torch.randn_like(found)
    wanted.backward(grad)
    found.backward(grad)
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(ours.down_bias.grad, theirs.down_proj_bias.grad)
    torch.testing.assert_close(ours.gate.grad, theirs.gate_up_proj.grad[..., ::2])
    torch.testing.assert_close(ours.up_bias.grad, theirs.gate_up_proj_bias.grad[..., 1::2])


def test_parts_of_the_width_add_up_when_one_of_them_adds_the_last_bias():
    whole, x, total = experts(bias=True), rows(), torch.zeros(int(COUNTS.sum()), H, dtype=torch.float64)
    for part in range(2):
        mine = experts(bias=True)
        mine.once = 1.0 if part == 0 else 0.0
        for name, dim in {"gate": 2, "up": 2, "down": 1, "gate_bias": 1, "up_bias": 1}.items():
            setattr(mine, name, torch.nn.Parameter(getattr(whole, name).detach().chunk(2, dim)[part]))
        total = total + mine(x, COUNTS)
    torch.testing.assert_close(total, whole(x, COUNTS))


def test_biases_of_experts_do_not_decay():
    made = experts(bias=True)
    decayed = groups(made, 0.1, ("matrix",))[0]["params"]
    assert {id(weight) for weight in decayed} == {id(made.gate), id(made.up), id(made.down)}


def test_many_experts_do_not_make_a_matrix_of_a_vector():
    e, h = Dim("expert", E), Dim("hidden", H)
    assert [role((e, h)), role((e, h, h)), role((h, h)), role((h,))] == ["vector", "matrix", "matrix", "vector"]


def test_flop_count_the_matrices_of_the_chosen_experts():
    assert flops.matmul_weights(experts(bias=True)) == 2 * 3 * H * F
    assert sum(item.count for item in declared(experts(bias=True))) == E * (3 * H * F + 2 * F + H)
