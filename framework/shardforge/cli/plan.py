"""`shardforge plan`: what a layout will do, before any rank starts."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardforge.plan.measure import Measured
    from shardforge.plan.rank import StageBytes
    from shardforge.plan.schedule import Plan
    from shardforge.plan.simulate import Cost
    from shardforge.recipe.schema import Recipe

HELP = "count weights, FLOP and bytes, picture a pipeline schedule, or place ranks on nodes; starts nothing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="file, run directory or shipped name")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="sets", help="change a field")
    what = parser.add_argument_group("what to plan, one of")
    what.add_argument(
        "--schedule", nargs="?", const="", metavar="NAME", help="a pipeline schedule as a picture; no NAME compares all"
    )
    what.add_argument("--ranks", action="store_true", help="which ranks share a node, and which axis crosses nodes")
    what.add_argument("--dry-run", action="store_true", help="bytes of a rank, from a step on tensors without storage")
    what.add_argument("--params", action="store_true", help="weights, FLOP a token and bytes of cache of the model")
    params = parser.add_argument_group("with --params")
    params.add_argument("--json", action="store_true", help="print JSON instead of a table")
    params.add_argument("--seq-len", type=_count, help="tokens of a sequence (default: the recipe's, or 4096)")
    schedule = parser.add_argument_group("with --schedule")
    schedule.add_argument("--pp", type=_count, help="ranks of the pipeline (default: the recipe's)")
    schedule.add_argument("--micro-batches", type=_count, help="micro-batches of a step (default: the recipe's)")
    schedule.add_argument(
        "--costs", metavar="F,I,W", help="time of forward, input gradient and weight gradient, or `measured` here"
    )
    schedule.add_argument("--latency", type=_time, default=0.0, help="time of a message between ranks, as in --costs")
    schedule.add_argument("--png", type=Path, metavar="FILE", help="draw it there")
    ranks = parser.add_argument_group("with --ranks")
    ranks.add_argument("--per-node", type=int, default=8, help="ranks of a node (default: 8)")
    dry = parser.add_argument_group("with --dry-run")
    dry.add_argument("--rank", type=int, help="the rank (default: one of each pipeline stage)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _time(text: str) -> float:
    try:
        time = float(text)
    except ValueError:
        time = -1.0
    if not 0 <= time < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time from 0 on")
    return time


def run(args: argparse.Namespace) -> int:
    from shardforge.core.errors import ForgeError
    from shardforge.recipe.load import load

    wanted = [args.schedule is not None, args.ranks, args.dry_run, args.params]
    if sum(wanted) != 1:
        raise ForgeError(
            "nothing to plan" if not any(wanted) else "one thing at a time",
            "shardforge plan",
            "give one of --schedule, --ranks, --dry-run, --params",
        )
    if args.params:
        _params(args)
        return 0
    if args.json or args.seq_len:
        given = "--json" if args.json else "--seq-len"
        raise ForgeError(f"{given} changes nothing here", "shardforge plan", "leave it out, or ask for --params")
    recipe = load(args.recipe, args.sets).recipe
    if args.ranks:
        _ranks(recipe, args.per_node)
    elif args.dry_run:
        _dry_run(recipe, args.rank)
    else:
        _schedule(recipe, args)
    return 0


def _params(args: argparse.Namespace) -> None:
    import json

    from shardforge.plan.params import params, table
    from shardforge.recipe.load import load_model

    found = params(load_model(args.recipe, args.sets).recipe, args.seq_len)
    print(json.dumps(found.as_dict(), indent=2) if args.json else "\n".join(table(found)))


def _ranks(recipe: Recipe, per_node: int) -> None:
    from shardforge.plan import ranks

    lines, boxes = ranks.table(recipe.parallel, per_node), ranks.drawing(recipe.parallel, per_node)
    print("\n".join([*lines, *(["", *boxes] if boxes else [])]))


def _dry_run(recipe: Recipe, rank: int | None) -> None:
    from shardforge.plan import dry_run

    dry_run.report(recipe, rank, print)


def _schedule(recipe: Recipe, args: argparse.Namespace) -> None:
    from shardforge.core.errors import LayoutError
    from shardforge.engine.staged import halves
    from shardforge.parallel.stages import ORDERS
    from shardforge.plan import schedule
    from shardforge.plan.order import known

    names = [known(args.schedule)] if args.schedule else list(ORDERS)
    pp = args.pp or recipe.parallel.pp
    micro_batches = schedule.micro_batches_of(recipe, args.micro_batches)
    measured = _measured(recipe, args, pp)
    plans, refused = [], []
    seen: dict[tuple, StageBytes] = {}
    for name in names:
        try:
            plans.append(_plan(recipe, name, pp, micro_batches, measured, args, seen))
        except LayoutError as error:
            if args.schedule:
                raise
            refused.append(error.what)
    if not plans:
        what = "\n    ".join(["no schedule can run this", *refused])
        raise LayoutError(what, "--schedule", "a smaller --pp, or other --micro-batches")
    print("\n".join(_shown(plans[0]) if args.schedule else [*schedule.table(plans), *refused]))
    if args.schedule:
        for error in halves(dataclasses.replace(recipe.engine, schedule=args.schedule)):
            print(f"this recipe is refused with it: {error.what}; {error.fix}")
    if args.png:
        from shardforge.plan.drawing import draw

        draw(args.png, [each.timeline for each in plans], [each.labels() for each in plans])
        print(f"picture  {args.png}")


def _shown(each: Plan) -> list[str]:
    from shardforge.plan.picture import picture
    from shardforge.plan.schedule import per_rank

    line = each.timeline
    published = "" if each.formula is None else f", {each.formula:.1%} published for even stages"
    head = f"{line.schedule}: {line.ranks} ranks, {len(line.stages)} stages, {line.micro_batches} micro-batches"
    return [f"{head}, bubble {line.bubble:.1%}{published}", "", *picture(line), "", *per_rank(each)]


def _plan(
    recipe: Recipe,
    name: str,
    pp: int,
    micro_batches: int,
    measured: Measured | None,
    args: argparse.Namespace,
    seen: dict[tuple, StageBytes],
) -> Plan:
    from shardforge.parallel.stages import check_micro_batches
    from shardforge.plan import dry_run, schedule

    stages = schedule.stages_of(recipe, name, pp)
    if measured is None:
        costs = schedule.even_costs(stages, _cost(args.costs))
    else:
        costs = measured.of(stages)
    check_micro_batches(name, pp, micro_batches, micro_batches)  # before what takes time
    return schedule.plan(stages, micro_batches, costs, dry_run.stage_bytes(recipe, stages, seen), args.latency)


def _measured(recipe: Recipe, args: argparse.Namespace, pp: int) -> Measured | None:
    """Times of this machine where they are asked for, and the line of stages that follows from them."""
    if args.costs != "measured":
        return None
    from shardforge.parallel.stages import ORDERS, write
    from shardforge.plan.measure import measure

    found, name = measure(recipe, print), args.schedule or recipe.engine.schedule
    stages = ORDERS[name].stages * pp
    if 1 < stages <= len(recipe.model.layers):
        print(f'stages: "{write(found.balanced(stages))}" balances {name} over pp={pp}')
    return found


def _cost(text: str | None) -> Cost:
    from shardforge.core.errors import RecipeError
    from shardforge.plan.simulate import Cost

    if text is None:
        return Cost()
    try:
        forward, inputs, weights = (float(part) for part in text.split(","))
    except ValueError:
        forward = inputs = weights = 0.0
    if not 0 < min(forward, inputs, weights) <= max(forward, inputs, weights) < float("inf"):
        fix = "three times above 0, like 1,1,1; or `measured`"
        raise RecipeError(f"cannot read the costs {text!r}", "--costs", fix)
    return Cost(forward, inputs, weights)
