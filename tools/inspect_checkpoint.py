"""`shardforge inspect` as a script: python tools/inspect_checkpoint.py CHECKPOINT [--against OTHER] [--numbers]."""

from __future__ import annotations

import sys

from shardforge.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
