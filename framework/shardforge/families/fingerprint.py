"""A short name for the numbers of a source, without reading all of them."""

from __future__ import annotations

import hashlib
import json
from math import prod

from shardforge.families.source import Source

SAMPLED_NUMBERS = 1 << 20


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
