"""shardforge report RUN_DIR [RUN_DIR...]"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write a report of runs that opens without a network, and pictures of loss and experts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", type=Path, help="folder of a run; several are overlaid")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="the HTML file; default RUN_DIR/report.html of the first run"
    )


def run(args: argparse.Namespace) -> int:
    from shardforge.observe.report import write

    report, *pictures = write(args.runs, args.output)
    print(f"report   {report}")
    for picture in pictures:
        print(f"picture  {picture}")
    return 0
