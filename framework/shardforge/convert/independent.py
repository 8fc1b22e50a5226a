"""What `transformers` computes of a folder: an implementation that shares nothing with ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardforge.core.errors import CheckpointError
from shardforge.core.optional import installed, require
from shardforge.core.units import bytes_
from shardforge.families.huggingface import CONFIG
from shardforge.families.memory import free
from shardforge.families.source import Source
from shardforge.families.tensorfolder import read_json

SPARE = 1.25
"""Memory that loading takes, in sizes of the model."""


@dataclass(frozen=True)
class Theirs:
    name: str  # "transformers 5.1.0 LlamaForCausalLM"
    streams: tuple[Tensor, ...]  # what each block reads, [1, s, h]
    normed: Tensor  # [1, s, h]
    logits: Tensor  # [1, s, v]
    unread: tuple[str, ...]  # tensors of the folder that it has no place for, like modules that predict further tokens


def obstacle(source: Source) -> str:
    """Why `transformers` cannot compute this source; "" when it can."""
    config = source.path / CONFIG
    if not config.is_file():
        return f"{source.path.name} is no Hugging Face folder"
    if not installed("transformers"):
        return "transformers is not installed"
    settings = read_json(config)
    if "quantization_config" in settings:
        return "transformers needs a GPU for these quantised weights"
    with _quiet():
        if _class(settings) is None:
            return f"transformers has no {' or '.join(settings.get('architectures') or ['architecture'])} of its own"
    size = SPARE * 4 * sum(prod(info.shape) for info in source.names.values())
    if size > (left := free()):
        return f"transformers would take {bytes_(size)} of memory, and {bytes_(left)} are free"
    return ""


@torch.no_grad()
def computed(folder: Path, tokens: Tensor) -> Theirs:
    """What becomes of `tokens` [1, s] in float32. CheckpointError when it does not take every weight as it is.

    Only classes of transformers itself run, no code that lies in the folder.
    """
    with _quiet():
        kind = _class(read_json(folder / CONFIG))
        try:
            model, told = kind.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            if hasattr(model, "set_experts_implementation"):
                model.set_experts_implementation("eager")  # kernels for experts have no odd widths
            out = model.eval()(tokens, output_hidden_states=True, use_cache=False)
        except Exception as cause:  # whatever a foreign program raises of what it does not like
            raise _refused(f"transformers cannot compute it: {type(cause).__name__}: {cause}", folder) from cause
    for problem in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in told[problem]):
            raise _refused(f"transformers says {problem.replace('_', ' ')}: {', '.join(names[:8])}", folder)
    *streams, normed = out.hidden_states
    name = f"transformers {require('transformers', for_='the proof', extra='hf').__version__} {kind.__name__}"
    return Theirs(name, tuple(streams), normed, out.logits, tuple(sorted(told["unexpected_keys"])))


def _refused(what: str, folder: Path) -> CheckpointError:
    return CheckpointError(what, folder, "leave transformers out with --proof own")


def _class(settings: dict[str, Any]) -> Any:
    transformers = require("transformers", for_="the proof", extra="hf")
    for name in settings.get("architectures") or ():
        if (kind := getattr(transformers, name, None)) is not None and hasattr(kind, "from_pretrained"):
            return kind
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Its warnings, logs and bars are not the user's."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()
