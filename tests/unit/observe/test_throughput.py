from __future__ import annotations

import pytest

from shardforge.observe.throughput import Throughput


def test_tokens_per_second_count_all_tokens_over_all_seconds(make_report):
    speed = Throughput()
    speed.add(make_report(1))
    speed.add(make_report(2, tokens=1000, seconds=1.0))
    assert speed.add(make_report(3, tokens=2000, seconds=5.0)).tokens_per_s == pytest.approx(500)


def test_the_first_step_leaves_the_window_when_a_second_comes(make_report):
    speed = Throughput()
    speed.add(make_report(1, seconds=100.0))
    assert speed.add(make_report(2, seconds=2.0)).step_seconds == 2.0


def test_a_restart_drops_the_first_step_again(make_report):
    speed = Throughput()
    for step in (1, 2, 3):
        speed.add(make_report(step))
    speed.restart()
    speed.add(make_report(4, seconds=100.0))
    assert speed.add(make_report(5, seconds=1.0)).step_seconds == 1.0


def test_steps_older_than_the_window_do_not_count(make_report):
    speed = Throughput(window=2)
    for step, seconds in enumerate((9.0, 9.0, 9.0, 1.0, 3.0), 1):
        rates = speed.add(make_report(step, seconds=seconds))
    assert rates.step_seconds == 2.0


def test_share_is_flops_per_second_of_the_peak(make_report):
    assert Throughput().add(make_report(1, model_flops=10.0, seconds=2.0, peak_flops=20.0)).share == 0.25


def test_share_is_unknown_without_a_peak(make_report):
    assert Throughput().add(make_report(1, peak_flops=0.0)).share is None


def test_eta_is_the_steps_left_at_the_windows_speed(make_report):
    assert Throughput().add(make_report(4, seconds=2.0)).eta_s == 12.0


def test_data_and_save_shares_are_parts_of_the_wall_time(make_report):
    rates = Throughput().add(make_report(1))
    assert (rates.data_share, rates.save_share) == (0.25, 0.125)


def test_a_step_that_took_no_time_has_no_speed(make_report):
    assert Throughput().add(make_report(1, seconds=0.0)).tokens_per_s == 0.0
