"""The type of a branch of the residual stream."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Branch = Callable[[Tensor], Tensor]
"""[b, s, h] -> [b, s, h]: a mixer or an ffn, as a residual kind calls it."""
