from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from shardforge.core.layout import Layout
from shardforge.engine import passes
from shardforge.engine.kinds.native import NativeConfig


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the passes in the order in which they were applied."""
    names: list[str] = []
    for name in ("expert", "tensor", "context", "recompute", "compile_pass", "offload", "fully_shard"):
        spy = SimpleNamespace(apply=lambda *args, name=name, **options: names.append(name))
        monkeypatch.setattr(passes, name, spy)
    return names


def apply(layout: Layout, policy: MixedPrecisionPolicy, **fields: object) -> None:
    here = SimpleNamespace(layout=layout, whole=SimpleNamespace(device_type="cpu"))
    passes.apply(nn.Module(), here, policy, NativeConfig(**fields))


@pytest.mark.parametrize("layout", [Layout(dp_shard=2), Layout(tp=2), Layout(dp_replicate=2)], ids=str)
def test_weights_are_split_first_and_sharded_last(ran, layout):
    apply(layout, MixedPrecisionPolicy())
    assert (ran[:2], ran[-1], len(ran)) == (["expert", "tensor"], "fully_shard", 7)


def test_one_process_in_one_type_is_not_sharded(ran):
    apply(Layout(), MixedPrecisionPolicy())
    assert "fully_shard" not in ran


def test_one_process_with_its_optimizer_on_the_cpu_is_sharded_for_the_copies(ran):
    apply(Layout(), MixedPrecisionPolicy(), offload=("optimizer",))
    assert ran[-1] == "fully_shard"


def test_one_process_that_computes_in_another_type_is_sharded_for_its_casts(ran):
    apply(Layout(), MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert ran[-1] == "fully_shard"
