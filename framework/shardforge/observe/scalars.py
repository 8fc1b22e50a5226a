"""The names under which a dashboard keeps the numbers of a step."""

from __future__ import annotations

from collections.abc import Mapping

from shardforge.observe.base import EvalReport, StepReport
from shardforge.observe.experts import ExpertUse
from shardforge.observe.health import Health
from shardforge.observe.throughput import Throughput


def of_step(report: StepReport) -> dict[str, float]:
    """Scalar name -> value of this one step; the peak share only when the peak is known."""
    rates = Throughput(window=1).add(report)
    out = {"train/loss": report.loss}
    out |= {f"train/{name}": value for name, value in report.terms.items()}
    out |= {
        "train/grad_norm": report.grad_norm,
        "train/lr": report.lr,
        "train/tokens_seen": report.tokens_seen,
        "speed/tokens_per_s": rates.tokens_per_s,
        "speed/step_seconds": report.seconds,
        "speed/data_share": rates.data_share,
        "speed/save_share": rates.save_share,
        "speed/model_flops_per_s": rates.flops_per_s,
        "memory/bytes": report.memory_bytes,
    }
    out |= of_experts(report.experts) if report.experts else {}
    return out if rates.share is None else out | {"speed/peak_share": rates.share}


def of_experts(experts: Mapping[int, ExpertUse]) -> dict[str, float]:
    """Of at least one layer: what `Health` sums up, and the violation of each layer."""
    health = Health.of(experts)
    out = {
        "health/max_vio": health.max_vio,
        "health/dead_experts": health.dead,
        "health/entropy_share": health.entropy_share,
        "health/drop_rate": health.drop_rate,
    }
    if health.bias is not None:
        out |= {"health/bias_low": health.bias[0], "health/bias_high": health.bias[1]}
    return out | {f"health_max_vio/layer_{layer}": use.max_vio for layer, use in experts.items()}


def of_eval(report: EvalReport) -> dict[str, float]:
    alike = {f"health_similarity/layer_{layer}": value for layer, value in report.similarity.items()}
    return {"held_out/loss": report.loss} | alike
