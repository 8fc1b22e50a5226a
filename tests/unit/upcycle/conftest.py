from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.upcycle import dense


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained dense run of two layers, with moments."""
    return dense.save(tmp_path_factory.mktemp("dense") / "run", trained=True)
