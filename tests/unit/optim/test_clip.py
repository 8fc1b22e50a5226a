from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from shardforge.core.layout import Layout
from shardforge.optim.clip import clip, copies, global_norm
from shardforge.parallel import mesh
from tests.tiny import batch, part, tiny

LIMIT = 0.05


def gradients(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    out = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for weight in out:
        weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype)
    return out


def on_ranks(layout: Layout) -> tuple[float, float, float, set[int]]:
    """Our norm, that of the whole gradients, the norm after clipping, and how many ranks share a piece."""
    recipe = tiny(layout=layout)
    engine = recipe.engine.build(recipe, torch.device("cpu"))
    engine.forward_backward(part(batch(), engine.mesh.data_rank, layout.data_ranks), 0)
    weights = list(engine.model.parameters())
    norm = global_norm(weights)
    whole = Tensor.norm(torch.stack([grad.norm() for grad in engine.gradients().values()]))
    shared = {copies(weight.grad) for weight in weights}
    clip(weights, norm, LIMIT)
    assert all(isinstance(weight.grad, DTensor) for weight in weights)
    return norm.item(), whole.item(), global_norm(weights).item(), shared


def test_one_process_gets_the_norm_of_torch():
    weights = gradients((3, 4), (5,), ())
    assert global_norm(weights).item() == pytest.approx(
        nn.utils.get_total_norm([w.grad for w in weights]).item(), 1e-12
    )


@pytest.mark.parametrize("limit", [0.5, 1.0, 1e9])
def test_one_process_clips_as_torch_does(limit):
    ours, theirs = gradients((3, 4), (5,)), gradients((3, 4), (5,))
    clip(ours, global_norm(ours), limit)
    nn.utils.clip_grad_norm_(theirs, limit)
    torch.testing.assert_close([w.grad for w in ours], [w.grad for w in theirs], rtol=1e-12, atol=0)


def test_gradients_below_the_limit_stay_to_the_last_bit():
    weights = gradients((3, 4))
    before = weights[0].grad.clone()
    clip(weights, global_norm(weights), 1e9)
    assert torch.equal(weights[0].grad, before)


@pytest.mark.parametrize("layout", ["dp2", "tp2", "dp2-tp2", "rep2-dp2", "rep2-tp2"])
def test_the_norm_counts_every_gradient_once_on_any_layout(ranks, layout):
    wanted = Layout.parse(layout)
    for norm, whole, clipped, _ in ranks(wanted.world_size).run(on_ranks, wanted):
        assert norm == pytest.approx(whole, rel=1e-12)
        assert clipped == pytest.approx(LIMIT, rel=1e-4)


@pytest.mark.parametrize(("layout", "shared"), [("dp2", {1}), ("tp2", {1, 2}), ("rep2-dp2", {2}), ("rep2-tp2", {2, 4})])
def test_copies_are_the_ranks_that_hold_the_same_piece(ranks, layout, shared):
    wanted = Layout.parse(layout)
    assert ranks(wanted.world_size).run(on_ranks, wanted)[0][3] == shared


def two_meshes() -> tuple[float, float, int]:
    """Norm of a weight over four ranks and one over (replicas, pieces), as experts are; what it is; and how many ranks
    hold a piece of the second."""
    generator, weights, grads = torch.Generator().manual_seed(0), [], []
    for text, places in (("dp4", [Shard(0)]), ("rep2-dp2", [Replicate(), Shard(1)])):
        here = mesh.build(Layout.parse(text), "cpu").fsdp
        grads.append(torch.randn(8, 6, generator=generator, dtype=torch.float64))
        weights.append(nn.Parameter(distribute_tensor(torch.zeros(8, 6).double(), here, places, src_data_rank=None)))
        weights[-1].grad = distribute_tensor(grads[-1], here, places, src_data_rank=None)
    return global_norm(weights).item(), torch.stack(grads).norm().item(), copies(weights[1].grad)


def lonely() -> float:
    """Only the first rank has a gradient."""
    weights = gradients((3, 4))
    if dist.get_rank() > 0:
        weights[0].grad = None
    return global_norm(weights).item()


def test_weights_on_different_meshes_have_one_norm(ranks):
    for norm, whole, shared in ranks(4).run(two_meshes):
        assert (norm, shared) == (pytest.approx(whole, rel=1e-12), 2)


def test_a_rank_without_gradients_learns_the_norm_of_the_others(ranks):
    expected = global_norm(gradients((3, 4))).item()
    assert ranks(2).run(lonely) == [pytest.approx(expected, rel=1e-12)] * 2


def test_weights_without_a_gradient_do_not_count():
    weights = [*gradients((3, 4)), nn.Parameter(torch.ones(9))]
    assert global_norm(weights) == global_norm(weights[:1])
    clip(weights, global_norm(weights), 0.1)
    assert weights[1].grad is None


def test_no_gradients_have_norm_0():
    assert global_norm([nn.Parameter(torch.ones(2))]) == 0


def test_half_precision_is_squared_in_float32():
    weights = gradients((1000,), dtype=torch.bfloat16)
    exact = weights[0].grad.double().norm().item()
    norm = global_norm(weights)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_told_as_it_is(bad):
    weights = gradients((3,), (4,))
    weights[1].grad[2] = bad
    assert not global_norm(weights).isfinite()
