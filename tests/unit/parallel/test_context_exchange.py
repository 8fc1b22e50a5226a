"""Each way of sharing a sequence against attention over the whole of it, and what each way sends and computes."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardforge.core.errors import LayoutError
from shardforge.core.slots import cores
from shardforge.model.attention import AttentionCore
from shardforge.model.masks.causal import Causal
from shardforge.model.masks.window import Window
from shardforge.nn import collectives
from shardforge.nn.batch import PADDING
from shardforge.nn.sequence import Places, Sequence
from shardforge.parallel import context
from shardforge.parallel.attention import chunks, exchange, local, ring

S, D, E = 32, 6, 5
MASKS = [Causal(), Window(size=1), Window(size=4), Window(size=5), Window(size=13)]
HEADS = [(4, 4), (8, 2), (4, 1)]
WAYS = [(way, mask) for way in context.WAYS for mask in MASKS if way != "halo" or mask.window]


def places() -> Places:
    """One row of a single document, one of documents of 5, 12 and 11 tokens and padding."""
    documents = torch.zeros(2, S, dtype=torch.int64)
    positions = torch.arange(S).expand(2, -1).clone()
    for number, (first, last) in zip((1, 2, PADDING), ((5, 17), (17, 28), (28, S)), strict=True):
        documents[1, first:last], positions[1, first:last] = number, torch.arange(last - first)
    return Places(positions, documents)


def inputs(n: int, m: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n * 10 + m)
    shapes = [(n, D), (m, D), (m, E), (n, E)]
    return [torch.randn(2, S, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def sunk(n: int, dtype: torch.dtype) -> Tensor:
    """A sink of each of n heads, of the size of the scores."""
    return torch.linspace(-1.0, 1.5, n, dtype=torch.float64).to(dtype)


def attended(core: AttentionCore, leaves: list[Tensor], weight: Tensor, seq: Sequence) -> list[Tensor]:
    """The result, and the gradients of q, k, v and, where leaves has them, sinks."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    core.prepare(seq)
    y = core(*leaves[:3], seq, *leaves[3:])
    (y * weight).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def own(x: Tensor) -> Tensor:
    return chunks.own(x, dist.get_world_size(), dist.get_rank(), 1)


def shared(core: AttentionCore, way: str) -> AttentionCore:
    made = context.WAYS[way](dist.group.WORLD)
    core.prepare, core.forward = partial(made.prepare, core), partial(made.forward, core)
    return core


def sequence() -> Sequence:
    index = context.zigzag(S, dist.get_world_size(), dist.get_rank())
    where = places()
    return Sequence(own(where.positions), own(where.documents), torch.arange(2), index=index, length=S)


def run(
    way: str, mask: object, heads: tuple[int, int], dtype: torch.dtype, sinks: bool, softcap: float | None
) -> list[Tensor]:
    *leaves, weight = (own(x) for x in inputs(*heads, dtype))
    kind = "sdpa" if softcap is None else "eager"
    core = shared(cores[kind]().build(mask, 0.3, sinks, softcap), way)
    if not sinks:
        return attended(core, leaves, weight, sequence())
    *found, grad = attended(core, [*leaves, sunk(heads[0], dtype)], weight, sequence())
    dist.all_reduce(grad)  # each rank has what its own queries, or its own heads, do to them
    return [*found, grad]


def errors(way: str, mask: object, dtype: torch.dtype, sinks: bool = False, softcap: float | None = None) -> float:
    """The largest error of the result and of any gradient against attention over the whole sequence in float64."""
    worst = 0.0
    for heads in HEADS:
        *leaves, weight = (x.double() for x in inputs(*heads, dtype))
        where = places()
        seq = Sequence(where.positions, where.documents, torch.arange(2))
        leaves += [sunk(heads[0], dtype).double()] if sinks else []
        expected = attended(cores["eager"]().build(mask, 0.3, sinks, softcap), leaves, weight, seq)
        for got, want in zip(run(way, mask, heads, dtype, sinks, softcap), expected, strict=True):
            assert got.dtype == dtype
            wanted = own(want) if want.dim() > 1 else want
            worst = max(worst, ((got - wanted).norm() / want.norm().clamp(min=1.0)).item())
    return worst


def counted(way: str, mask: object) -> tuple[int, int]:
    """(numbers sent by this rank, blocks of attention computed) in a forward pass."""
    sent, blocks = [], []
    swap, gather, attend = exchange.swap, collectives._all_gather, local.local_attention
    with ExitStack() as stack:
        for holder in ("ring", "halo"):
            spy = lambda sends, *rest: sent.extend(x.numel() for _, x in sends) or swap(sends, *rest)  # noqa: E731
            stack.enter_context(patch(f"shardforge.parallel.attention.{holder}.swap", spy))
        whole = lambda out, x, **rest: sent.append(x.numel()) or gather(out, x, **rest)  # noqa: E731
        stack.enter_context(patch.object(collectives, "_all_gather", whole))
        stack.enter_context(patch.object(ring, "local_attention", lambda *args: blocks.append(1) or attend(*args)))
        core, seq = shared(cores["sdpa"]().build(mask, 0.3), way), sequence()
        core.prepare(seq)
        sent.clear()  # places are gathered once a micro-batch, not once a layer
        core(*(own(x) for x in inputs(4, 4, torch.float64)[:3]), seq)
    return sum(sent), len(blocks)


def refused() -> str:
    core, seq = shared(cores["sdpa"]().build(Causal(), 0.3), "ulysses"), sequence()
    core.prepare(seq)
    try:
        core(*(own(x) for x in inputs(5, 1, torch.float64)[:3]), seq)
    except LayoutError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize(("way", "mask"), WAYS, ids=str)
def test_every_way_equals_attention_over_the_whole_sequence(ranks, way, mask, cp):
    assert max(ranks(cp).run(errors, way, mask, torch.float64)) < 1e-12


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize(("way", "mask"), [each for each in WAYS if each[1] in (MASKS[0], MASKS[2], MASKS[4])], ids=str)
def test_every_way_counts_a_sink_once_a_query(ranks, way, mask, cp):
    assert max(ranks(cp).run(errors, way, mask, torch.float64, True)) < 1e-12


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("way", "mask"), [each for each in WAYS if each[1] in (MASKS[0], MASKS[2])], ids=str)
def test_every_way_bends_scores_as_one_process_does(ranks, way, mask, sinks):
    assert max(ranks(2).run(errors, way, mask, torch.float64, sinks, 0.4)) < 1e-12


@pytest.mark.parametrize("way", context.WAYS)
def test_sinks_in_bfloat16_stay_within_its_rounding(ranks, way):
    assert max(ranks(2).run(errors, way, MASKS[4], torch.bfloat16, True)) < 0.02


@pytest.mark.parametrize(
    ("way", "mask"), [("gather", MASKS[0]), ("halo", MASKS[2])] + [(w, MASKS[4]) for w in context.WAYS]
)
def test_bfloat16_stays_within_its_rounding(ranks, way, mask):
    assert max(ranks(2).run(errors, way, mask, torch.bfloat16)) < 0.02


def test_a_ring_computes_only_what_is_visible_and_as_much_on_each_rank(ranks):
    assert [blocks for _, blocks in ranks(4).run(counted, "ring", Causal())] == [9] * 4  # of 16


def test_a_ring_computes_fewer_blocks_under_a_window(ranks):
    assert sum(blocks for _, blocks in ranks(4).run(counted, "ring", Window(size=2))) == 8 + 7  # of 64


def test_a_ring_passes_keys_and_values_on_once_less_than_there_are_ranks(ranks):
    share = 2 * (S // 4) * 4 * (D + E)
    assert [sent for sent, _ in ranks(4).run(counted, "ring", Causal())] == [3 * share] * 4


def test_a_halo_sends_the_ends_of_chunks_and_a_gather_all(ranks):
    numbers = 2 * 4 * (D + E)  # of a token: rows, heads, widths
    halo = [sent for sent, _ in ranks(4).run(counted, "halo", Window(size=4))]
    gather = [sent for sent, _ in ranks(4).run(counted, "gather", Window(size=4))]
    assert halo == [3 * numbers, 6 * numbers, 6 * numbers, 3 * numbers]
    assert gather == [8 * numbers] * 4


def test_a_window_of_one_sends_nothing(ranks):
    assert ranks(2).run(counted, "halo", Window(size=1)) == [(0, 0)] * 2


def test_ulysses_refuses_heads_that_cannot_be_traded_also_where_no_weight_tells_them(ranks):
    for message in ranks(2).run(refused):
        assert "5 query heads on each tp rank cannot be traded 2 ways" in message


def blockwise(mask: object, cuts: list[int]) -> tuple[Tensor, Tensor]:
    """Attention over pieces of the keys, joined -> (result [b, n, s, e], log-sum-exp)."""
    q, k, v, _ = (x.transpose(1, 2) for x in inputs(4, 2, torch.float64))
    q, where = q.unflatten(1, (2, 2)), places()
    out, total = torch.zeros(*q.shape[:-1], E, dtype=q.dtype), torch.full(q.shape[:-1], float("-inf"), dtype=q.dtype)
    for first, last in itertools.pairwise(cuts):
        rule = local.Rule(mask, 0.3, where, where.at(slice(first, last)), distance=-first)
        local.join(out, total, *local.local_attention(q, k[:, :, first:last], v[:, :, first:last], rule))
    return out, total


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("cuts", [[0, 16, 32], [0, 3, 4, 30, 32]], ids=str)
def test_blocks_of_attention_join_to_the_whole(mask, cuts):
    torch.testing.assert_close(blockwise(mask, cuts), blockwise(mask, [0, S]), rtol=1e-12, atol=1e-12)


def test_a_query_that_sees_none_of_the_keys_adds_nothing():
    q, k, v = (x.transpose(1, 2) for x in inputs(4, 4, torch.float64)[:3])  # [b, m, s, d]
    where = Places(torch.arange(S).expand(2, -1), torch.zeros(2, S, dtype=torch.int64))
    late = Places(where.positions + S, where.documents)
    out, total = local.local_attention(q[:, :, None], k, v, local.Rule(Causal(), 0.3, where, late, distance=-S))
    assert out.eq(0).all() and total.eq(float("-inf")).all()


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("cuts", [[0, 32], [0, 3, 16, 30, 32]], ids=str)
def test_gradients_of_blocks_in_small_tiles_add_up_to_those_of_the_whole(monkeypatch, mask, cuts):
    monkeypatch.setattr(local, "TILE_BYTES", {"cpu": 1})
    monkeypatch.setattr(local, "FEWEST", 5)
    *leaves, weight = inputs(4, 2, torch.float64)
    where = places()
    y, *expected = attended(
        cores["eager"]().build(mask, 0.3), leaves, weight, Sequence(where.positions, where.documents, torch.arange(2))
    )
    out, total = blockwise(mask, cuts)
    q, k, v, y, grad = (x.transpose(1, 2) for x in (*leaves, y, weight))
    q, grad = (x.unflatten(1, (2, 2)) for x in (q, grad))
    torch.testing.assert_close(out.flatten(1, 2), y, rtol=1e-12, atol=1e-12)
    got = [torch.zeros_like(x) for x in (q, k, v)]
    for first, last in itertools.pairwise(cuts):
        rule = local.Rule(mask, 0.3, where, where.at(slice(first, last)), distance=-first)
        known = total, grad, (grad * out).sum(-1)
        dq, dk, dv = local.local_gradients(q, k[:, :, first:last], v[:, :, first:last], rule, *known)
        got[0] += dq
        got[1][:, :, first:last] += dk
        got[2][:, :, first:last] += dv
    got[0] = got[0].flatten(1, 2)
    torch.testing.assert_close([x.transpose(1, 2) for x in got], expected, rtol=1e-11, atol=1e-11)


def test_scores_never_exist_for_more_queries_than_a_tile_holds(monkeypatch):
    monkeypatch.setattr(local, "TILE_BYTES", {"cpu": 20 * (2 * 4 * S * 8)})
    seen = []
    product = local.product
    monkeypatch.setattr(local, "product", lambda x, y: seen.append(x.shape[-2]) or product(x, y))
    tiled = blockwise(Causal(), [0, S])
    assert max(seen) == 20
    monkeypatch.undo()
    torch.testing.assert_close(tiled, blockwise(Causal(), [0, S]), rtol=1e-12, atol=1e-12)


def test_what_is_sent_must_lie_in_the_order_of_its_numbers():
    with pytest.raises(AssertionError, match="order of its memory"):
        exchange.swap([(0, torch.zeros(4, 2).T)], [], None)
