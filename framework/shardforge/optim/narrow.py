"""AdamW whose moments rest in fewer bits than they are computed with.

Paper: Loshchilov and Hutter 2017, "Decoupled Weight Decay Regularization", arXiv:1711.05101, algorithm 2; rounding as
in Gupta et al. 2015, arXiv:1502.02551.

    moments at rest ---> wide ---> new moments, step of the weights ---> rounded ---> moments at rest

The step uses the new moments before they are rounded. The second moment falls by a factor of beta2 in a step at most;
where beta2 > 1 - 2**-9 that is less than half of the distance between bfloat16 numbers, and with rounding to nearest it
would never fall. Hence moments are rounded at random. The random bits are a function of (weight, step, index in the
whole weight), so any layout and any resumed run rounds alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardforge.nn import counter
from shardforge.nn.init import matrix, pieces
from shardforge.optim.rounding import stochastic

CHUNKS = {"cpu": 1 << 15, "cuda": 1 << 22}
"""Numbers updated at a time: the temporaries (about 64 bytes each) stay in a CPU's cache, and small beside a GPU."""


class NarrowAdamW(Optimizer):
    """State of a weight: `exp_avg` and `exp_avg_sq` in `dtype` and `step` (0-d float32 on the CPU).

    `names` says how each weight is called in the whole model; the rounding is keyed by it.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        names: Mapping[nn.Parameter, str],
        dtype: torch.dtype,
        betas: tuple[float, float],
        eps: float,
    ):
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.names, self.dtype = dict(names), dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of all weights that have a gradient. `closure` belongs to torch's interface and must be empty."""
        assert closure is None, "gradients are made by the engine"
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(weight, dtype=self.dtype, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(weight, dtype=self.dtype, requires_grad=False)
        state["step"] += 1
        step = int(state["step"].item())
        key = counter.key("moments", self.names.get(weight, ""), step)
        tensors = [matrix(tensor) for tensor in (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"])]
        for rows, columns, index in pieces(weight, CHUNKS.get(tensors[0].device.type, CHUNKS["cuda"])):
            value, grad, mean, square = (tensor[rows, columns] for tensor in tensors)
            new_mean, new_square = self._advance(value, grad, mean, square, group, step)
            if self.dtype == torch.bfloat16:
                draw = counter.bits(key, index)
                new_mean, new_square = stochastic(new_mean, draw), stochastic(new_square, draw >> 16)
            mean.copy_(new_mean)
            square.copy_(new_square)

    def _advance(
        self, value: Tensor, grad: Tensor, mean: Tensor, square: Tensor, group: dict[str, Any], step: int
    ) -> tuple[Tensor, Tensor]:
        """Move the weights `value` in place; both moments in the type of the weights."""
        beta1, beta2 = group["betas"]
        new_mean = mean.to(value.dtype).lerp_(grad, 1 - beta1)
        new_square = square.to(value.dtype).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (new_square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        value.mul_(1 - group["lr"] * group["weight_decay"])
        value.addcdiv_(new_mean, root, value=-group["lr"] / (1 - beta1**step))
        return new_mean, new_square
