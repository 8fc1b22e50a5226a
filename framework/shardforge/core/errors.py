"""Every mistake a user can make, as one sentence each: what, where, and how to mend it.

ForgeError
  RecipeError        the recipe itself: keys, types, values
  LayoutError        the mesh does not fit the model or the machine
  DataError          corpus, shards, tokenizer
  CheckpointError    saving, loading, another model's weights
  EngineError        a step went wrong: non-finite, out of memory, a lost rank
  LaunchError        starting processes: a missing package, a live run, a wrong world size
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ForgeError(Exception):
    """A user's mistake. `where` is a file:line, a path or a field; `fix` is the next step."""

    def __init__(self, what: str, where: object = "", fix: str = ""):
        self.what, self.where, self.fix = what, str(where), fix
        super().__init__(what, self.where, fix)

    def __str__(self) -> str:
        head = f"{self.where}  {self.what}" if self.where else self.what
        return f"{head}\n    fix: {self.fix}" if self.fix else head


class RecipeError(ForgeError):
    pass


class LayoutError(ForgeError):
    pass


class DataError(ForgeError):
    pass


class CheckpointError(ForgeError):
    pass


class EngineError(ForgeError):
    pass


class LaunchError(ForgeError):
    pass


class Problems(ForgeError):
    """Several mistakes found by one check, reported together."""

    def __init__(self, problems: Iterable[ForgeError], subject: str = "the recipe"):
        self.problems = tuple(problems)
        count = len(self.problems)
        self.headline = f"{count} problem{'s' * (count != 1)} in {subject}"
        super().__init__(self.headline)

    def __str__(self) -> str:
        lines = [self.headline]
        for problem in self.problems:
            lines += ["  " + line for line in str(problem).splitlines()]
        return "\n".join(lines)

    def __reduce__(self):
        return Problems, (self.problems, self.headline.split(" in ", 1)[1])


def suggest(name: object, options: Iterable[object]) -> str:
    """The fix for a misspelt name: the nearest option, or the whole list when none is near."""
    known = sorted(str(option) for option in options)
    near = difflib.get_close_matches(str(name), known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"choose from {', '.join(known)}" if known else ""
