"""Fine-grained experts that are slices of the dense ffn, routed so that whole ffns are chosen at first.

Paper: He et al. 2024, "Upcycling Large Language Models into Mixture of Experts", arXiv:2410.07524.
Changes: the dense ffn is cut along its neurons into G = f / f_expert slices, and expert c * G + i is copy c of slice i.
    The router draws one row for each copy and repeats it G times, so the k best experts are k / G whole copies. `scale`
    makes up for what the gates take away.
Cost: nothing.
Limits: G divides f, the experts and k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shardforge.upcycle.method import Draw, Indices, Plain, Shape, methods


@methods.register("virtual_group")
@dataclass(frozen=True, kw_only=True)
class VirtualGroup(Plain):
    scaled = True

    def group(self, dense: int, expert: int) -> int:
        return dense // expert

    def refused(self, dense: int, expert: int, experts: int, k: int) -> Iterator[tuple[str, str, str]]:
        if dense % expert:
            near = [size for size in range(1, dense + 1) if dense % size == 0]
            best = min(near, key=lambda size: abs(size - expert))
            what = f"expert_ffn={expert} does not divide the {dense} neurons of the dense ffn into slices"
            yield "expert_ffn", what, f"take a divisor of {dense}, {best} for example"
            return
        group = dense // expert
        for field, value in (("experts", experts), ("k", k)):
            if value % group:
                what = f"{field}={value} is no multiple of the {group} slices of {expert} neurons that make one ffn"
                up = -(-value // group) * group
                yield field, what, f"{field}: {up}"

    def neurons(self, draw: Draw, shape: Shape) -> Indices | None:
        if shape.expert == shape.dense:
            return None
        assert draw.expert is not None
        first = draw.expert % self.group(shape.dense, shape.expert) * shape.expert
        return np.arange(first, first + shape.expert)
