from __future__ import annotations

import pytest
import torch
from torch import nn

from shardforge.core.layout import Layout
from shardforge.model.build import build
from shardforge.parallel import mesh
from shardforge.parallel.twins import Loan, Twins, part_with_twins
from tests.tiny import tiny

CPU = torch.device("cpu")


def parts(head: object = "tied", mtp: object = None) -> tuple[nn.Module, dict[int, nn.Module], list[Loan]]:
    """A decoder of two layers in two stages."""
    recipe = tiny(model={"head": head, "mtp": mtp})
    whole = build(recipe.model, recipe.objective.build())
    every = {0: whole.part([0], first=True, last=False), 1: whole.part([1], first=False, last=True)}
    return whole, every, part_with_twins(every)


def moved(ranks: tuple[int, int], grad: bool) -> tuple[float, float, bool]:
    """Owner's gradient and twin's weight after settling and renewing; whether the twin's gradient is gone.

    The owner has weights 3 and gradients 1, the twin weights 0 and gradients 10, or none.
    """
    _, _, loans = parts()
    group, here = mesh.build(Layout(pp=max(ranks) + 1), "cpu").group("pp"), max(ranks) and torch.distributed.get_rank()
    owner, twin = loans[0].lender, loans[0].twin
    if here == ranks[0]:
        owner.to_empty(device=CPU).weight.data.fill_(3.0)
        owner.weight.grad = torch.ones_like(owner.weight)
    if here == ranks[1]:
        twin.to_empty(device=CPU).weight.data.fill_(0.0)
        twin.weight.grad = torch.full_like(twin.weight, 10.0) if grad else None
    made = Twins(loans, ranks, group, CPU)
    made.settle()
    made.renew()
    found = owner.weight.grad.mean().item() if here == ranks[0] else 0.0
    return found, twin.weight.mean().item() if here == ranks[1] else 0.0, twin.weight.grad is None


def test_what_a_stage_borrows_gets_a_twin_that_has_no_name_in_the_model():
    whole, every, (loan,) = parts()
    assert (loan.owner, loan.borrower, loan.lender) == (0, 1, whole.embed)
    assert every[1].head.embed is loan.twin and loan.twin.weight is not whole.embed.weight
    assert [name for name, _ in every[1].named_parameters() if "twins" in name] == ["twins.0.weight"]
    assert not any("twins" in name for name, _ in whole.named_parameters())


def test_a_borrower_inside_another_head_is_found():
    _, every, (loan,) = parts({"kind": "softcap", "head": "tied"})
    assert every[1].head.inner.embed is loan.twin


def test_all_borrowers_of_a_stage_share_one_twin():
    _, every, (loan,) = parts(mtp={"block": "one", "depth": 2})
    assert every[1].head.embed is every[1].mtp.embed is loan.twin


def test_a_twin_is_to_passes_what_its_lender_is():
    _, _, (loan,) = parts("linear", {"block": "one"})
    assert loan.lender.slot == loan.twin.slot == "embed"


def test_a_stage_that_borrows_nothing_has_no_twin():
    assert parts("linear")[2] == []


@pytest.mark.parametrize(("grad", "sum_"), [(True, 11.0), (False, 1.0)])
def test_a_twin_hands_its_gradient_to_the_owner_and_takes_its_weight(ranks, grad, sum_):
    assert ranks(2).run(moved, (0, 1), grad) == [(sum_, 0.0, True), (0.0, 3.0, True)]


def test_owner_and_twin_may_be_on_one_rank(ranks):
    assert ranks(1).run(moved, (0, 0), True) == [(11.0, 3.0, True)]
