"""The stages of one rank under a schedule of torch.distributed.pipelining, and a forward pass through all of them.

    rank 0   F0 F1 F2    B0 F3    B1 ...      F2: the forward pass of micro-batch 2, B2: its backward pass (1f1b)
    rank 1      F0 F1 B0 F2 B1 F3 ...         between them, the stream goes up and its gradient comes down

What a stage computes is not known here: a `Work` is called with the stage's module, the stream and a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage, schedules

from shardforge.core.errors import ForgeError
from shardforge.parallel.stages import ORDERS, Stages

Work = Callable[[nn.Module, "Tensor | None", int], Tensor]
"""(module of a stage, the stream or None in the first stage, index of a micro-batch) -> the stream, or from the last
stage the 0-d loss to differentiate."""

Schedule = schedules.PipelineScheduleSingle | schedules.PipelineScheduleMulti


class Stage(PipelineStage):
    """A stage whose shapes are given, so that nothing runs to find them out.

    torch keeps a buffer for every micro-batch and direction for life. Here a buffer is born with the receive and dies
    with its last use, so a schedule holds as many activations as it promises.
    """

    work: Work | None = None
    promised: Tensor  # what the next stage expects, without storage

    def forward_maybe_with_nosync(self, x: Tensor, micro: Tensor) -> Tensor:
        assert self.work is not None
        out = self.work(self.submod, None if self.is_first else x, int(micro))
        if self.is_last:
            return out
        assert (out.shape, out.dtype) == (self.promised.shape, self.promised.dtype), (out.shape, out.dtype)
        return out.contiguous()  # what is sent is read as raw memory

    def backward_one_chunk(self, bwd_chunk_id: int, *args, **options) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **options)
        grads = self.bwd_cache.get(bwd_chunk_id, ())
        self.bwd_cache[bwd_chunk_id] = tuple(None if grad is None else grad.contiguous() for grad in grads)
        _drop(self.grad_recv_info.get(bwd_chunk_id, ()))

    def forward_one_chunk(self, fwd_chunk_id: int, *args, **options) -> Tensor:
        out = super().forward_one_chunk(fwd_chunk_id, *args, **options)
        _drop(self.args_recv_info[fwd_chunk_id])  # the graph holds it until the backward pass
        return out

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._fill(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._fill(self.grad_recv_info.get(bwd_chunk_id, ()))
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _fill(self, expected: tuple) -> None:
        for info in expected:
            if not info.is_root_arg:
                info.buffer = torch.empty(info.tensor_meta.shape, dtype=info.tensor_meta.dtype, device=self.device)

    def _setup_forward_recv_info(self, *args) -> None:
        super()._setup_forward_recv_info(*args)
        for expected in self.args_recv_info.values():
            _drop(expected)

    def _setup_backward_recv_info(self, *args) -> None:
        super()._setup_backward_recv_info(*args)
        for expected in self.grad_recv_info.values():
            _drop(expected)


def _drop(expected: tuple) -> None:
    for info in expected:
        info.buffer = None


class Pipeline:
    """The stages that one rank runs. Every rank of the pipeline group makes each call, in the same order."""

    def __init__(self, parts: Mapping[int, nn.Module], stages: Stages, group: ProcessGroup, device: torch.device):
        self.parts, self.stages, self.group, self.device = parts, stages, group, device
        self._schedules: dict[tuple, tuple[list[Stage], Schedule]] = {}

    def train(self, work: Work, count: int, stream: Tensor) -> None:
        """Forward and backward of `count` micro-batches. `stream` has the shape and type of what stages pass on."""
        stages, schedule = self._schedule(count, stream)
        for stage in stages:
            stage.work = work
        micro = torch.arange(count)
        args = (micro,) if 0 in self.parts else ()
        target = micro if len(self.stages) - 1 in self.parts else None
        try:
            schedule.step(*args, micro=micro, target=target, return_outputs=False)
        except RuntimeError as error:
            if isinstance(error.__cause__, ForgeError):
                raise error.__cause__ from None
            raise
        finally:
            for stage in stages:
                stage.work = None  # it holds the batch

    @torch.no_grad()
    def forward(self, work: Work, streams: Sequence[Tensor]) -> None:
        """The forward pass alone; `streams` has shape and type of each micro-batch's stream.

        All ranks walk through the same order of sends, so no two of them wait for each other.
        """
        sent: list[tuple[Tensor, dist.Work]] = []
        arrived: dict[tuple[int, int], tuple[Tensor, dist.Work | None]] = {}
        for tick in range(len(self.stages) + len(streams) - 1):
            for stage in range(max(0, tick - len(streams) + 1), min(tick + 1, len(self.stages))):
                micro, ahead = tick - stage, stage + 1
                if stage in self.parts:
                    x, receive = arrived.pop((stage, micro), (None, None))
                    if receive is not None:
                        receive.wait()
                    out = work(self.parts[stage], x, micro).contiguous()
                    if ahead in self.parts:
                        arrived[ahead, micro] = out, None
                    elif ahead < len(self.stages):
                        there = self.stages.ranks[ahead]
                        sent = [(x, send) for x, send in sent if not send.is_completed()]
                        sent.append((out, dist.isend(out, group=self.group, group_dst=there)))
                elif ahead in self.parts:
                    buffer, there = torch.empty_like(streams[micro], device=self.device), self.stages.ranks[stage]
                    arrived[ahead, micro] = buffer, dist.irecv(buffer, group=self.group, group_src=there)
        for _, send in sent:
            send.wait()

    def _schedule(self, count: int, stream: Tensor) -> tuple[list[Stage], Schedule]:
        """A schedule for these sizes; torch fixes them for the life of a schedule."""
        sizes = (count, stream.shape, stream.dtype)
        if sizes not in self._schedules:
            kind = getattr(schedules, ORDERS[self.stages.schedule].runner)
            stages = [self._stage(stage, stream) for stage in sorted(self.parts)]
            given = stages if issubclass(kind, schedules.PipelineScheduleMulti) else stages[0]
            made = kind(given, n_microbatches=count, loss_fn=lambda loss, _: loss, scale_grads=False)
            self._schedules[sizes] = stages, made
        return self._schedules[sizes]

    def _stage(self, stage: int, stream: Tensor) -> Stage:
        last = stage == len(self.stages) - 1
        stream = torch.empty(stream.shape, dtype=stream.dtype, device="meta", requires_grad=True)
        made = Stage(
            self.parts[stage],
            stage,
            len(self.stages),
            self.device,
            input_args=torch.empty(1, dtype=torch.int64, device="meta") if stage == 0 else stream,
            output_args=torch.empty((), dtype=stream.dtype, device="meta", requires_grad=True) if last else stream,
            group=self.group,
        )
        made.promised = stream
        return made
