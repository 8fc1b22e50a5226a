"""`shardforge data build|verify|show|trace`: make a corpus, check it, look into it, and ask what a step was fed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shardforge.core.errors import DataError, ForgeError, RecipeError

if TYPE_CHECKING:
    from shardforge.recipe.schema import BuildConfig

HELP = "build, verify and look into a corpus; trace the documents behind a training step"
DOCUMENTS, CHARACTERS = 3, 300
"""What `show` prints of a corpus."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    build = actions.add_parser("build", help="text to token shards; run it again after a kill and it goes on")
    build.add_argument("recipe", nargs="?", help="take everything from data.build of this recipe")
    build.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change a value of the recipe")
    build.add_argument("--input", action="append", metavar="X", help="file, folder, hf:NAME or stdlib; may be repeated")
    build.add_argument("--output", metavar="DIR", help="folder of the corpus")
    tokenizer = build.add_mutually_exclusive_group()
    tokenizer.add_argument("--vocab", type=int, metavar="N", help="train a byte-level BPE of N tokens")
    tokenizer.add_argument("--tokenizer", metavar="FILE", help="use this tokenizer.json")
    build.add_argument("--field", metavar="NAME", help="field or column that holds the text")
    build.add_argument("--held-out", type=float, metavar="SHARE", help="share of the documents kept out of training")
    build.add_argument("--shard-tokens", type=int, metavar="N", help="tokens after which a new shard begins")
    build.add_argument("--workers", type=int, metavar="N", help="processes; all cores unless given")
    build.add_argument("--invalid", choices=("error", "skip"), default="error", help="what to do with invalid text")

    verify = actions.add_parser("verify", help="hash every file of a corpus and check every index entry")
    verify.add_argument("folder")
    show = actions.add_parser("show", help="counts of a corpus, and its first documents")
    show.add_argument("folder")
    trace = actions.add_parser("trace", help="the documents that fed one step")
    trace.add_argument("recipe", metavar="RUN_OR_RECIPE")
    trace.add_argument("--step", type=int, required=True, metavar="N", help="steps finished before it: 0 is the first")
    trace.add_argument("--rows", metavar="A-B", help="only these rows of the batch")
    trace.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change a value of the recipe")


def run(args: argparse.Namespace) -> None:
    {"build": _build, "verify": _verify, "show": _show, "trace": _trace}[args.action](args)


def _build(args: argparse.Namespace) -> None:
    from shardforge.data.build import build

    if args.workers is not None and args.workers < 1:
        raise ForgeError(
            f"{args.workers} workers cannot work", "--workers", "at least 1, or leave it out for all cores"
        )
    built = build(_config(args), workers=args.workers, invalid=args.invalid)
    print(f"{'built' if built.fresh else 'already built, nothing to do:'} {built.path}")
    _summary(built.path)


def _config(args: argparse.Namespace) -> BuildConfig:
    from shardforge.recipe.schema import BuildConfig, TokenizerConfig

    flags = {
        "output": args.output, "held_out": args.held_out, "text_field": args.field, "shard_tokens": args.shard_tokens,
    }  # fmt: skip
    given = {name: value for name, value in flags.items() if value is not None}
    if args.recipe:
        if args.input or given or args.vocab or args.tokenizer:
            raise ForgeError(
                "a recipe and options that replace its values", "data build", "change a value with --set data.build.x=y"
            )
        from shardforge.recipe.load import load

        config = load(args.recipe, args.set).recipe.data.build
        if config is None:
            raise RecipeError("the recipe does not say how its corpus is built", "data.build", "add data.build.inputs")
        return config
    if not args.input or not args.output:
        raise ForgeError("neither a recipe nor --input with --output", "data build", "shardforge data build --help")
    _limits(args)
    tokenizer = TokenizerConfig(path=args.tokenizer, **({"vocab": args.vocab} if args.vocab else {}))
    return BuildConfig(inputs=tuple(args.input), tokenizer=tokenizer, **given)


def _limits(args: argparse.Namespace) -> None:
    """The limits that the schema puts on the same values of a recipe."""
    for name, value, least, most in (
        ("--vocab", args.vocab, 257, None),
        ("--held-out", args.held_out, 0, 0.5),
        ("--shard-tokens", args.shard_tokens, 1024, None),
    ):
        if value is not None and (value < least or (most is not None and value > most)):
            raise DataError(
                f"{value} is outside its limits", name, f"at least {least}" + (f", at most {most}" if most else "")
            )


def _summary(folder: Path) -> None:
    from shardforge.core.units import bytes_, count
    from shardforge.data.corpus import Corpus

    corpus = Corpus.open(folder)
    made = corpus.manifest
    for split, shards in made.splits.items():
        print(
            f"  {split:9}{count(made.tokens(split)):>8} tokens  {count(made.documents(split)):>8} documents  "
            f"{len(shards)} shards  {bytes_(made.text_bytes[split])} of text"
        )
    print(f"  tokenizer {made.tokenizer.vocab} tokens, stored as {made.dtype}, fingerprint {corpus.fingerprint}")
    measured = f", held-out under train unigrams {made.unigram_nats:.3f}" if made.unigram_nats is not None else ""
    print(f"  entropy   {made.entropy_nats:.3f} nats a token{measured}")
    left = made.skipped
    print(f"  left out  {left.invalid} invalid, {left.empty} empty documents, {left.ignored} files of other kinds")


def _verify(args: argparse.Namespace) -> None:
    from shardforge.data.corpus import Corpus

    corpus = Corpus.open(args.folder)
    corpus.verify()
    shards = sum(len(shards) for shards in corpus.manifest.splits.values())
    print(f"{args.folder}: {shards} shards and the tokenizer are what was built, fingerprint {corpus.fingerprint}")


def _show(args: argparse.Namespace) -> None:
    from shardforge.data.corpus import Corpus
    from shardforge.data.tokenizer import load

    corpus = Corpus.open(args.folder)
    print(args.folder)
    _summary(corpus.path)
    for line in corpus.manifest.skipped.examples:
        print(f"    {line}")
    tokenizer = load(corpus.tokenizer)
    reader = corpus.stream("train").reader(0)
    for number in range(min(DOCUMENTS, reader.documents)):
        tokens = reader.document(number)
        text = tokenizer.decode(tokens[:CHARACTERS].tolist(), skip_special_tokens=False)
        print(f"\n{corpus.stream('train').name(0, number)}: {tokens.size} tokens\n{text[:CHARACTERS]}")


def _trace(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from shardforge.data.loader import Loader
    from shardforge.recipe.load import load

    recipe = load(args.recipe, args.set).recipe
    if not 0 <= args.step < recipe.train.steps:
        what = f"step {args.step} of a run of {recipe.train.steps}"
        raise ForgeError(what, "--step", f"from 0 to {recipe.train.steps - 1}")
    loader = Loader(replace(recipe.data, prefetch=0), recipe.train, recipe.seed, vocab=recipe.model.vocab)
    chosen = _rows(args.rows, loader.sequences(args.step))
    print(
        f"step {args.step}: samples {loader.samples_before(args.step)} and on, tokens {loader.tokens_before(args.step)}"
    )
    print(f"{'row':>5} {'epoch':>5} {'sample':>10}  document")
    for found in loader.trace(args.step):
        if found.row in chosen:
            place = found.place
            tokens = f"tokens {place.start}-{place.stop - 1}"
            where = f"{found.source}/{place.shard}#{place.document}"
            print(f"{found.row:5} {found.epoch:5} {found.sample:10}  {place.name}  {tokens}  {where}")


def _rows(text: str | None, count: int) -> range:
    if text is None:
        return range(count)
    first, _, last = text.partition("-")
    if not first.isdigit() or not (last or first).isdigit():
        raise ForgeError(f"cannot read {text!r}", "--rows", "write 3 or 0-7")
    rows = range(int(first), int(last or first) + 1)
    if not rows or rows.stop > count:
        raise ForgeError(f"rows {text} of a batch of {count}", "--rows", f"from 0 to {count - 1}")
    return rows
