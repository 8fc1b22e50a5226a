"""Each position sees itself and the `size - 1` positions before it in its document.

Paper: Beltagy, Peters, Cohan 2020, "Longformer", arXiv:2004.05150, section 3.1, in its causal form.
Changes: query position - size < key position <= query position: exactly `size` keys, the position itself included.
Cost: `size` keys a position instead of half of the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import masks


@masks.register("window")
@dataclass(frozen=True, kw_only=True)
class Window:
    size: int = option(REQUIRED, "keys seen, the position itself included", unit="tokens", at_least=1)

    @property
    def window(self) -> int:
        return self.size

    def visible(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (q_pos >= k_pos) & (q_pos - k_pos < self.size)

    def keys(self, length: int) -> int:
        ramp = min(self.size, length)
        return ramp * (ramp + 1) // 2 + (length - ramp) * self.size
