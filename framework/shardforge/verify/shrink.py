"""A recipe's model, small: every kind, option, ratio and neighbourhood of blocks is kept, the numbers get small.

What a number is follows from its field: `unit="tokens"` is a length, "width", "rank" or "channels" in its name or its
meaning is a width, "heads", "experts" or "groups" a count, and a field called "sequences" the rows of a pool. Lengths
keep their share of the sequence, widths their order and equality, counts their ratios (so groups go on dividing experts
as they did), and pools of several rows become pairs. A kind for which that does not hold returns its small config from
`shrunk(self, scale: Scale)`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shardforge.core.errors import ForgeError, LayoutError, Problems
from shardforge.core.layout import Layout
from shardforge.engine.fit import check_recipe
from shardforge.model.build import build
from shardforge.nn.module import declared
from shardforge.recipe import rules
from shardforge.recipe.schema import Recipe
from shardforge.verify.stack import shortened

Role = Literal["tokens", "width", "count", "rows", "other"]

HIDDEN, LENGTH, ROWS = 32, 32, 48
"""What the width of the stream, the sequence and the vocabulary shrink to, where the layouts allow it."""
WIDTHS = frozenset({"width", "widths", "wide", "rank", "channels", "dim", "inner"})
COUNTS = frozenset({"head", "heads", "expert", "experts", "group", "groups"})
LARGE = 64
"""A number above this that no word explains is taken for a width: small models must be small."""
FACTORS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)


@dataclass(frozen=True)
class Scale:
    """Old number -> new number, for one small model."""

    widths: Mapping[int, int]
    counts: Mapping[int, int]
    length: int  # tokens of a sequence of the recipe
    seq_len: int  # and of the small one

    def width(self, value: int) -> int:
        return self.widths[value]

    def count(self, value: int) -> int:
        return self.counts[value]

    def rows(self, value: int) -> int:
        return min(value, 2)

    def tokens(self, value: int) -> int:
        """At least the sequence where it was, else its share of it, from 5 tokens up to half of the sequence."""
        if value >= self.length:
            return -(-value // self.length) * self.seq_len
        return max(min(value, 5), min(round(value * self.seq_len / self.length), self.seq_len // 2))


def role(field: dataclasses.Field[Any], value: Any) -> Role:
    """What a whole number in a config is."""
    if type(value) is not int or not field.init:
        return "other"
    if field.metadata.get("unit") == "tokens":
        return "tokens"
    if field.name == "sequences":
        return "rows"
    words = set(re.findall("[a-z]+", f"{field.name} {field.metadata.get('meaning', '')}".lower()))
    if words & WIDTHS:
        return "width"
    if words & COUNTS:
        return "count"
    return "width" if value > LARGE else "other"


def numbers(value: Any, wanted: Role) -> Iterator[int]:
    """The numbers of one role in a config and in all configs inside it."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            if role(field, inner) == wanted:
                yield inner
            yield from numbers(inner, wanted)
    elif isinstance(value, (Mapping, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from numbers(inner, wanted)


def resized(value: Any, scale: Scale) -> Any:
    """A config with every number replaced; everything else stays."""
    if dataclasses.is_dataclass(value):
        if hasattr(value, "shrunk"):
            return value.shrunk(scale)
        changes = {}
        for field in dataclasses.fields(value):
            inner, kind = getattr(value, field.name), role(field, getattr(value, field.name))
            known = {"tokens": scale.tokens, "width": scale.width, "count": scale.count, "rows": scale.rows}
            change: Callable[[Any], Any] = known.get(kind, lambda inner: resized(inner, scale))
            if field.init:
                changes[field.name] = change(inner)
        return dataclasses.replace(value, **changes)
    if isinstance(value, Mapping):
        return {name: resized(inner, scale) for name, inner in value.items()}
    return tuple(resized(inner, scale) for inner in value) if isinstance(value, tuple) else value


def widths(values: Iterable[int], hidden: int, quantum: int) -> dict[int, int]:
    """Each width -> its small one: multiples of `quantum`, in the same order, equal where they were equal."""
    share, last, out = min(1.0, HIDDEN / hidden), 0, {}
    for value in sorted(set(values)):
        last = out[value] = max(math.ceil(value * share / quantum) * quantum, last + quantum)
    return out


def counts(values: Iterable[int], factor: int, least: int) -> dict[int, int]:
    """Each count -> its small one: the same ratios, what was more than one stays at least `least`; one stays one."""
    several = sorted({value for value in values if value > 1})
    if not several:
        return {1: 1}
    common = math.gcd(*several)
    least = 4 if len(several) == 1 and least > 1 else least
    times = -(-least // (several[0] // common)) * factor
    return {1: 1, **{value: min(value // common * times, value * factor) for value in several}}


def shrink(recipe: Recipe, layouts: Sequence[Layout], full: Sequence[Layout] = (), layers: int = 1) -> Recipe:
    """A small recipe that each of `layouts` can split, with at least `layers` layers if there were as many.

    `full` are the layouts that these stand for: key/value heads that are repeated over tp there are repeated here.
    Raises LayoutError with what the last try lacked where no small model fits.
    """
    repeated = _repeated(recipe, full or layouts)
    failure: ForgeError | None = None
    degrees = math.lcm(*(math.lcm(layout.tp, layout.etp) for layout in layouts))
    sizes = sorted(itertools.product(FACTORS, (4, 8, 16)), key=lambda pair: (pair[0] * pair[1], pair))
    for (factor, quantum), least in itertools.product(sizes, (1, 2) if repeated else (2,)):
        try:
            small = _sized(recipe, layouts, factor, math.lcm(quantum, degrees), least, layers)
            for layout in layouts:
                check(placed(small, layout, recipe.engine, pools(small, layout)))
        except ForgeError as error:
            failure = failure or error
            continue
        if _repeated(small, layouts) == repeated:
            return small
    what = failure.what if failure is not None else "key/value heads cannot be repeated as they are in the recipe"
    raise LayoutError(
        f"no small model of these kinds fits {', '.join(map(str, layouts))}: {what}",
        failure.where if failure is not None else "parallel",
        failure.fix if failure is not None else "name one layout at a time",
    )


def pooled(recipe: Recipe) -> int:
    """Rows of the batch that a micro-batch of a small recipe must not part."""
    return max(numbers(recipe.model, "rows"), default=1)


def pools(small: Recipe, layout: Layout) -> int:
    """The most micro-batches that a data rank's share can be cut into."""
    return small.train.sequences // layout.data_ranks // pooled(small)


def placed(small: Recipe, layout: Layout, engine: Any, micro_batches: int) -> Recipe:
    """The small recipe on a layout, each data rank's share cut into `micro_batches`."""
    train = dataclasses.replace(small.train, micro_batch=small.train.sequences // layout.data_ranks // micro_batches)
    return dataclasses.replace(small, parallel=layout, engine=engine, train=train)


def check(recipe: Recipe) -> None:
    """Everything that can be said against a recipe before a rank starts, as one error."""
    if broken := rules.check(recipe, {}):
        raise broken[0] if len(broken) == 1 else Problems(broken)
    check_recipe(recipe)


def _sized(recipe: Recipe, layouts: Sequence[Layout], factor: int, quantum: int, least: int, layers: int) -> Recipe:
    unit = math.lcm(*(2 * layout.cp * layout.tp for layout in layouts))
    seq_len = -(-LENGTH // unit) * unit
    wide = widths(numbers((recipe.model, recipe.objective), "width"), recipe.model.hidden, quantum)
    train = dataclasses.replace(
        recipe.train,
        sequences=math.lcm(*(layout.data_ranks * 2 * layout.pp for layout in layouts), 4) * min(2, pooled(recipe)),
        seq_len=seq_len,
        micro_batch=None,
        batch_warmup=None,
    )

    def small(value: Any, least: int) -> Any:
        several = counts(numbers(value, "count"), factor, least)
        return resized(value, Scale(wide, several, recipe.train.seq_len, seq_len))

    model = recipe.model
    blocks = {}
    for name, block in model.blocks.items():
        parts = {field.name: getattr(block, field.name) for field in dataclasses.fields(block)}
        parts = {slot: small(part, least if slot == "mixer" else 2) for slot, part in parts.items()}
        blocks[name] = dataclasses.replace(block, **parts)
    outside = {name: small(getattr(model, name), 2) for name in ("embedding", "norm", "head")}
    stack = shortened(model.layers, layers)
    spread = math.sqrt(model.hidden / wide[model.hidden])
    model = dataclasses.replace(
        model,
        **outside,
        vocab=-(-ROWS // quantum) * quantum,
        hidden=wide[model.hidden],
        blocks=blocks,
        stack=stack,
        init=dataclasses.replace(
            model.init,
            std=model.init.std * spread,
            table_std=model.init.table_std and model.init.table_std * spread,
        ),
    )
    return dataclasses.replace(
        recipe,
        model=model,
        objective=small(recipe.objective, 2),
        data=dataclasses.replace(recipe.data, build=None),
        parallel=Layout(),
        train=train,
    )


def _repeated(recipe: Recipe, layouts: Sequence[Layout]) -> bool:
    """Whether any of the layouts has more tp ranks than some weight has key/value heads."""
    short = dataclasses.replace(recipe.model, stack=shortened(recipe.model.layers))
    dims = {dim for item in declared(build(short, recipe.objective.build())) for dim in item.dims}
    heads = [dim for dim in dims if dim.name == "kv_heads"]
    return any(layout.tp > 1 and layout.split((dim,)) == {} for layout in layouts for dim in heads)
