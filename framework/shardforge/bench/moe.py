"""Time of one mixture-of-experts layer, forward and backward, beside the same layer of other libraries, in one run.

All start from the same weights and see the same tokens, and must agree in the output and in every gradient before
anything is timed. Timed are the router, the way to the experts, their three products, the weighted sum, and the
gradients of all of these with respect to the input and all weights. Layers alternate, so that whatever else the machine
does falls on all.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from shardforge.bench.cost import Cost
from shardforge.bench.peers_moe import Contestant, Pick, Sizes, peers
from shardforge.core.dims import Dim
from shardforge.core.errors import EngineError
from shardforge.model.context import BuildContext
from shardforge.model.ffns.moe import MoEConfig
from shardforge.model.routers.topk import TopKConfig
from shardforge.nn.init import fill
from shardforge.nn.sequence import Sequence, Shares
from shardforge.precision.types import DTYPES
from shardforge.recipe.model import InitConfig

SHAPES = ("2048x1024x256", "4096x512x512")
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest distance of two results, as a share of their size (Frobenius norms)."""
SLOW = 4.0
"""Peers whose first pass takes this many times as long as that of the fastest one are not timed again."""
STEP = 2.0**-4
"""Between neighbouring affinities of a token, all of which are exact in bfloat16."""


def sizes(text: str, experts: int = 64, k: int = 6) -> Sizes:
    """TOKENSxHIDDENxINNER, as in 2048x1024x256."""
    try:
        tokens, hidden, inner = (int(part) for part in text.split("x"))
    except ValueError:
        raise EngineError(f"{text} is not tokens x hidden x inner", "bench moe", f"write it like {SHAPES[0]}") from None
    if min(tokens, hidden, inner, k) < 1 or k > experts or hidden < experts:
        what = (
            f"{text} with experts={experts}, k={k}: all must be at least 1, k at most experts, hidden at least experts"
        )
        raise EngineError(what, "bench moe", f"write it like {SHAPES[0]}")
    return Sizes(tokens, hidden, inner, experts, k)


def ours(shape: Sizes, dtype: torch.dtype) -> Contestant:
    cfg = MoEConfig(experts=shape.experts, k=shape.k, inner=shape.inner, router=TopKConfig())
    module = cfg.build(BuildContext(Dim("hidden", shape.hidden), Dim("vocab", 1), 1, InitConfig())).to(dtype)
    one, t = torch.zeros(1, dtype=torch.int64), shape.tokens
    seq = Sequence(torch.arange(t)[None], one.expand(1, t), one, shares=Shares(t, 1))

    def views(pick: Pick) -> dict[str, Tensor]:
        found = {name: pick(getattr(module.experts, name)) for name in ("gate", "up", "down")}
        return found | {"router": pick(module.router.weight)}

    fill(module, 0)
    return Contestant("ours", module, lambda x: module(x, seq), views)


def inputs(shape: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x and the gradient of the output [1, t, h], and weights.

    The router reads one channel for each expert, in which a token has its own order of distinct affinities: so every
    library chooses the same experts, however it rounds.
    """
    generator = torch.Generator().manual_seed(0)
    t, h, f, e = shape.tokens, shape.hidden, shape.inner, shape.experts

    def normal(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=generator)

    x, grad = normal(1, t, h), normal(1, t, h)
    x[..., :e] = (torch.rand(1, t, e, generator=generator).argsort(-1) - e / 2) * STEP
    router = torch.eye(e, h)
    weights = {"gate": normal(e, h, f), "up": normal(e, h, f), "down": normal(e, f, h)}
    scaled = {name: weight / weight.shape[1] ** 0.5 for name, weight in weights.items()}
    return x.to(dtype), grad.to(dtype), scaled | {"router": router}


def once(layer: Contestant, x: Tensor, grad: Tensor) -> tuple[float, Tensor, Tensor]:
    """Seconds of one pass forward and backward, the output, and the gradient of x."""
    layer.module.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    gc.collect()
    begun = time.perf_counter()
    y = layer.call(x)
    y.backward(grad)
    seconds = time.perf_counter() - begun
    assert x.grad is not None
    return seconds, y.detach(), x.grad


def results(layer: Contestant, x: Tensor, grad: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Seconds of one pass, and all that must agree: views that the next pass of this layer makes anew."""
    seconds, y, dx = once(layer, x, grad)
    return seconds, {"output": y, "x": dx} | layer.gradients()


def agree(mine: dict[str, Tensor], theirs: dict[str, Tensor], limit: float, name: str) -> float:
    """The largest distance of two results, EngineError where it is over `limit`."""
    distances = {key: ((mine[key] - theirs[key]).norm() / mine[key].norm()).item() for key in mine}
    worst = max(distances, key=lambda key: distances[key])
    if not distances[worst] <= limit:
        what = f"{name} differs from ours by {distances[worst]:.1e} in {worst}, more than {limit:.0e}"
        raise EngineError(what, "bench moe", "compare layers that compute the same")
    return distances[worst]


def measure(shape: Sizes, dtype: str, pairs: int, tell: Callable[[str], None], *, more: bool = False) -> Cost:
    """`pairs` timed passes of each, after the one that is compared and another one."""
    kind = DTYPES[dtype]
    x, grad, weights = inputs(shape, kind)
    mine, others = ours(shape, kind), peers(shape, kind, more=more, tell=tell)
    for layer in (mine, *others):
        layer.take(weights)
    del weights
    _, wanted = results(mine, x, grad)
    first: dict[str, float] = {}
    for layer in others:
        first[layer.name], found = results(layer, x, grad)
        far = agree(wanted, found, TOLERANCE[dtype], layer.name)
        layer.module.zero_grad(set_to_none=True)
        tell(f"{shape} {dtype}: {layer.name} gives the same output and gradients, within {far:.1e}")
    mine.module.zero_grad(set_to_none=True)
    del wanted, found
    limit = SLOW * min(first.values())
    for layer in others:
        if first[layer.name] > limit:
            tell(f"{shape} {dtype}: {layer.name} {first[layer.name] * 1e3:.0f} ms in one pass, not timed further")
    return timed([mine, *(layer for layer in others if first[layer.name] <= limit)], x, grad, pairs)


def timed(contestants: list[Contestant], x: Tensor, grad: Tensor, pairs: int) -> Cost:
    """The first is ours. One round is not counted."""
    times: dict[str, list[float]] = {layer.name: [] for layer in contestants}
    for index in range(pairs + 1):
        turn = index % len(contestants)
        for layer in contestants[turn:] + contestants[:turn]:
            times[layer.name].append(once(layer, x, grad)[0])
            layer.module.zero_grad(set_to_none=True)
    own = times.pop(contestants[0].name)[1:]
    rest = {name: seconds[1:] for name, seconds in times.items()}
    least = {name: min(seconds) for name, seconds in rest.items()}
    ratios = {name: statistics.median(a / b for a, b in zip(own, each, strict=True)) for name, each in rest.items()}
    return Cost(min(own), least, {name: min(own) / seconds for name, seconds in least.items()}, ratios)


def run(
    shapes: list[Sizes], dtypes: list[str], pairs: int, tell: Callable[[str], None], *, more: bool = False
) -> dict[tuple[str, str], Cost]:
    """(shape, type) -> what was measured."""
    if pairs < 1:
        raise EngineError(f"{pairs} pairs of passes have no time", "--pairs", "give at least 1")
    out: dict[tuple[str, str], Cost] = {}
    for dtype in dtypes:
        for shape in shapes:
            cost = out[str(shape), dtype] = measure(shape, dtype, pairs, tell, more=more)
            for name, seconds in sorted(cost.theirs.items(), key=lambda item: item[1]):
                tell(
                    f"{shape} {dtype}: ours {cost.ours * 1e3:.1f} ms, {name} {seconds * 1e3:.1f} ms, ratio "
                    f"{cost.fastest[name]:.3f} of the fastest passes, {cost.median[name]:.3f} in the median pair"
                )
    return out
