"""The proof that a conversion computes what its source computes.

Both sides go through our own forward pass, all that the target has is compared with the source's, and where one of
the two is a Hugging Face folder that fits into memory `transformers` computes it as well: an implementation that knows
nothing of our names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shardforge.checkpoint.tensorfile import TYPES
from shardforge.convert.distance import EXACT, TOLERANCES, Layer, Tolerance
from shardforge.convert.independent import Theirs, computed, obstacle
from shardforge.convert.lockstep import LOGITS, Lockstep, Seen, Side, Track
from shardforge.convert.moments import compared
from shardforge.core.errors import CheckpointError, ForgeError, Problems
from shardforge.families.open import open_source
from shardforge.families.section import apart
from shardforge.families.source import Source
from shardforge.families.streamed import Streamed
from shardforge.families.turned import turned

How = Literal["auto", "transformers", "own", "none"]
LENGTH = 160
"""Tokens that are computed: more than gpt-oss's window of 128, and less than costs anything beside reading weights."""
SHOWN = 8


@dataclass(frozen=True)
class Comparison:
    what: str  # "our forward of the target against our forward of the source"
    max_abs: float  # of the logits
    cosine: float  # of the logits
    error: float  # the largest of any layer: see `distance.Layer`
    tolerance: float  # of `error`; 0.0 is bit for bit
    why: str  # this tolerance
    layers: tuple[Layer, ...] = ()  # all places, on request


@dataclass(frozen=True)
class Proof:
    """Plain data for the certificate; the last of `comparisons` is by the most independent implementation."""

    method: Literal["transformers", "own", "none"]
    why: str  # the method
    tokens: tuple[int, ...] = ()  # the ids of the one sequence that was computed
    weights: int = 0  # that were compared with the source's, bit for bit after the cast that was asked for
    comparisons: tuple[Comparison, ...] = ()
    moments: int = 0  # tensors of the optimizer that were compared

    @property
    def passed(self) -> bool:
        """False: nothing was proved. A proof that fails raises instead."""
        return self.method != "none"

    def plain(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def prove(
    source: Path,
    target: Path,
    *,
    how: How,
    cast: bool,
    bisect: bool,
    kinds: Collection[str] = (),
    opener: Callable[[Path], Source] = open_source,
    seen: Seen | None = None,
) -> Proof:
    """Compute both and compare them after every layer and at the end; of the model one block is in memory at a time.

    `source` and `target` are what `families.open.open_source` opens, or `opener` of the source. `cast`: weights may
    have another number type than in the source. `bisect`: the comparisons list every layer. `kinds`: what the optimizer
    kept and the target must have. `seen` is told how far it is. Problems when the target is not what the source is:
    fields of the model, weights, moments, and the first layer that leaves tolerance. CheckpointError when `how` asks
    for what cannot be done.
    """
    if how == "none":
        return Proof("none", "--proof none was asked for")
    a, b = opener(source), open_source(target)
    b = turned(b, a.model)
    tokens = ids(a, b)
    wide = any(info.dtype == "float64" for info in (*a.names.values(), *b.names.values()))
    mine, yours = (Streamed(each, tokens, torch.float64 if wide else torch.float32) for each in (a, b))
    fields = list(_fields(a, b))
    if unlike := list(_unlike(mine, yours)):
        raise Problems([*fields, *unlike], f"the proof of {target}")
    theirs, side, why = _independent(how, a, b, tokens)
    steps = Lockstep(mine, yours, Track("our forward of the target against that of the source", _cast(a, b)), cast=cast)
    if theirs is not None:
        if theirs.unread:
            why += (
                f"; it does not read {len(theirs.unread)} tensors, {theirs.unread[0]} first: those are compared by us"
            )
        steps.beside(theirs, side, Track(f"our forward of the {side} against {theirs.name}", TOLERANCES["float32"]))
    steps.run(seen)
    moments, unlike_moments = compared(a, b, kinds)
    if problems := [*fields, *_wrong(steps, bisect), *_few(unlike_moments, "the optimizer")]:
        raise Problems(problems, f"the proof of {target}")
    found = tuple(_comparison(track, bisect) for track in (steps.own, steps.other) if track is not None)
    method: Literal["own", "transformers"] = "own" if theirs is None else "transformers"
    return Proof(method, why, tuple(tokens[0].tolist()), steps.weights, found, moments)


def lines(proof: Mapping[str, Any], layers: bool = True) -> Iterator[str]:
    """What `Proof.plain` gives, for people; with the layers where they are listed and wanted."""
    if not proof["passed"]:
        yield f"not proved: {proof['why']}"
        return
    yield f"proved with {proof['method']}: {proof['why']}"
    moments = f", {proof['moments']} tensors of the optimizer too" if proof.get("moments") else ""
    yield f"  {proof['weights']} weights equal the source's{moments}; {len(proof['tokens'])} tokens computed"
    for each in proof["comparisons"]:
        limit = f"at most {each['error']:.2g} in a layer, {each['tolerance']:g} allowed"
        exact = "bit for bit" if not each["tolerance"] else f"relative error {limit}"
        yield f"  {each['what']}: logits max-abs {each['max_abs']:.3g}, cosine {each['cosine']:.6f}; {exact}"
        yield from (f"    {line}" for line in _table(each["layers"]) if layers)


def lacks(proof: Mapping[str, Any], how: How, bisect: bool) -> bool:
    """Whether what was proved, as `Proof.plain` gives it, is less than what is asked for."""
    if how == "none":
        return False
    less = how == "transformers" and proof["method"] != how
    return not proof["passed"] or less or (bisect and not any(each["layers"] for each in proof["comparisons"]))


def foresee(source: Source, how: How) -> None:
    """CheckpointError when there is not the memory to prove a conversion of `source`; to be asked before it begins."""
    if how == "none":
        return
    try:
        Streamed(source, ids(source))
    except CheckpointError as cause:
        what = f"the conversion could not be proved: {cause.what}"
        raise CheckpointError(
            what, cause.where, "use a machine with more memory, or convert with --proof none"
        ) from cause


def ids(*sources: Source) -> Tensor:
    """One sequence [1, s] of token ids, the same for every call: spread over the vocabulary, no two near neighbours."""
    limits = [source.beside.length for source in sources]
    limits += [source.model["embedding"].get("length") for source in sources]
    length = min([LENGTH, *(limit for limit in limits if limit)])
    vocab = min(int(source.model["vocab"]) for source in sources)
    return torch.tensor([[(at * 0x9E3779B1 % 2**32) * vocab >> 32 for at in range(1, length + 1)]])


def _independent(how: How, a: Source, b: Source, tokens: Tensor) -> tuple[Theirs | None, Side, str]:
    """What transformers makes of one side, which one, and why; None where it is not wanted or not possible."""
    if how == "own":
        return None, "target", "--proof own was asked for"
    reasons = [_obstacle("target", b), _obstacle("source", a)]
    if not reasons[0]:
        return computed(b.path, tokens), "target", "transformers has this model, and memory holds it"
    if not reasons[1]:
        try:
            why = f"transformers has the source's model, and memory holds it; {reasons[0]}"
            return computed(a.path, tokens), "source", why
        except CheckpointError as cause:  # somebody else's folder; our conversion may be right all the same
            reasons[1] = cause.what
    if how == "transformers":
        raise CheckpointError(f"--proof transformers is not possible: {_both(reasons)}", b.path, "--proof own")
    return None, "target", _both(reasons)


def _obstacle(side: Side, source: Source) -> str:
    return f"the {side}: {reason}" if (reason := obstacle(source)) else ""


def _both(reasons: list[str]) -> str:
    return "; ".join(dict.fromkeys(reasons))


def _fields(a: Source, b: Source) -> Iterator[ForgeError]:
    for name, here, there in apart(a.model, b.model):
        yield CheckpointError(f"{name} is {there!r} here and {here!r} in the source", "the model")


def _unlike(a: Streamed, b: Streamed) -> Iterator[ForgeError]:
    """Weights that one side alone has, or in another shape. What a model remembers besides may be left behind."""
    learned = {name for name, _ in a.model.named_parameters()}
    told = []
    for name in dict.fromkeys([*a.weights, *b.weights]):
        here, there = b.weights.get(name), a.weights.get(name)
        if here != there and (here is not None or name in learned):
            told.append(f"{name} is {_shape(here)} here and {_shape(there)} in the source")
    yield from _few(told)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _cast(a: Source, b: Source) -> Tolerance:
    """How far our forward of the target may be from that of the source."""
    coarser = []
    for name in b.names.keys() & a.names.keys():
        was, now = (TYPES[source.names[name].dtype][0] for source in (a, b))
        if torch.promote_types(was, now) != now:
            coarser.append(TOLERANCES[b.names[name].dtype])
    return max(coarser, key=lambda tolerance: tolerance.error, default=EXACT)


def _table(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for layer in layers:
        numbers = f"max-abs {layer['max_abs']:<9.3g} cosine {layer['cosine']:<9.6f} relative error {layer['error']:.2g}"
        yield f"{layer['name']:<12} {numbers}"


def _wrong(steps: Lockstep, bisect: bool) -> Iterator[ForgeError]:
    yield from _few(steps.unequal)
    for track in (steps.own, steps.other):
        if track is None or track.first is None:
            continue
        layer, allowed = track.first, track.tolerance
        layers = (
            "".join(f"\n      {line}" for line in _table([asdict(each) for each in track.layers])) if bisect else ""
        )
        yield CheckpointError(
            f"{layer.name} is the first that leaves tolerance, {track.what}: relative error {layer.error:.2g}, "
            f"{allowed.error:g} allowed ({allowed.why}); from the tokens on max-abs {layer.max_abs:.3g}, "
            f"cosine {layer.cosine:.6f}{layers}",
            "the forward pass",
        )


def _few(lines: list[str], where: str = "the weights") -> Iterator[ForgeError]:
    for line in lines[:SHOWN]:
        yield CheckpointError(line, where)
    if len(lines) > SHOWN:
        yield CheckpointError(f"and {len(lines) - SHOWN} more", where)


def _comparison(track: Track, bisect: bool) -> Comparison:
    (logits,) = (layer for layer in track.layers if layer.name == LOGITS)
    worst = max(layer.error for layer in track.layers)
    told, allowed = tuple(track.layers) if bisect else (), track.tolerance
    return Comparison(track.what, logits.max_abs, logits.cosine, worst, allowed.error, allowed.why, told)
