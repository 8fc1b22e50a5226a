from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shardforge.core.errors import EngineError
from shardforge.core.layout import Layout
from shardforge.parallel import mesh
from shardforge.parallel.pipeline import Pipeline
from shardforge.parallel.stages import ORDERS, Stages, Work, cut

ROWS, WIDTH = 3, 4
CPU = torch.device("cpu")


def chain(count: int) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(WIDTH, WIDTH).double() for _ in range(count)]


def numbers(micro: int, rows: int) -> Tensor:
    return torch.randn(rows, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(micro))


def through(part: nn.Linear, x: Tensor | None, micro: int, rows: int, last: bool) -> Tensor:
    """A stage that hands on a transposed view, and whose gradient to the stage before is one too."""
    x = numbers(micro, rows) if x is None else x
    out = part(x.T.contiguous().T).tanh().T.contiguous().T
    return (out * (micro + 1)).sum() if last else out


def opened(schedule: str, pp: int) -> tuple[Pipeline, Stages, list[nn.Linear]]:
    stages = cut(schedule, pp, None, Work(0.0, (1.0,) * 8, 0.0))
    here, parts = mesh.build(Layout(pp=pp), "cpu"), chain(len(stages))
    held = {stage: parts[stage] for stage in stages.held(here.coordinate("pp"))}
    return Pipeline(held, stages, here.group("pp"), CPU), stages, parts


def expected(length: int, count: int, rows: int) -> list[Tensor]:
    alone = chain(length)
    for micro in range(count):
        x = None
        for stage, part in enumerate(alone):
            x = through(part, x, micro, rows, stage == length - 1)
        x.backward()
    return [part.weight.grad for part in alone]


def trained(schedule: str, pp: int, sizes: list[tuple[int, int]]) -> float:
    """The worst error of a gradient over steps of (micro-batches, rows), each with its own shapes."""
    made, stages, parts = opened(schedule, pp)
    worst = 0.0
    for count, rows in sizes:

        def work(part: nn.Linear, x: Tensor | None, micro: int, rows: int = rows) -> Tensor:
            return through(part, x, micro, rows, part is parts[-1])

        made.train(work, count, numbers(0, rows))
        wanted = expected(len(stages), count, rows)
        for stage, part in made.parts.items():
            worst = max(worst, ((part.weight.grad - wanted[stage]).norm() / wanted[stage].norm()).item())
            part.zero_grad()
    return worst


def forwarded(schedule: str, pp: int, rows: list[int]) -> tuple[float, bool]:
    """Error of the losses of uneven micro-batches, 0 where the last stage is not; whether a graph was made."""
    made, stages, parts = opened(schedule, pp)
    losses, graph = {}, False

    def work(part: nn.Linear, x: Tensor | None, micro: int) -> Tensor:
        nonlocal graph
        out = through(part, x, micro, rows[micro], part is parts[-1])
        graph |= out.requires_grad
        if part is parts[-1]:
            losses[micro] = out
        return out

    made.forward(work, [numbers(0, count) for count in rows])
    assert bool(losses) == (len(stages) - 1 in made.parts)
    worst = 0.0
    for micro, loss in losses.items():
        x = None
        for part in parts:
            x = through(part, x, micro, rows[micro], part is parts[-1])
        worst = max(worst, (loss - x).abs().item())
    return worst + (bool(losses) and len(losses) != len(rows)), graph


def held_buffers(schedule: str) -> int:
    """The most receive buffers of a stage that had memory at one time, in a step of 12 micro-batches over two ranks."""
    made, _, parts = opened(schedule, 2)
    most = 0

    def work(part: nn.Linear, x: Tensor | None, micro: int) -> Tensor:
        nonlocal most
        for stage in made._schedule(12, numbers(0, ROWS))[0]:
            infos = [
                info
                for table in (stage.args_recv_info, stage.grad_recv_info)
                for each in table.values()
                for info in each
            ]
            most = max(most, sum(info.buffer is not None for info in infos))
        return through(part, x, micro, ROWS, part is parts[-1])

    made.train(work, 12, numbers(0, ROWS))
    return most


def mistaken() -> str:
    """One rank is a pipeline too: a mistake there leaves nobody waiting."""
    made, _, _ = opened("gpipe", 1)

    def work(part: nn.Linear, x: Tensor | None, micro: int) -> Tensor:
        raise EngineError("this part cannot work", "here", "try another")

    try:
        made.train(work, 4, numbers(0, ROWS))
    except EngineError as error:
        return error.what
    return ""


@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("schedule", ORDERS)
def test_gradients_are_those_of_the_stages_one_after_the_other(ranks, schedule, pp):
    assert max(ranks(pp).run(trained, schedule, pp, [(8, ROWS)])) < 1e-14


@pytest.mark.parametrize(
    ("schedule", "counts"),
    [("gpipe", [1]), ("1f1b", [2, 3]), ("interleaved", [1, 3, 6]), ("zero_bubble", [1, 3, 6]), ("zbv", [1, 2, 5])],
)
def test_every_number_of_micro_batches_that_a_schedule_accepts_is_right(ranks, schedule, counts):
    assert max(ranks(2).run(trained, schedule, 2, [(count, ROWS) for count in counts])) < 1e-14


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_shapes_may_change_from_step_to_step_and_back(ranks, schedule):
    assert max(ranks(2).run(trained, schedule, 2, [(4, 2), (6, 5), (4, 2)])) < 1e-14


@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
def test_a_forward_pass_alone_takes_uneven_micro_batches_and_leaves_no_graph(ranks, schedule, pp):
    assert ranks(pp).run(forwarded, schedule, pp, [3, 3, 3, 1, 2]) == [(0.0, False)] * pp


@pytest.mark.parametrize("schedule", ORDERS)
def test_buffers_live_no_longer_than_they_are_used(ranks, schedule):
    assert max(ranks(2).run(held_buffers, schedule)) <= 4


def test_a_mistake_inside_a_stage_keeps_its_name_and_its_fix(ranks):
    assert ranks(1).run(mistaken) == ["this part cannot work"]
