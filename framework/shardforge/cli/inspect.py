"""`shardforge inspect CHECKPOINT`: what is it, whose, how large; its numbers, and how they differ from another's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shardforge.core.errors import ForgeError

HELP = "what a checkpoint of any known format is, and how it differs from another"
DETAILS = """\
Reads Hugging Face and safetensors folders and files, runs and steps of ShardForge, Megatron, DeepSpeed and GGUF; no
pickle is run. Without --numbers and --against nothing but headers is read, however large the checkpoint is.
Exit code 1: it is damaged, has numbers that are not finite, or differs from the other.

Whether the bytes of a run of ours are still those that were saved says `shardforge checkpoint audit`, those of a
converted folder `shardforge convert --check`: they know the hashes.
"""
SHOWN = 40
FOUND = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = HELP
    parser.epilog = DETAILS
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", metavar="CHECKPOINT", type=Path, help="a folder, a step's folder, or a file")
    parser.add_argument("--tensors", action="store_true", help="list every tensor: shape, type, bytes")
    parser.add_argument("--numbers", action="store_true", help="read all: norm, largest, mean, zeros, nan and infinite")
    parser.add_argument("--against", type=Path, metavar="OTHER", help="compare with another, of any format")
    parser.add_argument("--moments", action="store_true", help="with these two: what the optimizer kept as well")
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.json or recipe of a DeepSpeed checkpoint")
    parser.add_argument("--against-config", type=Path, metavar="FILE", help="the same of OTHER")
    parser.add_argument("--all", action="store_true", help=f"all lines of a table, not the first {SHOWN}")
    parser.add_argument("--processes", type=int, metavar="N", help="all cores unless given")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """0; 1 for what is damaged, not finite or different."""
    from shardforge.convert import inspect_lines as lines
    from shardforge.convert.inspect import inspect

    _settle(args)
    found = inspect(args.path, args.config)
    if args.json:
        document, bad = _document(args, found)
        print(json.dumps(document, indent=1))
        return FOUND if bad else 0
    _print(lines.summary(found))
    most = None if args.all else SHOWN
    bad = bool(found.problems)
    unknown = found.opened.source is None and found.opened.names and not (args.numbers or args.against)
    if args.tensors or unknown:
        _print(["", *lines.tensors(found, most)])
    if args.numbers:
        each, broken = _numbers(args)
        _print(["", *lines.table(each, broken, most)])
        bad |= bool(broken) or any(one.nan or one.infinite for one in each.values())
    if args.against:
        other, apart = inspect(args.against, args.against_config), _compared(args)
        _print(["", *(f"problem of the other: {line}" for line in other.problems)])
        _print(lines.differences(found, other, apart, most))
        bad |= not apart.same or bool(other.problems)
    return FOUND if bad else 0


def _settle(args: argparse.Namespace) -> None:
    """What was given for nothing is a mistake."""
    if args.processes is not None and args.processes < 1:
        raise ForgeError(f"{args.processes} processes cannot work", "--processes", "at least 1, or leave it out")
    if args.moments and not (args.numbers or args.against):
        raise ForgeError("--moments changes nothing here", "shardforge inspect", "add --numbers or --against OTHER")
    if args.against_config and not args.against:
        raise ForgeError("--against-config changes nothing here", "shardforge inspect", "add --against OTHER")


def _numbers(args: argparse.Namespace) -> Any:
    from shardforge.convert.inspect_numbers import numbers

    return numbers(args.path, args.config, moments=args.moments, processes=args.processes)


def _compared(args: argparse.Namespace) -> Any:
    from shardforge.convert.inspect_numbers import compare

    how = {"moments": args.moments, "processes": args.processes}
    return compare(args.path, args.against, args.config, args.against_config, **how)


def _document(args: argparse.Namespace, found: Any) -> tuple[dict[str, Any], bool]:
    from shardforge.convert import inspect_lines as lines
    from shardforge.convert.inspect import inspect

    document, bad = lines.as_json(found), bool(found.problems)
    if args.numbers:
        each, broken = _numbers(args)
        document["numbers"] = lines.numbers_json(each, broken)
        bad |= bool(broken) or any(one.nan or one.infinite for one in each.values())
    if args.against:
        other, apart = inspect(args.against, args.against_config), _compared(args)
        document["against"] = lines.differences_json(found, other, apart) | {"problems": list(other.problems)}
        bad |= not apart.same or bool(other.problems)
    return document, bad


def _print(lines: Iterable[str]) -> None:
    """Names and notes are a stranger's: what would steer a terminal is shown as it is written in Python."""
    for line in lines:
        print("".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in line))
