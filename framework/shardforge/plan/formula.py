"""Bubbles as the papers give them."""

from __future__ import annotations

from shardforge.plan.order import known
from shardforge.plan.simulate import Cost


def bubble_formula(
    schedule: str, ranks: int, micro_batches: int, chunks: int = 1, cost: Cost | None = None
) -> float | None:
    """Share of the time from the first start to the last end in which a rank waits; `cost` is of one stage.

    With p ranks, m micro-batches, v stages a rank, and F, I, W of one stage (B = I + W), the time is v m (F + B) of
    work and a wait of

    gpipe        (p-1) (F + B)       Huang et al. 2019, arXiv:1811.06965, section 2.3; exact
    1f1b         (p-1) (F + B)       Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1; exact
    interleaved  (p-1) (F + B)       the same, section 2.2.2: (p-1) / (v m + p-1) of the time; exact where p divides m
    zero_bubble  (p-1) (F + I - W)   Qi et al. 2024, arXiv:2401.10241, table 2, ZB-H1; exact where p divides m and
                                     neither W > I nor W > F
    zbv          (p-1) F             the same, section 6: where F = I = W no rank waits between its own first and last
                                     action, and ranks begin F apart; None for other costs, which have no formula
    dualpipev    (p-1) (F + 2 I - W) DeepSeek-AI 2024, arXiv:2412.19437, table 2: (PP/2 - 1) (F&B + B - 3W), for the
                                     PP/2 ranks of two stages each and F&B = F + B, as nothing is overlapped here;
                                     exact where F = I = W, else an upper bound.
    """
    cost = cost or Cost()
    known(schedule)
    f, i, w = cost.forward, cost.input_grad, cost.weight_grad
    if schedule == "zbv" and not f == i == w:
        return None
    wait = {"zero_bubble": f + i - w, "zbv": f, "dualpipev": f + 2 * i - w}.get(schedule, cost.total)
    wait *= ranks - 1
    return wait / (chunks * micro_batches * cost.total + wait)
