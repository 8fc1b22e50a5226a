"""What is asked of a dense source before anything is written: does it hold the model that it says it holds?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from math import prod

from shardforge.checkpoint.index import shorten
from shardforge.core.errors import CheckpointError, ForgeError
from shardforge.families.source import Source
from shardforge.upcycle.target import config, weights

SAMPLED_NUMBERS = 1 << 20


def mismatches(source: Source, where: str) -> Iterator[ForgeError]:
    """One error with every weight that the source's own recipe asks for and that is not there as it should be."""
    expected, buffers = weights(config(source.model, where))
    lines = []
    for name in sorted(expected.keys() | source.names.keys()):
        found, wanted = source.names.get(name), expected.get(name)
        was = "absent" if found is None else str(list(found.shape))
        now = "absent" if wanted is None else str(wanted["shape"])
        if was != now and not (found is None and name in buffers):
            lines.append(f"{name}: {was} in the files, {now} by its configuration")
    if lines:
        yield CheckpointError(
            f"{len(lines)} weights do not match the configuration of the source:\n{shorten(lines)}",
            where,
            "repair the configuration, or name the folder that these weights belong to",
        )


def fingerprint(source: Source) -> str:
    """16 hex digits of the model, the shapes and types of all weights, and the numbers of the smallest ones.

    A training step changes every weight, so other weights of the same shapes have another fingerprint.
    """
    digest = hashlib.sha256(json.dumps(source.model, sort_keys=True).encode())
    sizes = sorted((prod(info.shape), name) for name, info in source.names.items())
    for _, name in sizes:
        digest.update(f"{name} {source.names[name]}".encode())
    left = SAMPLED_NUMBERS
    for place, (size, name) in enumerate(sizes):
        if place and size > left:
            break
        left -= size
        digest.update(source.read(name).double().numpy().tobytes())
    return digest.hexdigest()[:16]
