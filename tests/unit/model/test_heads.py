from __future__ import annotations

import pytest
import torch
from torch import nn

from shardforge.core.errors import RecipeError
from shardforge.model.build import build
from shardforge.model.heads.softcap import SoftcapHeadConfig
from shardforge.nn.init import fill
from shardforge.nn.module import tagged
from tests.tiny import HIDDEN, tiny


def model(head: object) -> nn.Module:
    recipe = tiny(model={"head": head})
    made = build(recipe.model, recipe.objective.build(), torch.float64).to_empty(device="cpu")
    fill(made, 1)
    return made


def stream() -> torch.Tensor:
    return 9 * torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_tied_head_is_the_embedding_table():
    made, x = model("tied"), stream()
    assert torch.equal(made.head(x), x @ made.embed.weight.T)


def test_a_tied_weight_has_one_name():
    assert [name for name, _ in model("tied").named_parameters() if "embed" in name or "head" in name] == [
        "embed.weight"
    ]


def test_a_tied_head_follows_the_table_when_it_is_replaced():
    made = model("tied")
    made.embed.weight = nn.Parameter(torch.zeros_like(made.embed.weight))
    assert not made.head(stream()).any()


@pytest.mark.parametrize("inner", ["tied", "linear"])
def test_softcap_bends_the_logits_of_its_head(inner):
    made, x = model({"kind": "softcap", "cap": 5.0, "head": inner}), stream()
    plain = x @ made.head.operand().T
    torch.testing.assert_close(made.head(x), 5 * torch.tanh(plain / 5), rtol=1e-12, atol=1e-12)
    assert plain.abs().max() > 5


def test_the_slope_of_softcap_is_its_derivative():
    head = model({"kind": "softcap", "cap": 5.0}).head
    x = torch.linspace(-20, 20, 101, dtype=torch.float64, requires_grad=True)
    y = head.curve(x)
    (expected,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(head.slope(y.detach()), expected, rtol=1e-9, atol=1e-12)


def test_passes_see_one_head():
    made = model({"kind": "softcap", "head": "linear"})
    assert list(tagged(made, "head")) == [made.head]


def test_a_softcap_inside_a_softcap_is_refused():
    with pytest.raises(RecipeError, match="softcap inside a softcap"):
        SoftcapHeadConfig(head=SoftcapHeadConfig())
