"""Lines per folder, and every file or function over its cap. Run: python tools/dev/size.py"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE_CAP, FUNCTION_CAP = 400, 60
FOLDERS = ("framework", "kernels", "tools", "tests")
FUNCTIONS_MEASURED = ("framework", "kernels", "tools")


def files(folder: str) -> list[Path]:
    """Python files of a top-level folder, and the dev scripts that carry no suffix."""
    found = [path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts]
    scripts = [path for path in (ROOT / folder / "dev").glob("*") if path.is_file() and not path.suffix]
    return sorted(found + scripts)


def long_functions(source: str) -> list[tuple[str, int, int]]:
    """(name, first line, length) of each function over the cap, docstring and decorators counted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            length = (node.end_lineno or first) - first + 1
            if length > FUNCTION_CAP:
                found.append((node.name, first, length))
    return found


def problems() -> list[str]:
    """Every file and function over its cap, as file:line and one sentence."""
    found = []
    for folder in FOLDERS:
        for path in files(folder):
            source, name = path.read_text(), path.relative_to(ROOT)
            length = len(source.splitlines())
            if length > FILE_CAP:
                found.append(f"{name}: {length} lines, cap {FILE_CAP}; split it by idea")
            if folder in FUNCTIONS_MEASURED and path.suffix == ".py":
                for function, line, lines in long_functions(source):
                    found.append(f"{name}:{line}: {function} has {lines} lines, cap {FUNCTION_CAP}")
    return found


def totals() -> dict[str, tuple[int, int]]:
    """Folder, two levels deep -> (files, lines)."""
    count: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    for folder in FOLDERS:
        for path in files(folder):
            parts = path.relative_to(ROOT).parts[:-1]
            name = "/".join(parts[:3] if folder in ("framework", "kernels") else parts[:2])
            count[name] += 1
            lines[name] += len(path.read_text().splitlines())
    return {name: (count[name], lines[name]) for name in sorted(count)}


def main() -> int:
    for name, (count, lines) in totals().items():
        print(f"{name:<36}{count:>4} files {lines:>6} lines")
    found = problems()
    print("\n".join(found) if found else f"sizes: no file over {FILE_CAP} lines, no function over {FUNCTION_CAP}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
