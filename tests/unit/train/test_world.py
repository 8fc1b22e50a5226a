from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from shardforge.core.errors import DataError, ForgeError, LaunchError, Problems
from shardforge.core.layout import Layout
from shardforge.train import world as world_file
from shardforge.train.world import FailedThere, World, cores, distributed, join, limit, meet

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


class Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("this cannot travel")


def unpicklable() -> None:
    raise Unpicklable


def crashed(how: str) -> str:
    try:
        getattr(world(), how)(lambda: unpicklable() if dist.get_rank() == 0 else None)
    except FailedThere as error:
        return f"{type(error).__name__} {error.rank} {error.trace}"
    return "no error"


def limited() -> tuple[list[float], float]:
    """Seconds until groups give up: of one with the usual time, before and after; of one that was given more."""
    usual, patient = dist.new_group([0, 1]), dist.new_group([0, 1], timeout=timedelta(hours=2))

    def given(group: dist.ProcessGroup) -> float:
        return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()

    before = given(usual)
    limit(100)
    return [before, given(usual)], given(patient)


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


@pytest.mark.parametrize("how", ["lead", "agree"])
def test_a_bug_of_one_rank_is_raised_on_all_with_its_traceback(ranks, how):
    for told in ranks(2).run(crashed, how):
        assert told.startswith("FailedThere 0") and "in unpicklable" in told and "Unpicklable" in told


@pytest.mark.parametrize("how", ["lead", "agree"])
def test_alone_a_bug_is_what_it_is(how):
    with pytest.raises(Unpicklable):
        getattr(ALONE, how)(unpicklable)


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
        (Layout(tp=4), "start 4, or choose degrees whose product is 2; the other axes alone take 4"),
        (Layout(pp=2, cp=2), "start 4, or choose degrees whose product is 2; the other axes alone take 4"),
        (Layout(dp_shard=4, ep=4), "start 4, or choose degrees whose product is 2"),
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


def test_groups_give_up_some_time_after_the_pulse_unless_they_were_given_more(ranks):
    (before, after), patient = ranks(2).run(limited)[0]
    assert 100 < after < before and patient == 7200


@pytest.mark.parametrize(("name", "value"), [("RANK", "2"), ("RANK", "x"), ("WORLD_SIZE", "-2"), ("LOCAL_RANK", "")])
def test_a_place_that_no_rank_has_is_refused_with_its_name(monkeypatch, name, value):
    for each, good in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(each, value if each == name else good)
    with pytest.raises(LaunchError, match=f"environment variable {name}"):
        join(Layout(tp=2))


def test_ranks_that_never_came_are_named(monkeypatch):
    """A launcher hosts the store, rank 0 comes, and nobody else does."""
    monkeypatch.setattr(world_file, "JOINING_S", 0.2)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    given = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in (given | {"RANK": "0", "WORLD_SIZE": "3"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=r"1 of 3 ranks came in 0 s; missing: 1, 2"):
        meet(Layout(tp=3), 0)


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
