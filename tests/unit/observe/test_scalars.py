from __future__ import annotations

from shardforge.observe import scalars
from shardforge.observe.base import EvalReport
from shardforge.observe.experts import ExpertTally


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


def test_a_mixture_has_its_health_beside(make_report):
    one, two = ExpertTally((4.0, 4.0), 8.0, 0.0, 2.0, (-0.5, 0.25)), ExpertTally((8.0, 0.0), 8.0, 0.0, 0.0)
    made = scalars.of_step(make_report(4, experts={1: one, 3: two}))
    assert {name: value for name, value in made.items() if name.startswith("health")} == {
        "health/max_vio": 1.0,
        "health/dead_experts": 1,
        "health/entropy_share": 0.0,
        "health/drop_rate": 0.125,
        "health/bias_low": -0.5,
        "health/bias_high": 0.25,
        "health_max_vio/layer_1": 0.0,
        "health_max_vio/layer_3": 1.0,
    }


def test_similarity_stands_beside_the_held_out_loss():
    made = scalars.of_eval(EvalReport(step=1, loss=2.0, tokens=3, similarity={3: 0.5}))
    assert made == {"held_out/loss": 2.0, "health_similarity/layer_3": 0.5}
