"""JSON Schema of a recipe, for completion and checking in editors; generated from the dataclasses and the slots."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from shardforge.core.slots import Slot
from shardforge.recipe.build import choices, default_of, hints, slot_of
from shardforge.recipe.schema import Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCALARS = {bool: "boolean", int: "integer", float: "number", str: "string", types.NoneType: "null"}
KEYWORDS = {"at_least": "minimum", "at_most": "maximum", "above": "exclusiveMinimum"}


def schema(cls: type = Recipe) -> dict[str, Any]:
    """Draft 2020-12 schema of a recipe file. Nothing is required but what tells kinds apart: bases may supply the rest.

    Imports every kind.
    """
    work = _Schema()
    base = {"type": "string", "description": "path relative to this file, or name of a shipped recipe"}
    root = work.fields(cls)
    root["properties"] = {"base": {"oneOf": [base, {"type": "array", "items": base}]}, **root["properties"]}
    return {"$schema": DIALECT, "title": "ShardForge recipe", **root, "$defs": dict(sorted(work.shared.items()))}


class _Schema:
    """`shared` holds each config and each slot once, by name, so that kinds may contain their own slot."""

    def __init__(self) -> None:
        self.shared: dict[str, dict[str, Any]] = {}

    def reference(self, name: str) -> dict[str, Any]:
        return {"$ref": f"#/$defs/{name}"}

    def fields(self, cls: type, kind: str = "") -> dict[str, Any]:
        known = [f for f in dataclasses.fields(cls) if f.init]
        properties = {f.name: self.field(f, hints(cls)[f.name]) for f in known}
        if kind:
            properties = {"kind": {"const": kind}, **properties}
        required = {"required": ["kind"]} if kind else {}
        about = {"description": line} if kind and (line := _first_line(cls)) else {}
        return {"type": "object", **about, "properties": properties, **required, "additionalProperties": False}

    def field(self, field: dataclasses.Field[Any], want: Any) -> dict[str, Any]:
        limits = {KEYWORDS[name]: field.metadata[name] for name in KEYWORDS if name in field.metadata}
        out = self.of(want, limits)
        meaning, unit = field.metadata.get("meaning", ""), field.metadata.get("unit", "")
        if meaning:
            out["description"] = f"{meaning} ({unit})" if unit else meaning
        default = default_of(field)
        if default is None or isinstance(default, (bool, int, float, str)):
            out["default"] = default
        return out

    def of(self, want: Any, limits: Mapping[str, float]) -> dict[str, Any]:
        if len(choices(want)) > 1:
            return {"anyOf": [self.of(choice, limits) for choice in choices(want)]}
        slot = slot_of(want)
        if slot is not None:
            return self.slot(slot)
        shape = get_origin(want) or want
        if shape is Literal:
            return {"enum": list(get_args(want))}
        if shape is tuple and get_args(want)[-1] is Ellipsis:
            return {"type": "array", "items": self.of(get_args(want)[0], limits)}
        if shape is tuple:
            items = [self.of(item, limits) for item in get_args(want)]
            return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
        if shape in (Mapping, dict):
            entry = {"anyOf": [self.of(get_args(want)[1], limits), {"type": "null"}]}
            return {"type": "object", "additionalProperties": entry}
        if isinstance(shape, type) and dataclasses.is_dataclass(shape):
            return self.config(shape)
        return {"type": SCALARS[shape], **(limits if shape in (int, float) else {})} if shape in SCALARS else {}

    def config(self, cls: type) -> dict[str, Any]:
        if cls.__name__ not in self.shared:
            self.shared[cls.__name__] = {}
            self.shared[cls.__name__].update(self.fields(cls))
        return self.reference(cls.__name__)

    def slot(self, slot: Slot) -> dict[str, Any]:
        """One of: the name of a kind, a kind with its fields, or some fields of a kind that a base names."""
        if slot.name not in self.shared:
            entry = self.shared[slot.name] = {}
            kinds = slot.kinds()
            for kind, cls in kinds.items():
                self.shared[f"{slot.name}.{kind}"] = self.fields(cls, kind)
            names = sorted({name for cls in kinds.values() for name in hints(cls)})
            partial = {"type": "object", "propertyNames": {"enum": names}}
            entry["oneOf"] = [
                {"enum": list(kinds)},
                *(self.reference(f"{slot.name}.{kind}") for kind in kinds),
                partial,
            ]
        return self.reference(slot.name)


def _first_line(cls: type) -> str:
    """What the kind is: its own docstring, or the first line of its file."""
    own = cls.__doc__ or ""
    if own.startswith(f"{cls.__name__}("):  # written by dataclass
        own = ""
    module = sys.modules[cls.__module__].__doc__
    return (own or module or "").strip().partition("\n")[0]
