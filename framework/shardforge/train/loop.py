"""The loop: one turn a step, everything that changes the run in order and in sight."""

from __future__ import annotations

import json
import os
import time

import psutil
import torch

from shardforge.checkpoint import folders
from shardforge.checkpoint.tensorfile import write_whole
from shardforge.engine.base import Losses, UpdateStats
from shardforge.observe.base import EvalReport, StepReport
from shardforge.precision.types import DTYPES
from shardforge.train import watchdog
from shardforge.train.guard import start_id
from shardforge.train.pace import Pace
from shardforge.train.run import Run
from shardforge.train.signals import StopRequests, first_line


def train(run: Run, pace: Pace | None = None) -> str:
    """Turn until the last step or a stop request; "finished" or "stopped". Collective."""
    steps, step, pace = run.recipe.train.steps, run.step, pace or Pace()
    pace.probes(run.world.device, DTYPES[run.recipe.precision.compute])
    with StopRequests(run.dir.stop, run.world.control) as stop:
        stopping = False
        while step < steps and not stopping:
            begun = time.perf_counter()
            with pace:
                batch = run.data.batch(step)  # pure in (recipe, step): resume is an integer
                waited = time.perf_counter() - begun
                pace.waited_for_data(waited)
                losses = run.engine.forward_backward(batch, step)
                update = run.engine.update(run.recipe.schedule.at(step, steps))
                watchdog.check(step, losses, update)
                step += 1
                stopping = stop.agreed()
            stood = save(run, step) if due(run, step) or stopping else 0.0
            run.audience.on_step(report(run, step, losses, update, time.perf_counter() - begun, waited, stood, pace))
            if evaluates(run, step):
                evaluate(run, step)
        run.store.close()
        verdict = "finished" if step >= steps else "stopped"
        run.world.lead(lambda: mark(run, step, verdict, stop.why()))
    run.audience.on_end(verdict)
    run.data.close()
    return verdict


def due(run: Run, step: int) -> bool:
    every = run.recipe.checkpoint.every
    return step == run.recipe.train.steps or bool(every and step % every == 0)


def save(run: Run, step: int) -> float:
    """Seconds that training stood still; the writing goes on behind."""
    stood = run.store.save(step, run.engine.state(), {"data": run.data.fingerprint})
    run.audience.on_checkpoint(step, run.dir.checkpoints / folders.name(step))
    return stood


def evaluates(run: Run, step: int) -> bool:
    every, sequences = run.recipe.train.eval_every, run.recipe.train.eval_sequences
    return bool(sequences) and (step == run.recipe.train.steps or bool(every and step % every == 0))


def evaluate(run: Run, step: int) -> EvalReport:
    """Held-out loss over the same sequences at every step and on every layout, and how alike experts are."""
    total, scored = 0.0, 0
    for batch in run.data.held_out_batches(run.recipe.train.eval_sequences):
        losses = run.engine.evaluate(batch)
        total, scored = total + losses.loss * losses.scored, scored + losses.scored
    alike = run.engine.similarity()
    found = EvalReport(step=step, loss=total / max(1, scored), tokens=scored, similarity=alike)
    run.audience.on_eval(found)
    return found


def report(
    run: Run, step: int, losses: Losses, update: UpdateStats, seconds: float, waited: float, stood: float, pace: Pace
) -> StepReport:
    sequences = run.data.sequences(step - 1)
    return StepReport(
        step=step,
        steps=run.recipe.train.steps,
        loss=losses.loss,
        terms=losses.terms,
        experts=losses.experts,
        grad_norm=update.grad_norm,
        lr=run.recipe.schedule.at(step - 1, run.recipe.train.steps),
        tokens=sequences * run.recipe.train.seq_len,
        tokens_seen=run.data.tokens_before(step),
        seconds=seconds,
        data_seconds=waited,
        save_seconds=stood,
        model_flops=sequences * run.engine.step_flops,
        peak_flops=run.peak_flops,
        memory_bytes=memory(run.world.device),
        slow=pace.take(),
    )


def memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def mark(run: Run, step: int, verdict: str, reason: str) -> None:
    """First rank: the verdict that a launcher reads; exit codes do not survive torchrun and srun."""
    said = {"state": verdict, "step": step, "reason": reason}
    said |= {"start": start_id()} if "SHARDFORGE_START" in os.environ else {}  # the launcher that named it reads this
    write_whole(run.dir.stopped, json.dumps(said).encode() + b"\n")
    if first_line(run.dir.stop) in ("", reason):  # another wish has yet to be followed
        run.dir.stop.unlink(missing_ok=True)
