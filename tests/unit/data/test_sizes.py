from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardforge.data.sizes import BatchSizes, floor_sum

NUMBERS = st.integers(0, 60)
RAMPS = st.builds(
    lambda start, more, increment, steps: BatchSizes(start + more, start, increment, steps),
    st.integers(1, 40), st.integers(0, 90), st.integers(1, 30), st.integers(1, 60),
)  # fmt: skip


@given(NUMBERS, NUMBERS, st.integers(1, 40))
def test_floor_sum_equals_the_sum(count: int, slope: int, divisor: int):
    assert floor_sum(count, slope, divisor) == sum(i * slope // divisor for i in range(count))


@given(RAMPS)
def test_samples_before_a_step_are_the_sum_of_the_steps(sizes: BatchSizes):
    assert [sizes.before(step) for step in range(80)] == [sum(map(sizes.at, range(step))) for step in range(80)]


@given(RAMPS)
def test_the_ramp_rises_from_start_to_full_and_stays(sizes: BatchSizes):
    ramp = [sizes.at(step) for step in range(sizes.steps + 3)]
    assert ramp == sorted(ramp) and ramp[0] == (sizes.start if sizes.levels else sizes.full)
    assert set(ramp[sizes.steps :]) == {sizes.full}


@given(RAMPS)
def test_every_level_is_reached_by_whole_increments(sizes: BatchSizes):
    assert all((sizes.at(step) - sizes.start) % sizes.increment == 0 for step in range(sizes.steps))


def test_sizes_that_do_not_divide_are_all_named():
    problems = BatchSizes(full=32, start=6, increment=2, steps=10).problems(ranks=4)
    assert [(p.where, p.fix) for p in problems] == [
        ("train.batch_warmup.start", "use 8"),
        ("train.batch_warmup.increment", "use 4"),
    ]


def test_a_warm_up_above_the_full_batch_is_an_error_with_both_numbers():
    (problem,) = BatchSizes(full=8, start=16, increment=8, steps=10).problems(ranks=1)
    assert "16" in problem.what and "8" in problem.what
