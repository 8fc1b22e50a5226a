"""One recipe, small, on one process and on layouts; a verdict for each, and what stays unproved."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from shardforge.core.errors import LaunchError, LayoutError, RecipeError
from shardforge.core.layout import SHORT, Layout
from shardforge.core.slots import engines, optimizers
from shardforge.model.build import build
from shardforge.nn.module import declared
from shardforge.parallel.pool import Failure, Pool
from shardforge.recipe.schema import Recipe
from shardforge.verify.cases import Case
from shardforge.verify.causes import cause
from shardforge.verify.compare import Evidence, compare, first_in_order
from shardforge.verify.guess import guesses
from shardforge.verify.measure import Found, Key, Task, measure
from shardforge.verify.prepare import Wanted, companion, prepare
from shardforge.verify.shrink import placed
from shardforge.verify.verdict import Report, Verdict, described, header, introduction, row, sizes


def verify(recipe: Recipe, wanted: Wanted, say: Callable[[str], None] = lambda text: None) -> Report:
    """`say` is told what is verified, then every verdict as it falls. ForgeError for what cannot be verified at all."""
    for name, number in (("processes", wanted.processes), ("steps", wanted.steps)):
        if number < 1:
            raise LaunchError(f"{number} {name} show nothing", f"--{name}", "give at least 1")
    if wanted.timeout_s <= 0:
        raise LaunchError(f"{wanted.timeout_s:g} seconds are no time for a rank", "--timeout", "give more than 0")
    plan, small, listed = prepare(recipe, wanted)
    with Workplace(small, wanted) as work:
        report = Report(recipe.name, sizes(small), [], list(plan.unproved) + work.untried)
        say(introduction(report, listed))
        say(header(listed))
        deep = list({case.layout: case for case in reversed(listed)}.values())[::-1]  # the first case of each layout
        for case in listed:
            verdict = work.judge(case, companion(case, deep, small) if case in deep else None)
            say(row(verdict, listed))
            if wanted.every and verdict.status == "refused":
                report.unproved.append(f"{case} is refused: {verdict.worst.splitlines()[0]}")
            else:
                report.verdicts.append(verdict)
    return report


class Workplace:
    """Warm pools by size, one-process results by task, and a folder that goes away at the end."""

    def __init__(self, small: Recipe, wanted: Wanted):
        self.small, self.wanted = small, wanted
        self.plain = placed(small, Layout(), engines["native"](), 1)
        self.dims = {item.fqn: item.dims for item in declared(build(small.model, small.objective.build()))}
        self.known: dict[str, Found] = {}
        self.pools: dict[tuple[int, bool], Pool] = {}
        self.others, self.untried = other_optimizers(small)

    def __enter__(self) -> Workplace:
        self.home = tempfile.TemporaryDirectory(prefix="shardforge-verify-")
        self.folder = Path(self.home.name)
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self.pools.values():
            pool.stop()
        self.home.cleanup()

    def pool(self, size: int, *, plain: bool = False) -> Pool:
        tamper = "" if plain else self.wanted.tamper
        key = (size, bool(tamper))
        if key not in self.pools:
            self.pools[key] = Pool(size, self.folder, timeout_s=self.wanted.timeout_s, tamper=tamper)
        return self.pools[key]

    def alone(self, optimizer: str = "") -> Found:
        """What one process finds with the recipe's optimizer, or with another one's defaults."""
        if optimizer not in self.known:
            recipe = self.plain
            if optimizer:
                recipe = dataclasses.replace(recipe, optim=self.others[optimizer])
            steps = self.wanted.steps if optimizer else self.wanted.steps + 1
            task = Task(recipe, steps, gradients=not optimizer)
            self.known[optimizer] = self.pool(1, plain=True).run(measure, task)[0]
        return self.known[optimizer]

    def judge(self, case: Case, partner: Case | None) -> Verdict:
        """The verdict on one case; with a partner also on the other optimizers and on a resume as that case."""
        verdict, begun = Verdict(case), time.perf_counter()
        recipe = self.as_case(case)
        save = Path(tempfile.mkdtemp(dir=self.folder)) if partner is not None else None
        with self.failing(verdict, case.layout):
            self.run(verdict, Task(recipe, self.wanted.steps + (save is None), save=save), self.alone().values)
            for name in self.others if save is not None and verdict.status == "equal" else ():
                task = Task(dataclasses.replace(recipe, optim=self.others[name]), self.wanted.steps, gradients=False)
                errors = self.run(verdict, task, self.alone(name).values, with_=name)
                verdict.optimizers[name] = max(errors.values())
        if partner is not None and verdict.status == "equal":
            with self.failing(verdict, partner.layout):
                task, name = Task(self.as_case(partner), 1, load=save), str(partner.layout)
                errors = self.run(verdict, task, self.after(), with_=f"resumed on {name}")
                verdict.resumed = (name, max(errors.values()))
        verdict.seconds = time.perf_counter() - begun
        return verdict

    def as_case(self, case: Case) -> Recipe:
        engine = dataclasses.replace(self.small.engine, **dict(case.options))
        return placed(self.small, case.layout, engine, case.micro_batches)

    def after(self) -> dict[Key, Tensor]:
        """What one process has once a checkpoint after `steps` is loaded, and in the step that follows."""
        last, following = f"step {self.wanted.steps}", f"step {self.wanted.steps + 1}"
        out: dict[Key, Tensor] = {}
        for (phase, what, name), value in self.alone().values.items():
            if phase == last and what in ("weight", "remembered", "optimizer state"):
                out["resumed", what, name] = value
            if phase in (following, "held out"):
                out[phase, what, name] = value
        return out

    def run(self, verdict: Verdict, task: Task, want: dict[Key, Tensor], with_: str = "") -> dict[str, float]:
        """Compare one task; the first that differs fills the verdict. Worst errors of each kind come back."""
        layout = task.recipe.parallel
        found = self.pool(layout.world_size).run(measure, task)
        got, errors, differences = compare(found, want)
        if not with_:
            verdict.errors = errors
        if differences:
            evidence = Evidence(layout, got, want, differences, self.dims, self.alone().order)
            if not with_ and any(each.phase == "step 1" and each.what in ("loss", "gradient") for each in differences):
                mistakes = self.pool(1, plain=True).run(guesses, self.plain, layout, verdict.case.micro_batches)[0]
                evidence.guesses.update(mistakes)
            self.explain(verdict, evidence, with_)
        return errors

    def explain(self, verdict: Verdict, evidence: Evidence, with_: str) -> None:
        earliest = evidence.differences[0]
        same = [each for each in evidence.differences if each.key[:2] == earliest.key[:2] and each.name]
        weights = evidence.wrong("gradient") or evidence.wrong("weight")
        verdict.status = "different"
        verdict.first, verdict.last = first_in_order(weights, evidence.order)
        verdict.rule, verdict.cause = cause(evidence)
        verdict.worst = described(max(same, key=lambda each: each.error) if same else earliest)
        if with_:
            verdict.worst = f"{with_}: {verdict.worst}"

    @contextmanager
    def failing(self, verdict: Verdict, layout: Layout) -> Iterator[None]:
        """A rank that raises, dies or hangs is a verdict too."""
        try:
            yield
        except Failure as failure:
            refusal = isinstance(failure.refused, (LayoutError, RecipeError, LaunchError))
            verdict.status = "refused" if refusal else "failed"
            verdict.worst = str(failure.refused) if refusal else failure.told(lambda rank: called(rank, layout))
            verdict.details = failure.details


def called(rank: int, layout: Layout) -> str:
    """ "rank 3 (dp 1, tp 1)"."""
    here = layout.coordinates(rank).items()
    place = ", ".join(f"{SHORT[axis]} {at}" for axis, at in here if layout.degree(axis) > 1)
    return f"rank {rank} ({place})" if place else f"rank {rank}"


def other_optimizers(small: Recipe) -> tuple[dict[str, Any], list[str]]:
    """Every other registered optimizer with its defaults, and a sentence for each that has none."""
    ready, untried = {}, []
    for name, config in optimizers.kinds().items():
        if name == getattr(type(small.optim), "kind", ""):
            continue
        try:
            ready[name] = config()
        except TypeError as missing:
            untried.append(f"optimizer {name} has no defaults ({missing})")
    return ready, untried
