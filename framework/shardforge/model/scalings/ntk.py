"""NTK-aware interpolation: a larger base, so that fast pairs keep their rates and the slowest takes the whole factor.

Paper: Peng et al. 2023, "YaRN", arXiv:2309.00071, section 3 (first described by bloc97, 2023).
Changes: base * factor^(w/(w-2)) in place of base, for w turning channels.
Cost: nothing.
Limits: at least 4 turning channels. Pairs between are stretched by less than `factor`, so a factor somewhat above the
    ratio of lengths works better than the ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import rope_scalings
from shardforge.model.scaling import Scaling, frequencies, stretched


@rope_scalings.register("ntk")
@dataclass(frozen=True, kw_only=True)
class NTKScaling(Scaling):
    factor: float = option(REQUIRED, "how much slower the slowest pair turns", at_least=1)

    def rates(self, base: float, width: int, length: int, device: torch.device | None = None) -> Tensor:
        return frequencies(stretched(base, width, self.factor), width, device)
