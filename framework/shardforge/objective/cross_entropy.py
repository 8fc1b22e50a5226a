"""Cross entropy of a head's logits, in chunks of positions: the logits of a whole batch never exist at once.

The gradient of a chunk is formed while its logits are there, so nothing is computed twice. With the vocabulary split
over ranks, each holds some columns; maxima and sums run over the group, the gradient stays split.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function

from shardforge.nn.batch import IGNORE
from shardforge.nn.head import Head, VocabSplit

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Memory for the logits of one chunk on one rank: within the cache of a CPU, large enough to fill a GPU."""
FEWEST = 128
"""Positions in a chunk at least; fewer make thin, slow matrix products."""


@dataclass(frozen=True)
class Sums:
    """Over the scored positions: `total` = cross_entropy + z_coefficient * z; all 0-d, nats."""

    total: Tensor
    cross_entropy: Tensor
    z: Tensor  # sum of the squared log-normalizer


def cross_entropy(x: Tensor, head: Head, labels: Tensor, z_coefficient: float, split: VocabSplit) -> Sums:
    """x [b, s, h], labels [b, s] (IGNORE is not scored) -> sums over the scored positions of all b * s.

    z loss: Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, section 5: log(Z)^2.
    """
    weight = head.operand()
    return Sums(*_Score.apply(x.flatten(0, -2), weight, labels.flatten(), head, z_coefficient, split))


class _Score(Function):
    @staticmethod
    def forward(ctx, x, weight, labels, head, z_coefficient, split):
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = max(FEWEST, CHUNK_BYTES[x.device.type] // (weight.shape[0] * wide.itemsize))
        grads = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dx = torch.empty_like(x) if grads else None
        dw = torch.empty_like(weight, dtype=wide) if grads else None
        sums = torch.zeros(2, dtype=wide, device=x.device)
        for start in range(0, len(x), rows):
            piece, mine = x[start : start + rows], labels[start : start + rows]
            logits = head.curve((piece @ weight.T).to(wide))
            slope = head.slope(logits) if grads else None
            sums += _score(logits, mine, z_coefficient, split)  # logits become their gradient
            if grads:
                if slope is not None:
                    logits *= slope
                dlogits = logits.to(x.dtype)
                torch.mm(dlogits, weight, out=dx[start : start + rows])
                _accumulate(dw, dlogits, piece, keep=float(start > 0))
        ctx.grads = (dx, dw.to(weight.dtype)) if grads else None
        plain, z = sums.clone().unbind()
        ctx.mark_non_differentiable(plain, z)
        return plain + z_coefficient * z, plain, z

    @staticmethod
    def backward(ctx, grad, *_):
        dx, dw = ctx.grads  # kept whole: a schedule that splits the backward pass comes here twice
        return dx * grad, dw * grad, None, None, None, None


def _accumulate(dw: Tensor, dlogits: Tensor, piece: Tensor, keep: float) -> None:
    """dw = keep * dw + dlogits^T piece; with keep = 0 whatever dw held is forgotten."""
    if dlogits.dtype == dw.dtype:
        dw.addmm_(dlogits.T, piece, beta=keep)
    elif keep:
        dw += dlogits.T @ piece  # sums over chunks stay wide
    else:
        dw.copy_(dlogits.T @ piece)


def _score(logits: Tensor, labels: Tensor, z_coefficient: float, split: VocabSplit) -> Tensor:
    """logits [t, v] -> [cross entropy, z] summed; in place, logits become d total / d logits."""
    scored = labels != IGNORE
    column = labels - split.first
    mine = scored & (column >= 0) & (column < logits.shape[1])
    column = column.clamp(0, logits.shape[1] - 1)[:, None]
    hit = split.total(logits.gather(1, column)[:, 0] * mine)
    top = split.top(logits.amax(1))
    norm = split.total(logits.sub_(top[:, None]).exp_().sum(1))
    log_norm = norm.log() + top
    weight = scored * (1 + 2 * z_coefficient * log_norm) / norm
    logits.mul_(weight[:, None]).scatter_add_(1, column, -mine.to(logits.dtype)[:, None])
    return torch.stack([((log_norm - hit) * scored).sum(), (log_norm.square() * scored).sum()])
