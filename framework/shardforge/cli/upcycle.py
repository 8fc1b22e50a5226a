"""`shardforge upcycle SOURCE OUTPUT`: a dense model becomes a mixture of experts that training starts from."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardforge.core.errors import ForgeError

if TYPE_CHECKING:
    from shardforge.upcycle.run import Upcycled

HELP = "make a mixture of experts of a dense model; run it again after a kill and it goes on"
METHODS = ("drop", "naive", "noise", "virtual_group", "random")
FLAGS = (
    "experts", "k", "expert_ffn", "shared", "layers", "gate", "scale", "router_init", "balance", "seed", "dtype",
    "moments",
)  # fmt: skip
OF_METHOD = {"ratio": "ratio", "share_indices": "share_indices", "noise_std": "std"}
TAKES = {"ratio": ("drop", "noise"), "share_indices": ("drop", "noise"), "noise_std": ("noise",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="Hugging Face or Megatron folder, ShardForge run or step folder")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML with a section upcycle, as OUTPUT keeps one")
    parser.add_argument("--method", choices=METHODS, help="drop unless given: arXiv:2502.19261")
    parser.add_argument("--ratio", type=float, metavar="R", help="share of neurons drawn anew (drop) or noisy (noise)")
    parser.add_argument(
        "--share-indices", action=argparse.BooleanOptionalAction, help="one set of neurons for all matrices"
    )
    parser.add_argument("--noise-std", type=float, metavar="S", help="of method noise")
    parser.add_argument("--experts", type=int, metavar="E", help="experts of a layer")
    parser.add_argument("--k", type=int, metavar="K", help="experts of a token")
    parser.add_argument("--expert-ffn", type=int, metavar="N", help="neurons of an expert; all of the dense ffn's")
    parser.add_argument("--shared", type=int, metavar="N", help="neurons of a shared expert")
    parser.add_argument("--layers", metavar="WHICH", help="all, 'every 2', or indices from 0 like 4-11,20")
    parser.add_argument("--gate", choices=("renormalized", "raw", "topk_first"), help="weights of the chosen experts")
    parser.add_argument(
        "--scale", choices=("auto", "none", "virtual_group"), help="make up for what the gates take away"
    )
    parser.add_argument(
        "--router-init", choices=("uniform_zero_mean", "normal_002", "uniform", "normal_02887"), help="router rows"
    )
    parser.add_argument("--balance", type=float, metavar="W", help="factor of the balance loss in the recipe")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--dtype", choices=("source", "bf16", "fp32"), help="type of the weights")
    parser.add_argument("--moments", choices=("drop", "carry"), help="what the optimizer kept")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="change an option: method.ratio=0.3"
    )
    parser.add_argument("--data", action="append", default=[], metavar="DIR", help="corpus for the recipe")
    parser.add_argument("--processes", type=int, metavar="N", help="all cores unless given; the result is the same")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text on which both models' losses are compared")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json; SOURCE's own unless given")


def run(args: argparse.Namespace) -> None:
    from functools import partial

    from shardforge.checkpoint.filling import shown
    from shardforge.upcycle.options import read_options
    from shardforge.upcycle.run import upcycle

    if args.processes is not None and args.processes < 1:
        raise ForgeError(f"{args.processes} processes cannot work", "--processes", "at least 1, or leave it out")
    tokenizer = _tokenizer(args)
    given = read_options(args.config, _flags(args), args.set)
    begun = time.perf_counter()
    progress = partial(shown, doing="upcycling")
    made = upcycle(args.source, args.output, given, processes=args.processes, data=args.data, progress=progress)
    spent = time.perf_counter() - begun
    if tokenizer is not None:
        from shardforge.upcycle.loss import compare

        made.report["loss"] = compare(args.source, made, args.text, tokenizer)
    _tell(made, spent)


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says, by option; the method's own go below it."""
    found = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    given = [flag for flag in OF_METHOD if getattr(args, flag) is not None]
    for flag in given:
        if args.method and args.method not in TAKES[flag]:
            words = f"--{flag.replace('_', '-')}"
            fix = f"leave {words} out, or choose --method {' or '.join(TAKES[flag])}"
            raise ForgeError(f"method {args.method} has no such option", words, fix)
    method = {OF_METHOD[flag]: getattr(args, flag) for flag in given}
    if args.method:
        method = {"kind": args.method, **method}
    return found | ({"method": method} if method else {})


def _tokenizer(args: argparse.Namespace) -> Path | None:
    """The tokenizer of the text, before anything long is begun; None without a text."""
    if args.text is None:
        return None
    found: Path = args.tokenizer or args.source / "tokenizer.json"
    for path, flag in ((args.text, "--text"), (found, "--tokenizer")):
        if not path.is_file():
            raise ForgeError("there is no such file", f"{flag} {path}", f"name a file with {flag}")
    return found


def _tell(made: Upcycled, spent_s: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from shardforge.core.units import bytes_, count, seconds
    from shardforge.upcycle import report

    found = made.report
    weights = found["weights"]
    size = sum(path.stat().st_size for path in made.step.iterdir())
    took = f": {bytes_(size)} in {seconds(spent_s)}, {bytes_(size / spent_s)}/s" if made.fresh else ""
    print(f"{'made' if made.fresh else 'already made, nothing to do:'} {made.path}{took}")
    layers = len(found["layers"])
    print(f"  {count(weights['total'])} weights, a token meets {count(weights['active'])}; {layers} layers of experts")
    head, *rows = report.rows(found)
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    step = found["step_0"]
    print(f"at step 0 it {report.VERDICTS[step['verdict']]}")
    for line in (*step["reasons"], *step["fixes"], *found["notes"]):
        print(f"  {line}")
    if loss := found["loss"]:
        print(f"loss of {loss['tokens']} tokens: source {loss['dense']:.6f}, result {loss['moe']:.6f} nats a token")
    print(f"report {made.path / report.PAGE}; train it with: shardforge train {made.path / 'recipe.yaml'}")
