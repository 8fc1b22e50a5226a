"""GPTModel of megatron-core on the CPU with its own optimizer, saved and loaded by its own code:

python megatron_program.py save|load KIND FOLDER SAID.pt RANK WORLD STORE

`save` trains two steps, saves FOLDER as Megatron-LM's training script does, and goes on; `load` starts from other
weights, with the arguments that FOLDER holds, loads it and goes on. SAID gets the logits on fixed tokens (with further
predictions: the losses), the losses of the steps behind the checkpoint, and the rows of these. KIND is one of KINDS
and, behind a hyphen, the optimizer. With WORLD ranks the model is split by tensor parallelism, a mixture by experts.

It is a program of its own because megatron-core has to be told that there is a GPU, and saves with a process that is
spawned.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

LENGTH, VOCAB, STEPS, LEARNING_RATE = 12, 32, 2, 1e-2
ROPE = {"position_embedding_type": "rope", "rotary_base": 500000}
DENSE: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 4,
    "padded_vocab_size": VOCAB,
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "max_position_embeddings": 64,
    **ROPE,
}
MOE: dict[str, Any] = {
    "num_experts": 4,
    "moe_ffn_hidden_size": 20,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_router_pre_softmax": False,
}
MLA: dict[str, Any] = {
    "multi_latent_attention": True,
    "group_query_attention": False,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_head_dim": 4,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "qk_layernorm": True,
    "rope_type": "rope",
    "kv_channels": None,
}
V3 = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_shared_expert_intermediate_size": 28,
    "moe_layer_freq": [0, 1, 1],
    "moe_router_bias_update_rate": 1e-3,
}
KINDS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "tied": DENSE | {"untie_embeddings_and_output_weights": False, "add_qkv_bias": True, "qk_layernorm": True},
    "gpt": DENSE
    | {"swiglu": False, "add_bias_linear": True, "position_embedding_type": "learned_absolute"}
    | {"group_query_attention": False, "num_query_groups": None},
    "moe": DENSE | MOE,
    "mla": DENSE | MLA,
    "v3": DENSE | MOE | MLA | V3,
    "mtp": DENSE | {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3},
    "padded": DENSE | {"vocab_size": 30},
}


class Still:
    """Stands for streams and events."""

    def __init__(self, *_: Any, **__: Any):
        self.cuda_stream = 0

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: Still()


def pretend() -> None:
    """Tell megatron-core that the CPU is a GPU."""
    import megatron.core.tensor_parallel.random as drawn
    import megatron.core.transformer.moe.moe_utils as routed
    import megatron.core.transformer.moe.token_dispatcher as sent
    import megatron.core.transformer.multi_latent_attention as latent
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    cuda = torch.cuda
    cuda.current_device = lambda: "cpu"
    drawn.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.current_stream = cuda.default_stream = cuda.Stream = cuda.Event = Still
    cuda.stream = lambda _=None: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda self, stream: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    kept = torch.Tensor.type

    def kind(self: Tensor, wanted: Any = None, **how: Any) -> Any:
        if wanted is None:
            return kept(self).replace("torch.", "torch.cuda.", 1)
        return kept(self, wanted.replace("torch.cuda.", "torch.") if isinstance(wanted, str) else wanted, **how)

    torch.Tensor.type = kind
    for name in ("zeros", "ones", "empty", "tensor", "full", "arange"):
        setattr(torch, name, here(getattr(torch, name)))
    kept_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def loaded(self: Any, weight: Tensor, states: dict[str, Tensor]) -> None:
        group, place = self.model_param_group_index_map[weight]
        main = self.optimizer.param_groups[group]["params"][place]
        count = self.optimizer.state[main]["step"].clone()  # one for all weights would count every one of them
        self.optimizer.state[main]["step"] = count
        kept_states(self, weight, states | {"step": count})

    DistributedOptimizer._set_main_param_and_optimizer_states = loaded
    routed.te_general_gemm = None
    latent.TELinear = type("Absent", (), {})

    def moved(x: Any, as_numpy: bool = False, **_: Any) -> Any:
        return x.cpu().numpy() if torch.is_tensor(x) and as_numpy else x

    routed.maybe_move_tensor_to_cpu = sent.maybe_move_tensor_to_cpu = moved


def here(made: Any) -> Any:
    """A factory of tensors that makes them on the CPU whatever it is told."""

    def make(*args: Any, **how: Any) -> Any:
        if "cuda" in str(how.get("device", "")):
            how["device"] = "cpu"
        return made(*args, **how)

    return make


class Attention(nn.Module):
    """The core of latent attention; megatron-core's own needs Transformer Engine there."""

    def __init__(self, *_: Any, softmax_scale: float | None = None, **__: Any):
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [s, b, n, d] -> [b, n, s, d]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return mixed.permute(2, 0, 1, 3).flatten(2).contiguous()


def settings(args: dict[str, Any], world: int) -> Any:
    """TransformerConfig of the arguments, as Megatron-LM makes it of them."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    latent, mixed = args.get("multi_latent_attention", False), bool(args.get("num_experts"))
    made = MLATransformerConfig if latent else TransformerConfig
    plain = made.__dataclass_fields__
    fusions = ("gradient_accumulation", "masked_softmax", "bias_activation", "bias_dropout")
    if latent:
        fusions = tuple(each for each in fusions if f"{each}_fusion" in plain)
    told = {name: value for name, value in args.items() if name in plain and value is not None}
    told |= {f"{name}_fusion": False for name in fusions}
    if mixed:
        told |= {"num_moe_experts": args["num_experts"], "moe_token_dispatcher_type": "alltoall"}
    told |= {
        "expert_model_parallel_size": world if mixed else 1,
        "tensor_model_parallel_size": 1 if mixed else world,
        "layernorm_epsilon": args["norm_epsilon"],
        "gated_linear_unit": args["swiglu"],
        "activation_func": F.silu if args["swiglu"] else F.gelu,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": torch.float32,
        "bf16": False,
    }
    return made(**told)


def build(args: dict[str, Any], world: int) -> tuple[nn.Module, Any]:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt import gpt_layer_specs as specs

    config = settings(args, world)
    latent = args.get("multi_latent_attention", False)
    if args.get("num_experts"):
        spec = specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        layers = spec.layer_specs
    else:
        spec = specs.get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, multi_latent_attention=latent, normalization=config.normalization
        )
        layers = [spec]
    if latent:
        for layer in layers:
            layer.submodules.self_attention.submodules.core_attention = Attention
    further = None
    if args.get("mtp_num_layers"):
        further = specs.get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        mtp_block_spec=further,
        vocab_size=args["padded_vocab_size"],
        max_sequence_length=args["max_position_embeddings"],
        position_embedding_type=args["position_embedding_type"],
        rotary_base=args["rotary_base"],
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
    )
    return model, config


def wrapped(model: nn.Module, config: Any, how: str) -> tuple[nn.Module, Any]:
    """The model as it is trained, and its optimizer: "dist" the distributed one, "bf16" one with weights of that type
    and masters, "fp32" a plain one."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    parted, half = how == "dist", how == "bf16"
    told = DistributedDataParallelConfig(use_distributed_optimizer=parted, overlap_grad_reduce=False)
    whole = DistributedDataParallel(config, told, model)
    plan = OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        weight_decay=0.1,
        use_distributed_optimizer=parted,
        clip_grad=0.0,
        bf16=half,
        params_dtype=torch.bfloat16 if half else torch.float32,
    )
    return whole, get_megatron_optimizer(plan, [whole])


def scheduler(optimizer: Any) -> Any:
    """Constant rates, and decay where Megatron has it; numbers of a checkpoint count."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    made = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=LEARNING_RATE,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=100,
        lr_decay_style="constant",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=100,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=True,
    )
    made.step(0)
    return made


def content(how: str) -> dict[str, Any]:
    """What Megatron-LM tells about the layout of a checkpoint."""
    told = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if how == "dist":
        told |= {"distrib_optim_sharding_type": "fully_reshardable"}
        told |= {"distrib_optim_fully_reshardable_mem_efficient": False}
    return told


def state(model: nn.Module, optimizer: Any, how: str, loading: bool) -> dict[str, Any]:
    from megatron.core import parallel_state

    told = content(how) | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    made = {"model": model.module.sharded_state_dict(metadata=told)}
    made["optimizer"] = optimizer.sharded_state_dict(made, is_loading=loading, metadata=told)
    return made


def batches() -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(7)
    while True:
        yield torch.randint(0, 30, (2, LENGTH + 1), generator=draw)


def said(model: nn.Module, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
    places = torch.arange(tokens.shape[1]).expand(2, -1)
    hidden = torch.triu(torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool), 1)
    return model(tokens, places, hidden, labels=labels)


def steps(model: nn.Module, optimizer: Any, schedule: Any, data: Iterator[Tensor]) -> list[float]:
    from megatron.core.distributed import finalize_model_grads

    losses = []
    for _ in range(STEPS):
        rows = next(data)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = said(model.train(), rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).float().mean()
        loss.backward()
        finalize_model_grads([model])
        optimizer.step()
        schedule.step(2)
        losses.append(loss.item())
    return losses


def start(rank: int, world: int, store: str, kind: str) -> None:
    from megatron.core import parallel_state

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mixed = "num_experts" in KINDS[kind]
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=1 if mixed else world, expert_model_parallel_size=world if mixed else 1
    )


def main(verb: str, kind: str, folder: Path, report: Path, rank: int, world: int, store: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    kind, _, how = kind.partition("-")
    how = how or "dist"
    pretend()
    start(rank, world, store, kind)
    torch.manual_seed(1 if verb == "save" else 2)
    args = KINDS[kind] | (vars(torch.load(folder / "common.pt", weights_only=False)["args"]) if verb == "load" else {})
    model, config = build(args, world)
    if how == "bf16":
        model = model.bfloat16()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape).to(weight.dtype) * 0.3)
    whole, optimizer = wrapped(model, config, how)
    schedule, data = scheduler(optimizer), batches()
    if verb == "save":
        steps(whole, optimizer, schedule, data)
        told = argparse.Namespace(**args, iteration=STEPS, consumed_train_samples=2 * STEPS)
        common = {"args": told, "checkpoint_version": 3.0, "iteration": STEPS}
        common["opt_param_scheduler"] = schedule.state_dict()
        folder.mkdir(exist_ok=True)
        dist_checkpointing.save(
            state(whole, optimizer, how, False) | common, str(folder), content_metadata=content(how)
        )
    else:
        steps(whole, optimizer, schedule, data)  # without Apex the distributed optimizer loads into states alone
        found = dist_checkpointing.load(state(whole, optimizer, how, True), str(folder))
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        schedule.load_state_dict(found["opt_param_scheduler"])
    tokens = torch.arange(2 * LENGTH).view(2, -1) % 30
    with torch.no_grad():
        rows = None if "mtp_num_layers" not in KINDS[kind] else tokens  # then it gives losses alone
        logits = said(whole.eval(), tokens, rows).float()
        if rows is None:
            logits = gather_from_tensor_model_parallel_region(logits)
    after = steps(whole, optimizer, schedule, data)
    if rank == 0:
        draw = batches()
        rows = [next(draw) for _ in range(2 * STEPS)][STEPS:]
        torch.save({"tokens": tokens, "logits": logits, "losses": after, "rows": rows}, report)
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    verb, kind, folder, report, rank, world, store = sys.argv[1:]
    main(verb, kind, Path(folder), Path(report), int(rank), int(world), store)
