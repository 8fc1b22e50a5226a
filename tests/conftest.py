from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings

from tests.ranks import Ranks

torch.set_num_threads(1)
settings.register_profile("shardforge", deadline=None, database=None, derandomize=True)
settings.load_profile("shardforge")
logging.getLogger("torch.distributed").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """ranks(4).run(function, *args): a warm pool of that many gloo processes."""
    pools: dict[int, Ranks] = {}

    def pool(size: int) -> Ranks:
        if size not in pools:
            pools[size] = Ranks(size)
        return pools[size]

    yield pool
    for each in pools.values():
        each.stop()
