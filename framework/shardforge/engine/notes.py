"""What the modules of a whole model note beside the loss, and what the experts of a layer came to in a step.

Every rank knows all names and lengths, whatever stages of a pipeline it has, so one sum over all ranks carries them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardforge.observe.experts import ExpertTally

BIAS = "selection_bias"
"""What a router with a bias on the choice calls it among the numbers that it remembers."""

Key = tuple[int, str]
"""(layer, name of a tally)."""


@dataclass(frozen=True)
class Notes:
    """See `Module.records` and `Module.tallies`."""

    records: tuple[str, ...]  # 0-d, added over layers
    tallies: Mapping[Key, int]  # length of each, in order
    biased: tuple[int, ...]  # layers whose router remembers a bias
    counting: bool  # some module wants to know the loads of a step before its backward pass

    @classmethod
    def of(cls, model: nn.Module) -> Notes:
        modules = list(model.modules())
        tallies = {(m.layer, name): length for m in modules for name, length in getattr(m, "tallies", {}).items()}
        return cls(
            tuple(sorted({name for module in modules for name in getattr(module, "records", ())})),
            dict(sorted(tallies.items())),
            tuple(sorted(biased(model))),
            any(getattr(module, "counts_now", False) for module in modules),
        )


def biased(model: nn.Module) -> dict[int, nn.Module]:
    """By layer: the modules that remember a bias on the choice of experts."""
    found = {}
    for module in model.modules():
        for inner in module.modules() if "load" in getattr(module, "tallies", {}) else ():
            if BIAS in inner.__dict__.get("remembered", ()):
                found[module.layer] = inner
    return found


def ranges(notes: Notes, model: nn.Module, device: torch.device) -> Tensor:
    """[2 * layers of notes.biased]: the least and the largest bias of the layers in `model`, float64; 0 of others."""
    here, out = biased(model), torch.zeros(len(notes.biased), 2, dtype=torch.float64, device=device)
    for row, layer in enumerate(notes.biased):
        if layer in here:
            out[row] = torch.stack(getattr(here[layer], BIAS).aminmax())
    return out.flatten()


def loads(tallies: Mapping[Key, Tensor]) -> dict[int, Tensor]:
    """By layer: the tokens that each expert got."""
    return {layer: value for (layer, name), value in tallies.items() if name == "load"}


def experts(notes: Notes, tallies: Mapping[Key, Tensor], ranges: Tensor) -> Iterator[tuple[int, ExpertTally]]:
    """(layer, tally) of sums over all ranks; `ranges` as the function of that name gives them."""
    bounds = dict(zip(notes.biased, ranges.view(-1, 2).tolist(), strict=True))
    for layer, load in loads(tallies).items():
        tokens, entropy, dropped = tallies[layer, "router"].tolist()
        low_high = tuple(bounds[layer]) if layer in bounds else None
        yield layer, ExpertTally(tuple(load.tolist()), tokens, entropy, dropped, low_high)
