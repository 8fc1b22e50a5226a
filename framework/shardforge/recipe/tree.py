"""YAML as nodes that remember where they were written; bases and overrides merge into one tree.

Only what is plain in YAML is read: booleans are true and false, numbers are decimal or 0x, and everything else that
YAML 1.1 would turn into something (yes, on, 1:30, 010, 2024-01-01) stays the text it looks like.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from shardforge.core.errors import RecipeError

TAG = "tag:yaml.org,2002:"
TAGS = {TAG + name for name in ("null", "bool", "int", "float", "str", "timestamp", "value", "merge", "map", "seq")}
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)")


@dataclass(frozen=True)
class Origin:
    """Where a value was written: file, line and column from 1; or a word such as "default", with line 0."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


DEFAULT = Origin("default")


@dataclass(frozen=True)
class Node:
    """One value of the tree. `keys` says where each key of a mapping stands; `near` is where to point for a default."""

    value: Any  # a scalar, list[Node] or dict[str, Node]
    origin: Origin
    keys: Mapping[str, Origin] = field(default_factory=dict)
    near: Origin | None = None

    @property
    def place(self) -> Origin:
        return self.near or self.origin


def problem(place: Origin, path: str, what: str, fix: str = "") -> RecipeError:
    """A mistake in one value; prints as "file:line:column  dotted.path: what"."""
    return RecipeError(f"{path or 'recipe'}: {what}", place, fix)


def read(path: Path, lookup: Callable[[str], Path]) -> tuple[Node, list[RecipeError]]:
    """The tree of a file with its bases merged in, and the mistakes that did not stop the reading.

    A base is a path relative to the file that names it, or a name for `lookup`. RecipeError for what cannot be read.
    """
    problems: list[RecipeError] = []
    return _read(path, lookup, problems, ()), problems


def _read(path: Path, lookup: Callable[[str], Path], problems: list[RecipeError], above: tuple[Path, ...]) -> Node:
    shown = _shown(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as cause:
        raise RecipeError(f"cannot be read: {cause.strerror}", shown, "check the path and its permissions") from cause
    except UnicodeDecodeError as cause:
        raise RecipeError(f"byte {cause.start} is not UTF-8", shown, "save the file as UTF-8") from cause
    tree = _Walk(problems, shown).text(text)
    if not isinstance(tree.value, dict):
        raise problem(tree.origin, "", f"expected a mapping of sections, got {describe(tree)}", "write section: value")
    named = tree.value.pop("base", None)
    if named is None:
        return tree
    above = (*above, path.resolve())
    merged: Node | None = None
    for base in _bases(named):
        found = path.parent / base.value
        if not found.is_file():
            try:
                found = lookup(base.value)
            except RecipeError as error:
                raise problem(base.origin, "base", error.what, error.fix) from None
        if found.resolve() in above:
            chain = " -> ".join(_shown(p) for p in (*above[above.index(found.resolve()) :], found))
            raise problem(base.origin, "base", f"a recipe cannot stand on itself: {chain}", "remove one of the bases")
        low = _read(found, lookup, problems, above)
        merged = low if merged is None else merge(merged, low)
    return tree if merged is None else merge(merged, tree)


def _bases(node: Node) -> list[Node]:
    items = node.value if isinstance(node.value, list) else [node]
    for item in items:
        if not isinstance(item.value, str) or not item.value:
            raise problem(item.origin, "base", f"expected a path or a name, got {describe(item)}", "base: [a.yaml]")
    return items


def _shown(path: Path) -> str:
    """Relative to the working directory where it lies below it."""
    whole = path.resolve()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else os.path.normpath(path)


class _Walk:
    """Turns composed YAML into nodes, collecting mistakes. `fixed` replaces the places inside the text."""

    def __init__(self, problems: list[RecipeError], file: str, fixed: Origin | None = None):
        self.problems, self.file, self.fixed = problems, file, fixed

    def text(self, text: str) -> Node:
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            reason = " ".join(part for part in (error.context, error.problem) if part)
            fix = "indent with spaces" if "\\t" in reason else "check indentation, brackets, quotes and colons here"
            place = self.place(mark) if mark else Origin(self.file)
            raise RecipeError(f"this is not YAML: {reason}", place, fix) from None
        except yaml.YAMLError as error:
            raise RecipeError(f"this is not YAML: {error}", self.file, "remove the character") from None
        return Node({}, self.fixed or Origin(self.file, 1, 1)) if root is None else self.node(root, "", ())

    def place(self, mark: yaml.Mark) -> Origin:
        return self.fixed or Origin(self.file, mark.line + 1, mark.column + 1)

    def node(self, node: yaml.Node, path: str, above: tuple[int, ...]) -> Node:
        place = self.place(node.start_mark)
        if id(node) in above:
            self.problems.append(problem(place, path, "an alias stands inside its own anchor", "write the value out"))
            return Node(None, place)
        if node.tag not in TAGS:
            self.problems.append(problem(place, path, f"tags like {node.tag} mean nothing here", "remove the tag"))
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, (*above, id(node)))
        if isinstance(node, yaml.SequenceNode):
            inside = (*above, id(node))
            return Node([self.node(item, join(path, i), inside) for i, item in enumerate(node.value)], place)
        return Node(_scalar(node), place)

    def mapping(self, node: yaml.MappingNode, path: str, above: tuple[int, ...]) -> Node:
        out: dict[str, Node] = {}
        keys: dict[str, Origin] = {}
        for key, child in node.value:
            place = self.place(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(problem(place, path, "a key must be a word", "write key: value"))
            elif key.value == "<<" and key.style is None:
                self.problems.append(problem(place, path, "merge keys (<<) are not read", "use base: in a file"))
            elif key.value in out:
                what = f"{key.value!r} is given twice, first at {keys[key.value]}"
                self.problems.append(problem(place, path, what, "keep one of them"))
            else:
                out[key.value], keys[key.value] = self.node(child, join(path, key.value), above), place
        return Node(out, self.place(node.start_mark), keys)


def _scalar(node: yaml.ScalarNode) -> Any:
    text, tag = node.value, node.tag.removeprefix(TAG)
    if tag == "null":
        return None
    if tag == "bool":
        return {"true": True, "false": False}.get(text.lower(), text)
    if tag == "int" and INTEGER.fullmatch(text):
        return int(text.replace("_", ""), 0)
    if tag == "float":
        try:
            return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            return text
    return text


def kind_of(config: Any) -> str:
    """The name under which a slot knows this config; empty for a plain section."""
    return getattr(type(config), "kind", "")


def wrap(value: Any, origin: Origin, near: Origin | None = None) -> Node:
    """Python values as a tree: mappings, lists, scalars, paths, and config instances with their kind."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = {"kind": kind_of(value)} if kind_of(value) else {}
        value = {**kind, **{f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}}
    if isinstance(value, Mapping):
        nodes = {str(key): wrap(child, origin, near) for key, child in value.items()}
        return Node(nodes, origin, dict.fromkeys(nodes, near or origin), near)
    if isinstance(value, (list, tuple)):
        return Node([wrap(child, origin, near) for child in value], origin, near=near)
    return Node(os.fspath(value) if isinstance(value, os.PathLike) else value, origin, near=near)


def shorthand(node: Node) -> Node:
    """`rope` as `{kind: rope}`."""
    return Node({"kind": node}, node.origin, {"kind": node.place}, node.near)


def merge(low: Node, high: Node) -> Node:
    """Mappings merge key by key; a different kind, a list or a scalar replaces the whole value."""
    if isinstance(low.value, str) and isinstance(high.value, dict):
        low = shorthand(low)
    elif isinstance(high.value, str) and isinstance(low.value, dict) and "kind" in low.value:
        high = shorthand(high)
    if not (isinstance(low.value, dict) and isinstance(high.value, dict)):
        return high
    if {"kind"} <= low.value.keys() & high.value.keys() and low.value["kind"].value != high.value["kind"].value:
        return high
    out = dict(low.value)
    for key, node in high.value.items():
        out[key] = merge(out[key], node) if key in out else node
    return Node(out, high.origin, {**low.keys, **high.keys})


def override(tree: Node, text: str, flag: str = "--set") -> Node:
    """The tree with one `a.b=value` of the command line in it, given by `flag`; items of a list count from 0."""
    at = Origin(f"{flag} {text}")
    path, equals, raw = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError("this sets nothing", at, f"write {flag} section.field=value")
    problems: list[RecipeError] = []
    value = _Walk(problems, str(at), fixed=at).text(raw) if raw.strip() else Node(None, at)
    if problems:
        raise problems[0]
    return _put(tree, keys, value, at, "")


def _put(node: Node, keys: list[str], value: Node, at: Origin, path: str) -> Node:
    if not keys:
        return merge(node, value)
    key, rest = keys[0], keys[1:]
    if isinstance(node.value, list):
        if not (key.isdecimal() and int(key) < len(node.value)):
            count = len(node.value)
            fix = f"choose from 0 to {count - 1}" if count else "set the whole list"
            raise problem(at, path, f"no item {key!r} in a list of {count}", fix)
        items = list(node.value)
        items[int(key)] = _put(items[int(key)], rest, value, at, join(path, key))
        return Node(items, node.origin)
    child = node.value.get(key) if isinstance(node.value, dict) else None
    inner = _put(child or Node({} if rest else None, at), rest, value, at, join(path, key))
    merged = merge(node, Node({key: inner}, at, {key: at}))
    return dataclasses.replace(merged, origin=node.origin) if isinstance(node.value, dict) else merged


def join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def describe(node: Node) -> str:
    """A value for a message: "str 'two'", "a mapping", "nothing"."""
    if node.value is None:
        return "nothing"
    if isinstance(node.value, dict):
        return "a mapping"
    return "a list" if isinstance(node.value, list) else f"{type(node.value).__name__} {node.value!r}"
