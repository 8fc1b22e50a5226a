"""A resolved recipe as plain data, as YAML that loads back to the same recipe, and as a short hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml

from shardforge.recipe.schema import Recipe
from shardforge.recipe.tree import join, kind_of


class Absent:
    """Stands for a field that one of two recipes does not have."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = Absent()


def plain(config: Any) -> Any:
    """A config as dicts, lists and scalars; the kind comes first."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        kind = {"kind": kind_of(config)} if kind_of(config) else {}
        return {**kind, **{f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}}
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    return [plain(item) for item in config] if isinstance(config, (list, tuple)) else config


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value, for scalars, empty mappings and lists without mappings; the paths of `origins`."""
    if isinstance(value, dict) and value:
        items: Any = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        return {path: value}
    return {leaf: found for key, child in items for leaf, found in leaves(child, join(path, key)).items()}


def dump(recipe: Recipe, comment: Callable[[str], str] | None = None) -> str:
    """YAML that loads back to an equal recipe. `comment` gives the remark behind each leaf, by dotted path."""
    lines = list(_lines(plain(recipe), "", ""))
    if comment is None:
        return "".join(f"{text}\n" for text, _ in lines)
    width = max((len(text) for text, leaf in lines if leaf and len(text) <= 72), default=0)
    remarks = (f"{text:<{width}}  # {' '.join(comment(leaf).split())}" if leaf else text for text, leaf in lines)
    return "".join(f"{line}\n" for line in remarks)


def content_hash(recipe: Recipe) -> str:
    """16 hex digits of what the recipe says; key order, bases and comments do not count."""
    return _hash(plain(recipe))


def model_hash(recipe: Recipe) -> str:
    """16 hex digits of the model, however its attention is computed."""
    return _hash({key: value for key, value in plain(recipe.model).items() if key != "core"})


def differences(left: Any, right: Any) -> list[tuple[str, Any, Any]]:
    """(field, left, right) of every leaf that differs; ABSENT where one side has no such field."""
    one, other = leaves(plain(left)), leaves(plain(right))
    fields = dict.fromkeys([*one, *other])
    pairs = [(field, one.get(field, ABSENT), other.get(field, ABSENT)) for field in fields]
    return [(field, a, b) for field, a, b in pairs if a is ABSENT or b is ABSENT or a != b]


def inline(value: Any) -> str:
    """A scalar or a list on one line of YAML, safe anywhere in a document."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(inline(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{inline(key)}: {inline(child)}' for key, child in value.items())}}}"
    # YAML folds every kind of line break outside double quotes, U+0085 and U+2028 too
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text = yaml.safe_dump([value], default_flow_style=True, default_style=style, width=math.inf, allow_unicode=True)
    return text.strip()[1:-1]


def _lines(value: Any, key: str, indent: str, path: str = "") -> Iterator[tuple[str, str]]:
    """Lines of block YAML, each with the path of its leaf, or "" for a line that only opens a section."""
    if isinstance(value, dict) and value:
        if key:
            yield f"{indent}{key}:", ""
            indent += "  "
        for name, child in value.items():
            yield from _lines(child, inline(name), indent, join(path, name))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        yield f"{indent}{key}:", ""
        for index, item in enumerate(value):
            mark = f"{indent}  - "
            for text, leaf in _lines(item, "", f"{indent}    ", join(path, index)):
                yield mark + text[len(mark) :], leaf
                mark = f"{indent}    "
    else:
        yield f"{indent}{key}: {inline(value)}" if key else f"{indent}{inline(value)}", path


def _hash(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
