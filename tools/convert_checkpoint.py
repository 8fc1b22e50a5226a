"""Convert a checkpoint: the same as `shardforge convert`, for those who look among the scripts first.

python tools/convert_checkpoint.py SRC DST --to huggingface
"""

from __future__ import annotations

import sys

from shardforge.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
