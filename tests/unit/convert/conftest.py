from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.convert.folders import converted
from tests.unit.upcycle import dense


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of two Llama layers, with moments."""
    return dense.save(tmp_path_factory.mktemp("run") / "run", trained=True)


@pytest.fixture(scope="session")
def published(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a Hugging Face folder of three files with a tokenizer and special tokens."""
    path = tmp_path_factory.mktemp("published") / "hf"
    converted(run, path, shard_bytes=8000)
    table = {f"t{number}": number for number in range(32)}
    (path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": table}}))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"bos_token_id": 1, "eos_token_id": [2, 3]}))
    (path / "conversion.json").unlink()
    return path


@pytest.fixture
def change(published: Path, tmp_path: Path) -> Callable[..., Path]:
    """change(vocab_size=3): a copy of the published folder with another config.json."""

    def make(**settings: Any) -> Path:
        copy = tmp_path / "changed"
        copy.mkdir()
        for file in published.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | settings))
        return copy

    return make
