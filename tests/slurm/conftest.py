from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.lab import Lab, LabError, missing

REQUIRED = "CI_REQUIRES_SLURM" in os.environ
"""A machine that must not skip these tests."""


def absent(reason: str) -> None:
    if REQUIRED:
        pytest.fail(f"CI_REQUIRES_SLURM is set, and {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One cluster for all tests; a test leaves it with every node idle."""
    lacking = missing()
    if lacking:
        absent(f"Slurm is not here ({', '.join(lacking)}): tools/ci/install_slurm.sh installs it")
    cluster = Lab(tmp_path_factory.mktemp("lab"))
    try:
        cluster.__enter__()
    except LabError as error:
        absent(f"Slurm cannot start here: {error}")
    try:
        yield cluster
    finally:
        cluster.__exit__()
