from __future__ import annotations

import socket

import pytest

from shardforge.train.failure import Blamed, Failure, broken_hardware, node_name, recall


def test_a_failure_travels_to_other_ranks_whole():
    sent = Failure(
        text="error: x", code=2, cause="hang", step=7, blamed=(Blamed(3, "node2", "elsewhere"),), node="node2", page="p"
    )
    there = recall(sent.told().encode())
    assert (there, there.page) == (sent, "p")


def test_a_node_is_called_as_the_scheduler_calls_it():
    assert node_name({"SLURMD_NODENAME": "node7"}) == "node7"
    assert node_name({}) == socket.gethostname()


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", True),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", False),
        ("torch.OutOfMemoryError: CUDA out of memory", False),
    ],
)
def test_only_what_no_program_can_cause_speaks_against_a_node(text, broken):
    assert broken_hardware(text) is broken
