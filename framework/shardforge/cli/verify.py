"""`shardforge verify`: whether a layout computes what one process computes, before any GPU hour is spent on it."""

from __future__ import annotations

import argparse
import sys

HELP = "hold layouts of a recipe against one process: loss, every gradient, update, resume"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="file, run directory or shipped name")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--layout",
        nargs="+",
        action="extend",
        metavar="L",
        dest="layouts",
        help="layouts like pp2-dp2-tp2 instead of the recipe's",
    )
    asked.add_argument("--all", action="store_true", help="a sample of all layouts and options that the kinds allow")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", dest="sets", help="put a value over the recipe"
    )
    parser.add_argument(
        "--processes", type=int, default=8, help="processes at most; what is larger shrinks (default: 8)"
    )
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps before the checkpoint (default: 2)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds until a rank hangs (default: 120)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """0 all equal, 1 something differs or failed, 2 bad input."""
    import dataclasses
    import json

    import torch

    from shardforge.core.layout import Layout
    from shardforge.recipe.load import load
    from shardforge.verify.prepare import Wanted
    from shardforge.verify.run import verify
    from shardforge.verify.verdict import as_json, conclusion

    torch.set_num_threads(1)  # the ranks are forked from here, and a forked process cannot use its parent's threads
    recipe = load(args.recipe, args.sets).recipe
    order = recipe.parallel.order
    wanted = Wanted(
        layouts=tuple(dataclasses.replace(Layout.parse(text), order=order) for text in args.layouts or ()),
        every=args.all,
        processes=args.processes,
        steps=args.steps,
        timeout_s=args.timeout,
    )

    def say(text: str) -> None:
        print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    report = verify(recipe, wanted, say)
    print(json.dumps(as_json(report), indent=2) if args.json else conclusion(report))
    if args.traceback:
        print("\n".join(each.details for each in report.verdicts if each.details), file=sys.stderr)
    return report.exit_code
