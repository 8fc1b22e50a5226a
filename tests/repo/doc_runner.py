"""Code blocks of a document, and a way to run those marked `test`. What the marks mean stands in tests/README.md."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^( *)(`{3,})([^\n`]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """`path` is the file that a block is, or empty; `line` is where its first line stands in the document."""

    document: Path
    line: int
    language: str
    tested: bool
    path: str
    text: str


def blocks(document: Path) -> list[Block]:
    """Fenced blocks in order; the info string is `LANGUAGE [test [PATH]]`."""
    source, found = document.read_text(), []
    for match in FENCE.finditer(source):
        language, *marks = match[3].split() or [""]
        tested = bool(marks) and marks[0] == "test"
        path = marks[1] if tested and len(marks) > 1 else ""
        line = source.count("\n", 0, match.start(4)) + 1
        found.append(Block(document, line, language, tested, path, textwrap.dedent(match[4])))
    return found


def run_block(block: Block, namespace: dict[str, object], number: int) -> None:
    """Do what one tested block says, in the working directory; whatever it raises goes through."""
    path = Path(block.path or f"recipes/runs/{block.document.stem}-{number}.yaml")
    if block.path or block.language == "yaml":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
    if block.language == "yaml":
        from shardforge.recipe.load import load

        load(path)
    elif block.language in ("sh", "bash"):
        subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], check=True)
    elif block.language == "python":
        at_its_line = "\n" * (block.line - 1) + block.text  # a traceback then names the line of the document
        code = compile(at_its_line, str(block.document), "exec")
        if not block.path:
            exec(code, namespace)
    else:
        raise ValueError(f"{block.document}:{block.line}: a {block.language!r} block cannot be tested")


def main(document: str) -> None:
    namespace = vars(sys.modules["__main__"])  # dataclasses look their module up by name
    for number, block in enumerate(blocks(Path(document)), 1):
        if block.tested:
            print(f"{document}:{block.line}: {block.language}", flush=True)
            run_block(block, namespace, number)


if __name__ == "__main__":
    main(sys.argv[1])
