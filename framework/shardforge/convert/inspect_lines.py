"""An inspection for people: lines and tables; and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from math import prod
from typing import Any

from shardforge.convert.inspect import Inspection, bytes_of
from shardforge.convert.inspect_numbers import Comparison, Numbers
from shardforge.core.units import bytes_, count
from shardforge.families.section import apart as fields_apart
from shardforge.plan.schedule import columns

COUNTED = ("tensors", "numbers", "bytes")


def summary(found: Inspection) -> Iterator[str]:
    """What it is, a fact a line."""
    opened, laid = found.opened, found.laid
    told = ", ".join(each for each in (opened.title, laid.program) if each)
    yield f"{opened.path}: {told}"
    ranks = f"written by {laid.ranks} rank{'s' * (laid.ranks != 1)}" if laid.ranks else ""
    layout = f"layout {found.layout}" if found.layout else ""
    files = f"{len(laid.files)} file{'s' * (len(laid.files) != 1)}, {bytes_(laid.bytes)}"
    yield "  " + ", ".join(each for each in (files, ranks, layout) if each)
    yield from (f"  {note}" for note in laid.notes)
    yield from (f"  {line}" for line in _beside(found))
    for dtype, (tensors, numbers, size) in found.types.items():
        yield f"  {dtype}: {tensors} tensors, {count(numbers)} numbers, {bytes_(size)}"
    yield from _model(found)
    if (where := opened.path / "conversion.json").is_file() or (where := opened.path.parent / where.name).is_file():
        yield f"  made by a conversion: `shardforge convert --check {where.parent}` verifies it"
    for line in found.beside.unread:
        yield f"  not read: {line}"
    for line in found.problems:
        yield f"  problem: {line}"


def _beside(found: Inspection) -> Iterator[str]:
    source, beside = found.opened.source, found.beside
    if beside.step is not None:
        yield f"step {beside.step}"
    if source and (source.moments or source.counts):
        yield f"optimizer: {', '.join((*source.moments, *source.counts))} of the weights"
    if beside.extra:
        yield f"state of the run: {', '.join(beside.extra)}"
    names = sorted(file.name for file in beside.tokenizer)
    if names:
        yield f"tokenizer: {', '.join(names)}"


def _model(found: Inspection) -> Iterator[str]:
    """Weights by role, and what each kind of block is."""
    model, counts = found.model, found.counts
    if model is None or counts is None:
        return
    length = f", sequences of {found.beside.length} tokens" if found.beside.length else ""
    layers = sum(each.layers for each in counts.blocks)
    yield f"  model: {layers} layers, hidden {model['hidden']}, vocab {model['vocab']}{length}"
    roles = {
        "embedding": counts.embedding,
        "head": counts.head,
        "mixers": sum(each.layers * each.mixer for each in counts.blocks),
        "ffns": sum(each.layers * each.ffn for each in counts.blocks),
        "mtp": counts.mtp_total,
    }
    roles["rest"] = counts.total + counts.mtp_total - sum(roles.values())
    routers = f"; {counts.routers:,} of the ffns' are routers'" if counts.routers else ""
    yield (
        f"  weights: {counts.total + counts.mtp_total:,}, a token meets {counts.active:,}; "
        + ", ".join(f"{role} {number:,}" for role, number in roles.items() if number)
        + routers
    )
    rows: list[Sequence[str]] = [("block", "layers", "mixer", "ffn", "weights", "active", "which")]
    for each in counts.blocks:
        block = model["blocks"][each.name]
        kinds = block["mixer"]["kind"], block["ffn"]["kind"]
        rows.append((each.name, str(each.layers), *kinds, f"{each.total:,}", f"{each.active:,}", each.stands))
    yield from (f"  {line}" for line in columns(rows))


def tensors(found: Inspection, most: int | None) -> Iterator[str]:
    """Every tensor with shape, type and bytes."""
    rows = [("tensor", "shape", "type", "bytes")]
    rows += [
        (name, str(list(info.shape)), info.dtype, bytes_(bytes_of(info)))
        for name, info in islice(found.opened.names.items(), most)
    ]
    yield from columns(rows)
    yield from _more(len(found.opened.names), most)


def table(found: Mapping[str, Numbers], broken: Mapping[str, str], most: int | None) -> Iterator[str]:
    """Norms and what is not finite; tensors with something wrong first."""
    order = sorted(found.items(), key=lambda each: not (each[1].nan or each[1].infinite))
    rows: list[Sequence[str]] = [("tensor", "norm", "rms", "mean", "largest", "zeros", "nan", "infinite")]
    for name, each in islice(order, most):
        shown = (f"{value:.6g}" for value in (each.norm, each.rms, each.mean, each.largest))
        rows.append((name, *shown, str(each.zeros), str(each.nan), str(each.infinite)))
    yield from columns(rows)
    yield from _more(len(order), most)
    yield from (f"problem: {name}: {why}" for name, why in broken.items())
    bad = sum(each.nan + each.infinite for each in found.values())
    places = sum(bool(each.nan + each.infinite) for each in found.values())
    norm = math.sqrt(sum(each.norm**2 for each in found.values()))
    odd = f"{bad} numbers in {places} tensors are not finite" if bad else "all numbers are finite"
    yield f"{len(found)} tensors, norm of all {norm:.8g}; {odd}"


def differences(one: Inspection, other: Inspection, found: Comparison, most: int | None) -> Iterator[str]:
    """Two checkpoints, the largest difference first."""
    yield f"{one.opened.path} against {other.opened.path}"
    if one.model is not None and other.model is not None:
        for field, left, right in fields_apart(one.model, other.model):
            yield f"  model: {field}: {left!r} here, {right!r} there"
    for name in (*found.missing, *found.extra):
        yield f"  {name}: only {'here' if name in found.missing else 'there'}"
    for name, (left, right) in found.shapes.items():
        yield f"  {name}: {list(left)} here, {list(right)} there"
    for (left, right), names in _pairs(found.types).items():
        yield f"  {len(names)} tensors are {left} here and {right} there: {', '.join(names[:3])}"
    yield from (f"  problem: {name}: {why}" for name, why in found.broken.items())
    differing = {name: each for name, each in found.tensors.items() if each.unequal}
    if differing:
        rows = [("tensor", "largest", "relative", "cosine", "unequal", "of")]
        for name, each in islice(differing.items(), most):
            shown = f"{each.largest:.3e}", f"{each.relative:.3e}", f"{each.cosine:.9f}"
            rows.append((name, *shown, str(each.unequal), str(each.count)))
        yield from columns(rows)
        yield from _more(len(differing), most)
    yield f"{len(found.tensors)} tensors compared, {len(differing)} differ" + (
        "" if differing else ": equal bit for bit"
    )


def _pairs(kinds: Mapping[str, tuple[str, str]]) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for name, pair in kinds.items():
        found.setdefault(pair, []).append(name)
    return found


def _more(total: int, most: int | None) -> Iterable[str]:
    return [f"and {total - most} more; --all shows them"] if most is not None and total > most else []


def as_json(found: Inspection) -> dict[str, Any]:
    opened, laid, source = found.opened, found.laid, found.opened.source
    return {
        "path": str(opened.path),
        "kind": opened.kind,
        "program": laid.program,
        "named": "shardforge" if source else "as in the files",
        "step": found.beside.step,
        "ranks": laid.ranks,
        "layout": found.layout or None,
        "files": dict(laid.files),
        "notes": list(laid.notes),
        "model": found.model,
        "weights": found.counts.as_dict() if found.counts else None,
        "types": {
            kind: dict(zip(("tensors", "numbers", "bytes"), each, strict=True)) for kind, each in found.types.items()
        },
        "tensors": {
            name: {"shape": list(info.shape), "dtype": info.dtype, "numbers": prod(info.shape), "bytes": bytes_of(info)}
            for name, info in opened.names.items()
        },
        "optimizer": [*source.moments, *source.counts] if source else [],
        "tokenizer": sorted(file.name for file in found.beside.tokenizer),
        "unread": list(found.beside.unread),
        "problems": list(found.problems),
    }


def numbers_json(found: Mapping[str, Numbers], broken: Mapping[str, str]) -> dict[str, Any]:
    return {name: asdict(each) | {"rms": each.rms} for name, each in found.items()} | {
        name: {"problem": why} for name, why in broken.items()
    }


def differences_json(one: Inspection, other: Inspection, found: Comparison) -> dict[str, Any]:
    fields = fields_apart(one.model, other.model) if one.model is not None and other.model is not None else []
    return {
        "path": str(other.opened.path),
        "same": found.same,
        "model": {field: [left, right] for field, left, right in fields},
        **{key: value for key, value in asdict(found).items() if key != "tensors"},
        "tensors": {name: _finite(asdict(each)) for name, each in found.tensors.items()},
    }


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {key: "infinite" if value == math.inf else value for key, value in record.items()}
