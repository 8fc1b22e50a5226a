"""`shardforge sample`: text from a trained run."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "let a trained run continue prompts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="start of a text; may be given several times")
    parser.add_argument("--tokens", type=int, default=96, help="tokens to add at most (default: 96)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="total probability that is drawn from (default: 0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument("--step", type=int, help="checkpoint to sample; the newest by default")
    parser.add_argument("--save", action="store_true", help="also write samples.txt, which the report shows")


def run(args: argparse.Namespace) -> int:
    from shardforge.core.rundir import RunDir
    from shardforge.evals.generate import generate
    from shardforge.evals.open import open_trained

    run_dir = RunDir(args.run_dir)
    trained = open_trained(run_dir, args.step)
    prompts = args.prompt or ["def ", "class ", "import "]
    texts = generate(trained, prompts, args.tokens, args.temperature, args.top_p, args.seed)
    shown = "\n\n".join(f"--- step {trained.step} ---\n{p}{text}" for p, text in zip(prompts, texts, strict=True))
    print(shown)
    if args.save:
        run_dir.samples.write_text(shown + "\n", encoding="utf-8")
    return 0
