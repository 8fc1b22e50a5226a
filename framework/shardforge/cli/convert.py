"""`shardforge convert SRC DST --to FORMAT`: a checkpoint in another program's files, with a certificate beside it."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from shardforge.core.errors import ForgeError

if TYPE_CHECKING:
    from shardforge.convert.run import Converted

HELP = "bring a checkpoint into another format and prove it; run it again after a kill and it goes on"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, nargs="?", help="checkpoint to read: any that `shardforge inspect` knows")
    parser.add_argument("target", type=Path, nargs="?", help="folder to make")
    parser.add_argument("--to", metavar="FORMAT", help="huggingface, shardforge, megatron or deepspeed")
    parser.add_argument("--layout", metavar="L", help="ranks that will read it, like tp2-pp4, where the format says so")
    parser.add_argument("--dtype", choices=("source", "bf16", "fp16", "fp32"), help="of weights (default: source)")
    parser.add_argument("--moments", choices=("carry", "drop"), help="what the optimizer kept (default: carry)")
    parser.add_argument("--shard-size", metavar="SIZE", help="of one file (default: a 16th of all, 256MiB to 4GiB)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="tokenizer files, or none (default: SOURCE's own)"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.json or recipe of a DeepSpeed checkpoint")
    parser.add_argument("--processes", type=int, metavar="N", help="all cores unless given; the result is the same")
    parser.add_argument(
        "--proof",
        choices=("auto", "transformers", "own", "none"),
        help="what the result's logits are compared with (default: auto, transformers where it can, else our own "
        "forward); with --check it is proved again",
    )
    parser.add_argument("--bisect", action="store_true", help="compare after every layer, and list it")
    parser.add_argument("--check", type=Path, metavar="DIR", help="is a converted folder what its certificate says?")


def run(args: argparse.Namespace) -> None:
    if args.check is not None:
        return _check(args)
    if args.source is None or args.target is None or args.to is None:
        fix = "shardforge convert SOURCE TARGET --to huggingface; --help names all formats"
        raise ForgeError("a conversion needs SOURCE, TARGET and --to", "shardforge convert", fix)
    if args.processes is not None and args.processes < 1:
        raise ForgeError(f"{args.processes} processes cannot work", "--processes", "at least 1, or leave it out")
    from functools import partial

    from shardforge.checkpoint.filling import Counted, shown
    from shardforge.convert.format import Options
    from shardforge.convert.run import convert

    options = Options(
        to=args.to,
        layout=layout(args.layout),
        dtype=args.dtype or "source",
        moments=args.moments or "carry",
        shard_bytes=None if args.shard_size is None else size(args.shard_size),
        tokenizer=args.tokenizer,
        config=args.config,
    )
    begun = time.perf_counter()
    try:
        made = convert(
            args.source,
            args.target,
            options,
            proof=args.proof or "auto",
            bisect=args.bisect,
            processes=args.processes,
            progress=partial(shown, doing="converting"),
            proving=Counted("proving"),
        )
    except KeyboardInterrupt:
        print(f"{args.target} is not there yet; the same command goes on with it", file=sys.stderr)
        raise
    _tell(made, time.perf_counter() - begun)


def size(text: str) -> int:
    """ "4GiB" -> 4294967296."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(\w*)", text)
    units = {name.lower(): value for name, value in UNITS.items()}
    if not match or match[2].lower() not in units or float(match[1]) * units[match[2].lower()] < 1:
        raise ForgeError(f"{text!r} is not a size", "--shard-size", "write it like 4GiB, 500MB or 1000000")
    return int(float(match[1]) * units[match[2].lower()])


def layout(text: str | None) -> dict[str, int] | None:
    """ "tp2-pp4" -> {"tp": 2, "pp": 4}."""
    from shardforge.core.layout import SHORT

    if text is None:
        return None
    axes = {short: axis for axis, short in SHORT.items()}
    found: dict[str, int] = {}
    for word in text.split("-"):
        match = re.fullmatch(r"([a-z]+)([1-9]\d*)", word)
        if not match or match[1] not in axes or axes[match[1]] in found:
            raise ForgeError(
                f"cannot read the layout {text!r}", "--layout", f"write it like tp2-pp4; {', '.join(axes)}"
            )
        found[axes[match[1]]] = int(match[2])
    return found


def _check(args: argparse.Namespace) -> None:
    from shardforge.convert.check import check

    if args.source is not None or args.target is not None or args.to is not None:
        raise ForgeError("--check converts nothing", "--check", "leave SOURCE, TARGET and --to out")
    unused = {"--layout": args.layout, "--shard-size": args.shard_size, "--tokenizer": args.tokenizer}
    unused |= {"--processes": args.processes, "--dtype": args.dtype, "--moments": args.moments}
    if given := [option for option, value in unused.items() if value is not None]:
        what = f"--check has no place for {', '.join(given)}"
        raise ForgeError(what, "--check", "leave it out; --proof, --bisect and --config are for --check too")
    proof = args.proof or ("auto" if args.bisect else None)
    if args.config is not None and proof is None:
        what = "--config says the model of the source, which is read for a proof alone"
        raise ForgeError(what, "--check", "add --proof auto, or leave --config out")
    print(check(args.check, proof=proof, bisect=args.bisect, config=args.config))


def _tell(made: Converted, spent_s: float) -> None:
    from shardforge.convert.proof import lines
    from shardforge.core.units import bytes_, seconds

    found = made.certificate
    target = found["target"]
    total = sum(file["bytes"] for file in target["files"].values())
    rate = bytes_(total / made.writing_s) if made.fresh else ""
    took = f": {bytes_(total)} at {rate}/s, {seconds(spent_s)} with the proof" if made.fresh else ""
    done = "already made, proved now:" if made.proved else "already made, nothing to do:"
    print(f"{'made' if made.fresh else done} {made.path}{took}")
    print(f"  {found['source']['format']} -> {target['format']}: {len(found['tensors'])} tensors")
    changes = ", ".join(f"{count} {word}" for word, count in found["changes"].items())
    print(f"  {changes or 'no tensor was changed'}")
    for name, count in found["odd"].items():
        print(f"  {name}: {count} numbers are not finite")
    for line in dict.fromkeys(found["left"]):
        print(f"  left behind: {line}")
    for line in lines(found["proof"]):
        print(f"  {line}")
