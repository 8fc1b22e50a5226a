"""The way in: a name or a path becomes a checked recipe whose every value knows where it was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import shardforge
from shardforge.core.errors import Problems, RecipeError, suggest
from shardforge.recipe.build import build, in_order
from shardforge.recipe.rules import check
from shardforge.recipe.schema import Recipe
from shardforge.recipe.tree import Node, Origin, override, read, wrap

STAND_INS: Mapping[str, Any] = {
    "data": {"sources": [{"path": "data/corpus"}]},
    "schedule": {"kind": "constant", "lr": 1.0},
    "train": {"steps": 1, "sequences": 1, "seq_len": 4096},
}
"""Sections that a run needs and a model does not."""
PROFILES = "clusters"
"""The folder beside recipes that describes machines; `shardforge launch --cluster` reads it."""


@dataclass(frozen=True)
class Loaded:
    """A recipe and its sources. `origins` has one entry for each leaf; a default has the origin "default"."""

    recipe: Recipe
    origins: Mapping[str, Origin]
    tree: Node
    path: Path | None


def load(name_or_path: str | Path, sets: Sequence[str] = ()) -> Loaded:
    """The recipe of a file, a run directory or a shipped name, with `sets` like "optim.lr=0.001" put over it.

    Problems lists everything that is wrong at once; RecipeError is for a file that is not there or is not YAML.
    """
    path = find(name_or_path)
    tree, problems = tree_of(path)
    if "arms" in tree.value:
        raise RecipeError("this is a sweep of several runs, not one recipe", path, f"shardforge sweep {name_or_path}")
    return finish(tree, problems, sets, path)


def load_model(name_or_path: str | Path, sets: Sequence[str] = ()) -> Loaded:
    """As `load`, for what asks about the model alone: sections of a run that the file does not have get stand-ins,
    whose origin is "stand-in". With them a file of recipes/models is a recipe."""
    path = find(name_or_path)
    tree, problems = tree_of(path)
    stand_ins = wrap(STAND_INS, Origin("stand-in"))
    return finish(replace(tree, value={**stand_ins.value, **tree.value}), problems, sets, path)


def from_mapping(mapping: Mapping[str, Any], sets: Sequence[str] = ()) -> Loaded:
    """The recipe that a Python mapping describes; configs may stand in it as instances."""
    return finish(wrap(mapping, Origin("from_mapping")), [], sets, None)


def tree_of(path: Path) -> tuple[Node, list[RecipeError]]:
    """What a file and its bases say, nothing checked, and the mistakes that did not stop the reading."""
    return read(path, lambda name: _named(name, (shipped(),)))


def finish(tree: Node, problems: list[RecipeError], sets: Sequence[str], path: Path | None) -> Loaded:
    """The recipe of a tree with `sets` put over it. Problems lists `problems` and everything else that is wrong."""
    for text in sets:
        try:
            tree = override(tree, text)
        except RecipeError as error:
            problems.append(error)
    if path is not None and "name" not in tree.value:
        tree = replace(tree, value={"name": Node(path.stem, Origin("default: file name")), **tree.value})
    recipe, origins = build(Recipe, tree, problems)
    broken = check(recipe, origins)
    if broken:
        raise Problems(in_order(broken))
    return Loaded(recipe, origins, tree, path)


def find(name_or_path: str | Path) -> Path:
    """The file of a recipe: an existing path, a run directory, or a name below recipes/ here or as shipped."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    if (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    return _named(str(name_or_path), (Path("recipes"), shipped()))


def shipped() -> Path:
    """The folder of the recipes that come with ShardForge: in the installed package, or in the clone."""
    package = Path(shardforge.__file__).parent
    inside = package / "_recipes"
    return inside if inside.is_dir() else package.parent.parent / "recipes"


def names(folder: Path) -> dict[str, Path]:
    """Every way to name a recipe below `folder` -> its file: "first", and "runs/first" where two are called first."""
    files = [file for file in sorted(folder.rglob("*.yaml")) if PROFILES not in file.relative_to(folder).parts[:-1]]
    stems = [file.stem for file in files]
    full = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    return full | {file.stem: file for file in files if stems.count(file.stem) == 1}


def _named(name: str, folders: Sequence[Path]) -> Path:
    wanted = name.removesuffix(".yaml").removeprefix("recipes/")
    known: dict[str, Path] = {}
    for folder in folders:
        found = names(folder)
        if wanted in found:
            return found[wanted]
        known |= {key: file for key, file in found.items() if key not in known}
    twins = [key for key in known if key.endswith(f"/{wanted}")]
    if twins:
        raise RecipeError(f"{len(twins)} recipes are called {wanted!r}", "", f"write {' or '.join(twins)}")
    raise RecipeError(f"there is no recipe {name!r}, as a file or by name", "", suggest(wanted, known))
