"""One norm of the whole gradient, over every mesh axis, and the clip that follows from it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def copies(weight: Tensor) -> int:
    """Ranks that hold the same piece of a weight."""
    if not isinstance(weight, DTensor):
        return 1
    count = 1
    for size, place in zip(weight.device_mesh.shape, weight.placements, strict=True):
        count *= size if place.is_replicate() else 1
    return count


@torch.no_grad()
def global_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, 0-d, the same on every rank; float32 at least, where the weights are.

    Each rank squares its pieces, a piece held by r ranks counts 1/r on each, and one all-reduce adds everything. So
    weights may be on different meshes, as experts are, if each covers all ranks of a pipeline stage.
    """
    weights, by_copies = list(parameters), {}
    for weight in weights:
        if weight.grad is not None:
            grad = weight.grad
            piece = grad._local_tensor if isinstance(grad, DTensor) else grad
            by_copies.setdefault(copies(grad), []).append(piece)
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=weights[0].device)
    for count, pieces in sorted(by_copies.items()):
        norms = torch._foreach_norm(pieces, dtype=wide)
        total += torch.stack(norms).square().sum() / count
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale all gradients by limit / norm where norm > limit."""
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    grads = [p.grad for p in parameters if p.grad is not None]
    pieces = [g._local_tensor if isinstance(g, DTensor) else g for g in grads]
    if pieces:
        torch._foreach_mul_(pieces, scale)
