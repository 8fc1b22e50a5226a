from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from shardforge.core.errors import ForgeError
from shardforge.model.balance import Balance, from_megatron, from_switch, from_transformers, spread_evenly
from shardforge.model.ffns.moe import MoE
from shardforge.nn.batch import PADDING
from shardforge.nn.sequence import Sequence, Shares
from tests.tiny_experts import B, E, K, S, gradients, moe, reroute, sequence, tokens

SCOPES: dict[str, dict[str, Any]] = {
    "sequence": {"scope": "sequence", "weight": 0.3},
    "pools": {"scope": "sequence", "weight": 0.3, "sequences": 2},
    "batch": {"scope": "batch", "weight": 0.3},
    "layers": {"scope": "layers", "weight": 0.3},
}


def balanced(scope: str, **options: Any) -> MoE:
    return moe(balance=[SCOPES[scope]], **options)


def charged(module: MoE, x: Tensor, seq: Sequence) -> list[Tensor]:
    """Gradients of the auxiliary losses alone."""
    return gradients(module(x, seq).sum() * 0.0, module, x)


def value(module: MoE, x: Tensor, seq: Sequence) -> float:
    module(x, seq)
    return seq.records["balance", module.layer].item()


def loads(module: MoE, x: Tensor, seq: Sequence) -> Tensor:
    with torch.no_grad():
        module(x, seq)
    return seq.records["load", module.layer]


def plainly(module: MoE, x: Tensor, seq: Sequence, rows: int) -> Tensor:
    """Switch's eq. 4-6 and DeepSeek-V3's 17-20, one pool after the other, padding cut out."""
    routing, losses = module.router(x, seq, module.split), []
    for first in range(0, len(x), rows):
        real = seq.documents[first : first + rows] != PADDING
        chosen = routing.expert[first : first + rows][real]
        f = torch.stack([(chosen == index).sum() / (K * len(chosen)) for index in range(E)])
        losses.append(E * (f * routing.shares[first : first + rows][real].mean(0)).sum())
    return 0.3 * torch.stack(losses).mean()


@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize(("scope", "rows"), [("sequence", 1), ("pools", 2), ("batch", 4), ("layers", 4)])
def test_value_and_gradients_are_those_of_the_formula(scope, rows, padded):
    module, x, seq = balanced(scope), tokens(4), sequence(padded, rows=range(4))
    expected = plainly(module, x, seq, rows)
    assert value(module, x, seq) == pytest.approx(expected.item(), rel=1e-6)  # f above is in float32
    torch.testing.assert_close(charged(module, x, seq), gradients(expected, module, x), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scope", SCOPES)
def test_it_is_its_weight_where_all_experts_are_used_evenly(scope):
    module = balanced(scope)
    reroute(module, torch.arange(S * K).remainder(E).view(S, K))
    assert value(module, tokens(), sequence(padded=1)) == pytest.approx(0.3)  # 8 tokens


@pytest.mark.parametrize("scope", SCOPES)
def test_padding_counts_nowhere(scope):
    module, x = balanced(scope), tokens()
    half = x[:, : S // 2].detach().requires_grad_()
    padded = charged(module, x, sequence(padded=S - S // 2))
    alone = charged(module, half, sequence(length=S // 2))
    torch.testing.assert_close(padded[0][:, : S // 2], alone[0])
    assert not padded[0][:, S // 2 :].any()
    torch.testing.assert_close(padded[1:], alone[1:])


@pytest.mark.parametrize(
    ("scope", "micro"), [("sequence", 1), ("sequence", 2), ("pools", 2), ("batch", 1), ("batch", 2), ("layers", 1)]
)
def test_micro_batches_add_up_to_the_whole_batch(scope, micro):
    module, x, whole = balanced(scope), tokens(4), sequence(rows=range(4))
    whole.loads = {1: loads(module, x, sequence(rows=range(4)))}
    expected, found = charged(module, x, whole), []
    for first in range(0, 4, micro):
        part = x[first : first + micro].detach().requires_grad_()
        seq = sequence(rows=range(first, first + micro), shares=whole.shares)
        seq.loads = whole.loads
        found.append(charged(module, part, seq))
    torch.testing.assert_close(torch.cat([each[0] for each in found]), expected[0])
    torch.testing.assert_close([sum(each) for each in zip(*(e[1:] for e in found), strict=True)], expected[1:])


def test_without_the_loads_of_the_batch_micro_batches_do_not_add_up():
    """The trap that seq.loads is there for: f of a part is not f of the whole."""
    module, x = balanced("batch"), tokens(4)
    expected = charged(module, x, sequence(rows=range(4)))[0]
    parts = [x[row : row + 1].detach().requires_grad_() for row in range(4)]
    shares = Shares(4 * S, 4)
    found = torch.cat([charged(module, part, sequence(rows=range(1), shares=shares))[0] for part in parts])
    assert (found - expected).norm() > 0.1 * expected.norm()


def test_counts_of_the_step_before_start_even():
    module, x = moe(balance=[SCOPES["batch"] | {"counts": "previous"}]), tokens()
    assert value(module, x, sequence()) == pytest.approx(0.3)  # sum_i P_i


@pytest.mark.parametrize("scope", ["batch", "layers"])
def test_counts_of_the_step_before_are_those_that_were_settled(scope):
    now, x = balanced(scope, layers=2), tokens()
    other = torch.tensor([1.0, 2.0, 3.0, 30.0], dtype=torch.float64)
    seq = sequence()
    seq.loads = {0: other, 1: loads(now, x, sequence())}
    previous = moe(balance=[SCOPES[scope] | {"counts": "previous"}], layers=2)
    previous.settle(seq.loads, 0.0)
    torch.testing.assert_close(charged(previous, x, sequence()), charged(now, x, seq))


def test_a_module_asks_for_the_loads_of_a_step_only_where_it_needs_them():
    asks = {name: balanced(name).counts_now for name in SCOPES}
    assert asks == {"sequence": False, "pools": False, "batch": True, "layers": True}
    assert not moe(balance=[SCOPES["batch"] | {"counts": "previous"}]).counts_now


def both_layers(scope: str, logits: Mapping[int, Tensor]) -> float:
    """The loss of two layers whose routers see these logits [b, s, e]."""
    found = {}
    for layer, x in logits.items():
        module = balanced(scope, layer=layer, layers=2, hidden=E)
        with torch.no_grad():
            module.router.weight.copy_(torch.eye(E))
        found[layer] = (module, x)
    known = {layer: loads(module, x, sequence()) for layer, (module, x) in found.items()}
    total = 0.0
    for module, x in found.values():
        seq = sequence()
        seq.loads = known
        total += value(module, x, seq)
    return total


def drawn(seed: int) -> Tensor:
    return torch.randn(B, S, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_loss_over_all_layers_is_that_of_transformers_divided_by_k():
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = {0: drawn(0), 1: drawn(1)}
    theirs = modeling.load_balancing_loss_func(tuple(x.flatten(0, 1) for x in logits.values()), E, K)
    assert both_layers("layers", logits) / 0.3 == pytest.approx(theirs.item() / K, rel=1e-5)
    assert from_transformers(0.02, K).weight * both_layers("layers", logits) / 0.3 == pytest.approx(
        0.02 * theirs.item(), rel=1e-5
    )


def test_the_loss_of_a_layer_is_that_of_megatron():
    """switch_load_balancing_loss_func: sum(probs) . tokens_per_expert * E * coeff / (topk * total_tokens^2)."""
    logits, coefficient = drawn(0), 0.01
    module = moe(balance=[vars(from_megatron(coefficient, "aux_loss", B))], hidden=E)
    with torch.no_grad():
        module.router.weight.copy_(torch.eye(E))
    probs, count = logits.softmax(-1).flatten(0, 1), B * S
    chosen = probs.topk(K).indices.flatten().bincount(minlength=E)
    expected = (probs.sum(0) * chosen).sum() * E * coefficient / (K * count**2)
    assert value(module, logits, sequence()) == pytest.approx(expected.item())


def test_over_all_layers_mirrored_collapses_look_even_and_in_each_layer_they_do_not():
    """Two layers, each of which uses two of four experts, and together all of them."""
    low = torch.tensor([9.0, 9.0, -9.0, -9.0], dtype=torch.float64).expand(B, S, E)
    logits = {0: low, 1: low.flip(-1)}
    assert both_layers("layers", logits) == pytest.approx(0.3)
    assert both_layers("batch", logits) / 2 == pytest.approx(2 * 0.3, rel=1e-6)


def test_conversions_keep_what_a_coefficient_means():
    assert from_transformers(0.02, 2) == Balance(scope="layers", weight=0.04)
    assert from_megatron(1e-2, "aux_loss", 4) == Balance(scope="sequence", weight=1e-2, sequences=4)
    assert from_megatron(1e-4, "seq_aux_loss", 4) == Balance(scope="sequence", weight=1e-4)
    assert from_megatron(1e-3, "global_aux_loss", 4) == Balance(scope="batch", weight=1e-3)
    assert from_switch(1e-2, 8) == Balance(scope="sequence", weight=1e-2, sequences=8)


@pytest.mark.parametrize(
    ("rows", "sequences", "message"),
    [
        (range(3), 4, "pools of sequences=2 do not fill a micro-batch of 3 sequences"),
        (range(1, 3), 4, r"rows \[1, 2\] of the batch are not whole pools of sequences=2"),
    ],
)
def test_pools_that_are_cut_are_refused_in_training(rows, sequences, message):
    module, shares = balanced("pools"), Shares(S * sequences, sequences)
    with pytest.raises(ForgeError, match=message):
        module.prepare(sequence(rows=rows, shares=shares, key=1))
    module.prepare(sequence(rows=rows, shares=shares))


def test_whole_pools_pass():
    balanced("pools").prepare(sequence(rows=range(2, 4), shares=Shares(4 * S, 4), key=1))


def test_in_evaluation_rows_that_are_left_over_are_a_smaller_pool():
    module, x = balanced("pools"), tokens(3)
    found = value(module, x, sequence(rows=range(3)))
    pair, last = plainly(module, x[:2], sequence(), 2), plainly(module, x[2:], sequence(rows=range(1)), 1)
    assert found == pytest.approx((2 * pair + last).item() / 3, rel=1e-6)


def test_shares_of_nothing_are_even():
    assert spread_evenly(torch.zeros(4)).tolist() == [0.25] * 4
    assert spread_evenly(torch.tensor([1, 3, 0, 0])).tolist() == [0.25, 0.75, 0.0, 0.0]
