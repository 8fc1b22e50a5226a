"""The language model of a Gemma 3 that sees images too, which all of 4B and more are; what sees them is left behind.

Paper: Gemma Team 2025, "Gemma 3 Technical Report", arXiv:2503.19786, section 2.
Limits: read only. It computes what the whole computes of text without images; the image tower and its projector stay
    where they are, which is told with the source, and what is written is a Gemma 3 for text (`gemma3`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from shardforge.core.errors import CheckpointError
from shardforge.families import decoder, gemma
from shardforge.families.family import Family
from shardforge.families.kinds import gemma3
from shardforge.families.linked import Tensors
from shardforge.families.settings import Settings
from shardforge.families.source import Info

TEXT = "text_config"
IMAGES = ("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index")
USUAL = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}
"""What the released text_config leaves out where it is what the architecture takes."""
PREFIXES = {"language_model.": "", "model.language_model.": "model."}
"""Before the names of the language model, and what stands there in a model for text."""
SEEING = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def model(settings: Settings) -> dict[str, Any]:
    for key in IMAGES:
        settings.get(key)
    told = settings.get(TEXT, {})
    text = settings.changed(USUAL | {key: value for key, value in told.items() if value is not None})
    found = gemma3.model(text)
    text.settle()
    return found


def config(section: dict[str, Any]) -> dict[str, Any]:
    raise CheckpointError("a model section has no images", "model", "write it as a Gemma 3 for text")


def decoded(tensors: Tensors, settings: Settings) -> Tensors:
    """The tensors of the language model, named as in a model for text."""
    settings.unknown(
        ["quantization_config"], "quantised weights are not read; name a folder with the model dequantised"
    )
    return Spoken(tensors, settings)


class Spoken:
    """See `families.linked.Tensors`."""

    def __init__(self, tensors: Tensors, settings: Settings):
        self.path, self._tensors = tensors.path, tensors
        self._real = {_bare(name): name for name in tensors.names if not name.startswith(SEEING)}
        self.names: Mapping[str, Info] = {name: tensors.names[real] for name, real in self._real.items()}
        if seeing := len(tensors.names) - len(self.names):
            settings.note(f"{seeing} tensors of the image tower and its projector: only the language model is read")

    def read(self, name: str) -> Tensor:
        return self._tensors.read(self._real[name])


def _bare(name: str) -> str:
    for prefix, instead in PREFIXES.items():
        if name.startswith(prefix):
            return instead + name.removeprefix(prefix)
    return name


FAMILY = Family(
    architectures=("Gemma3ForConditionalGeneration",),
    model=model,
    config=config,
    table=lambda _: gemma.TABLE,
    tied="lm_head.weight",
    spare=decoder.SPARE,
    decoded=decoded,
)
