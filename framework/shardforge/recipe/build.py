"""A tree becomes frozen dataclasses; every value is checked, every mistake is reported at once."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from shardforge.core.errors import ForgeError, Problems, RecipeError, suggest
from shardforge.core.slots import Slot
from shardforge.recipe.tree import DEFAULT, Node, Origin, describe, join, kind_of, problem, shorthand, wrap

T = TypeVar("T")

LIMITS = {
    "at_least": (lambda value, limit: value >= limit, "at least"),
    "at_most": (lambda value, limit: value <= limit, "at most"),
    "above": (lambda value, limit: value > limit, "above"),
}
WORDS = {bool: "true or false"}


def build(cls: type[T], tree: Node, earlier: Sequence[ForgeError] = ()) -> tuple[T, dict[str, Origin]]:
    """The config that `tree` describes, and the origin of each of its leaves by dotted path.

    A leaf is a scalar, a kind, or a list without mappings. Problems holds `earlier` ones and all found here.
    """
    work = _Build()
    value = work.value(cls, tree, "")
    problems = [*earlier, *work.problems]
    if problems:
        raise Problems(in_order(problems))
    return value, work.origins


def in_order(problems: Sequence[ForgeError]) -> list[ForgeError]:
    """By file and line, then as found."""

    def place(error: ForgeError) -> tuple[str, int]:
        file, _, rest = error.where.partition(":")
        line = rest.partition(":")[0]
        return (file, int(line)) if line.isdecimal() else (error.where, 0)

    return sorted(problems, key=place)


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Field name -> its type, of the fields a recipe may give, slots kept."""
    found = get_type_hints(cls, include_extras=True)
    return {f.name: found[f.name] for f in dataclasses.fields(cls) if f.init}


def slot_of(want: Any) -> Slot | None:
    """The slot that a field of this type is filled from."""
    marks = get_args(want)[1:] if get_origin(want) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, Slot)), None)


def choices(want: Any) -> tuple[Any, ...]:
    """The types of a union; the type itself when it is none."""
    return get_args(want) if get_origin(want) in (Union, types.UnionType) else (want,)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default value, or dataclasses.MISSING."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def pointed(value: float) -> str:
    """A float as YAML 1.1 reads it back: 0.0003, 1.0e-20, .inf."""
    if not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    text = repr(value)
    return text if "." in text else text.replace("e", ".0e")


class _Build:
    def __init__(self) -> None:
        self.problems: list[RecipeError] = []
        self.origins: dict[str, Origin] = {}

    def bad(self, place: Origin, path: str, what: str, fix: str = "") -> Any:
        """Note a mistake; None stands for the value."""
        self.problems.append(problem(place, path, what, fix))

    def value(self, want: Any, node: Node, path: str, default: Any = None) -> Any:
        """`node` as a `want`; None, with a problem noted, when it is not one."""
        if len(choices(want)) > 1:
            return self.choice(choices(want), node, path, default)
        slot = slot_of(want)
        if slot is not None:
            return self.kind(slot, node, path, default)
        shape = get_origin(want) or want
        if shape is tuple:
            return self.sequence(get_args(want), node, path)
        if shape in (Mapping, dict):
            return self.mapping(get_args(want)[1], node, path)
        if isinstance(shape, type) and dataclasses.is_dataclass(shape):
            return self.struct(shape, node, path)
        self.origins[path] = node.origin
        return self.literal(get_args(want), node, path) if shape is Literal else self.scalar(shape, node, path)

    def choice(self, wants: tuple[Any, ...], node: Node, path: str, default: Any) -> Any:
        some = [want for want in wants if want is not type(None)]
        if node.value is None and len(some) < len(wants):
            self.origins[path] = node.origin
            return None
        if len(some) == 1:
            return self.value(some[0], node, path, default)
        for want in some:
            trial = _Build()
            value = trial.value(want, node, path, default)
            if not trial.problems:
                self.origins.update(trial.origins)
                return value
        return self.bad(node.place, path, f"expected {' or '.join(map(type_name, some))}, got {describe(node)}")

    def kind(self, slot: Slot, node: Node, path: str, default: Any) -> Any:
        if isinstance(node.value, str):
            node = shorthand(node)
        if not isinstance(node.value, dict):
            what = f"expected the name of a kind or a mapping with one, got {describe(node)}"
            return self.bad(node.place, path, what, suggest("", slot.kinds()))
        named = node.value.get("kind")
        if named is None:
            usual = default if isinstance(default, str) else kind_of(default)
            if not usual:
                return self.bad(node.place, path, "needs a 'kind'", suggest("", slot.kinds()))
            named = Node(usual, DEFAULT, near=node.place)
        if not isinstance(named.value, str):
            what = f"expected the name of a kind, got {describe(named)}"
            return self.bad(named.place, path, what, suggest("", slot.kinds()))
        try:
            config = slot[named.value]
        except RecipeError as error:
            return self.bad(named.place, path, error.what, error.fix)
        self.origins[join(path, "kind")] = named.origin
        rest = {key: child for key, child in node.value.items() if key != "kind"}
        return self.struct(config, dataclasses.replace(node, value=rest), path)

    def sequence(self, wants: tuple[Any, ...], node: Node, path: str) -> tuple[Any, ...] | None:
        if not isinstance(node.value, list):
            fix = f"write [{node.value}]" if isinstance(node.value, (str, int, float)) else ""
            return self.bad(node.place, path, f"expected a list, got {describe(node)}", fix)
        if wants[-1] is Ellipsis:
            wants = wants[:1] * len(node.value)
        if len(wants) != len(node.value):
            return self.bad(node.place, path, f"expected {len(wants)} values, got {len(node.value)}")
        out = []
        for index, (want, item) in enumerate(zip(wants, node.value, strict=True)):
            out.append(self.value(want, item, join(path, index)))
            self.origins.pop(join(path, index), None)  # a plain item is part of its list
        if not any(known.startswith(path + ".") for known in self.origins):
            self.origins[path] = node.origin
        return tuple(out)

    def mapping(self, want: Any, node: Node, path: str) -> dict[str, Any] | None:
        """Entries by name; a null entry takes an inherited one out."""
        if not isinstance(node.value, dict):
            return self.bad(node.place, path, f"expected a mapping of names, got {describe(node)}")
        optional = type(None) in choices(want)
        kept = {key: child for key, child in node.value.items() if optional or child.value is not None}
        if not kept:
            self.origins[path] = node.origin
        return {key: self.value(want, child, join(path, key)) for key, child in kept.items()}

    def struct(self, cls: type, node: Node, path: str) -> Any:
        if not isinstance(node.value, dict):
            return self.bad(node.place, path, f"expected a mapping, got {describe(node)}", _fields_of(cls))
        before = len(self.problems)
        known = {f.name: f for f in dataclasses.fields(cls) if f.init}
        for key, child in node.value.items():
            if key not in known:
                self.bad(node.keys.get(key, child.place), path, f"no field {key!r}", suggest(key, known))
        given = {}
        missing = []
        for key, field in known.items():
            child = node.value.get(key)
            if child is None and default_of(field) is dataclasses.MISSING:
                missing.append(field)
                continue
            child = child or wrap(default_of(field), DEFAULT, near=node.place)
            given[key] = self.value(hints(cls)[key], child, join(path, key), default_of(field))
            self.limits(field, given[key], child, join(path, key))
        for field in missing:
            meaning = field.metadata.get("meaning", "")
            self.bad(node.place, path, f"field {field.name!r} is missing", meaning and f"{field.name}: {meaning}")
        if not known and not hasattr(cls, "kind"):
            self.origins[path] = node.origin
        return self.make(cls, given, node, path) if len(self.problems) == before else None

    def make(self, cls: type, given: dict[str, Any], node: Node, path: str) -> Any:
        try:
            return cls(**given)
        except Problems as many:
            errors = list(many.problems)
        except ForgeError as one:
            errors = [one]
        except ValueError as cause:
            return self.bad(node.place, path, str(cause))
        for error in errors:
            child = node.value.get(error.where)
            inside = join(path, error.where) if error.where in given else path
            self.bad(child.place if child else node.place, inside, error.what, error.fix)
        return None

    def limits(self, field: dataclasses.Field[Any], value: Any, node: Node, path: str) -> None:
        numbers = value if isinstance(value, tuple) else (value,)
        for name, (holds, words) in LIMITS.items():
            limit = field.metadata.get(name)
            for number in numbers if limit is not None else ():
                if isinstance(number, (int, float)) and not holds(number, limit):
                    unit = field.metadata.get("unit", "")
                    fix = f"write a number that is {words} {limit} {unit}".rstrip()
                    self.bad(node.place, path, f"{number} is not {words} {limit}", fix)

    def literal(self, allowed: tuple[Any, ...], node: Node, path: str) -> Any:
        for option in allowed:
            if option == node.value and type(option) is type(node.value):
                return option
        shown = repr(node.value) if isinstance(node.value, (str, int, float)) else describe(node)
        options = ", ".join(map(repr, allowed))
        return self.bad(node.place, path, f"{shown} is not one of {options}", suggest(node.value, allowed))

    def scalar(self, want: Any, node: Node, path: str) -> Any:
        value = node.value
        if want is Any:
            return plain_data(node)
        if want is float and type(value) is int:
            return float(value)
        if type(value) is not want:
            name = WORDS.get(want, want.__name__)
            return self.bad(node.place, path, f"expected {name}, got {describe(node)}", _mend(want, value))
        if want is float and math.isnan(value):
            return self.bad(node.place, path, "expected a number, got .nan", "write a number")
        if want is str and "${" in value:
            what = f"{value!r} asks for interpolation, which recipes do not have"
            return self.bad(node.place, path, what, f"write the value, or give it with --set {path}=...")
        return value


def plain_data(node: Node) -> Any:
    """The node's value without origins."""
    if isinstance(node.value, dict):
        return {key: plain_data(child) for key, child in node.value.items()}
    return [plain_data(child) for child in node.value] if isinstance(node.value, list) else node.value


def type_name(want: Any) -> str:
    """A type in the words of a message."""
    if get_origin(want) is Literal:
        return " or ".join(map(repr, get_args(want)))
    slot = slot_of(want)
    if slot is not None:
        return f"a kind of {slot.name}"
    if get_origin(want) is tuple:
        return "a list"
    return WORDS.get(want, want.__name__) if want in (bool, int, float, str) else "a mapping"


def _fields_of(cls: type) -> str:
    names = list(hints(cls))
    return f"its fields are {', '.join(names)}" if names else ""


def _mend(want: type, value: Any) -> str:
    """What to write instead of `value` for a `want`, where that can be told."""
    if value is None:
        return "give a value, or leave the key out"
    if want is bool:
        return "only true and false are booleans"
    if want is str and isinstance(value, (bool, int, float)):
        return f"put it in quotes: '{value}'"
    if isinstance(value, (str, float)) and want in (int, float):
        try:
            number = float(value)
        except ValueError:
            return ""
        right = pointed(number) if want is float else str(int(number)) if number.is_integer() else ""
        if right:
            return f"YAML reads {value} as text; write {right}" if isinstance(value, str) else f"write {right}"
    return ""
