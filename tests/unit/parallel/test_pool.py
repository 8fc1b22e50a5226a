from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardforge.core.errors import LayoutError
from shardforge.parallel.pool import Failure, Pool, standing


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    made = Pool(2, tmp_path, timeout_s=20.0)
    yield made
    made.stop()


def ranks_sum(factor: int) -> float:
    x = torch.tensor(float(dist.get_rank() * factor))
    dist.all_reduce(x)
    return x.item()


def process() -> int:
    return os.getpid()


def refuses() -> None:
    raise LayoutError("too wide", "parallel.tp", "make it narrower")


def breaks_on_the_last() -> None:
    if dist.get_rank() == 1:
        raise KeyError("lost")
    dist.barrier()


def leaves() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def test_every_rank_answers_in_order(pool: Pool):
    assert pool.run(ranks_sum, 3) == [3.0, 3.0]


def test_processes_stay_warm(pool: Pool):
    assert pool.run(process) == pool.run(process)


def test_nothing_starts_before_it_is_needed(pool: Pool):
    assert pool.workers == []


def test_a_mistake_with_a_fix_comes_back_as_it_was(pool: Pool):
    with pytest.raises(Failure) as failure:
        pool.run(refuses)
    assert isinstance(failure.value.refused, LayoutError) and failure.value.refused.fix == "make it narrower"


def test_the_rank_that_broke_is_told_before_those_that_lost_it(pool: Pool):
    with pytest.raises(Failure, match="rank 1: KeyError: 'lost'"):
        pool.run(breaks_on_the_last)


def test_the_rank_that_left_is_told_with_its_exit_code(pool: Pool):
    with pytest.raises(Failure, match="rank 0: the process ended with exit code 7"):
        pool.run(leaves)


def test_the_traceback_is_kept(pool: Pool):
    with pytest.raises(Failure) as failure:
        pool.run(breaks_on_the_last)
    assert "breaks_on_the_last" in failure.value.details


def test_a_pool_that_failed_starts_again(pool: Pool):
    with pytest.raises(Failure):
        pool.run(leaves)
    assert pool.run(ranks_sum, 1) == [1.0, 1.0]


def test_a_stopped_pool_leaves_no_process(pool: Pool):
    pids = pool.run(process)
    pool.stop()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_what_ranks_print_stays_in_their_logs(pool: Pool, capfd: pytest.CaptureFixture[str]):
    pool.run(print, "quiet")
    assert capfd.readouterr().out == ""
    assert pool.log(0).read_text() == "quiet\n"


def test_a_stack_is_told_by_the_collective_and_our_line_that_called_it():
    import shardforge

    home = Path(shardforge.__file__).parent
    stack = (
        "Current thread 0x1 (most recent call first):\n"
        '  File "/x/torch/distributed/distributed_c10d.py", line 10 in all_reduce\n'
        '  File "/x/torch/distributed/c10d_logger.py", line 5 in wrapper\n'
        f'  File "{home}/optim/clip.py", line 44 in global_norm\n'
        f'  File "{home}/engine/native.py", line 90 in update\n'
    )
    assert standing(stack) == "all_reduce, called at optim/clip.py:44 (global_norm)"


def test_a_stack_without_a_line_of_ours_is_not_guessed_at():
    assert standing("") == "a place that it could not tell"
