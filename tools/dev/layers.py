"""Import direction: who may import whom, read from the source without importing it. Run: python tools/dev/layers.py"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORK = ROOT / "framework" / "shardforge"
KERNELS = ROOT / "kernels" / "shardforge_kernels"

LEVELS = (
    ("core",),
    ("recipe",),
    ("nn",),
    ("model", "parallel", "objective", "optim", "precision", "checkpoint", "data", "observe"),
    ("engine", "families"),
    ("plan",),
    ("train", "launch", "convert", "upcycle", "evals", "bench", "verify"),
    ("cli",),
)
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}
# What an extra brings, or only some machines have: never imported just because a file of ours is.
OPTIONAL = frozenset(
    {
        *("datasets", "deep_ep", "deepspeed", "flash_attn", "gguf", "megatron", "pyarrow", "tensorboard"),
        *("transformer_engine", "transformers", "triton", "wandb", "zstandard"),
    }
)


@dataclass(frozen=True)
class Import:
    """One import statement: `module` is the full dotted name, `inside` whether it stands in a function."""

    file: Path
    line: int
    module: str
    inside: bool
    typing_only: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    @property
    def where(self) -> str:
        return f"{self.file.relative_to(ROOT) if self.file.is_relative_to(ROOT) else self.file}:{self.line}"


def imports(file: Path) -> list[Import]:
    """Every import of a file; `from a import b` gives a.b, since b may be a module."""
    return list(_walk(ast.parse(file.read_text(), str(file)), file, inside=False, typing_only=False))


def _walk(node: ast.AST, file: Path, inside: bool, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(file, child.lineno, alias.name, inside, typing_only)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            for alias in child.names:
                yield Import(file, child.lineno, f"{base}.{alias.name}", inside, typing_only)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _walk(child, file, inside, True)
        else:
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _walk(child, file, inside or function, typing_only)


def framework_problems(file: Path, root: Path = FRAMEWORK) -> list[str]:
    """What one file under framework/shardforge does against the rules."""
    parts = file.relative_to(root).parts
    package = parts[0] if len(parts) > 1 else ""
    if package and package not in LEVEL:
        return [f"{file}: package {package} has no level; add it to the table in tools/dev/layers.py"]
    found = []
    for each in imports(file):
        found += [f"{each.where}: {why}" for why in _reasons(each, package, "/".join(parts))]
    return found


def _reasons(each: Import, package: str, path: str) -> Iterator[str]:
    top, at_start = each.top, not each.inside and not each.typing_only
    if each.module.startswith("."):
        yield "relative import; write shardforge.<package>.<module>"
    if top in ("tests", "tools"):
        yield f"the framework may not import {top}"
    if top == "shardforge_kernels" and path != "nn/kernels.py":
        yield "only nn/kernels.py imports shardforge_kernels"
    if top in OPTIONAL and at_start:
        yield f"{top} is optional; import it inside a function with core.optional.require"
    if package in ("core", "recipe") and top == "torch":
        yield f"{package} may not import torch"
    if package == "core" and at_start and top not in sys.stdlib_module_names and top != "shardforge":
        yield f"core is standard library only, {top} is not in it"
    if top == "shardforge" and package:
        yield from _direction(each, package)


def _direction(each: Import, package: str) -> Iterator[str]:
    words = each.module.split(".")
    target = words[1] if len(words) > 1 else ""
    if target not in LEVEL or target == package:
        return
    if LEVEL[target] >= LEVEL[package]:
        relation = "beside" if LEVEL[target] == LEVEL[package] else "above"
        yield f"{package} may not import {target}, which stands {relation} it"


def kernel_problems(file: Path) -> list[str]:
    """Kernels stand apart: torch and triton, nothing of the framework."""
    return [f"{each.where}: kernels may not import shardforge" for each in imports(file) if each.top == "shardforge"]


def problems() -> list[str]:
    """Every broken rule in the repository, as file:line and one sentence."""
    found = [line for file in sorted(FRAMEWORK.rglob("*.py")) for line in framework_problems(file)]
    return found + [line for file in sorted(KERNELS.rglob("*.py")) for line in kernel_problems(file)]


def main() -> int:
    found = problems()
    print("\n".join(found) if found else f"layers: {len(list(FRAMEWORK.rglob('*.py')))} files import downward only")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
