from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from shardforge.core.errors import ForgeError
from shardforge.nn.sequence import Shares
from tests.tiny import GLU, tiny
from tests.tiny_experts import B, E, H, K, S, everything, gradients, moe, reroute, sequence, tokens
from tests.tiny_kinds import EVEN, EVERYWHERE, MOE, TIGHT

FORMS: dict[str, dict[str, Any]] = {
    "glu": {},
    "mlp": {"form": "mlp"},
    "glu-biases": {"bias": True},
    "mlp-biases": {"form": "mlp", "bias": True},
    "clamped-biases": {"bias": True, "clamp": 0.5},
}


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_it_is_the_weighted_sum_of_the_chosen_experts(options):
    module, x = moe(**options), tokens()
    torch.testing.assert_close(module(x, sequence()), everything(module, x, sequence()))


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_every_gradient_is_that_of_the_weighted_sum(options):
    module, x = moe(**options), tokens()
    found = gradients(module(x, sequence()).square().sum(), module, x)
    expected = gradients(everything(module, x, sequence()).square().sum(), module, x)
    torch.testing.assert_close(found, expected)


def test_tokens_in_another_order_give_their_results_in_that_order():
    module, x, order = moe(), tokens(), torch.randperm(S)
    torch.testing.assert_close(module(x, sequence())[:, order], module(x[:, order], sequence()))


@pytest.mark.parametrize("bias", [False, True])
def test_an_expert_without_tokens_has_gradients_of_zeros(bias):
    module, x = moe(bias=bias), tokens()
    reroute(module, torch.tensor([1, 2]).expand(S, -1))
    module(x, sequence()).square().sum().backward()
    found = {name: [bool(each.any()) for each in weight.grad] for name, weight in module.experts.named_parameters()}
    assert len(found) == (6 if bias else 3)
    assert all(used == [False, True, True, False] for used in found.values())


def test_all_experts_with_weights_of_one_are_one_wide_unit():
    """DeepSeekMoE: splitting a unit into E small ones and using all of them changes nothing."""
    module, x = moe(k=E), tokens()
    reroute(module, torch.arange(E).expand(S, -1), torch.ones(S, E))
    gate, up = (weight.transpose(0, 1).flatten(1) for weight in (module.experts.gate, module.experts.up))
    wide = (torch.nn.functional.silu(x @ gate) * (x @ up)) @ module.experts.down.flatten(0, 1)
    torch.testing.assert_close(module(x, sequence()), wide)


def test_a_shared_expert_sees_every_token():
    module, x = moe(shared=GLU), tokens()
    torch.testing.assert_close(module(x, sequence()), everything(module, x, sequence()) + module.shared(x, sequence()))


def test_with_weights_of_zero_only_the_shared_expert_is_left():
    module, x = moe(shared=GLU), tokens()
    reroute(module, torch.arange(K).expand(S, -1), torch.zeros(S, K))
    assert torch.equal(module(x, sequence()), module.shared(x, sequence()))


def test_a_gate_on_the_shared_expert_is_one_sigmoid_a_token():
    module, x = moe(shared=GLU, shared_gate="sigmoid"), tokens()
    gate = torch.sigmoid(x @ module.shared_gate.weight[0])[..., None]
    expected = everything(module, x, sequence()) + gate * module.shared(x, sequence())
    torch.testing.assert_close(module(x, sequence()), expected)


@pytest.mark.parametrize("padded", [0, 3])
def test_the_z_loss_has_the_gradient_of_its_formula(padded):
    """d/dr of mean lse(r)^2 is 2 lse softmax(r) / T, and r = x W^T."""
    module, x, seq = moe(z_loss=0.2), tokens(), sequence(padded)
    found = gradients(module(x, seq).sum() * 0.0, module, x)
    with torch.no_grad():
        logits, count = module.router(x, seq, module.split).logits, B * (S - padded)
        slope = 0.2 * 2 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1) / count
        slope[:, S - padded :] = 0
        expected = {"x": slope @ module.router.weight, "w": slope.flatten(0, 1).T @ x.flatten(0, 1)}
    names = ["x", *(name for name, _ in module.named_parameters())]
    torch.testing.assert_close(found[0], expected["x"])
    torch.testing.assert_close(found[names.index("router.weight")], expected["w"])


def test_the_z_loss_is_recorded_with_its_factor():
    module, x, seq = moe(z_loss=0.2), tokens(), sequence(padded=3)
    module(x, seq)
    logits = module.router(x, seq, module.split).logits[:, :-3]
    torch.testing.assert_close(seq.records["router_z", 1], 0.2 * logits.logsumexp(-1).square().mean().detach())


def test_the_sum_of_both_losses_is_differentiated():
    x, both = tokens(), moe(z_loss=0.2, balance=EVEN)
    apart = [moe(z_loss=0.2), moe(balance=EVEN)]
    one, two = (gradients(module(x, sequence()).sum() * 0.0, module, x) for module in apart)
    found = gradients(both(x, sequence()).sum() * 0.0, both, x)
    torch.testing.assert_close(found, [left + right for left, right in zip(one, two, strict=True)])


def test_auxiliary_losses_are_shares_of_the_whole_batch():
    module, x = moe(balance=EVEN, z_loss=0.2), tokens()
    small, large = sequence(), sequence(shares=Shares(4 * B * S, 4 * B))
    module(x, small), module(x, large)
    assert all(torch.equal(4 * large.records[name, 1], small.records[name, 1]) for name in module.records)


@pytest.mark.parametrize(
    ("options", "records"),
    [({}, set()), ({"balance": EVEN}, {"balance"}), ({"z_loss": 0.5}, {"router_z"}), ({"capacity": TIGHT}, set())],
    ids=str,
)
def test_a_module_says_beforehand_what_it_records(options, records):
    module, seq = moe(**options), sequence()
    module(tokens(), seq)
    assert set(module.records) == records
    assert {name for name, _ in seq.records} == records | set(module.tallies)
    assert {name: len(seq.records[name, 1]) for name in module.tallies} == module.tallies


def test_loads_count_real_tokens():
    module, seq = moe(), sequence(padded=1)
    reroute(module, torch.tensor([[0, 1]] * 8 + [[2, 3]]))  # the last place is padding
    module(tokens(), seq)
    assert seq.records["load", 1].tolist() == [8.0 * B, 8.0 * B, 0.0, 0.0]


def test_the_entropy_of_the_affinities_is_tallied_in_nats():
    module, x, seq = moe(), tokens(), sequence(padded=2)
    module(x, seq)
    shares = module.router(x, seq, module.split).shares[:, :-2]
    count, entropy, dropped = seq.records["router", 1].tolist()
    assert (count, dropped) == (B * (S - 2), 0.0)
    assert entropy == pytest.approx(-(shares * shares.log()).sum().item())


def test_a_token_without_room_anywhere_loses_its_experts_and_keeps_the_shared_one():
    module, x, seq = moe(capacity=TIGHT | {"factor": 0.1}, shared=GLU), tokens(), sequence()  # room for one token
    reroute(module, torch.arange(K).expand(S, -1))
    y = module(x, seq)
    assert torch.equal(y[:, 1:], module.shared(x, seq)[:, 1:])
    assert not torch.equal(y[:, :1], module.shared(x, seq)[:, :1])
    assert seq.records["router", 1][2] == B * K * (S - 1)
    assert seq.records["load", 1].tolist() == [B * S, B * S, 0, 0]  # what was chosen, with room or without


def test_a_dropped_token_gets_exactly_nothing_without_a_shared_expert():
    module = moe(capacity=TIGHT | {"factor": 0.1})
    reroute(module, torch.arange(K).expand(S, -1))
    assert not module(tokens(), sequence())[:, 1:].any()


@pytest.mark.parametrize("drop", ["position", "weight"])
def test_room_for_all_equals_dropless(drop):
    x, room = tokens(), {"factor": E / K, "drop": drop}
    assert torch.equal(moe(capacity=room)(x, sequence()), moe()(x, sequence()))


def test_evaluation_can_have_another_room():
    module, x = moe(capacity=TIGHT | {"factor": 0.1, "eval_factor": float(E)}), tokens()
    assert torch.equal(module(x, sequence()), moe()(x, sequence()))
    assert not torch.equal(module(x, sequence(key=1)), moe()(x, sequence()))


def test_by_weight_the_tokens_with_the_largest_weights_are_kept():
    module, x, seq = moe(k=1, capacity=TIGHT | {"factor": 0.1, "drop": "weight"}), tokens(), sequence()
    reroute(module, torch.zeros(S, 1, dtype=torch.int64), (torch.arange(S) - 4).abs()[:, None])  # 4 first and last
    kept = module(x, seq).any(-1)
    assert kept.tolist() == [[True] + [False] * (S - 1)] * B


WRONG: dict[str, dict[str, Any]] = {
    "k=5 of experts=4 cannot be chosen": {"k": 5},
    "a mixture that every token goes through, in a mixture": {"shared": MOE},
    "clamp=7.0 limits a gate, and form: mlp has none": {"form": "mlp", "clamp": 7.0},
    "clamp=7.0 brings its own curve, so activation: gelu would not be used": {"activation": "gelu", "clamp": 7.0},
    "shared_gate: sigmoid has no shared ffn to gate": {"shared_gate": "sigmoid"},
    "2 losses with scope: sequence": {"balance": EVEN * 2},
    "groups=3 does not divide experts=4": {"router": {"kind": "topk", "groups": 3, "group_topk": 1}},
    "scope: batch is the whole batch, and sequences=2": {
        "balance": [{"scope": "batch", "weight": 0.1, "sequences": 2}]
    },
    "scope: sequence cannot take counts: previous": {"balance": [EVEN[0] | {"counts": "previous"}]},
    "0.0 is not above 0": {"balance": [{"scope": "batch", "weight": 0.0}]},
}


@pytest.mark.parametrize(("message", "options"), WRONG.items(), ids=WRONG)
def test_what_cannot_be_is_refused(message, options):
    with pytest.raises(ForgeError, match=message):
        tiny(ffn=MOE | options)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ForgeError, match=r"(?s)clamp=7.0 limits a gate.*no shared ffn to gate"):
        tiny(ffn=MOE | {"form": "mlp", "clamp": 7.0, "shared_gate": "sigmoid"})


def test_a_dry_run_has_the_shapes_of_a_run():
    options = {"shared": GLU, "capacity": TIGHT, "balance": EVERYWHERE, "z_loss": 0.1, "bias": True}
    module = moe(**options).to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        module, x = module.to_empty(device="cpu"), torch.zeros(B, S, H, dtype=torch.float64, requires_grad=True)
        y = module(x, sequence())
        y.sum().backward()
    assert y.shape == x.grad.shape == (B, S, H)
    assert module.experts.gate.grad.shape == (E, H, MOE["inner"])
    assert module.experts.down_bias.grad.shape == (E, H)


def test_a_layer_can_stand_without_gradients():
    module, seq = moe(balance=EVEN), sequence()
    with torch.no_grad():
        assert not module(tokens(), seq).requires_grad
    assert seq.records


def library(kind: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A mixture of transformers in float64, and our options for it."""
    torch.manual_seed(0)
    small = {"hidden_size": H, "moe_intermediate_size": 6, "num_experts_per_tok": K, "_experts_implementation": "eager"}
    if kind == "qwen2":
        from transformers import Qwen2MoeConfig
        from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

        made = Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(num_experts=E, shared_expert_intermediate_size=10, **small))
        options = {
            "router": {"kind": "topk", "weights": "raw"},
            "shared": GLU | {"inner": 10},
            "shared_gate": "sigmoid",
        }
    else:
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

        groups = {"n_group": 2, "topk_group": 1, "n_shared_experts": 2, "routed_scaling_factor": 2.5}
        made = DeepseekV3MoE(DeepseekV3Config(n_routed_experts=E, **groups, **small))
        router = {"kind": "topk", "score": "sigmoid", "groups": 2, "group_topk": 1, "scale": 2.5}
        options = {"router": router, "shared": GLU | {"inner": 12}}
    made = made.double()
    for weight in made.parameters():
        weight.data.normal_(std=0.3)
    return made, options | {"inner": 6}


@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v3"])
def test_it_is_the_layer_of_transformers(kind):
    pytest.importorskip("transformers")
    theirs, options = library(kind)
    ours, x = moe(**options), tokens()
    shared = theirs.shared_experts if kind == "deepseek_v3" else theirs.shared_expert
    with torch.no_grad():
        gate, up = theirs.experts.gate_up_proj.transpose(1, 2).chunk(2, -1)
        for name, value in {"gate": gate, "up": up, "down": theirs.experts.down_proj.transpose(1, 2)}.items():
            getattr(ours.experts, name).copy_(value)
            getattr(ours.shared, name).weight.copy_(getattr(shared, f"{name}_proj").weight)
        ours.router.weight.copy_(theirs.gate.weight)
        if kind == "qwen2":
            ours.shared_gate.weight.copy_(theirs.shared_expert_gate.weight)
    other = x.detach().clone().requires_grad_()
    wanted, found = theirs(other), ours(x, sequence())
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # their routers work in float32
    wanted.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_a_uniform_router_has_the_entropy_of_all_experts():
    module, seq = moe(), sequence()
    with torch.no_grad():
        module.router.weight.zero_()
    module(tokens(), seq)
    assert seq.records["router", 1][1].item() == pytest.approx(B * S * math.log(E))


def test_layers_are_pooled_with_those_of_the_stack_and_one_behind_it_is_alone():
    assert moe(balance=EVERYWHERE, layers=3).peers == (0, 1, 2)
    assert moe(balance=EVERYWHERE, layers=3, layer=3).peers == (3,)


def test_a_narrow_layer_computes_in_its_own_type():
    module, x = moe(balance=EVEN).bfloat16(), tokens().detach().bfloat16().requires_grad_()
    y = module(x, replace(sequence(), dtype=torch.float32))
    y.float().sum().backward()
    assert {y.dtype, x.grad.dtype, module.experts.gate.grad.dtype} == {torch.bfloat16}
