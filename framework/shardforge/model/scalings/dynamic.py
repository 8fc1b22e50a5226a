"""Dynamic NTK interpolation: the base grows with the sequence, and not at all up to the length of the first training.

Paper: Peng et al. 2023, "YaRN", arXiv:2309.00071, "dynamic scaling" (first described by emozilla, 2023).
Changes: base * (factor * t/l - (factor - 1))^(w/(w-2)) in place of base, for w turning channels, sequences of t tokens
    and l = original_length, where t > l.
Cost: nothing.
Limits: at least 4 turning channels. t counts the whole sequence, with all documents and padding in it, so beyond
    `original_length` a document alone gets other rates than the same document in a longer row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import rope_scalings
from shardforge.model.scaling import Scaling, frequencies, stretched


@rope_scalings.register("dynamic")
@dataclass(frozen=True, kw_only=True)
class DynamicScaling(Scaling):
    factor: float = option(REQUIRED, "how steeply the base grows; 1 makes t/l the stretch", at_least=1)
    original_length: int = option(REQUIRED, "length of the first training", unit="tokens", at_least=1)

    def rates(self, base: float, width: int, length: int, device: torch.device | None = None) -> Tensor:
        longer = max(length, self.original_length) / self.original_length
        return frequencies(stretched(base, width, self.factor * longer - (self.factor - 1)), width, device)
