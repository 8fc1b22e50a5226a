"""A slot is a place in the model or the run that a recipe fills by kind; a folder is its registry."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from shardforge.core.errors import RecipeError, suggest

T = TypeVar("T", bound=type)


@dataclass(eq=False)
class Slot:
    """Kinds are frozen dataclasses registered in the files of `package`, one kind a file."""

    name: str
    package: str

    def __post_init__(self) -> None:
        self._kinds: dict[str, type] = {}
        self._listed = False

    def register(self, kind: str) -> Callable[[T], T]:
        def keep(config: T) -> T:
            if kind in self._kinds and self._kinds[kind].__module__ != config.__module__:
                raise RecipeError(
                    f"{self.name} {kind!r} is defined twice",
                    f"{self._kinds[kind].__module__} and {config.__module__}",
                    "rename one of them",
                )
            self._kinds[kind] = config
            config.kind = kind  # type: ignore[attr-defined]
            return config

        return keep

    def kinds(self) -> dict[str, type]:
        """Kind name -> config class, sorted; imports every file of the folder once."""
        if not self._listed:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
            self._listed = True
        return dict(sorted(self._kinds.items()))

    def __getitem__(self, kind: str) -> type:
        kinds = self.kinds()
        if kind not in kinds:
            raise RecipeError(f"no {self.name} is called {kind!r}", self.name, suggest(kind, kinds))
        return kinds[kind]


embeddings = Slot("embedding", "shardforge.model.embeddings")
mixers = Slot("mixer", "shardforge.model.mixers")
positions = Slot("position", "shardforge.model.positions")
rope_scalings = Slot("rope_scaling", "shardforge.model.scalings")
masks = Slot("mask", "shardforge.model.masks")
cores = Slot("core", "shardforge.model.cores")
ffns = Slot("ffn", "shardforge.model.ffns")
routers = Slot("router", "shardforge.model.routers")
norms = Slot("norm", "shardforge.model.norms")
residuals = Slot("residual", "shardforge.model.residuals")
heads = Slot("head", "shardforge.model.heads")
objectives = Slot("objective", "shardforge.objective.kinds")
optimizers = Slot("optimizer", "shardforge.optim.kinds")
schedules = Slot("schedule", "shardforge.optim.schedules")
engines = Slot("engine", "shardforge.engine.kinds")
observers = Slot("observer", "shardforge.observe.kinds")

# Field types: `mixer: Mixer` in a dataclass means "a mapping with a kind, filled from that slot".
Embedding = Annotated[Any, embeddings]
Mixer = Annotated[Any, mixers]
Position = Annotated[Any, positions]
RopeScaling = Annotated[Any, rope_scalings]
Mask = Annotated[Any, masks]
Core = Annotated[Any, cores]
FFN = Annotated[Any, ffns]
Router = Annotated[Any, routers]
Norm = Annotated[Any, norms]
Residual = Annotated[Any, residuals]
Head = Annotated[Any, heads]
Objective = Annotated[Any, objectives]
Optimizer = Annotated[Any, optimizers]
Schedule = Annotated[Any, schedules]
Engine = Annotated[Any, engines]
Observer = Annotated[Any, observers]
