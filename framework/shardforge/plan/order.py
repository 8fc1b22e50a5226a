"""The order in which a pipeline schedule works, written down by torch's own schedule.

torch.distributed.pipelining runs its schedule on stand-in stages that compute nothing and note what they were asked
for, rank by rank. A picture of another order than the one that trains cannot come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch.distributed.pipelining import schedules

from shardforge.core.errors import RecipeError, suggest
from shardforge.parallel.stages import ORDERS, check_micro_batches

Work = Literal["F", "B", "I", "W", "SF", "SB"]
"""Forward; whole backward; backward of the input only; of the weights only; and, of no duration, the sending of what a
forward or a backward pass hands on."""
SENDS = ("SF", "SB")


class Action(NamedTuple):
    work: Work
    stage: int
    micro: int  # micro-batch


def known(schedule: str) -> str:
    """The name itself; RecipeError when there is no such schedule."""
    if schedule not in ORDERS:
        raise RecipeError(f"no schedule is called {schedule!r}", "--schedule", suggest(schedule, ORDERS))
    return schedule


def order(schedule: str, stages: Sequence[int], micro_batches: int) -> list[list[Action]]:
    """For each rank what it works on, in order; `stages` is the rank of each stage. LayoutError where there is none."""
    return [[action for action in row if action.work not in SENDS] for row in script(schedule, stages, micro_batches)]


def script(schedule: str, stages: Sequence[int], micro_batches: int) -> list[list[Action]]:
    """The same with every send to another rank where it stands: some schedules work on before they hand on."""
    made = getattr(schedules, ORDERS[known(schedule)].runner)
    ranks = max(stages) + 1
    check_micro_batches(schedule, ranks, micro_batches, micro_batches)
    seen: list[list[Action]] = [[] for _ in range(ranks)]
    stand_ins = [_Stage(stage, len(stages), rank, ranks, seen[rank]) for stage, rank in enumerate(stages)]
    mine = [[stage for stage in stand_ins if stage.group_rank == rank] for rank in range(ranks)]
    runs_many = issubclass(made, schedules.PipelineScheduleMulti)
    runner = made(mine[0] if runs_many else mine[0][0], micro_batches, loss_fn=lambda out, target: out)
    runner._initialize_stage = runner._initialize_stages = lambda *args, **kwargs: None  # it would ask for shapes
    for rank in range(ranks):  # what a schedule makes when it is built covers all ranks
        runner.rank, runner._stages, runner._stage = rank, mine[rank], mine[rank][0]
        runner._step_microbatches([()] * micro_batches, [{}] * micro_batches, [None] * micro_batches, None, False)
    return seen


class _Stage:
    """What a schedule asks of a torch PipelineStage, noted in `seen` and not done."""

    device = torch.device("cpu")
    has_backward = True

    def __init__(self, index: int, stages: int, rank: int, ranks: int, seen: list[Action]):
        self.stage_index, self.num_stages = index, stages
        self.group_rank, self.group_size = rank, ranks
        self.is_first, self.is_last = index == 0, index == stages - 1
        self.submod = torch.nn.Identity()
        self.seen = seen

    def forward_one_chunk(self, micro: int, *args: Any, **kwargs: Any) -> None:
        self.seen.append(Action("F", self.stage_index, micro))

    def backward_one_chunk(self, micro: int, loss: Any = None, full_backward: bool = True, **kwargs: Any) -> None:
        self.seen.append(Action("B" if full_backward else "I", self.stage_index, micro))

    def backward_weight_one_chunk(self, micro: int, **kwargs: Any) -> None:
        self.seen.append(Action("W", self.stage_index, micro))

    def _nothing(self, *args: Any, **kwargs: Any) -> list[Any]:
        return []

    def get_fwd_send_ops(self, micro: int) -> list[Any]:
        self.seen.append(Action("SF", self.stage_index, micro))
        return []

    def get_bwd_send_ops(self, micro: int) -> list[Any]:
        self.seen.append(Action("SB", self.stage_index, micro))
        return []

    get_fwd_recv_ops = get_bwd_recv_ops = _nothing
    set_local_fwd_input = set_local_bwd_input = get_local_bwd_output = perform_reduce_grad = _nothing
