"""`shardforge bench`: measurements, each against a named peer or a physical limit."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

HELP = "measure loader, training step, mixture, upcycling, conversion, layout or pipeline on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    parts.add_parser("data", help="loader tokens/s a core, and start-up in a corpus of 10^12 tokens")
    step = parts.add_parser("step", help="tokens/s of a recipe on one process, beside transformers")
    step.add_argument("recipe", nargs="?", default="first", help="recipe to step (default: first)")
    step.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="sets", help="change a field")
    step.add_argument("--pairs", type=int, default=10, help="timed pairs of steps (default: 10)")
    step.add_argument("--threads", type=int, help="torch threads (default: all cores)")
    moe = parts.add_parser("moe", help="one mixture-of-experts layer, beside transformers")
    moe.add_argument("shapes", nargs="*", metavar="SHAPE", help="tokens x hidden x inner of an expert, 2048x1024x256")
    moe.add_argument("--experts", type=int, default=64, help="experts of the layer (default: 64)")
    moe.add_argument("--k", type=int, default=6, help="experts of a token (default: 6)")
    moe.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="default: both")
    moe.add_argument("--pairs", type=int, default=10, help="timed passes of each layer (default: 10)")
    moe.add_argument("--threads", type=int, help="torch threads (default: all cores)")
    moe.add_argument("--peers", action="store_true", help="also torchtitan, where it is installed")
    upcycle = parts.add_parser("upcycle", help="upcycling a dense model with all cores, beside a copy of the result")
    upcycle.add_argument("--layers", type=int, help="layers of the dense model (default: 4.5 GB of experts)")
    upcycle.add_argument("--hidden", type=int, default=2048, help="hidden size, a multiple of 128 (default: 2048)")
    upcycle.add_argument("--inner", type=int, default=5632, help="neurons of its ffn (default: 5632)")
    upcycle.add_argument("--experts", type=int, default=8, help="experts of a layer (default: 8)")
    upcycle.add_argument("--ratio", type=float, default=0.5, help="share of neurons drawn anew (default: 0.5)")
    upcycle.add_argument(
        "--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="default: both"
    )
    upcycle.add_argument("--pairs", type=int, default=3, help="timed pairs of each (default: 3)")
    upcycle.add_argument("--folder", type=Path, help="where the files go, twice the result (default: temporary files)")
    convert = parts.add_parser("convert", help="converting a checkpoint with all cores, beside a copy of the result")
    convert.add_argument("--layers", type=int, help="layers of the model (default: 3 GB)")
    convert.add_argument("--hidden", type=int, default=4096, help="hidden size, a multiple of 128 (default: 4096)")
    convert.add_argument("--inner", type=int, default=11008, help="neurons of its ffn (default: 11008)")
    convert.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["bf16"], help="default: bf16")
    convert.add_argument("--pairs", type=int, default=3, help="timed pairs of each direction (default: 3)")
    convert.add_argument("--folder", type=Path, help="where the files go, four times the model (default: temporary)")
    parallel = parts.add_parser("parallel", help="a step on two local ranks, beside the same one written by hand")
    parallel.add_argument("layouts", nargs="*", metavar="LAYOUT", help="tp2, dp2, pp2, dp2-ep2 (default: all)")
    parallel.add_argument("--pairs", type=int, default=20, help="timed pairs of steps (default: 20)")
    parallel.add_argument("--peer", action="store_true", help="also OLMo-core, where it is installed (tp2, dp2)")
    bubble = parts.add_parser("bubble", help="waiting in every pipeline schedule on gloo, beside its formula")
    bubble.add_argument("--pp", type=int, default=4, help="stages' ranks (default: 4)")
    bubble.add_argument("--micro-batches", type=int, default=8, help="micro-batches of a step (default: 8)")
    bubble.add_argument("--ms", type=float, default=60.0, help="milliseconds of each F, I and W (default: 60)")


def run(args: argparse.Namespace) -> int:
    from shardforge.core.errors import EngineError
    from shardforge.parallel.pool import Failure

    try:
        SUBJECTS[args.subject](args)
    except Failure as failure:
        asked = f"shardforge bench {args.subject}"
        raise (failure.refused or EngineError(str(failure), asked, "--traceback shows more")) from failure
    return 0


def _data(args: argparse.Namespace) -> None:
    from shardforge.bench import data

    data.run(sys.stdout)


def _step(args: argparse.Namespace) -> None:
    import torch

    from shardforge.bench import step
    from shardforge.recipe.load import load

    if args.threads:
        torch.set_num_threads(args.threads)
    found = step.run(load(args.recipe, args.sets).recipe, args.pairs, print)
    print(f"weights: ours {found.weights:,}, transformers {found.peer_weights:,}")
    print(f"tokens/s: ours {found.ours:,.0f}, transformers {found.peer:,.0f}")
    print(f"ratio {found.ratio:.2f} of the fastest steps, {found.median:.2f} in the median pair")


def _moe(args: argparse.Namespace) -> None:
    import torch

    from shardforge.bench import moe

    if args.threads:
        torch.set_num_threads(args.threads)
    shapes = [moe.sizes(text, args.experts, args.k) for text in args.shapes or moe.SHAPES]
    moe.run(shapes, args.dtypes, args.pairs, print, more=args.peers)


def _upcycle(args: argparse.Namespace) -> None:
    from shardforge.bench import upcycle
    from shardforge.upcycle.options import read_options
    from shardforge.upcycle.run import upcycle as made

    given = read_options(flags={"experts": args.experts, "k": 1, "method": {"kind": "drop", "ratio": args.ratio}})
    for dtype in args.dtypes:
        size = upcycle.Size.usual(args.hidden, args.inner, args.experts, dtype)
        size = dataclasses.replace(size, layers=args.layers or size.layers)
        ratio = upcycle.run(lambda source, output: made(source, output, given), size, args.pairs, args.folder, print)
        print(f"{dtype}: {ratio:.2f} of the speed of cp in the median pair")


def _convert(args: argparse.Namespace) -> None:
    from shardforge.bench import convert
    from shardforge.convert.format import Options
    from shardforge.convert.run import convert as made

    def make(source: Path, target: Path, to: str) -> object:
        return made(source, target, Options(to=to), proof="none")

    for dtype in args.dtypes:
        size = convert.usual(args.hidden, args.inner, dtype)
        size = dataclasses.replace(size, layers=args.layers or size.layers)
        ratio = convert.run(make, size, args.pairs, args.folder, print)
        print(f"{dtype}: {ratio:.2f} of the speed of cp in the slower direction's median pair")


def _parallel(args: argparse.Namespace) -> None:
    from shardforge.bench import parallel

    parallel.run(args.layouts or list(parallel.KNOWN), parallel.Shape(), args.pairs, print, peer=args.peer)


def _bubble(args: argparse.Namespace) -> None:
    from shardforge.bench import bubble
    from shardforge.plan.simulate import Cost

    one = args.ms / 1000
    bubble.run(args.pp, args.micro_batches, Cost(one, one, one), print)


SUBJECTS = {
    "data": _data,
    "step": _step,
    "moe": _moe,
    "upcycle": _upcycle,
    "convert": _convert,
    "parallel": _parallel,
    "bubble": _bubble,
}
