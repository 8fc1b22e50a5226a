"""Rules between fields: one short function each, all of them asked, all their problems reported together.

What depends on the size of a weight (heads, ffn) is checked on the built model, not here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from shardforge.core.errors import ForgeError, LayoutError, RecipeError, suggest
from shardforge.core.layout import Layout
from shardforge.recipe.model import expand
from shardforge.recipe.schema import Recipe
from shardforge.recipe.tree import DEFAULT, Origin, join, kind_of

Origins = Mapping[str, Origin]
Rule = Callable[[Recipe, Origins], Iterable[ForgeError]]

WIDTHS = {"bf16": 16, "fp32": 32, "fp64": 64}
CLAIMED = ("tp", "cp", "pp")
"""Axes that change what a kind computes, so that a kind may not support them."""


def check(recipe: Recipe, origins: Origins) -> list[ForgeError]:
    """Every broken rule of a recipe."""
    return [error for rule in RULES for error in rule(recipe, origins)]


def place(origins: Origins, path: str) -> Origin | str:
    """Origin of a field, of the first leaf below it, or of the nearest one above it."""
    if path in origins:
        return origins[path]
    below = next((origin for leaf, origin in origins.items() if leaf.startswith(path + ".")), None)
    parent = path.rpartition(".")[0]
    return below or (place(origins, parent) if parent else "")


def broken(kind: type[ForgeError], origins: Origins, path: str, what: str, fix: str, cause: str = "") -> ForgeError:
    """A problem with the field `path`; it points to the field `cause` where `path` was left to its default."""
    where = place(origins, path)
    return kind(f"{path}: {what}", place(origins, cause) if cause and where == DEFAULT else where, fix)


def nearest(value: int, step: int) -> str:
    """The multiples of `step` on both sides of `value`, in words."""
    low, high = value // step * step, -(-value // step) * step
    return f"{low} and {high} are the nearest that work" if low else f"{high} is the smallest that works"


def divisors_near(value: int, whole: int) -> str:
    """The divisors of `whole` on both sides of `value`, in words."""
    low = max(n for n in range(1, min(value, whole) + 1) if whole % n == 0)
    high = next((n for n in range(value, whole + 1) if whole % n == 0), None)
    return f"{low} and {high} are the nearest that work" if high else f"{low} is the largest that works"


def stack_names_blocks(recipe: Recipe, origins: Origins) -> Iterator[ForgeError]:
    model, used = recipe.model, set()
    for item in model.stack:
        try:
            names = expand(item)
        except RecipeError as error:
            yield broken(RecipeError, origins, "model.stack", error.what, error.fix)
            names = tuple(name for name in model.blocks if name in item)
        for name in dict.fromkeys(names):
            if name not in model.blocks:
                what = f"no block is called {name!r}"
                several = set(name.split()) <= model.blocks.keys()
                fix = f"write '({name})' for one after another" if several else suggest(name, model.blocks)
                yield broken(RecipeError, origins, "model.stack", what, fix)
            used |= {name, *name.split()}
    if model.mtp is not None:
        used.add(model.mtp.block)
    if not model.stack:
        fix = f"write [{next(iter(model.blocks), 'block')} x 12]"
        yield broken(RecipeError, origins, "model.stack", "a model needs at least one layer", fix)
    for name in model.blocks if model.stack else ():
        if name not in used:
            fix = f"add it to the stack, or write {name}: null to leave it out"
            yield broken(RecipeError, origins, f"model.blocks.{name}", "this block is not in model.stack", fix)


def further_tokens_are_there(recipe: Recipe, origins: Origins) -> Iterator[ForgeError]:
    model, length = recipe.model, recipe.train.seq_len
    if model.mtp is None:
        return
    if model.mtp.block not in model.blocks:
        what = f"no block is called {model.mtp.block!r}"
        yield broken(RecipeError, origins, "model.mtp.block", what, suggest(model.mtp.block, model.blocks))
    if model.mtp.depth >= length:
        what = f"no position has a token {model.mtp.depth} places ahead in sequences of train.seq_len={length}"
        yield broken(RecipeError, origins, "model.mtp.depth", what, f"at most {length - 1}; DeepSeek-V3 takes 1")


def batch_fits_ranks(recipe: Recipe, origins: Origins) -> Iterator[ForgeError]:
    total, ranks, micro = recipe.train.sequences, recipe.parallel.data_ranks, recipe.train.micro_batch
    if total % ranks:
        what = f"{total} sequences cannot be shared evenly by {ranks} data ranks ({_data_axes(recipe.parallel)})"
        yield broken(LayoutError, origins, "train.sequences", what, nearest(total, ranks))
    elif micro and total // ranks % micro:
        share = total // ranks
        what = f"a data rank's share of {share} sequences ({total} over {ranks} ranks) cannot be cut into {micro}s"
        yield broken(RecipeError, origins, "train.micro_batch", what, divisors_near(micro, share))


def batch_warmup_reaches_the_batch(recipe: Recipe, origins: Origins) -> Iterator[ForgeError]:
    train, ranks = recipe.train, recipe.parallel.data_ranks
    warmup = train.batch_warmup
    if warmup is None:
        return
    quantum = ranks * (train.micro_batch or 1)
    for name in ("start", "increment"):
        count = getattr(warmup, name)
        if count % quantum:
            what = f"{count} is not a multiple of {quantum} ({ranks} data ranks x micro_batch {train.micro_batch or 1})"
            yield broken(LayoutError, origins, f"train.batch_warmup.{name}", what, nearest(count, quantum))
    if warmup.start > train.sequences:
        what = f"{warmup.start} sequences at the start are more than the full batch of {train.sequences}"
        yield broken(RecipeError, origins, "train.batch_warmup.start", what, f"write at most {train.sequences}")
    elif (train.sequences - warmup.start) % warmup.increment:
        gap = train.sequences - warmup.start
        what = f"steps of {warmup.increment} from {warmup.start} never meet {train.sequences} sequences"
        fix = f"increment must divide {gap}: {divisors_near(warmup.increment, gap)}"
        yield broken(RecipeError, origins, "train.batch_warmup.increment", what, fix)
    if warmup.steps > train.steps:
        what = f"{warmup.steps} steps of batch warm-up are longer than the run of {train.steps}"
        yield broken(RecipeError, origins, "train.batch_warmup.steps", what, f"write at most {train.steps}")


def pools_lie_in_micro_batches(recipe: Recipe, origins: Origins) -> Iterator[ForgeError]:
    """Modules that pool `sequences` rows of the batch must see whole pools at once."""
    train, ranks = recipe.train, recipe.parallel.data_ranks
    sizes = {"train.sequences": train.sequences}
    if train.batch_warmup is not None:
        sizes |= {f"train.batch_warmup.{name}": getattr(train.batch_warmup, name) for name in ("start", "increment")}
    pools = ((path, getattr(config, "sequences", 1)) for path, config in configs(recipe.model, "model"))
    for path, rows in ((path, rows) for path, rows in pools if rows > 1):
        if train.micro_batch and train.micro_batch % rows:
            what = f"pools of {rows} sequences do not fill micro-batches of train.micro_batch={train.micro_batch}"
            fix = f"a pool must divide it: {divisors_near(rows, train.micro_batch)}"
            yield broken(RecipeError, origins, f"{path}.sequences", what, fix)
        for name, count in sizes.items() if not train.micro_batch else ():
            if count % (ranks * rows):
                what = (
                    f"pools of {rows} sequences do not fill the share of each of {ranks} data ranks of {name}={count}"
                )
                yield broken(RecipeError, origins, f"{path}.sequences", what, f"{name}: {nearest(count, ranks * rows)}")


def sequence_fits_tp(recipe: Recipe, origins: Origins) -> Iterator[ForgeError]:
    length, tp = recipe.train.seq_len, recipe.parallel.tp
    if length % tp and recipe.parallel.cp == 1:
        what = f"{length} tokens cannot be split {tp} ways over tp"
        yield broken(LayoutError, origins, "train.seq_len", what, nearest(length, tp))


def sequence_fits_cp(recipe: Recipe, origins: Origins) -> Iterator[ForgeError]:
    length, cp, tp = recipe.train.seq_len, recipe.parallel.cp, recipe.parallel.tp
    quantum = math.lcm(2 * cp, cp * tp)
    if cp > 1 and length % quantum:
        what = f"{length} tokens cannot be cut into 2 x {cp} chunks over cp"
        what += f", with the two chunks of each rank split {tp} ways over tp" if tp > 1 else ""
        yield broken(LayoutError, origins, "train.seq_len", what, nearest(length, quantum))


def vocabulary_fits_tp(recipe: Recipe, origins: Origins) -> Iterator[ForgeError]:
    vocab, tp = recipe.model.vocab, recipe.parallel.tp
    if vocab % tp:
        what = f"{vocab} rows cannot be split {tp} ways over tp"
        fix = f"vocab={-(-vocab // tp) * tp} works; rows beyond the tokenizer are never a target"
        yield broken(LayoutError, origins, "model.vocab", what, fix)


def vocabulary_holds_tokenizer(recipe: Recipe, origins: Origins) -> Iterator[ForgeError]:
    build, vocab = recipe.data.build, recipe.model.vocab
    if build is not None and build.tokenizer.path is None and build.tokenizer.vocab > vocab:
        what = f"{vocab} rows are fewer than the {build.tokenizer.vocab} tokens of data.build.tokenizer"
        yield broken(RecipeError, origins, "model.vocab", what, f"write at least {build.tokenizer.vocab}")


def sources_share_one_way(recipe: Recipe, origins: Origins) -> Iterator[ForgeError]:
    sources = recipe.data.sources
    if not sources:
        yield broken(RecipeError, origins, "data.sources", "there is no corpus", "write [{path: FOLDER}]")
    both = [n for n, source in enumerate(sources) if source.weight is not None and source.epochs is not None]
    for n in both:
        what = f"weight={sources[n].weight} and epochs={sources[n].epochs} both say how often this source comes"
        yield broken(RecipeError, origins, f"data.sources.{n}", what, "keep one of them")
    ways = {("weight", s.weight is not None) if s.epochs is None else ("epochs", True) for s in sources}
    if len(ways) > 1 and not both:
        given = [f"{n}: {_share(source)}" for n, source in enumerate(sources)]
        what = f"sources must all have a weight, all have epochs, or all have neither; here {', '.join(given)}"
        yield broken(RecipeError, origins, "data.sources", what, "give every source a weight")


def precision_is_ordered(recipe: Recipe, origins: Origins) -> Iterator[ForgeError]:
    types, cause = recipe.precision, "precision.compute"
    if WIDTHS[types.master] < WIDTHS[types.compute]:
        what = f"{types.master} weights cannot feed {types.compute} compute"
        yield broken(RecipeError, origins, "precision.master", what, f"write master: {types.compute}", cause)
    if WIDTHS[types.reduce] < WIDTHS[types.compute]:
        what = f"gradients of {types.compute} would be summed in {types.reduce}"
        yield broken(RecipeError, origins, "precision.reduce", what, f"write reduce: {types.compute}", cause)


def kept_checkpoints_are_saved(recipe: Recipe, origins: Origins) -> Iterator[ForgeError]:
    every, kept = recipe.checkpoint.every, recipe.checkpoint.keep_every
    if every and kept and kept % every:
        what = f"checkpoints come every {every} steps, so not every {kept}"
        yield broken(RecipeError, origins, "checkpoint.keep_every", what, nearest(kept, every))


def warmup_ends_inside_the_run(recipe: Recipe, origins: Origins) -> Iterator[ForgeError]:
    warmup = getattr(recipe.schedule, "warmup", None)
    if isinstance(warmup, int) and warmup > recipe.train.steps:
        what = f"{warmup} steps of warm-up are longer than the run of {recipe.train.steps}"
        yield broken(RecipeError, origins, "schedule.warmup", what, f"write at most {recipe.train.steps}")


def kinds_support_axes(recipe: Recipe, origins: Origins) -> Iterator[ForgeError]:
    layout = recipe.parallel
    for axis in CLAIMED:
        degree = layout.degree(axis)
        degrees: dict[str, Any] = {"dp_shard": layout.dp_shard * degree, axis: 1}
        works = dataclasses.replace(layout, **degrees)
        for path, config in configs(recipe.model, "model") if degree > 1 else ():
            if axis not in getattr(config, "supports", CLAIMED):
                what = f"{kind_of(config) or type(config).__name__} does not work over {axis}={degree}"
                fix = f"{axis}=1 keeps the same {layout.world_size} ranks with dp_shard={works.dp_shard} ({works})"
                yield broken(LayoutError, origins, path, what, fix)


RULES: tuple[Rule, ...] = (
    stack_names_blocks,
    further_tokens_are_there,
    batch_fits_ranks,
    batch_warmup_reaches_the_batch,
    pools_lie_in_micro_batches,
    sequence_fits_tp,
    sequence_fits_cp,
    vocabulary_fits_tp,
    vocabulary_holds_tokenizer,
    sources_share_one_way,
    precision_is_ordered,
    kept_checkpoints_are_saved,
    warmup_ends_inside_the_run,
    kinds_support_axes,
)


def configs(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every config inside `value`, itself included, with its dotted path."""
    if dataclasses.is_dataclass(value):
        yield path, value
        for field in dataclasses.fields(value):
            yield from configs(getattr(value, field.name), join(path, field.name))
    elif isinstance(value, (Mapping, tuple)):
        for name, child in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from configs(child, join(path, name))


def _data_axes(layout: Layout) -> str:
    return f"dp_replicate {layout.dp_replicate} x dp_shard {layout.dp_shard}"


def _share(source: Any) -> str:
    if source.epochs is not None:
        return f"epochs={source.epochs}"
    return "neither" if source.weight is None else f"weight={source.weight}"
