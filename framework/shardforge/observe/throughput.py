"""Speed and outlook of a run, from its last steps."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from shardforge.observe.base import StepReport


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Means over the window, all of one moment."""

    loss: float  # nats per scored token
    step_seconds: float  # wall time of a step
    tokens_per_s: float  # over all ranks
    flops_per_s: float  # model FLOP/s over all ranks, recompute excluded
    share: float | None  # flops_per_s of the peak, 0 to 1; None when the peak is unknown
    data_share: float  # of the wall time, waiting for batches, 0 to 1
    save_share: float  # of the wall time, standing still for checkpoints, 0 to 1
    eta_s: float  # seconds to the last step at the speed of the window


class Throughput:
    """Takes each report once, in order; `window` is a number of steps.

    The first step of a life compiles, allocates and opens files. It leaves the window as soon as there is a second.
    """

    def __init__(self, window: int = 20):
        self._window: deque[StepReport] = deque(maxlen=window)
        self._warming = True

    def add(self, report: StepReport) -> Rates:
        if self._warming and self._window:
            self._window.clear()
            self._warming = False
        self._window.append(report)
        return self.rates()

    def restart(self) -> None:
        """Forget everything: another life of the run begins."""
        self._window.clear()
        self._warming = True

    def rates(self) -> Rates:
        """Needs at least one report."""
        window, last = self._window, self._window[-1]
        seconds = sum(report.seconds for report in window)
        flops_per_s = _over(sum(report.model_flops for report in window), seconds)
        return Rates(
            loss=sum(report.loss for report in window) / len(window),
            step_seconds=seconds / len(window),
            tokens_per_s=_over(sum(report.tokens for report in window), seconds),
            flops_per_s=flops_per_s,
            share=flops_per_s / last.peak_flops if last.peak_flops else None,
            data_share=_over(sum(report.data_seconds for report in window), seconds),
            save_share=_over(sum(report.save_seconds for report in window), seconds),
            eta_s=(last.steps - last.step) * seconds / len(window),
        )


def _over(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
