from __future__ import annotations

from functools import partial

import pytest
import torch

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
    [{"residual": {"kind": "pre", "dropout": 0.3}}, {"ffn": MOE | {"balance": EVERYWHERE, "z_loss": 0.1}}],
    ids=["dropout", "records"],
)
def test_blocks_that_differ_in_their_number_alone_do_not_run_out_of_graphs(monkeypatch, block):
    """torch compiles a function for 8 cases; after that it leaves it as it is."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    recipe = tiny(model={"stack": ["one x 10"]}, **block)
    model = build(recipe.model, recipe.objective.build(), torch.float64).to_empty(device="cpu")
    fill(model, 0)
    compile_pass.apply(model, True)
    data = batch()
    seq = Sequence(data.positions, data.documents, data.rows, torch.tensor(1), torch.float64)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert model(data.tokens, seq, data.labels)["total"].isfinite()
