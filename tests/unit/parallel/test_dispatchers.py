from __future__ import annotations

import functools
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardforge.core.errors import ForgeError
from shardforge.core.layout import Layout
from shardforge.nn import collectives
from shardforge.nn.dispatch import NOWHERE, Dispatch, Local
from shardforge.parallel import expert as expert_pass
from shardforge.parallel import mesh
from shardforge.parallel.dispatchers.deepep import DeepEP, buffer
from tests.unit.parallel import deep_ep_stand_in

E, K, H, F = 8, 3, 4, 8
KINDS = ["gather", "exchange", "two_hop"]
LAYOUTS = ["dp2-ep2", "dp4-ep4", "dp4-ep2", "dp2-etp2", "dp4-ep2-etp2"]
ROUTES = ["spread", "dropped", "one-expert", "nowhere"]


@functools.cache
def dispatch(kind: str, layout: str, nodes: int = 1) -> Dispatch:
    made = mesh.build(Layout.parse(layout), "cpu")
    return expert_pass.maker(kind, made, H, made.layout.ep // nodes)(E)


def numbers(salt: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(salt), dtype=torch.float64)


def tokens(rank: int, route: str, uneven: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x, expert, weight of one rank; where `uneven`, the last rank has no tokens and the others different numbers."""
    count = 6 if not uneven else 0 if rank == dist.get_world_size() - 1 else 5 + rank
    generator = torch.Generator().manual_seed(rank)
    expert = torch.rand(count, E, generator=generator).argsort(-1)[:, :K]
    if route == "dropped":
        expert[torch.rand(count, K, generator=generator) < 0.4] = NOWHERE
    if route == "one-expert":
        expert[:] = torch.tensor([NOWHERE, 5, NOWHERE])
    if route == "nowhere":
        expert[:] = NOWHERE
    return numbers(100 + rank, count, H).requires_grad_(), expert, numbers(200 + rank, count, K).requires_grad_()


def weights() -> tuple[Tensor, Tensor]:
    return numbers(1, E, H, F), numbers(2, E, F, H)


def experts(up: Tensor, down: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Two matrices and a curve between, so that a part of the width gives a part of the sum."""
    rows = zip(x.split(counts.tolist()), up, down, strict=True)
    return torch.cat([(part @ one).tanh() @ two for part, one, two in rows])


def compared(kind: str, layout: str, route: str, nodes: int = 1, uneven: bool = False) -> list[float]:
    """Largest errors of the result and of the gradients of x, weight, up and down, against all experts on one rank."""
    made = mesh.build(Layout.parse(layout), "cpu")
    up, down = weights()
    whole = [up.clone().requires_grad_(), down.clone().requires_grad_()]
    for rank in dist.get_process_group_ranks(made.experts):
        x, expert, weight = tokens(rank, route, uneven)
        y = Local(E, False)(x, expert, weight, functools.partial(experts, *whole))
        (y * y.detach().cos()).sum().backward()
        if rank == dist.get_rank():
            wanted = [y, x.grad, weight.grad]
    own, wide = made.coordinate("ep"), made.coordinate("etp")
    pieces = [up.chunk(made.layout.ep)[own].chunk(made.layout.etp, 2)[wide]]
    pieces.append(down.chunk(made.layout.ep)[own].chunk(made.layout.etp, 1)[wide])
    pieces = [each.clone().requires_grad_() for each in pieces]
    wanted.append(whole[0].grad.chunk(made.layout.ep)[own].chunk(made.layout.etp, 2)[wide])
    wanted.append(whole[1].grad.chunk(made.layout.ep)[own].chunk(made.layout.etp, 1)[wide])
    x, expert, weight = tokens(dist.get_rank(), route, uneven)
    y = dispatch(kind, layout, nodes)(x, expert, weight, functools.partial(experts, *pieces))
    (y * y.detach().cos()).sum().backward()
    got = [y, x.grad, weight.grad, *(each.grad for each in pieces)]
    return [(left - right).abs().max().item() if left.numel() else 0.0 for left, right in zip(got, wanted, strict=True)]


def agree(found: list[list[float]]) -> bool:
    return max(max(errors) for errors in found) < 1e-12


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_reach_their_experts_and_gradients_come_back(ranks, kind, layout, route):
    assert agree(ranks(Layout.parse(layout).world_size).run(compared, kind, layout, route))


@pytest.mark.parametrize(("layout", "nodes"), [("dp2-ep2", 2), ("dp4-ep4", 2), ("dp4-ep4", 4), ("dp4-ep2-etp2", 2)])
@pytest.mark.parametrize("route", ROUTES)
def test_two_hops_over_nodes_are_one(ranks, layout, nodes, route):
    assert agree(ranks(Layout.parse(layout).world_size).run(compared, "two_hop", layout, route, nodes))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["exchange", "two_hop"])
def test_ranks_may_bring_different_numbers_of_tokens_or_none(ranks, kind, layout):
    found = ranks(Layout.parse(layout).world_size).run(compared, kind, layout, "spread", Layout.parse(layout).ep, True)
    assert agree(found)


def crossings(route: str) -> tuple[int, int]:
    """Rows that two_hop sends between nodes of two ranks, and pairs of a token and a node that it needs."""
    sent = []
    original = collectives.exchange

    def watched(x: Tensor, out: list[int], back: list[int], group: dist.ProcessGroup) -> Tensor:
        if group == two.across and x.dim() == 2 and x.shape[1] == H:
            sent.append(sum(out))
        return original(x, out, back, group)

    two = dispatch("two_hop", "dp4-ep4", 2)
    x, expert, weight = tokens(dist.get_rank(), route, False)
    with patch.object(collectives, "exchange", watched):
        two(x, expert, weight, functools.partial(lambda x, counts: x))
    node = expert.div(E // 2, rounding_mode="floor")
    return sent[0], sum(len({each for each in row if each >= 0}) for row in node.tolist())


@pytest.mark.parametrize("route", ["spread", "dropped"])
def test_a_token_crosses_to_a_node_once_however_many_of_its_experts_are_there(ranks, route):
    found = ranks(4).run(crossings, route)
    assert all(sent == needed for sent, needed in found)
    assert sum(sent for sent, _ in found) < 4 * 6 * K


def doubled(x: Tensor, counts: Tensor) -> Tensor:
    """Experts that multiply by 1, 2, 4, 8 of this rank's; exact in bfloat16."""
    return x * (2.0 ** torch.arange(len(counts), dtype=x.dtype)).repeat_interleave(counts)[:, None]


def deepep(route: str) -> list[bool]:
    """DeepEP over a stand-in against Exchange, with numbers that bfloat16 holds exactly."""
    group = mesh.build(Layout.parse("dp2-ep2"), "cpu").group("ep")
    results = []
    with patch.dict(sys.modules, {"deep_ep": SimpleNamespace(Buffer=deep_ep_stand_in.Buffer)}):
        for each in (DeepEP(buffer(group, H), E), dispatch("exchange", "dp2-ep2")):
            x, expert, weight = tokens(dist.get_rank(), route, True)
            x = (2 * x.detach()).round().to(torch.bfloat16).requires_grad_()
            weight = weight.detach().gt(0).float().requires_grad_()
            y = each(x, expert, weight, doubled)
            y.backward(torch.ones_like(y))
            results.append([y, x.grad, weight.grad])
    return [torch.equal(left, right) for left, right in zip(*results, strict=True)]


@pytest.mark.parametrize("route", ["spread", "dropped"])
def test_deepep_over_its_interface_equals_the_exchange(ranks, route):
    assert ranks(2).run(deepep, route) == [[True] * 3] * 2


def test_deepep_says_what_it_needs_where_its_package_is_missing():
    with pytest.raises(ForgeError, match=r"deepep needs the package deep-ep(.|\n)*build it from github"):
        buffer(None, H)


def test_deepep_refuses_what_its_kernels_do_not_send():
    with pytest.raises(ForgeError, match="deepep sends bfloat16, not float64"):
        DeepEP(None, E)(torch.zeros(1, H, dtype=torch.float64), torch.zeros(1, K), torch.zeros(1, K), doubled)
