"""One line format for everything a run says; only the first rank speaks unless asked."""

from __future__ import annotations

import logging
import os
import sys


def logger(name: str) -> logging.Logger:
    return logging.getLogger(f"shardforge.{name}")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def setup(level: str = "INFO") -> None:
    """Configure the shardforge loggers once per process: rank 0 at `level`, the others warnings with their rank."""
    root = logging.getLogger("shardforge")
    if root.handlers:
        return
    here = rank()
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if here == 0 else f"[rank {here}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(level if here == 0 else "WARNING")
    root.propagate = False
