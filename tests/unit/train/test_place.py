from __future__ import annotations

import _thread
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardforge.nn import collectives
from shardforge.train import place
from shardforge.train.place import Place, ranges, signature, stack_in, stack_of

LATE_S = 60.0


def other(work: Callable[[threading.Event], None], *, raw: bool = False) -> tuple[int, threading.Event]:
    """A thread that is inside of `work`, which calls the event's wait; setting the event lets it go."""
    inside, let_go = threading.Event(), threading.Event()
    ident: list[int] = []

    class Gate(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            inside.set()
            return let_go.wait(LATE_S)

    def run() -> None:
        ident.append(_thread.get_ident())
        work(Gate())

    _thread.start_new_thread(run, ()) if raw else threading.Thread(target=run, daemon=True).start()
    assert inside.wait(LATE_S)
    return ident[0], let_go


def waiting_for_the_other() -> tuple[Place, int, int]:
    """On rank 0: where its thread is while it waits for rank 1, its signature, and the one when it has gone on."""
    group = dist.new_group([0, 1], group_desc="mesh_tp")
    if dist.get_rank() == 1:
        dist.recv(torch.zeros(1), 0)
        collectives.all_sum(torch.ones(3), group)
        return Place(), 0, 0
    ident: list[int] = []

    def work() -> None:
        ident.append(threading.get_ident())
        collectives.all_sum(torch.ones(3), group)

    thread = threading.Thread(target=work)
    before = group._get_sequence_number_for_group()
    thread.start()
    while group._get_sequence_number_for_group() == before:
        pass
    while not (found := place.place(stack_of(ident[0]))).operation:
        pass
    still = signature(stack_of(ident[0]))
    dist.send(torch.zeros(1), 1)
    thread.join()
    return found, still, signature([])


def waiting_for_a_message() -> Place:
    """On rank 0: where its thread is while it waits in code of ours for a message of rank 1."""
    from shardforge.parallel.attention import exchange

    if dist.get_rank() == 1:
        dist.barrier()
        dist.send(torch.ones(2), 0)
        return Place()
    ident: list[int] = []

    def work() -> None:
        ident.append(threading.get_ident())
        receive = dist.P2POp(dist.irecv, torch.zeros(2), 1)
        exchange._settle(dist.batch_isend_irecv([receive]), [receive])

    thread = threading.Thread(target=work)
    thread.start()
    found = Place()
    while not (found.operation and found.line):
        found = place.place(stack_of(ident[0])) if ident else found
    dist.barrier()
    thread.join()
    return found


def before_and_in_a_collective() -> tuple[bool, bool]:
    """On rank 0: whether a thread is in one while it waits for a word, and while it waits for rank 1."""
    group, let_go = dist.new_group([0, 1]), threading.Event()
    if dist.get_rank() == 1:
        dist.recv(torch.zeros(1), 0)
        collectives.all_sum(torch.ones(3), group)
        return False, True
    thread = threading.Thread(target=lambda: (let_go.wait(), collectives.all_sum(torch.ones(3), group)))
    thread.start()
    before = place.in_collective(thread.ident)
    let_go.set()
    deadline = time.monotonic() + LATE_S
    while not (found := place.in_collective(thread.ident)) and time.monotonic() < deadline:
        pass
    dist.send(torch.zeros(1), 1)
    thread.join()
    return before, found


def test_a_thread_is_in_a_collective_while_it_waits_there_and_not_before(ranks):
    assert ranks(2).run(before_and_in_a_collective) == [(False, True)] * 2


def test_a_thread_in_a_collective_is_told_by_operation_group_and_line(ranks):
    found, _, _ = ranks(2).run(waiting_for_the_other)[0]
    assert (found.operation, found.group, found.members) == ("all_reduce", "mesh_tp", (0, 1))
    assert found.line.startswith("nn/collectives.py:") and found.line.endswith("in _summed")
    assert found.call >= 1


def test_a_collective_that_has_ended_changes_the_signature(ranks):
    _, still, later = ranks(2).run(waiting_for_the_other)[0]
    assert still != later


def test_a_message_that_our_own_code_waits_for_is_a_wait_too(ranks):
    found = ranks(2).run(waiting_for_a_message)[0]
    assert found.members == (0, 1) and found.operation
    assert found.line.startswith("parallel/attention/exchange.py:")


def test_a_thread_outside_of_collectives_is_told_by_its_innermost_line():
    ident, let_go = other(lambda gate: gate.wait())
    found = place.place(stack_of(ident))
    let_go.set()
    assert (found.operation, found.members) == ("", ())
    assert "threading.py" in found.leaf


def test_a_thread_that_stands_still_keeps_its_signature():
    ident, let_go = other(lambda gate: gate.wait())
    first, second = signature(stack_of(ident)), signature(stack_of(ident))
    let_go.set()
    assert first == second


def test_a_thread_that_has_gone_on_has_another_signature():
    def twice(gate: threading.Event) -> None:
        gate.wait()
        following.wait(LATE_S)

    following = threading.Event()
    ident, let_go = other(twice)
    first = signature(stack_of(ident))
    let_go.set()
    while signature(stack_of(ident)) == first:
        pass
    following.set()


def test_a_block_is_named_by_its_layer():
    class Block(nn.Module):
        slot, layer = "block", 3

        def forward(self, gate: threading.Event) -> None:
            gate.wait()

    ident, let_go = other(Block())
    found = place.place(stack_of(ident))
    let_go.set()
    assert found.unit == "block 3"


def test_a_gpu_backward_is_looked_for_in_the_threads_of_torch(monkeypatch):
    def _engine_run_backward(gate: threading.Event) -> None:
        gate.wait()

    def hook(gate: threading.Event) -> None:
        gate.wait()

    of_torch, first = other(hook, raw=True)
    main, second = other(_engine_run_backward)
    monkeypatch.setattr(place, "_outward", lambda frame: trimmed(frame))
    names = [frame.f_code.co_name for frame, _ in stack_of(main)]
    first.set()
    second.set()
    assert of_torch != main and "hook" in names and names.index("hook") < names.index("_engine_run_backward")


def trimmed(frame) -> place.Stack:
    """Without the waiting of the test itself."""
    found = []
    while frame is not None:
        if frame.f_code.co_filename == __file__ and frame.f_code.co_name != "wait":
            found.append((frame, frame.f_lineno))
        frame = frame.f_back
    return found


def test_the_place_of_an_error_is_where_it_was_raised():
    def raises() -> None:
        raise ValueError

    with pytest.raises(ValueError) as caught:
        raises()
    assert stack_in(caught.value)[0][0].f_code.co_name == "raises"


def test_the_stack_of_a_thread_that_has_ended_is_empty():
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert stack_of(thread.ident) == [] or thread.ident in sys._current_frames()


@pytest.mark.parametrize(
    "ranks", [(), (5,), (0, 1, 2, 3), (1, 3, 5), (0, 1, 8, 9, 16, 17), (3, 2, 1), (0, 1, 3, 6)], ids=str
)
def test_ranges_say_the_same_ranks_in_the_same_order(ranks):
    assert Place(runs=ranges(ranks)).members == ranks


def test_a_large_group_is_a_few_numbers():
    assert len(ranges(range(0, 2048, 8))) == 1
