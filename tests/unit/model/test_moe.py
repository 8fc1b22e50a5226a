from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from shardforge.core.dims import Dim
from shardforge.core.errors import ForgeError
from shardforge.model.context import BuildContext
from shardforge.model.ffns.moe import MoE
from shardforge.nn.batch import PADDING
from shardforge.nn.init import fill
from shardforge.nn.sequence import Sequence, Shares
from shardforge.recipe.model import InitConfig
from tests.tiny import tiny
from tests.tiny_kinds import GLU, MOE

B, S, H, E, K = 2, 9, 16, 4, 2


def moe(**options: Any) -> MoE:
    cfg = tiny(ffn=MOE | options).model.blocks["one"].ffn
    ctx = BuildContext(Dim("hidden", H), Dim("vocab", 32), 2, InitConfig(std=0.3), layer=1)
    made = cfg.build(ctx).double()
    fill(made, 0)
    return made


def tokens() -> Tensor:
    return torch.randn(B, S, H, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)


def sequence(padded: int = 0, shares: Shares | None = None) -> Sequence:
    documents = torch.zeros(B, S, dtype=torch.int64)
    if padded:
        documents[:, -padded:] = PADDING
    shares = shares or Shares(B * (S - padded), B)
    return Sequence(torch.arange(S).expand(B, -1), documents, torch.arange(B), dtype=torch.float64, shares=shares)


def expert_output(module: MoE, index: int, x: Tensor) -> Tensor:
    experts = module.experts
    return (experts.curve(x @ experts.gate[index]) * (x @ experts.up[index])) @ experts.down[index]


def everything(module: MoE, x: Tensor, seq: Sequence) -> Tensor:
    """Every expert on every token, times its weight or zero."""
    routing = module.router(x, seq)
    weight = torch.zeros_like(routing.shares).scatter(-1, routing.expert, routing.weight)
    return sum(weight[..., i, None] * expert_output(module, i, x) for i in range(E))


def auxiliary(module: MoE, x: Tensor, seq: Sequence) -> dict[str, Tensor]:
    """The losses as the papers write them, one sequence at a time, padding cut out."""
    routing = module.router(x, seq)
    balance, squares = torch.zeros((), dtype=x.dtype), []
    for row in range(B):
        real = seq.documents[row] != PADDING
        count = int(real.sum())
        picked = routing.expert[row, real].flatten().bincount(minlength=E)
        f, p = picked * E / (K * count), routing.shares[row, real].mean(0)
        balance = balance + (f * p).sum() / B
        squares.append(routing.logits[row, real].logsumexp(-1).square())
    return {"balance": module.balance * balance, "router_z": module.z_loss * torch.cat(squares).mean()}


def reroute(module: MoE, expert: Tensor) -> None:
    """Every token to the experts [s, k] of its place, whatever it is."""
    route = module.router.forward
    module.router.forward = lambda x, seq: replace(route(x, seq), expert=expert.expand(B, -1, -1))


def gradients(loss: Tensor, module: MoE, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x, *module.parameters()], allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("router", ["topk", "sigmoid"])
def test_it_is_the_weighted_sum_of_the_chosen_experts(router):
    module, x = moe(router=router), tokens()
    torch.testing.assert_close(module(x, sequence()), everything(module, x, sequence()))


def test_every_gradient_is_that_of_the_weighted_sum():
    module, x = moe(), tokens()
    found = gradients(module(x, sequence()).square().sum(), module, x)
    expected = gradients(everything(module, x, sequence()).square().sum(), module, x)
    torch.testing.assert_close(found, expected)


def test_a_shared_expert_sees_every_token():
    module, x = moe(shared=GLU), tokens()
    torch.testing.assert_close(module(x, sequence()), everything(module, x, sequence()) + module.shared(x, sequence()))


@pytest.mark.parametrize("padded", [0, 3])
def test_auxiliary_losses_have_the_gradients_of_the_papers_formulas(padded):
    module, x = moe(balance=0.3, z_loss=0.2), tokens()
    found = gradients(module(x, sequence(padded)).sum() * 0.0, module, x)
    expected = gradients(sum(auxiliary(module, x, sequence(padded)).values()), module, x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("padded", [0, 3])
def test_auxiliary_losses_are_recorded_with_their_factors(padded):
    module, x, seq = moe(balance=0.3, z_loss=0.2), tokens(), sequence(padded)
    module(x, seq)
    expected = {(name, 1): value.detach() for name, value in auxiliary(module, x, seq).items()}
    torch.testing.assert_close(seq.records, expected)


def test_the_balance_loss_is_its_factor_where_all_experts_are_used_evenly():
    module, seq = moe(balance=0.3), sequence(padded=1)  # 8 tokens
    reroute(module, torch.arange(S * K).remainder(E).view(S, K))
    module(tokens(), seq)
    torch.testing.assert_close(seq.records["balance", 1], torch.tensor(0.3, dtype=torch.float64))


def test_auxiliary_losses_are_shares_of_the_whole_batch():
    module, x = moe(balance=0.3, z_loss=0.2), tokens()
    small, large = sequence(), sequence(shares=Shares(4 * B * S, 4 * B))
    module(x, small), module(x, large)
    assert all(torch.equal(4 * large.records[key], value) for key, value in small.records.items())


def test_a_model_without_auxiliary_losses_records_nothing():
    module, seq = moe(), sequence()
    module(tokens(), seq)
    assert seq.records == {} and module.records == ()


@pytest.mark.parametrize("option", ["balance", "z_loss", "capacity"])
def test_a_module_says_beforehand_what_it_records(option):
    module, seq = moe(**{option: 0.5}), sequence()
    module(tokens(), seq)
    assert {name for name, _ in seq.records} == set(module.records)


def test_a_token_without_room_anywhere_loses_its_experts_and_keeps_the_shared_one():
    module, x, seq = moe(capacity=0.1, shared=GLU), tokens(), sequence()  # room for one token an expert
    reroute(module, torch.arange(K).expand(S, -1))
    y = module(x, seq)
    assert torch.equal(y[:, 1:], module.shared(x, seq)[:, 1:])
    assert not torch.equal(y[:, :1], module.shared(x, seq)[:, :1])
    assert seq.records["dropped", 1] == K * (S - 1) / S


def test_capacity_for_all_equals_dropless():
    x = tokens()
    assert torch.equal(moe(capacity=E / K)(x, sequence()), moe()(x, sequence()))


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ForgeError, match="k=5 of experts=4 cannot be chosen"):
        moe(k=5)


def test_a_mixture_as_shared_expert_is_refused():
    with pytest.raises(ForgeError, match="a mixture that every token goes through, in a mixture"):
        tiny(ffn=MOE | {"shared": MOE})


def test_a_dry_run_has_the_shapes_of_a_run():
    module = moe(shared=GLU, capacity=1.0, balance=0.1, z_loss=0.1).to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        module, x = module.to_empty(device="cpu"), torch.zeros(B, S, H, dtype=torch.float64, requires_grad=True)
        y = module(x, sequence())
        y.sum().backward()
    assert y.shape == x.grad.shape == (B, S, H)
    assert module.experts.gate.grad.shape == (E, H, MOE["inner"])


def test_a_layer_can_stand_without_gradients():
    module, seq = moe(balance=0.3), sequence()
    with torch.no_grad():
        assert not module(tokens(), seq).requires_grad
    assert seq.records
