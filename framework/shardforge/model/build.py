"""A recipe's model section to a Decoder on the meta device: shapes and meanings, no numbers yet."""

from __future__ import annotations

import torch
from torch import nn

from shardforge.model.decoder import Decoder
from shardforge.recipe.model import ModelConfig


def build(cfg: ModelConfig, objective: nn.Module, dtype: torch.dtype = torch.float32) -> Decoder:
    """The whole model without storage; `nn.init.fill` gives it numbers once a device is chosen."""
    with torch.device("meta"):
        model = Decoder(cfg, objective)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)  # what modules remember keeps its type
    return model
