"""`shardforge COMMAND ...`: the files beside this one are the commands.

A command is a module with `HELP: str`, `add_arguments(parser)` and `run(args) -> int | None`. It imports torch, yaml
and everything else that is slow inside `run`, so that help and argument errors answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

import shardforge
import shardforge.cli
from shardforge.core.errors import ForgeError, suggest

FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141


def commands() -> list[str]:
    """Names of all commands, sorted; none of them is imported."""
    return sorted(found.name for found in pkgutil.iter_modules(shardforge.cli.__path__) if found.name != "main")


def command(name: str) -> ModuleType:
    return importlib.import_module(f"shardforge.cli.{name}")


class Parser(argparse.ArgumentParser):
    """Mistyped arguments are a ForgeError too, so every mistake looks the same."""

    def error(self, message: str) -> NoReturn:
        raise ForgeError(message, self.prog, f"{self.prog} --help")


def parser(name: str | None = None) -> Parser:
    """The parser of one command, or with no name the one that lists them all."""
    top = Parser("shardforge", description=shardforge.__doc__)
    top.add_argument("--version", action="version", version=f"shardforge {shardforge.__version__}")
    top.add_argument("--traceback", action="store_true", help="show where in the code an error came from")
    table = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser, title="commands")
    for each in [name] if name else commands():
        module = command(each)
        one = table.add_parser(each, help=module.HELP, description=module.HELP)
        one.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        module.add_arguments(one)
    return top


def run(words: Sequence[str]) -> int:
    """Do what the command line says; the exit code comes back."""
    name = next((word for word in words if not word.startswith("-")), None)
    known = commands()
    if name is not None and name not in known:
        raise ForgeError(f"no command is called {name!r}", "shardforge", suggest(name, known))
    args, left = parser(name).parse_known_args(words)
    if left:
        here = f"shardforge {name}" if name else "shardforge"
        raise ForgeError(f"cannot use {' '.join(left)}", here, f"{here} --help")
    if args.command is None:
        parser().print_help()
        return 0
    return command(args.command).run(args) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 a mistake of the user (printed with its fix), 130 interrupted, or what the command says."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return run(words)
        finally:
            sys.stdout.flush()  # a reader that went away is noticed here, and not when the interpreter ends
    except ForgeError as error:
        if "--traceback" in words:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else it complains again at exit
        return PIPE_CLOSED
