"""DeepSeek-V2 and V3, Moonlight, and what their releases hold that `transformers` does not write."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.parity.family_cases import Case, as_saved
from tests.parity.models import LATENT, SHARED, WIDER, YARN
from tests.parity.models_moe import E, K, X

SIZES = {"n_routed_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": X, "n_shared_experts": 2}
MOE = (
    SHARED | LATENT | SIZES | {"num_key_value_heads": 4, "first_k_dense_replace": 1, "experts_implementation": "eager"}
)
GROUPS = {"n_group": 4, "topk_group": 2}
ALONE = {"n_group": 1, "topk_group": 1}
ODD = {"hidden_size": 27, "num_attention_heads": 3, "num_key_value_heads": 3}
STRETCHED = {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}} | WIDER
FILE, CONFIG = "model.safetensors", "config.json"


def made(config: str, **fields: Any) -> Callable[[], Any]:
    def config_of() -> Any:
        import transformers

        return getattr(transformers, config)(**fields)

    return config_of


def v2(stored: Callable[[Path], None] = as_saved, **fields: Any) -> Case:
    return Case(made("DeepseekV2Config", **MOE | {"routed_scaling_factor": 4.0} | fields), stored=stored)


def v3(stored: Callable[[Path], None] = as_saved, **fields: Any) -> Case:
    return Case(made("DeepseekV3Config", **MOE | GROUPS | fields), stored=stored)


def with_modules(folder: Path, depth: int = 1) -> None:
    """What the release has behind the last layer: a mixture, norms, a projection, copies of embedding and head."""
    tensors = load_file(folder / FILE)
    generator = torch.Generator().manual_seed(9)
    last, hidden = SHARED["num_hidden_layers"] - 1, tensors["model.norm.weight"].shape[0]
    block = {name: weight for name, weight in tensors.items() if name.startswith(f"model.layers.{last}.")}
    for at in range(depth):
        theirs = f"model.layers.{last + 1 + at}"
        shapes = {name.replace(f"model.layers.{last}", theirs): weight.shape for name, weight in block.items()}
        shapes |= {f"{theirs}.{norm}.weight": (hidden,) for norm in ("enorm", "hnorm", "shared_head.norm")}
        shapes[f"{theirs}.eh_proj.weight"] = (hidden, 2 * hidden)
        tensors |= {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
        tensors[f"{theirs}.shared_head.head.weight"] = head.clone()
        tensors[f"{theirs}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / FILE, {"format": "pt"})
    told = json.loads((folder / CONFIG).read_text()) | {"num_nextn_predict_layers": depth}
    (folder / CONFIG).write_text(json.dumps(told))


def as_released(folder: Path) -> None:
    """The words of the released config.json, before transformers 5."""
    told = json.loads((folder / CONFIG).read_text())
    rope = told.pop("rope_parameters")
    rope["type"] = rope.pop("rope_type")
    told |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "aux_loss_alpha": 0.001, "seq_aux": True}
    told |= {"scoring_func": "softmax", "moe_layer_freq": 1, "ep_size": 1, "pretraining_tp": 1}
    (folder / CONFIG).write_text(json.dumps(told))


CASES: dict[str, Case] = {
    "deepseek-v2": v2(**GROUPS, topk_method="group_limited_greedy", **STRETCHED),
    "deepseek-v2-lite": v2(stored=as_released, q_lora_rank=None, **STRETCHED),
    "deepseek-v2-odd": v2(**ODD, tie_word_embeddings=True),
    "deepseek-v3": v3(**STRETCHED),
    "deepseek-v3-half": v3(rope_interleave=False, norm_topk_prob=False),
    "deepseek-v3-tied": v3(**ODD, tie_word_embeddings=True),
    "deepseek-v3-dense": v3(first_k_dense_replace=3),
    "deepseek-v3-further": v3(stored=with_modules, rope_parameters=YARN),
    "deepseek-v3-tied-further": v3(stored=partial(with_modules, depth=2), tie_word_embeddings=True),
    "moonlight": v3(**ALONE, q_lora_rank=None, rms_norm_eps=1e-5, routed_scaling_factor=2.446),
}
