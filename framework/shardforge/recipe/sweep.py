"""A sweep: one file that describes several runs, its arms, by what they change in a recipe that they share.

base: first                      # as in a recipe, and any other section of one: what all arms share
arms:
  short: {}                      # no change
  wide: {model: {hidden: 512}}   # merged over the shared part as a recipe is over its base
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shardforge.core.errors import ForgeError, Problems, RecipeError
from shardforge.recipe.load import Loaded, find, finish, tree_of
from shardforge.recipe.tree import Node, Origin, describe, merge, override, problem

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
OWN = ("name", "run_dir")
"""Fields of the sweep itself; those of an arm follow from them and its name."""


@dataclass(frozen=True)
class Sweep:
    """The run of an arm lies in `folder`/<name of the arm>."""

    name: str
    folder: Path
    arms: Mapping[str, Loaded]


def load_sweep(name_or_path: str | Path, sets: Sequence[str] = ()) -> Sweep:
    """The sweep of a file, or of one in recipes/ by name, with `sets` put over every arm.

    `name` and `run_dir` at the top are those of the sweep: its folder is runs/<name> unless run_dir says otherwise.
    Problems lists what is wrong with any arm, each mistake once; RecipeError is for a file that is no sweep.
    """
    path = find(name_or_path)
    tree, problems = tree_of(path)
    for text in sets:
        if _field(text) in OWN:
            tree = override(tree, text)
    shared = dict(tree.value)
    arms = shared.pop("arms", None)
    if arms is None or not isinstance(arms.value, dict) or not arms.value:
        what = "this is no sweep: it has no arms" if arms is None else f"arms: expected names, got {describe(arms)}"
        raise RecipeError(what, arms.origin if arms else path, "write arms: {NAME: {changes}, ...}")
    own = {key: shared.pop(key).value for key in OWN if key in shared}
    name = str(own.get("name") or path.stem)
    folder = Path(str(own.get("run_dir") or f"runs/{name}"))
    sets = [text for text in sets if _field(text) not in OWN]
    base = replace(tree, value=shared)
    loaded: dict[str, Loaded] = {}
    found: list[ForgeError] = []
    for arm, changes in arms.value.items():
        try:
            at = arms.keys[arm]
            loaded[arm] = finish(_arm(arm, base, changes, at, folder), list(problems), sets, None)
        except Problems as many:
            found += many.problems
        except RecipeError as error:
            found.append(error)
    if found:
        raise Problems({str(error): error for error in found}.values(), f"the sweep {path}")
    return Sweep(name, folder, loaded)


def _field(text: str) -> str:
    """What a "field=value" sets."""
    return text.partition("=")[0].strip()


def _arm(name: str, base: Node, changes: Node, at: Origin, folder: Path) -> Node:
    """The recipe of one arm as a tree."""
    if not NAME.fullmatch(name):
        raise problem(at, f"arms.{name}", "an arm is a folder", "name it with letters, digits, dots, dashes")
    if changes.value is None:
        changes = replace(changes, value={})
    if not isinstance(changes.value, dict):
        raise problem(changes.origin, f"arms.{name}", f"expected changes, got {describe(changes)}", "write {} for none")
    for key in OWN:
        if key in changes.value:
            what, fix = f"{key} follows from the name of the arm", "leave it out"
            raise problem(changes.value[key].origin, f"arms.{name}.{key}", what, fix)
    own = {"name": Node(name, at), "run_dir": Node(str(folder / name), at)}
    merged = merge(base, changes)
    return replace(merged, value={**own, **merged.value})
