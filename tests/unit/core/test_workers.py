from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest

from shardforge.core.errors import DataError
from shardforge.core.workers import Workers, cores

PARENT = """
import os, signal
from shardforge.core.workers import Workers
if __name__ == "__main__":
    with Workers(2) as pool:
        child = "__import__('multiprocessing').parent_process()"
        for number in pool.run(eval, [f"__import__('time').sleep(600) if {child} else 7"] * 4):
            print(number, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
"""
ENDS = "__import__('multiprocessing').parent_process() and __import__('os')._exit(9)"


def test_one_worker_is_this_process():
    with Workers(1) as pool:
        assert set(pool.run(eval, ["__import__('os').getpid()"] * 3)) == {os.getpid()}


@pytest.mark.parametrize("count", [1, 2])
def test_a_process_is_prepared_before_its_first_job(count, monkeypatch):
    monkeypatch.setenv("PREPARED", "no")
    prepare = partial(exec, "__import__('os').environ['PREPARED'] = 'yes'")
    with Workers(count, prepare=prepare) as pool:
        assert set(pool.run(eval, ["__import__('os').environ['PREPARED']"] * 4)) == {"yes"}


def test_every_job_is_done_once():
    with Workers(2) as pool:
        assert sorted(pool.run(abs, list(range(-30, 0)))) == list(range(1, 31))


def test_a_workers_error_comes_back_as_it_is():
    with Workers(2) as pool, pytest.raises(ZeroDivisionError):
        list(pool.run(eval, ["1", "1 / 0"]))


def test_a_killed_worker_is_an_error_with_a_next_step():
    with Workers(4) as pool, pytest.raises(DataError) as error:
        list(pool.run(eval, [ENDS] * 20))
    assert "--workers 2" in error.value.fix


def test_workers_end_with_their_parent():
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, check=False, timeout=120)
    # capture_output returns only when every process that holds the pipe is gone, sleeping workers included
    assert int(done.stdout) > 0


def test_cores_are_those_that_this_process_may_use():
    assert 1 <= cores() <= (os.cpu_count() or 1)
