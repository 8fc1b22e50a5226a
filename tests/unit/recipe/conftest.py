from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.recipe.stock import stocked


@pytest.fixture(scope="module", autouse=True)
def stock() -> Iterator[None]:
    """Small kinds without torch in every slot."""
    with stocked():
        yield
