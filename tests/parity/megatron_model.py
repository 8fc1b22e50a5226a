"""A tiny GPTModel of megatron-core on the CPU, saved in both of its formats: python megatron_model.py FOLDER

It is a program of its own because megatron-core has to be told that there is a GPU, and saves with a process that is
spawned. The folder gets dist/, legacy/mp_rank_00/ and said.pt with tokens and logits.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

ARGS: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 4,
    "padded_vocab_size": 32,
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "rotary_base": 500000,
}
LENGTH = 12


def build() -> nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer import TransformerConfig

    CudaRNGStatesTracker.fork = lambda self, name=None: nullcontext()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    fusions = ("gradient_accumulation", "masked_softmax", "bias_activation", "bias_dropout")
    config = TransformerConfig(
        **{size: ARGS[size] for size in sizes},
        **{f"{name}_fusion": False for name in fusions},
        apply_rope_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        layernorm_epsilon=ARGS["norm_epsilon"],
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=ARGS["padded_vocab_size"],
        max_sequence_length=64,
        position_embedding_type="rope",
        rotary_base=ARGS["rotary_base"],
        share_embeddings_and_output_weights=False,
    ).eval()


def main(folder: Path) -> None:
    from megatron.core import dist_checkpointing

    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *_: None
    model = build()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=draw) * 0.3)
    tokens = torch.randint(0, ARGS["padded_vocab_size"], (2, LENGTH), generator=draw)
    hidden = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), 1)
    with torch.no_grad():
        logits = model(tokens, torch.arange(LENGTH).expand(2, -1), hidden)
    torch.save({"tokens": tokens, "logits": logits}, folder / "said.pt")
    rank = folder / "legacy" / "mp_rank_00"
    rank.mkdir(parents=True)
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(**ARGS)}, rank / "model_optim_rng.pt")
    (folder / "dist").mkdir()
    state = model.sharded_state_dict() | {"args": argparse.Namespace(**ARGS)}
    dist_checkpointing.save(state, str(folder / "dist"))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
