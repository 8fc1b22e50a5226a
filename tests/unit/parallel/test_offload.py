from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from shardforge.core.layout import Layout
from shardforge.model.build import build
from shardforge.nn.init import fill
from shardforge.nn.sequence import Sequence
from shardforge.parallel import offload, recompute
from shardforge.parallel.shelf import Lane, Shelf
from tests.tiny import HIDDEN, LENGTH, VOCAB, batch, part, tiny

BLOCKS = 3
STREAM = 2 * LENGTH * HIDDEN * 8  # bytes of the residual stream of these tests


class CopyLane(Lane):
    """Copies as between two memories, and keeps count of them. `marks` are passed in order, like those of a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []  # bytes
        self.fetched = 0
        self.moved: list[Tensor] = []  # what stood on the device

    def out(self, x: Tensor) -> Tensor:
        self.sent.append(x.numel())
        self.moved.append(x)
        return x.clone()

    def back(self, x: Tensor) -> Tensor:
        self.fetched += 1
        return x.clone()


def model(kind: recompute.Recompute = "none", lane: Lane | None = None) -> nn.Module:
    recipe = tiny(model={"stack": [f"one x {BLOCKS}"]})
    made = build(recipe.model, recipe.objective.build(), torch.float64)
    offload.materialise(made, torch.device("cpu"), ())
    fill(made, 1)
    recompute.apply(made, kind)
    if lane is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(offload, "lane_of", lambda device_type: lane)
            offload.apply(made, ("activations",), "cpu")
    return made


def sequence() -> tuple[Tensor, Sequence]:
    positions = torch.arange(LENGTH).expand(2, -1)
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    return tokens, Sequence(
        positions, torch.zeros_like(positions), torch.zeros(2, dtype=torch.int64), dtype=torch.float64
    )


def logits(made: nn.Module) -> Tensor:
    return made(*sequence())


def gradients(made: nn.Module) -> dict[str, Tensor]:
    logits(made).square().sum().backward()
    return {name: weight.grad for name, weight in made.named_parameters()}


@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.parametrize("lane", [Lane, CopyLane])
def test_no_gradient_changes_to_the_last_bit(kind, lane):
    expected, got = gradients(model(kind)), gradients(model(kind, lane()))
    assert {name for name in expected if not torch.equal(got[name], expected[name])} == set()


def test_two_forward_passes_before_their_backward_passes_change_nothing():
    """As the schedules of a pipeline do."""
    found = []
    for lane in (None, CopyLane()):
        made = model("none", lane)
        first, second = logits(made), logits(made)
        first.square().sum().backward()
        second.sin().sum().backward()
        found.append([weight.grad for weight in made.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_graph_that_is_used_twice_gives_the_same_gradient_twice():
    """As the two halves of a split backward pass do."""
    made = model("none", CopyLane())
    total = logits(made).square().sum()
    first = torch.autograd.grad(total, list(made.parameters()), retain_graph=True)
    second = torch.autograd.grad(total, list(made.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_no_weight_and_no_table_travels():
    lane = CopyLane()
    made = model("none", lane)
    tokens, seq = sequence()
    made(tokens, seq)
    stay = {each.untyped_storage().data_ptr() for each in (*made.parameters(), *offload.tensors(seq))}
    assert lane.moved
    assert {x.data_ptr() for x in lane.moved} & stay == set()


def test_what_several_operations_keep_is_sent_once():
    lane = CopyLane()
    logits(model("none", lane))
    assert len({x.data_ptr() for x in lane.moved}) == len(lane.moved)


def test_a_recomputed_block_sends_its_input_and_nothing_else():
    lane = CopyLane()
    logits(model("full", lane))
    assert lane.sent == [STREAM] * BLOCKS


def test_an_evaluation_sends_nothing():
    lane = CopyLane()
    with torch.no_grad():
        logits(model("none", lane))
    assert lane.sent == []


def shelves(lane: Lane) -> list[Shelf]:
    """Those of one forward pass, in the order of the blocks."""
    out = [lane.latest]
    while out[0].before is not None:
        out.insert(0, out[0].before)
    return out


def test_after_the_forward_pass_the_last_block_alone_is_on_the_device():
    lane = CopyLane()
    held = logits(model("none", lane))
    assert [{parcel.device is None for parcel in shelf.parcels} for shelf in shelves(lane)] == [{True}, {True}, {False}]
    del held


def test_a_block_comes_back_while_the_one_after_it_runs_backward_and_the_last_never_leaves():
    lane, back = CopyLane(), {}
    made = model("none", lane)

    def look(layer: str, y: Tensor) -> None:
        """To be called when the backward pass of the next block is done."""
        y.register_hook(lambda grad: back.update({layer: [shelf.back for shelf in shelves(lane)]}))

    for layer, block in made.blocks.items():
        block.register_forward_hook(lambda module, args, y, layer=layer: look(layer, y))
    total = logits(made).square().sum()
    here = len(shelves(lane)[-1].parcels)
    total.backward()
    assert back == {"2": [False, False, False], "1": [False, True, True], "0": [True, True, True]}
    assert lane.fetched == len(lane.sent) - here


def test_nothing_is_kept_after_the_backward_pass():
    lane = CopyLane()
    logits(model("none", lane)).square().sum().backward()
    assert [len(shelf.parcels) for shelf in shelves(lane)] == [0] * BLOCKS


def test_a_storage_that_is_written_between_two_operations_is_sent_as_each_of_them_saw_it():
    lane = CopyLane()
    shelf = Shelf(lane, None)
    x = torch.arange(4.0)
    first = shelf.pack(x)
    x.add_(1)
    second = shelf.pack(x)
    shelf.close()
    shelf.leave()
    assert (shelf.unpack(first).tolist(), shelf.unpack(second).tolist()) == ([0, 1, 2, 3], [1, 2, 3, 4])


@pytest.mark.parametrize(
    "view",
    [lambda x: x, lambda x: x.T, lambda x: x[1:, ::2], lambda x: x[:, :1].expand(-1, 3), lambda x: x.view(2, 12)],
)
def test_a_view_comes_back_with_its_strides(view: Callable[[Tensor], Tensor]):
    x = view(torch.arange(24, dtype=torch.float64).view(4, 6))
    shelf = Shelf(CopyLane(), None)
    saved = shelf.pack(x)
    shelf.close()
    shelf.leave()
    got = shelf.unpack(saved)
    assert torch.equal(got, x) and (got.stride(), got.storage_offset()) == (x.stride(), x.storage_offset())


def test_small_storages_stay_where_a_lane_says_so():
    lane = CopyLane()
    lane.least_bytes = 64
    shelf, small, large = Shelf(lane, None), torch.zeros(15), torch.zeros(16)
    assert shelf.pack(small) is small
    assert shelf.pack(large) is not large


def test_without_offload_the_blocks_stay_as_they_are():
    assert all("forward" not in block.__dict__ for block in model().blocks.values())


def test_optimizer_offload_puts_weights_on_the_cpu_and_buffers_on_the_device():
    made = nn.Linear(2, 2, device="meta")
    made.register_buffer("seen", torch.zeros(3, device="meta"))
    offload.materialise(made, torch.device("meta"), ("optimizer",))
    assert ({weight.device.type for weight in made.parameters()}, made.seen.device.type) == ({"cpu"}, "meta")


def travelled(layout: Layout, changes: dict) -> int:
    """Storages that a micro-batch sends."""
    lane = CopyLane()
    recipe = tiny(layout=layout, engine={"kind": "native", "offload": ["activations"]}, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "lane_of", lambda device_type: lane)
        made = recipe.engine.build(recipe, torch.device("cpu"))
    made.forward_backward(part(batch(), made.mesh.data_rank, layout.data_ranks), 0)
    return len(lane.sent)


def offloaded(layout: Layout) -> set[tuple[str, bool, bool]]:
    """Policy of each unit, whether it pins memory, and whether moments are split as weights are."""
    recipe = tiny(layout=layout, engine={"kind": "native", "offload": ["optimizer"]})
    made = recipe.engine.build(recipe, torch.device("cpu"))
    assert isinstance(made.model, FSDPModule)
    split = all(isinstance(value, DTensor) for name, value in made.state().items() if name.endswith("exp_avg"))
    policies = [
        module._get_fsdp_state()._fsdp_param_group.offload_policy
        for module in made.model.modules()
        if isinstance(module, FSDPModule)
    ]
    return {(type(policy).__name__, policy.pin_memory, split) for policy in policies}


@pytest.mark.parametrize(
    "changes", [{}, {"ffn": {"kind": "moe", "experts": 4, "k": 2, "inner": 8}}], ids=["dense", "moe"]
)
def test_gathered_weights_do_not_travel(ranks, changes):
    """A rank with pieces of the weights sends as much as one that has them whole."""
    alone = ranks(1).run(travelled, Layout(), changes)
    assert alone[0] > 0
    assert ranks(2).run(travelled, Layout(dp_shard=2), changes) == alone * 2


@pytest.mark.parametrize("layout", ["one", "dp2"])
def test_optimizer_offload_takes_the_same_way_on_every_layout(ranks, layout):
    wanted = Layout.parse(layout)
    assert ranks(wanted.world_size).run(offloaded, wanted)[0] == {("CPUOffloadPolicy", False, True)}
