"""Tokens a second of a recipe's step on one process, beside the same model written with transformers, in one run.

Both start from the same weights and must give the same loss on the same packed documents before anything is timed.
Both do all of a step: forward, backward, clipping, AdamW (torch's fused one), in the same number type, with torch's
fused attention; the peer is told of documents in its own way, by a mask and positions. Steps alternate, so that
whatever else the machine does falls on both.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardforge.core.errors import EngineError
from shardforge.core.layout import Layout
from shardforge.core.optional import require
from shardforge.model.masks.causal import Causal
from shardforge.nn.batch import IGNORE, Batch
from shardforge.nn.sequence import Sequence, visible
from shardforge.precision.types import DTYPES
from shardforge.recipe.schema import Recipe


@dataclasses.dataclass(frozen=True)
class StepBench:
    ours: float  # tokens a second, in the fastest step
    peer: float
    ratio: float  # of the fastest steps
    median: float  # median over pairs of (peer's time / our time)
    weights: int
    peer_weights: int


def run(recipe: Recipe, pairs: int, tell: Callable[[str], None]) -> StepBench:
    """Time `pairs` pairs of steps after two untimed ones."""
    recipe = dataclasses.replace(recipe, parallel=Layout())
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    engine = recipe.engine.build(recipe, torch.device("cpu"))
    peer = Peer(recipe)
    peer.take(dict(engine.model.named_parameters()))
    batches = [synthetic(recipe, step) for step in range(4)]
    mine, other = engine.evaluate(batches[0]).loss, peer.evaluate(batches[0])
    if not math.isclose(mine, other, rel_tol=1e-4):
        raise EngineError(f"the two models differ: loss {mine} here, {other} in transformers", "bench step")
    tell(f"loss of the same weights: ours {mine:.6f}, transformers {other:.6f}")
    ours: list[float] = []
    theirs: list[float] = []
    for index in range(pairs + 2):
        batch = batches[index % len(batches)]
        turn = [(ours, lambda b=batch, i=index: native(engine, b, i)), (theirs, lambda b=batch: peer.step(b))]
        for times, step in turn if index % 2 else reversed(turn):
            gc.collect()
            begun = time.perf_counter()
            step()
            times.append(time.perf_counter() - begun)
        if index >= 2:
            tell(f"pair {index - 1}: ours {ours[-1]:.3f} s, transformers {theirs[-1]:.3f} s")
    tokens = recipe.train.sequences * recipe.train.seq_len
    ratios = [b / a for a, b in zip(ours[2:], theirs[2:], strict=True)]
    return StepBench(
        tokens / min(ours[2:]),
        tokens / min(theirs[2:]),
        min(theirs[2:]) / min(ours[2:]),
        statistics.median(ratios),
        engine.weights,
        sum(weight.numel() for weight in peer.model.parameters()),
    )


def native(engine: Any, batch: Batch, step: int) -> None:
    engine.forward_backward(batch, step)
    engine.update(1e-4)


def synthetic(recipe: Recipe, step: int) -> Batch:
    """Random tokens in two documents a row."""
    generator = torch.Generator().manual_seed(step)
    rows, length = recipe.train.sequences, recipe.train.seq_len
    tokens = torch.randint(0, recipe.model.vocab, (rows, length + 1), generator=generator)
    cut = length // 3
    positions = torch.cat([torch.arange(cut), torch.arange(length - cut)]).expand(rows, -1).contiguous()
    documents = (torch.arange(length) >= cut).long().expand(rows, -1).contiguous()
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, documents, torch.arange(rows))


class Peer:
    """transformers' Llama with the sizes of a recipe of one block kind."""

    def __init__(self, recipe: Recipe):
        transformers = require("transformers", for_="bench step", extra="hf")
        cfg = recipe.model
        blocks = {name: cfg.blocks[name] for name in cfg.layers}
        block = next(iter(blocks.values()))
        if len(blocks) > 1 or block.mixer.kind != "gqa" or block.ffn.kind != "glu" or cfg.head.kind != "tied":
            raise EngineError(
                "the peer is a Llama: one kind of block, gqa, glu, tied head", "bench step", "bench recipe `first`"
            )
        self.recipe = recipe
        torch.manual_seed(0)
        self.model: nn.Module = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=cfg.vocab,
                hidden_size=cfg.hidden,
                intermediate_size=block.ffn.inner,
                num_hidden_layers=len(cfg.layers),
                num_attention_heads=block.mixer.heads,
                num_key_value_heads=block.mixer.kv_heads,
                head_dim=block.mixer.head_dim,
                max_position_embeddings=recipe.train.seq_len,
                rms_norm_eps=block.residual.norm.eps,
                tie_word_embeddings=True,
                use_cache=False,
                attn_implementation="sdpa",
            )
        ).to(DTYPES[recipe.precision.master])
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def loss(self, piece: Batch, scored: int) -> Tensor:
        """Cross entropy over the scored tokens of `piece`, divided by `scored`."""
        seq = Sequence(piece.positions, piece.documents, piece.rows)
        out = self.model(
            input_ids=piece.tokens,
            position_ids=piece.positions,
            attention_mask=visible(Causal(), seq),
            labels=piece.labels,
            shift_labels=piece.labels,
            num_items_in_batch=scored,
        )
        return out.loss

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        return self.loss(batch, int((batch.labels != IGNORE).sum())).item()

    def step(self, batch: Batch) -> None:
        scored = int((batch.labels != IGNORE).sum())
        for piece in batch.split(self.recipe.train.micro_batch or len(batch)):
            self.loss(piece, scored).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def take(self, weights: dict[str, Tensor]) -> None:
        """Start from the weights of our decoder."""
        mine = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                mine[THEIRS.sub(lambda found: NAMES[found.group()], name)].copy_(weight)


NAMES = {
    "embed": "model.embed_tokens",
    "blocks": "model.layers",
    "mixer.q": "self_attn.q_proj",
    "mixer.k": "self_attn.k_proj",
    "mixer.v": "self_attn.v_proj",
    "mixer.out": "self_attn.o_proj",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "mixer_residual.norm": "input_layernorm",
    "ffn_residual.norm": "post_attention_layernorm",
    "norm.weight": "model.norm.weight",
}
THEIRS = re.compile("|".join(re.escape(name) for name in sorted(NAMES, key=len, reverse=True)))
