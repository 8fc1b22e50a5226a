from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from shardforge.model.build import build
from shardforge.nn.init import fill
from shardforge.nn.sequence import Sequence
from shardforge.parallel import compile as compile_pass
from tests.tiny import batch, tiny
from tests.tiny_kinds import EVERYWHERE, MOE


@pytest.mark.parametrize(("compiled", "count"), [(True, 2), (False, 0)])
def test_every_block_is_compiled_when_asked_and_names_stay(monkeypatch, compiled, count):
    made: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: made.append(function) or function)
    recipe = tiny()
    model = build(recipe.model, recipe.objective.build())
    names = [name for name, _ in model.named_parameters()]
    compile_pass.apply(model, compiled)
    assert len(made) == count
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "block",
    [
        {"residual": {"kind": "pre", "dropout": 0.3}},
        {"ffn": MOE | {"balance": EVERYWHERE, "z_loss": 0.1}},
        {"ffn": MOE | {"router": "noisy_topk"}},
    ],
    ids=["dropout", "records", "router-records"],
)
def test_blocks_that_differ_in_their_number_alone_do_not_run_out_of_graphs(monkeypatch, block):
    """torch compiles a function for 8 cases; after that it leaves it as it is."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert compiled_loss(monkeypatch, "one x 10", **block).isfinite()


@pytest.mark.filterwarnings("ignore")
def test_balance_losses_leave_no_code_to_python(monkeypatch):
    """What a graph does not hold breaks a frame in two, or leaves the whole of it out if it stands in a loop."""
    torch._dynamo.utils.counters.clear()
    compiled_loss(monkeypatch, "one", ffn=MOE | {"balance": EVERYWHERE})
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] > 0


def compiled_loss(monkeypatch: pytest.MonkeyPatch, stack: str, **block: Any) -> Tensor:
    """Of one pass over a batch, of blocks that are compiled anew."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    recipe = tiny(model={"stack": [stack]}, **block)
    model = build(recipe.model, recipe.objective.build(), torch.float64).to_empty(device="cpu")
    fill(model, 0)
    compile_pass.apply(model, True)
    data = batch()
    seq = Sequence(data.positions, data.documents, data.rows, torch.tensor(1), torch.float64)
    return model(data.tokens, seq, data.labels)["total"]
