from __future__ import annotations

import pytest
import torch

from shardforge.model.build import build
from shardforge.parallel import compile as compile_pass
from tests.tiny import tiny


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
