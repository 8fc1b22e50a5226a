"""Tokens a second of a recipe's step on one process, beside the same model written with transformers, in one run.

Both do all of a step: forward, backward, clipping, AdamW (torch's fused one), in the same number type, on the same
tokens, with torch's fused attention. Ours keeps documents apart; the peer attends over whole rows, which is its
default. Steps alternate, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardforge.core.errors import EngineError
from shardforge.core.layout import Layout
from shardforge.core.optional import require
from shardforge.nn.batch import Batch
from shardforge.precision.types import DTYPES
from shardforge.recipe.schema import Recipe


@dataclasses.dataclass(frozen=True)
class StepBench:
    ours: float  # tokens a second
    peer: float
    ratio: float  # median over pairs of (peer's time / our time)
    weights: int
    peer_weights: int


def run(recipe: Recipe, pairs: int, tell: Callable[[str], None]) -> StepBench:
    """Time `pairs` pairs of steps after two untimed ones."""
    recipe = dataclasses.replace(recipe, parallel=Layout())
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    engine = recipe.engine.build(recipe, torch.device("cpu"))
    peer = Peer(recipe)
    batches = [synthetic(recipe, step) for step in range(4)]
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
        tokens / statistics.median(ours[2:]),
        tokens / statistics.median(theirs[2:]),
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
                tie_word_embeddings=True,
                use_cache=False,
                attn_implementation="sdpa",
            )
        ).to(DTYPES[recipe.precision.master])
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step(self, batch: Batch) -> None:
        pieces = list(batch.split(self.recipe.train.micro_batch or len(batch)))
        for piece in pieces:
            out = self.model(input_ids=piece.tokens, labels=piece.tokens)
            (out.loss / len(pieces)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
