from __future__ import annotations

import errno

import pytest
import torch.distributed as dist

from shardforge.checkpoint.crew import Crew, explained
from shardforge.core.errors import CheckpointError


def outcome(failing: int, kind: str) -> str:
    crew = Crew()
    rank = dist.get_rank()

    def work() -> int:
        if rank == failing:
            raise OSError(errno.ENOSPC, "No space left on device", "there")
        return rank * 10

    try:
        value = crew.agree(work, "here") if kind == "agree" else crew.lead(work, "here")
        return f"value {value}"
    except CheckpointError as error:
        return str(error)
    finally:
        crew.close()


def test_work_of_each_rank_stays_with_it(ranks):
    assert ranks(2).run(outcome, -1, "agree") == ["value 0", "value 10"]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_rank_is_the_same_error_on_all(ranks, failing):
    first, second = ranks(2).run(outcome, failing, "agree")
    assert first == second
    assert first.startswith(f"there  No space left on device (rank {failing})\n    fix: free space there")


def test_what_the_first_rank_finds_is_given_to_all(ranks):
    assert ranks(2).run(outcome, -1, "lead") == ["value 0", "value 0"]


def test_an_error_of_the_first_rank_reaches_all(ranks):
    first, second = ranks(2).run(outcome, 0, "lead")
    assert first == second
    assert "No space left on device (rank 0)" in first


def test_a_process_alone_needs_no_group():
    assert Crew().agree(lambda: 3, "here") == 3


def test_a_process_alone_is_not_told_its_rank():
    def fail() -> None:
        raise CheckpointError("broken", "here", "mend it")

    with pytest.raises(CheckpointError, match=r"^here  broken\n"):
        Crew().agree(fail, "there")


def test_a_failure_of_the_program_keeps_its_name():
    assert explained(KeyError("x"), "here").what == "KeyError: 'x'"
