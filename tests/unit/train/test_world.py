from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from shardforge.core.errors import DataError, ForgeError, LaunchError, Problems
from shardforge.core.layout import Layout
from shardforge.train.world import World, cores, distributed, join

ALONE = World(0, 1, torch.device("cpu"), None)


def world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD)


def wrong(number: int) -> None:
    raise DataError(f"rank {number} failed", "here", "mend it")


def caught(work) -> str:
    try:
        return f"no error, {work()!r}"
    except ForgeError as error:
        return f"{type(error).__name__} {error.args}"


def led() -> tuple[str, int]:
    ran = []
    answer = world().lead(lambda: ran.append(1) or f"from rank {dist.get_rank()}")
    return answer, len(ran)


def led_into_a_mistake() -> str:
    return caught(lambda: world().lead(lambda: wrong(dist.get_rank())))


def agreed() -> int:
    return world().agree(lambda: dist.get_rank() * 10)


def agreed_with_mistakes(failing: tuple[int, ...]) -> str:
    return caught(lambda: world().agree(lambda: wrong(dist.get_rank()) if dist.get_rank() in failing else "fine"))


def agreed_with_several() -> list[str]:
    try:
        world().agree(lambda: (_ for _ in ()).throw(Problems([DataError("a"), DataError("b")], "the data")))
    except Problems as problems:
        return [problem.what for problem in problems.problems] + [problems.headline]
    return []


def joined(layout: Layout) -> str:
    """The message for a job of two processes that wants another layout."""
    os.environ["WORLD_SIZE"] = "2"
    return caught(lambda: join(layout))


def test_what_the_first_rank_found_is_on_all_and_only_it_has_worked(ranks):
    assert ranks(2).run(led) == [("from rank 0", 1), ("from rank 0", 0)]


def test_a_mistake_of_the_first_rank_is_raised_on_all(ranks):
    (first, second) = ranks(2).run(led_into_a_mistake)
    assert first == second == "DataError ('rank 0 failed', 'here', 'mend it')"


def test_without_a_mistake_each_rank_keeps_its_own_result(ranks):
    assert ranks(4).run(agreed) == [0, 10, 20, 30]


@pytest.mark.parametrize(("failing", "told"), [((0,), 0), ((1,), 1), ((2, 3), 2), ((0, 1, 2, 3), 0)])
def test_the_mistake_of_the_lowest_failing_rank_is_raised_on_all(ranks, failing, told):
    answers = ranks(4).run(agreed_with_mistakes, failing)
    assert answers == [f"DataError ('rank {told} failed', 'here', 'mend it')"] * 4


def test_several_problems_arrive_as_several(ranks):
    assert ranks(2).run(agreed_with_several) == [["a", "b", "2 problems in the data"]] * 2


def test_alone_a_result_and_a_mistake_are_what_they_are():
    assert ALONE.lead(lambda: 1) == ALONE.agree(lambda: 1) == 1
    with pytest.raises(DataError, match="rank 0 failed"):
        ALONE.lead(lambda: wrong(0))
    with pytest.raises(DataError, match="rank 0 failed"):
        ALONE.agree(lambda: wrong(0))


@pytest.mark.parametrize(
    ("layout", "fix"),
    [
        (Layout(dp_shard=4), "start 4, or choose degrees whose product is 2, for example --set parallel.dp_shard=2"),
        (
            Layout(tp=2, dp_shard=4),
            "start 8, or choose degrees whose product is 2, for example --set parallel.dp_shard=1",
        ),
        (Layout(tp=4), "start 4, or choose degrees whose product is 2"),
    ],
    ids=str,
)
def test_a_wrong_number_of_processes_is_refused_with_a_layout_that_fits(ranks, layout, fix):
    for message in ranks(2).run(joined, layout):
        assert f"needs {layout.world_size} processes and 2 were started" in message
        assert message.endswith(f"'{fix}')")


def test_one_process_is_not_enough_for_two(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(LaunchError, match="needs 2 processes and 1 were started"):
        join(Layout(tp=2))


@pytest.mark.parametrize(("names", "expected"), [((), False), (("RANK",), False), (("RANK", "WORLD_SIZE"), True)])
def test_a_launcher_is_known_by_its_environment(monkeypatch, names, expected):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in names:
        monkeypatch.setenv(name, "1")
    assert distributed() is expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_a_process_bound_to_one_core_has_one():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)
