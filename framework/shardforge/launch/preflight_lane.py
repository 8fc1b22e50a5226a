"""One lane: a process that measures bandwidth over one GPU, or over gloo where there is none.

It reads questions, one line of JSON each, and answers each with one line; what libraries print goes to stderr. The
process that started it ends it when it hangs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

WARM_BYTES = 1 << 20
SPAN_S, MOST = 0.5, 20
"""A measurement lasts about this long, and repeats its message at most so often."""


class Lane:
    """`number` among those of its node; `cuda` says whether it has a GPU of that number."""

    def __init__(self, number: int, cuda: bool):
        import torch

        self.device = torch.device("cuda", number) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        self._store: Any = None

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        return {"hello": self.hello, "open": self.open, "measure": self.measure}[question["ask"]](question)

    def hello(self, question: dict[str, Any]) -> dict[str, Any]:
        """Versions of what talks to other nodes, as it is loaded here."""
        import torch

        if self.device.type == "cpu":
            return {"versions": {}}
        torch.zeros(1, device=self.device).item()  # a GPU that is there may still not work
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        return {"versions": {"NCCL": nccl, "CUDA": str(torch.version.cuda)}}

    def open(self, question: dict[str, Any]) -> dict[str, Any]:
        """A place where a group will meet; its port."""
        import torch.distributed as dist

        self._store = dist.TCPStore(question["address"], 0, is_master=True, wait_for_workers=False)
        return {"port": self._store.port}

    def measure(self, question: dict[str, Any]) -> dict[str, Any]:
        """GB/s. pair: of one direction while both are used; all_reduce: bus bandwidth, 2 (n - 1) / n of the bytes."""
        import torch.distributed as dist

        patience = timedelta(seconds=question["timeout_s"])
        rank, size = question["rank"], question["size"]
        store = self._store
        if rank or store is None:
            store = dist.TCPStore(question["address"], question["port"], is_master=False, timeout=patience)
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=dist.PrefixStore(question["key"], store),
            rank=rank,
            world_size=size,
            timeout=patience,
            device_id=self.device if self.device.type == "cuda" else None,
        )
        try:
            seconds = self._timed(question["op"], question["bytes"], rank)
        finally:
            dist.destroy_process_group()
            self._store = None
        moved = question["bytes"] * (1 if question["op"] == "pair" else 2 * (size - 1) / size)
        return {"gb_s": moved / seconds / 1e9}

    def _timed(self, op: str, size: int, rank: int) -> float:
        """Seconds of one exchange, the slowest rank's."""
        import torch
        import torch.distributed as dist

        def spent(count: int, out: Any, into: Any) -> float:
            self._settle()
            begin = time.perf_counter()
            for _ in range(count):
                _exchange(out, into, 1 - rank) if op == "pair" else dist.all_reduce(out)
            self._settle()
            taken = torch.tensor([time.perf_counter() - begin], dtype=torch.float64, device=self.device)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            return taken.item()

        def tensors(count: int) -> list[Any]:
            return [torch.zeros(count // 4, dtype=torch.float32, device=self.device) for _ in range(2)]

        spent(1, *tensors(min(size, WARM_BYTES)))  # connections are made when they are first used
        whole = tensors(size)
        count = max(1, min(MOST, int(SPAN_S / max(spent(1, *whole), 1e-9))))
        return spent(count, *whole) / count

    def _settle(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _exchange(out: Any, into: Any, other: int) -> None:
    import torch.distributed as dist

    both = [dist.P2POp(dist.isend, out, other), dist.P2POp(dist.irecv, into, other)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


def main() -> int:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lane: Lane | None = None
    for line in sys.stdin:
        try:
            lane = lane or Lane(int(sys.argv[1]), sys.argv[2] == "cuda")
            told = lane.answer(json.loads(line))
        except Exception as error:  # whatever it is, the node says it
            told = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(json.dumps(told), file=channel, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
