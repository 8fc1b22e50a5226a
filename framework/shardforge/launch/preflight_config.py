"""What nodes must be like before a run starts on them: the `preflight` section of a cluster profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shardforge.core.options import option


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    patience_s: float = option(
        60.0, "a node that does not come, or does not answer a question, for this long is bad", unit="seconds", above=0
    )
    gpus: Literal["checked", "unchecked"] = option(
        "checked", "whether nvidia-smi knows the GPUs that the profile counts; unchecked for other devices"
    )
    gpu_used: int = option(
        2_000_000_000, "memory of an idle GPU that may be taken before the run", unit="bytes", at_least=0
    )
    free_memory: int = option(1_000_000_000, "free memory of a node, at least", unit="bytes", at_least=0)
    free_disk: int = option(
        10_000_000_000,
        "free space at the run directory, at least; never less than one more of its newest checkpoint",
        unit="bytes",
        at_least=0,
    )
    write_bytes: int = option(
        16_777_216, "size of the file that every node writes there to measure the speed", unit="bytes", at_least=1
    )
    write_mb_s: float = option(
        0.0, "speed at which every node can write there while all do, at least", unit="MB/s", at_least=0
    )
    clock_s: float = option(5.0, "difference between the clocks of two nodes, at most", unit="seconds", above=0)
    pair_gb_s: float = option(
        0.0, "speed between two nodes in each direction, over all their GPUs, at least", unit="GB/s", at_least=0
    )
    inside_gb_s: float = option(
        0.0, "bus bandwidth of an all-reduce among the GPUs of one node, at least", unit="GB/s", at_least=0
    )
    all_reduce_gb_s: float = option(
        0.0, "bus bandwidth of an all-reduce over all nodes below which the report warns", unit="GB/s", at_least=0
    )
    share: float = option(
        0.4,
        "a node that reaches less than this share of the median is slow; 0, with no floor either: nothing is measured",
        at_least=0,
        at_most=1,
    )
    message_bytes: int = option(67_108_864, "size of the messages that measure bandwidth", unit="bytes", at_least=1024)

    @property
    def measured(self) -> bool:
        """Whether bandwidth is measured at all."""
        return any((self.share, self.pair_gb_s, self.inside_gb_s, self.all_reduce_gb_s))
