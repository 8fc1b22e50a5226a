"""The names under which a dashboard keeps the numbers of a step."""

from __future__ import annotations

from shardforge.observe.base import EvalReport, StepReport
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
    return out if rates.share is None else out | {"speed/peak_share": rates.share}


def of_eval(report: EvalReport) -> dict[str, float]:
    return {"held_out/loss": report.loss}
