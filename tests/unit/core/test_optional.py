from __future__ import annotations

import json

import pytest

from shardforge.core.errors import LaunchError
from shardforge.core.optional import installed, require


def test_an_installed_package_is_returned():
    assert require("json", for_="reading", extra="hf") is json


def test_a_missing_package_names_the_feature_the_field_and_the_extra():
    with pytest.raises(LaunchError) as caught:
        require("no_such_package", for_="reading parquet", extra="parquet", field="data.build.inputs")
    assert str(caught.value) == (
        "data.build.inputs  reading parquet needs the package no-such-package, which cannot be imported here "
        "(ModuleNotFoundError: No module named 'no_such_package')\n    fix: pip install 'shardforge[parquet]'"
    )


def test_a_package_that_no_extra_brings_comes_with_its_own_fix():
    with pytest.raises(LaunchError) as caught:
        require("no_such_package", for_="sending", fix="build it")
    assert caught.value.fix == "build it"


@pytest.mark.parametrize(
    ("module", "there"), [("json", True), ("no_such_package", False), ("no_such_package.part", False)]
)
def test_installed_tells_without_importing(module: str, there: bool):
    assert installed(module) is there
