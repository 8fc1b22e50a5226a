"""What is asked of a dense source before anything is written: does it hold the model that it says it holds?"""

from __future__ import annotations

from collections.abc import Iterator

from shardforge.checkpoint.index import shorten
from shardforge.core.errors import CheckpointError, ForgeError
from shardforge.families.source import Source
from shardforge.upcycle.target import config, weights


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
