from __future__ import annotations

from shardforge.observe import scalars


def test_a_step_has_every_scalar(make_report):
    assert scalars.of_step(make_report(4)) == {
        "train/loss": 6.0,
        "train/z_loss": 0.5,
        "train/grad_norm": 1.5,
        "train/lr": 1e-3,
        "train/tokens_seen": 4000,
        "speed/tokens_per_s": 500.0,
        "speed/step_seconds": 2.0,
        "speed/data_share": 0.25,
        "speed/save_share": 0.125,
        "speed/model_flops_per_s": 5.0,
        "speed/peak_share": 0.5,
        "memory/bytes": 2**30,
    }


def test_an_unknown_peak_has_no_share(make_report):
    assert "speed/peak_share" not in scalars.of_step(make_report(4, peak_flops=0.0))
