from __future__ import annotations

import pytest
import torch

from shardforge.model.build import build
from shardforge.parallel import compile as compile_pass
from tests.tiny import tiny


@pytest.mark.parametrize("compiled", [True, False])
def test_blocks_are_compiled_when_asked_and_keep_their_names(monkeypatch, compiled):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    recipe = tiny()
    model = build(recipe.model, recipe.objective.build())
    names = [name for name, _ in model.named_parameters()]
    compile_pass.apply(model, compiled)
    assert [block._compiled_call_impl is not None for block in model.blocks.values()] == [compiled] * 2
    assert [name for name, _ in model.named_parameters()] == names
