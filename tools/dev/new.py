"""Start a new kind: python tools/dev/new.py mixer my_idea

Writes the kind's file as a copy of the kind that recipes/runs/first.yaml uses in that slot, a recipe that puts it in
the same places, and its entry in docs/reference/zoo.md. All tests are green before the first edit, and the recipe
trains to exactly the losses of the original; what changes after that is the idea. `--like KIND` starts elsewhere.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardforge.cli.zoo import every_slot
from shardforge.core.errors import ForgeError, suggest
from shardforge.core.slots import Slot
from shardforge.recipe.load import load
from shardforge.recipe.provenance import inline, leaves, plain
from shardforge.recipe.tree import DEFAULT

ROOT = Path(__file__).resolve().parents[2]
STANDARD = ROOT / "recipes" / "runs" / "first.yaml"
HEADER = '''"""One line: what {kind} is.

Paper: none yet.
Changes: nothing yet; it starts as a copy of {source}.
Cost: that of {source}.
"""'''


def places(config: Any, slot: Slot, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted field, config) of everything that fills `slot` in a recipe, outermost first."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from places(value, slot, f"{path}.{key}")
    elif dataclasses.is_dataclass(config):
        hints = typing.get_type_hints(type(config), include_extras=True)
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            here = f"{path}.{field.name}".lstrip(".")
            if hasattr(value, "kind") and fills(hints[field.name], slot):
                yield here, value
            yield from places(value, slot, here)


def fills(hint: Any, slot: Slot) -> bool:
    """Whether a field of this type takes a kind of `slot`."""
    found = getattr(hint, "__metadata__", ())
    return slot in found or any(fills(part, slot) for part in typing.get_args(hint))


def class_names(tree: ast.Module, kind: str) -> dict[str, str]:
    """Old class name -> new: my_idea gives MyIdeaConfig and MyIdea; a third class keeps its own name behind MyIdea."""
    stem = "".join(part.capitalize() for part in kind.split("_"))
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    renamed: dict[str, str] = {}
    for name in names:
        wanted = f"{stem}Config" if name.endswith("Config") else stem
        renamed[name] = wanted if wanted not in renamed.values() else f"{stem}{name}"
    return renamed


def kind_source(source: str, old: str, kind: str) -> str:
    """The file of `old` as the file of `kind`: header, registered name and class names changed."""
    tree = ast.parse(source)
    header = tree.body[0]
    lines = source.splitlines()
    body = "\n".join(lines[header.end_lineno :])
    body = body.replace(f'.register("{old}")', f'.register("{kind}")')
    for name, new in class_names(tree, kind).items():
        body = re.sub(rf"\b{name}\b", new, body)
    return HEADER.format(kind=kind, source=old) + body + "\n"


def ablation(slot: Slot, kind: str, old: str) -> str:
    """A recipe on top of the standard one: the new kind, with the same fields, wherever the old one stood."""
    loaded = load(STANDARD)
    values = leaves(plain(loaded.recipe))
    stated = {leaf: values[leaf] for leaf, origin in loaded.origins.items() if origin != DEFAULT and leaf in values}
    tree: dict[str, Any] = {}
    for path, config in places(loaded.recipe, slot):
        if config.kind != old:
            continue
        for length in range(1, path.count(".") + 1):  # a kind that stands there by default must be named to be changed
            above = ".".join(path.split(".")[:length]) + ".kind"
            if above in values and above not in stated:
                put(tree, above, values[above])
        put(tree, f"{path}.kind", kind)
        for leaf, value in stated.items():
            if leaf.startswith(f"{path}.") and leaf != f"{path}.kind":
                put(tree, leaf, value)
    head = [
        f"# {STANDARD.stem} with {kind} in place of {old}.",
        f"base: ../{STANDARD.parent.name}/{STANDARD.name}",
        f"name: {slot.name}-{kind}",
    ]
    return "\n".join([*head, *(f"{key}: {inline(value)}" for key, value in tree.items())]) + "\n"


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for key in above:
        tree = tree.setdefault(key, {})
    tree[last] = value


def start(slot: Slot, kind: str, like: str | None) -> list[Path]:
    """Write the kind's file and, where the standard recipe has the slot, its recipe; the paths come back."""
    used = [config.kind for _, config in places(load(STANDARD).recipe, slot)]
    old = like or (used[0] if used else next(iter(slot.kinds())))
    original = Path(sys.modules[slot[old].__module__].__file__ or "")
    target = original.with_name(f"{kind}.py")
    if target.exists():
        raise ForgeError(f"{slot.name} {kind!r} exists", target.relative_to(ROOT), "choose another name")
    target.write_text(kind_source(original.read_text(), old, kind))
    written = [target]
    if old in used:
        recipe = ROOT / "recipes" / "ablations" / f"{slot.name}-{kind}.yaml"
        recipe.parent.mkdir(exist_ok=True)
        recipe.write_text(ablation(slot, kind, old))
        written.append(recipe)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slot", help="mixer, ffn, norm, residual, position, mask, schedule, ...")
    parser.add_argument("kind", help="name in recipes and of the file, like my_idea")
    parser.add_argument("--like", metavar="KIND", help="start from this kind")
    args = parser.parse_args()
    slots = {slot.name: slot for slot in every_slot()}
    try:
        if args.slot not in slots:
            raise ForgeError(f"no slot is called {args.slot!r}", "tools/dev/new.py", suggest(args.slot, slots))
        if not re.fullmatch(r"[a-z][a-z0-9_]*", args.kind):
            raise ForgeError(f"{args.kind!r} cannot name a file", "tools/dev/new.py", "write it like my_idea")
        written = start(slots[args.slot], args.kind, args.like)
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(written[0])], check=True, cwd=ROOT)
    subprocess.run([sys.executable, str(ROOT / "tools" / "dev" / "zoo_docs.py")], check=True)
    for path in written:
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
