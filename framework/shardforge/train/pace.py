"""Which ranks are slower than the others. In a step all take equally long, since they wait for each other, so what is
compared is a rank's own share of it.

    work     seconds of a step outside of collectives, found by looking at the main thread ten times a second (CPU)
    data     seconds of a step in which a rank waits for its batch
    device   FLOP/s of the device in a fixed matrix product, between two steps (GPU, where a main thread does not wait)

Nothing is exchanged for it but the pulses that go to the job's store anyway, and no number of the training is touched.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from shardforge.core.layout import Layout
from shardforge.observe.base import Slow
from shardforge.train import peak
from shardforge.train.place import in_collective
from shardforge.train.verdict import Paced, spot

TICK_S = 0.1
"""Seconds between two looks."""
REVIEW_S = 30.0
"""Seconds between two comparisons of all ranks."""
FEWEST = 5
"""Steps of every rank that a comparison is over."""
SLOW = 1.25
"""Times the usual, from which a rank is an outlier."""
MATTERS = 0.05
"""Share of a step that it must cost the run."""
PROBE_EVERY, PROBE_SIZE = 100, 4096
"""Steps between two matrix products of this size: the same steps on all ranks, so that they stand still together."""


class Pace:
    """Of this rank. `with pace:` is one step, on the main thread; `look` comes from another."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.sums = Paced()
        self.slow: tuple[Slow, ...] = ()  # what the last comparison found, until it is taken
        self._clock = clock
        self._device: tuple[torch.device, torch.dtype] | None = None
        self._inside, self._begun, self._looked = False, 0.0, 0.0
        self._waited, self._data = 0.0, 0.0

    def probes(self, device: torch.device, dtype: torch.dtype) -> None:
        """Measure a GPU now and then, in the compute type of the run."""
        self._device = (device, dtype) if device.type == "cuda" else None

    def __enter__(self) -> Pace:
        self._begun, self._inside = self._clock(), True
        return self

    def __exit__(self, *error: object) -> None:
        self._inside = False
        before = self.sums
        seconds = before.seconds + self._clock() - self._begun
        rate = before.rate
        if self._device is not None and before.steps % PROBE_EVERY == 0 and error[0] is None:
            rate = _probe(*self._device)
        self.sums = Paced(before.steps + 1, seconds, max(0.0, seconds - self._waited), self._data, rate)

    def waited_for_data(self, seconds: float) -> None:
        self._data += seconds

    def look(self, thread: int) -> None:
        """The time since the last look counts as that thread stands now: in a collective, or at work."""
        now = self._clock()
        elapsed, self._looked = min(now - self._looked, 2 * TICK_S), now
        if self._inside and in_collective(thread):
            self._waited += elapsed

    def take(self) -> tuple[Slow, ...]:
        """What the last comparison found, once."""
        found, self.slow = self.slow, ()
        return found


def _probe(device: torch.device, dtype: torch.dtype) -> float:
    try:
        return peak.measure(device, dtype, PROBE_SIZE)
    except torch.OutOfMemoryError:  # the memory belongs to the training
        return 0.0


class Review:
    """The first rank's comparison of all."""

    def __init__(self, layout: Layout, clock: Callable[[], float] = time.monotonic):
        self.layout, self._clock = layout, clock
        self._before: dict[int, Paced] = {}
        self._at = clock()

    def due(self) -> bool:
        return self._clock() - self._at >= REVIEW_S

    def of(self, ranks: Mapping[int, tuple[str, Paced]]) -> tuple[Slow, ...]:
        """Outliers over the steps since the last comparison; `ranks` gives a rank's node and sums."""
        self._at = self._clock()
        now = {rank: sums for rank, (_, sums) in ranks.items()}
        if not self._before:
            self._before = now
            return ()
        if set(now) != set(self._before) or any(now[rank].steps - self._before[rank].steps < FEWEST for rank in now):
            return ()
        means = {rank: _mean(self._before[rank], sums) for rank, sums in now.items()}
        self._before = now
        found = [
            Slow(rank, spot(self.layout, rank), ranks[rank][0], measure, value, usual)
            for stage in self._stages(means)
            for measure, rank, value, usual in outliers(stage)
        ]
        return tuple(found)

    def _stages(self, means: Mapping[int, Paced]) -> list[dict[int, Paced]]:
        """The ranks that have the same to do: those of each stage of a pipeline."""
        stages: dict[int, dict[int, Paced]] = {}
        for rank, each in means.items():
            stages.setdefault(self.layout.coordinates(rank)["pp"], {})[rank] = each
        return list(stages.values())


def _mean(before: Paced, now: Paced) -> Paced:
    """Of one step, over those between two moments."""
    steps = now.steps - before.steps
    seconds, worked = (now.seconds - before.seconds) / steps, (now.worked - before.worked) / steps
    return Paced(steps, seconds, worked, (now.data - before.data) / steps, now.rate)


def outliers(means: Mapping[int, Paced]) -> list[tuple[str, int, float, float]]:
    """(measure, rank, value, the usual value) of the ranks that hold the others up, the worst of each measure first."""
    found: list[tuple[str, int, float, float]] = []
    for measure, name in (("work", "worked"), ("data", "data")):
        values = {rank: float(getattr(each, name)) for rank, each in means.items()}
        usual = statistics.median_low(values.values())
        late = [
            (measure, rank, value, usual)
            for rank, value in values.items()
            if value > SLOW * usual and value - usual > MATTERS * means[rank].seconds
        ]
        found += sorted(late, key=lambda each: -each[2])
    rates = {rank: each.rate for rank, each in means.items() if each.rate}
    if rates:
        usual = statistics.median_high(rates.values())
        weak = [("device", rank, rate, usual) for rank, rate in rates.items() if rate * SLOW < usual]
        found += sorted(weak, key=lambda each: each[2])
    return found
