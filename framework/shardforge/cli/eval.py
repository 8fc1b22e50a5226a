"""`shardforge eval`: held-out loss of a trained run."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "held-out loss of a trained run, beside what token frequencies alone would reach"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("--step", type=int, help="checkpoint to evaluate; the newest by default")
    parser.add_argument("--sequences", type=int, default=64, help="held-out sequences (default: 64)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    import dataclasses
    import json

    from shardforge.core.rundir import RunDir
    from shardforge.evals.open import open_trained
    from shardforge.evals.perplexity import held_out

    trained = open_trained(RunDir(args.run_dir), args.step)
    found = held_out(trained, args.sequences)
    if args.json:
        print(json.dumps({"step": trained.step, **dataclasses.asdict(found)}))
        return 0
    print(f"step {trained.step}: held-out loss {found.loss:.4f} nats a token over {found.tokens} tokens")
    if found.unigram is not None:
        print(f"token frequencies alone reach {found.unigram:.4f} nats a token")
    if found.bits_per_byte is not None:
        print(f"{found.bits_per_byte:.4f} bits a byte")
    return 0
