from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from shardforge.core.errors import EngineError, LaunchError, RecipeError
from shardforge.core.slots import cores
from shardforge.model.attention import AttentionCore, kept
from shardforge.model.cores import auto, flash
from shardforge.model.masks.causal import Causal
from shardforge.model.masks.window import Window
from shardforge.nn.sequence import Places, Sequence

B, S, D = 2, 24, 8
MASKS = [Causal(), Window(size=1), Window(size=5), Window(size=100)]
HEADS = [(4, 4), (4, 2), (4, 1)]


def sequence() -> Sequence:
    """Documents of 24, and of 5, 1 and 18 tokens."""
    documents = torch.zeros(B, S, dtype=torch.int64)
    documents[1, 5:6], documents[1, 6:] = 1, 2
    positions = torch.arange(S).expand(B, -1).clone()
    positions[1] -= torch.tensor([0] * 5 + [5] + [6] * 18)
    return Sequence(positions, documents, torch.arange(B))


def inputs(n: int, m: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 10 + m)
    return tuple(torch.randn(B, S, heads, D, generator=generator, dtype=dtype) for heads in (n, m, m))


def attend(core: AttentionCore, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
    seq = sequence()
    core.prepare(seq)
    return core(q, k, v, seq, sinks)


def made(
    kind: str, mask: object = MASKS[0], scale: float = 0.3, sinks: bool = False, softcap: float | None = None
) -> AttentionCore:
    return cores[kind]().build(mask, scale, sinks, softcap)


def sunk(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A sink of each of n heads, of the size of the scores."""
    return torch.linspace(-1.0, 1.5, n, dtype=dtype)


def naive(
    q: Tensor, k: Tensor, v: Tensor, mask: object, scale: float, sinks: Tensor | None = None, cap: float = math.inf
) -> Tensor:
    """Eq. 1 of the paper, one query at a time, over the keys that its document and mask leave."""
    seq, group = sequence(), q.shape[2] // k.shape[2]
    y = torch.zeros(B, S, q.shape[2], D, dtype=q.dtype)
    for b in range(B):
        for s in range(S):
            pos, doc = seq.positions[b], seq.documents[b]
            keys = [t for t in range(S) if doc[t] == doc[s] and bool(mask.visible(pos[s], pos[t]))]
            for n in range(q.shape[2]):
                score = k[b, keys, n // group] @ q[b, s, n] * scale
                score = (score if cap == math.inf else cap * torch.tanh(score / cap)).exp()
                lost = 0.0 if sinks is None else sinks[n].exp()
                y[b, s, n] = score / (score.sum() + lost) @ v[b, keys, n // group]
    return y


def varlen(q, k, v, q_starts, k_starts, q_longest, k_longest, *, softmax_scale, causal, window_size, softcap=0.0):
    """What flash_attn_varlen_func computes, by its documentation: the last query of a run sees its last key, each one
    before it one key less; query i sees `left` keys before its own; a softcap above 0 bends the scaled scores."""
    assert causal and q_starts.dtype == k_starts.dtype == torch.int32
    assert (q_longest, k_longest) == (int(q_starts.diff().max()), int(k_starts.diff().max()))
    assert (q_starts[-1], k_starts[-1]) == (len(q), len(k)) and len(k) == len(v)
    y, group, left = torch.zeros_like(q), q.shape[1] // k.shape[1], window_size[0]
    runs = zip(itertools.pairwise(q_starts.tolist()), itertools.pairwise(k_starts.tolist()), strict=True)
    for (first, last), (first_key, last_key) in runs:
        for i in range(first, last):
            own = last_key - last + i
            low = first_key if left < 0 else max(first_key, own - left)
            for n in range(q.shape[1]):
                score = k[low : own + 1, n // group] @ q[i, n] * softmax_scale
                score = softcap * torch.tanh(score / softcap) if softcap > 0 else score
                y[i, n] = score.softmax(0) @ v[low : own + 1, n // group]
    return y


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = varlen
    monkeypatch.setitem(sys.modules, "flash_attn", package)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("n", "m"), HEADS)
def test_eager_is_attention_as_it_is_defined(n, m, mask):
    q, k, v = inputs(n, m, torch.float64)
    torch.testing.assert_close(attend(made("eager", mask), q, k, v), naive(q, k, v, mask, 0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("n", "m"), HEADS)
@pytest.mark.parametrize("kind", ["sdpa", "flex", "flash"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # as it is meant to be on CPU
@torch.no_grad()
def test_every_core_equals_eager(flash_attn, kind, n, m, mask):
    q, k, v = inputs(n, m)
    expected = attend(made("eager", mask), q, k, v)
    torch.testing.assert_close(attend(made(kind, mask), q, k, v), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("n", "m"), HEADS)
def test_a_sink_adds_to_the_denominator_alone(n, m, mask):
    q, k, v = inputs(n, m, torch.float64)
    sinks = sunk(n, torch.float64)
    got = attend(made("eager", mask, sinks=True), q, k, v, sinks)
    torch.testing.assert_close(got, naive(q, k, v, mask, 0.3, sinks), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("n", "m"), HEADS)
@pytest.mark.parametrize("kind", ["sdpa", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_every_core_with_sinks_equals_eager(kind, n, m, mask):
    q, k, v = inputs(n, m)
    expected = attend(made("eager", mask, sinks=True), q, k, v, sunk(n))
    got = attend(made(kind, mask, sinks=True), q, k, v, sunk(n))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_a_softcap_bends_the_scaled_scores_before_the_mask_and_leaves_sinks(mask, sinks):
    q, k, v = inputs(4, 2, torch.float64)
    given = sunk(4, torch.float64) if sinks else None
    got = attend(made("eager", mask, sinks=sinks, softcap=0.4), q, k, v, given)
    torch.testing.assert_close(got, naive(q, k, v, mask, 0.3, given, cap=0.4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("kind", "sinks"), [("flex", False), ("flex", True), ("flash", False)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_every_core_with_a_softcap_equals_eager(flash_attn, kind, sinks, mask):
    q, k, v = inputs(4, 2)
    given = sunk(4) if sinks else None
    expected = attend(made("eager", mask, sinks=sinks, softcap=0.4), q, k, v, given)
    got = attend(made(kind, mask, sinks=sinks, softcap=0.4), q, k, v, given)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_sdpa_refuses_a_softcap_and_says_which_cores_take_it():
    with pytest.raises(RecipeError, match=r"within softcap=50.0(.|\n)*auto or eager, or on CUDA flex"):
        made("sdpa", softcap=50.0)


def test_a_head_too_wide_for_flash_keeps_its_softcap(flash_attn):
    core = made("flash", softcap=0.4).taking(flash.WIDEST + 1)
    q, k, v = inputs(4, 2)
    torch.testing.assert_close(attend(core, q, k, v), attend(made("eager", softcap=0.4), q, k, v))


@pytest.mark.parametrize("kind", ["eager", "sdpa", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_a_sink_far_below_all_scores_changes_nothing(kind):
    q, k, v = inputs(4, 2)
    got = attend(made(kind, sinks=True), q, k, v, torch.full((4,), -1e4))
    torch.testing.assert_close(got, attend(made(kind), q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["eager", "sdpa", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_a_sink_far_above_all_scores_leaves_nothing_of_its_head_and_all_of_the_others(kind):
    q, k, v = inputs(4, 2)
    got = attend(made(kind, sinks=True), q, k, v, torch.tensor([-1e4, 1e4, -1e4, -1e4]))
    expected = attend(made(kind), q, k, v) * torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_sinks_of_half_precision_stay_within_its_rounding(kind):
    q, k, v = (x.bfloat16() for x in inputs(4, 2))
    sinks = sunk(4).bfloat16()
    got = attend(made(kind, sinks=True), q, k, v, sinks)
    expected = attend(made("eager", sinks=True), q.double(), k.double(), v.double(), sinks.double())
    assert got.dtype == torch.bfloat16 and (got - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("first", "last"), [(16, 24), (4, 9), (7, 8)])
@pytest.mark.parametrize("kind", ["eager", "sdpa", "flex", "flash"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_every_core_takes_keys_from_before_its_queries(flash_attn, kind, first, last, mask):
    q, k, v = inputs(4, 2)
    seq, begin = sequence(), 0 if mask.window is None else max(0, first - mask.window + 1)
    piece = dataclasses.replace(
        seq,
        positions=seq.positions[:, first:last],
        documents=seq.documents[:, first:last],
        keys=Places(seq.positions[:, begin:last], seq.documents[:, begin:last]),
    )
    sinks = None if kind == "flash" else sunk(4)
    core = made(kind, mask, sinks=sinks is not None)
    core.prepare(piece)
    got = core(q[:, first:last], k[:, begin:last], v[:, begin:last], piece, sinks)
    expected = attend(made("eager", mask), q, k, v, sinks)[:, first:last]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_gradients_of_sdpa_are_those_of_eager(mask, sinks):
    found = []
    for kind in ("eager", "sdpa"):
        leaves = [*inputs(4, 2, torch.float64), *([sunk(4, torch.float64)] if sinks else [])]
        leaves = [x.requires_grad_() for x in leaves]
        attend(made(kind, mask, sinks=sinks), *leaves).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


def test_what_sinks_leave_is_exact_in_its_gradient_through_the_log_sum_exp():
    q, k, v = (x[:1] for x in inputs(4, 4, torch.float64))
    leaves = [x.requires_grad_() for x in (q, k, v, sunk(4, torch.float64))]
    heads = [x.transpose(1, 2) for x in leaves[:3]]
    score = heads[0] @ heads[1].mT * 0.3
    score = score.masked_fill(torch.ones(S, S).triu(1).bool(), float("-inf"))
    y = score.softmax(-1) @ heads[2] * kept(score.logsumexp(-1), leaves[3])[..., None]
    got = torch.autograd.grad(y.square().sum(), leaves)
    expected = torch.autograd.grad(naive_rows(leaves).square().sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def naive_rows(leaves: list[Tensor]) -> Tensor:
    """Causal attention with sinks over one document by its definition, differentiable."""
    q, k, v, sinks = leaves
    score = torch.einsum("bsnd,btnd->bnst", q, k).mul(0.3).exp() * torch.ones(S, S, dtype=q.dtype).tril()
    return torch.einsum("bnst,btnd->bsnd", score / (score.sum(-1) + sinks.exp()[:, None])[..., None], v)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_sdpa_with_sinks_stays_fused(compute):
    """A mask that has a gradient would make torch compute every score."""
    q, k, v = (x.to(compute).requires_grad_() for x in inputs(4, 2))
    y = attend(made("sdpa", sinks=True), q, k, v, sunk(4, compute).requires_grad_())
    names, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [each for each, _ in node.next_functions if each is not None]
    assert "ScaledDotProductFlashAttentionForCpuBackward0" in names


@pytest.mark.parametrize(("size", "left"), [(1, 0), (5, 4)])
def test_flash_is_asked_for_the_keys_before_the_query(flash_attn, size, left):
    core, asked = made("flash", Window(size=size)), []
    core.attend = lambda *args, window_size, **options: asked.append(window_size) or args[0]
    attend(core, *inputs(4, 4))
    assert asked == [(left, 0)]


def test_flash_without_a_window_is_asked_for_all_keys(flash_attn):
    core, asked = made("flash", Causal()), []
    core.attend = lambda *args, window_size, **options: asked.append(window_size[0]) or args[0]
    attend(core, *inputs(4, 4))
    assert asked == [-1]


def test_documents_never_join_over_rows():
    starts, longest = flash.document_starts(torch.tensor([[0, 0, 1, 1], [1, 1, 1, -1]]))
    assert (starts.tolist(), longest) == ([0, 2, 4, 7, 8], 3)


def test_flash_refuses_sinks_and_says_which_cores_take_them():
    with pytest.raises(RecipeError, match=r"no softmax with sinks(.|\n)*auto, flex or sdpa"):
        made("flash", sinks=True)


def test_flash_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(LaunchError, match=r"needs the package flash-attn(.|\n)*shardforge\[flash\]"):
        made("flash")


def test_flex_says_that_it_cannot_train_on_cpu():
    q, k, v = (x.requires_grad_() for x in inputs(4, 4))
    with pytest.raises(EngineError, match=r"no backward on CPU(.|\n)*sdpa"):
        attend(made("flex"), q, k, v)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_the_scale_multiplies_the_scores(kind):
    q, k, v = inputs(4, 4, torch.float64)
    scaled = attend(made(kind, scale=1.0), q * 0.5, k, v)
    torch.testing.assert_close(attend(made(kind, scale=0.5), q, k, v), scaled, rtol=1e-12, atol=1e-12)


def test_scores_of_half_precision_are_at_least_float32():
    q, k, v = (x.bfloat16() for x in inputs(4, 4))
    q = q * 100
    got, expected = attend(made("eager"), q, k, v), attend(made("eager"), q.double(), k.double(), v.double())
    assert got.dtype == torch.bfloat16 and (got - expected).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("cuda", "package", "triton", "kind"),
    [
        (False, False, False, "sdpa"),
        (False, True, True, "sdpa"),
        (True, True, True, "flash"),
        (True, True, False, "flash"),
        (True, False, True, "flex"),
        (True, False, False, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_core_that_works_here(cuda, package, triton, kind):
    assert auto.choose(cuda, package, triton)[0] == kind


@pytest.mark.parametrize(("triton", "kind"), [(True, "flex"), (False, "sdpa")])
def test_auto_takes_a_core_that_trains_sinks_although_flash_is_here(triton, kind):
    chosen, reason = auto.choose(True, True, triton, sinks=True)
    assert chosen == kind and "sinks" in reason


@pytest.mark.parametrize(
    ("cuda", "package", "triton", "kind"),
    [
        (False, True, True, "eager"),
        (True, True, True, "flash"),
        (True, False, True, "flex"),
        (True, False, False, "eager"),
    ],
)
def test_auto_takes_the_fastest_core_that_trains_a_softcap(cuda, package, triton, kind):
    assert auto.choose(cuda, package, triton, softcap=True)[0] == kind


def test_auto_never_takes_a_core_that_cannot_train_here():
    core = made("auto", scale=1 / math.sqrt(D))
    leaves = [x.requires_grad_() for x in inputs(4, 4)]
    attend(core, *leaves).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


@pytest.mark.parametrize("width", [3, 11])
@pytest.mark.parametrize("kind", ["sdpa", "flex", "flash"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_values_may_have_another_width_than_keys(flash_attn, kind, width):
    q, k, _ = inputs(4, 2)
    v = torch.randn(B, S, 2, width, generator=torch.Generator().manual_seed(9))
    expected = attend(made("eager"), q, k, v)
    torch.testing.assert_close(attend(made(kind), q, k, v), expected, rtol=1e-5, atol=1e-5)
