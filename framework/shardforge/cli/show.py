"""shardforge show: what a recipe says once its bases are merged, and where each value was written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardforge.recipe.load import Loaded

HELP = "print a resolved recipe with the origin of every value, or what differs between two"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="*", metavar="RECIPE", help="file, run directory or shipped name; two compare")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", dest="sets", help="put a value over each recipe"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of YAML or a table")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of recipes, for editors")


def run(args: argparse.Namespace) -> int:
    """0; 1 when two recipes differ."""
    from shardforge.core.errors import RecipeError
    from shardforge.recipe.jsonschema import schema
    from shardforge.recipe.load import load

    if args.schema:
        print(json.dumps(schema(), indent=2))
        return 0
    if len(args.recipe) not in (1, 2):
        raise RecipeError(
            f"expected one recipe or two, got {len(args.recipe)}",
            "shardforge show",
            "name one to see it, two to compare",
        )
    loaded = [load(name, args.sets) for name in args.recipe]
    if len(loaded) == 1:
        _one(loaded[0], args.json)
        return 0
    return _two(loaded[0], loaded[1], args.json)


def _one(loaded: Loaded, as_json: bool) -> None:
    from shardforge.recipe.provenance import content_hash, dump, plain

    if as_json:
        origins = {field: str(origin) for field, origin in loaded.origins.items()}
        found = {"recipe": plain(loaded.recipe), "origins": origins, "hash": content_hash(loaded.recipe)}
        print(json.dumps(found, indent=2))
        return
    print(dump(loaded.recipe, comment=lambda field: str(loaded.origins[field])), end="")
    print(f"# content hash {content_hash(loaded.recipe)}")


def _two(left: Loaded, right: Loaded, as_json: bool) -> int:
    from shardforge.recipe.provenance import ABSENT, differences, inline

    rows = differences(left.recipe, right.recipe)
    if as_json:
        print(json.dumps([_record(row, left, right) for row in rows], indent=2, default=repr))
        return int(bool(rows))

    def side(field: str, value: Any, origins: Mapping[str, Any]) -> str:
        return "(absent)" if value is ABSENT else f"{inline(value)}  # {origins[field]}"

    cells = [(field, side(field, a, left.origins), side(field, b, right.origins)) for field, a, b in rows]
    widths = [max((len(row[column]) for row in cells), default=0) for column in (0, 1)]
    for field, one, other in cells:
        print(f"{field:<{widths[0]}}  {one:<{widths[1]}}  {other}")
    if not rows:
        print("the recipes are equal")
    return int(bool(rows))


def _record(row: tuple[str, Any, Any], left: Loaded, right: Loaded) -> dict[str, Any]:
    """One difference as JSON; a side without the field has neither value nor origin."""
    from shardforge.recipe.provenance import ABSENT

    field, a, b = row
    sides = {"left": (a, left), "right": (b, right)}
    known = {name: (value, loaded) for name, (value, loaded) in sides.items() if value is not ABSENT}
    return {
        "field": field,
        **{name: {"value": value, "origin": str(loaded.origins[field])} for name, (value, loaded) in known.items()},
    }
