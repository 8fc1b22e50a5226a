"""`shardforge bench`: measurements, each against a named peer or a physical limit."""

from __future__ import annotations

import argparse
import sys

HELP = "measure the loader or a training step on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    parts.add_parser("data", help="loader tokens/s a core, and start-up in a corpus of 10^12 tokens")
    step = parts.add_parser("step", help="tokens/s of a recipe on one process, beside transformers")
    step.add_argument("recipe", nargs="?", default="first", help="recipe to step (default: first)")
    step.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="sets", help="change a field")
    step.add_argument("--pairs", type=int, default=10, help="timed pairs of steps (default: 10)")
    step.add_argument("--threads", type=int, help="torch threads (default: all cores)")


def run(args: argparse.Namespace) -> int:
    if args.subject == "data":
        from shardforge.bench import data

        data.run(sys.stdout)
        return 0
    import torch

    from shardforge.bench import step
    from shardforge.recipe.load import load

    if args.threads:
        torch.set_num_threads(args.threads)
    found = step.run(load(args.recipe, args.sets).recipe, args.pairs, print)
    print(f"weights: ours {found.weights:,}, transformers {found.peer_weights:,}")
    print(f"tokens/s: ours {found.ours:,.0f}, transformers {found.peer:,.0f}")
    print(f"ratio {found.ratio:.2f} of the fastest steps, {found.median:.2f} in the median pair")
    return 0
