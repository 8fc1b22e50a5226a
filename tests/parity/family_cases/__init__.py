"""Tiny random models of every family, as `transformers` makes them. A module here has `CASES`, cases by name.

`tests/parity/test_families.py` takes each of them to ShardForge and back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn


def as_made(model: nn.Module) -> None:
    """Nothing is changed."""


def as_saved(folder: Path) -> None:
    """Nothing is changed."""


@dataclass(frozen=True)
class Case:
    """`config` makes a transformers config whose model AutoModelForCausalLM.from_config can build.

    Every weight of the model is moved away from its start, and so are buffers named e_score_correction_bias. What a
    case needs beyond that stands in `prepare`. `stored` changes the folder that save_pretrained has written into what
    the family releases, where that differs: other names in config.json, more tensors in the file. Tensors that
    `transformers` does not read are compared as they lie in the files; all others in its model too.
    """

    config: Callable[[], Any]
    prepare: Callable[[nn.Module], None] = as_made
    stored: Callable[[Path], None] = as_saved
    tolerance: float = 2e-5  # float32, relative to the norm of the expected tensor
    vocabulary: int = 48  # token ids are below this
    length: int = 19  # tokens of a sequence; longer than a window, so that the window counts
