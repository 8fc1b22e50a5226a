"""FLOP of a model, from the weights it declares and the pairs its mixers score. No second formula per variant."""

from __future__ import annotations

from torch import nn

from shardforge.core.dims import role
from shardforge.nn.head import Head
from shardforge.nn.linear import Linear
from shardforge.nn.module import Declared, declared, tagged


def weights(model: nn.Module) -> int:
    """Numbers in all weights, over all ranks; tied weights once."""
    return sum(item.count for item in declared(model))


def matmul_weights(model: nn.Module) -> int:
    """Weights that meet a token in a matrix product: matrices, of experts those of the chosen ones, and the head's
    table even when it is tied.

    As published counts do, it leaves out routers (`router_weights`) and modules that predict further tokens than the
    next one: DeepSeek-AI 2025, "Insights into DeepSeek-V3", arXiv:2505.09343, table 2, counts 250 GFLOP a token for
    DeepSeek-V3 in this way.
    """
    apart = further(model)
    mine = [item for item in declared(model) if item.module not in apart]
    inside = sum(
        item.count for item in mine if isinstance(item.module, Linear) and _is_matrix(item) and not routes(item)
    )
    experts = (module for module in tagged(model, "experts") if module not in apart)
    inside += sum(_met(item, module.chosen) for module in experts for item in declared(module))
    return inside + sum(_head_size(head, model) for head in tagged(model, "head"))


def router_weights(model: nn.Module) -> int:
    """Weights of the products that choose experts."""
    apart = further(model)
    return sum(i.count for i in declared(model) if i.module not in apart and routes(i) and _is_matrix(i))


def forward_flops(model: nn.Module, length: int, *, masked: bool = True) -> float:
    """FLOP of one forward pass over one sequence of `length` tokens that is a single document.

    `masked` counts only the pairs that a mask shows; otherwise all length^2, as a dense kernel computes them.
    """
    total = 2.0 * matmul_weights(model) * length
    apart = further(model)
    for mixer in tagged(model, "mixer"):
        if mixer not in apart:
            pairs = mixer.core.mask.keys(length) if masked else length * length
            total += mixer.core_flops(pairs)
    return total


def step_flops(model: nn.Module, length: int) -> float:
    """FLOP of forward and backward per sequence: the backward pass of each product is two products."""
    return 3.0 * forward_flops(model, length)


def further(model: nn.Module) -> set[nn.Module]:
    """The modules inside `model` that predict tokens behind the next one."""
    return {inner for module in tagged(model, "mtp") if module is not model for inner in module.modules()}


def routes(item: Declared) -> bool:
    """Whether a weight makes the logits of a router."""
    return any(dim.name == "router" for dim in item.dims)


def _is_matrix(item: Declared) -> bool:
    return item.name == "weight" and role(item.dims) == "matrix"


def _met(item: Declared, chosen: int) -> int:
    """Of a weight over experts, what the `chosen` of one token hold; vectors meet no product."""
    experts, *rest = item.dims
    return item.count // experts.size * chosen if role(tuple(rest)) == "matrix" else 0


def _head_size(head: nn.Module, model: nn.Module) -> int:
    assert isinstance(head, Head)
    shape = head.operand().shape
    return shape[0] * shape[1]
