"""The arguments of a Megatron training that say a model of ours, the other way round from `megatron_model`.

They are only proposed here. They count when `megatron_model` makes of them a model that computes the same, field by
field; so what Megatron has no argument for is an error that names it, never a silently different model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardforge.core.errors import CheckpointError
from shardforge.families.megatron_model import LOSSES, model
from shardforge.families.megatron_names import gated
from shardforge.families.section import apart, plainer, whole
from shardforge.families.section import layers as blocks_of
from shardforge.families.settings import Settings

NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
KINDS = {scope: kind for kind, scope in LOSSES.items()} | {"sequence": "seq_aux_loss"}
PROPOSAL = Path("args")
SHOWN = 8


def arguments(section: Mapping[str, Any], padded: int, length: int | None) -> dict[str, Any]:
    """The arguments that say a whole model section, whose tables of words get `padded` rows; `length` is that of the
    longest sequence. CheckpointError naming every field that Megatron cannot say."""
    try:
        args = _proposal(section, padded, length)
    except (KeyError, TypeError, AttributeError) as cause:
        what = f"Megatron has nothing of this kind of model: {cause} is missing in it"
        raise CheckpointError(what, "model", "name another format") from cause
    settings = Settings(args, PROPOSAL)
    again = model(settings)
    lines = [problem.what for problem in settings.problems]
    if not lines:
        again = whole(again, PROPOSAL)
        lines = [f"{field}: {ours!r} here, {theirs!r} there" for field, ours, theirs in differing(section, again)]
    if lines:
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        told = "\n".join(f"      {line}" for line in [*lines[:SHOWN], *more])
        raise CheckpointError(f"Megatron cannot say this model:\n{told}", "model", "name another format")
    return args


def untold(section: Mapping[str, Any]) -> Iterator[str]:
    """What a section says of training, and the arguments do not, a line each."""
    blocks = list(section["blocks"].values())
    rates = {block["residual"]["dropout"] for block in blocks} | {section["dropout"]}
    if len(rates) > 1:
        yield f"dropout of {', '.join(map(str, sorted(rates)))} in places: there is one rate"
    for ffn in (block["ffn"] for block in blocks if block["ffn"]["kind"] == "moe"):
        for each in ffn["balance"]:
            if each["scope"] not in KINDS or each["counts"] != "now":
                yield f"balance with scope: {each['scope']} and counts: {each['counts']}: there is no such loss"
        moved = ffn["router"].get("selection_bias")
        if moved and (moved["centered"] or not isinstance(moved["rate"], int | float)):
            yield "how the selection bias moves: there it does so by one rate, not centered"
    mtp = section.get("mtp")
    if mtp and not isinstance(mtp["weight"], int | float):
        yield "phases of the weight of further predictions: there it is one number"


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two whole sections compute the same for Megatron."""
    return not differing(one, other)


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What two whole sections compute differently, apart from how that is written."""
    return apart(_plain(one), _plain(other))


def _plain(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section in the one way in which Megatron would say it, without what is for training alone."""
    blocks = {name: _plain_block(block) for name, block in section["blocks"].items()}
    mtp = section.get("mtp")
    return {**section, "blocks": blocks, "mtp": mtp and {**mtp, "weight": 0.0}}


def _plain_block(block: Mapping[str, Any]) -> dict[str, Any]:
    mixer, ffn = dict(block["mixer"]), dict(block["ffn"])
    if mixer["kind"] == "mla" and mixer["position"]["kind"] == "rope":
        mixer["position"] = {**mixer["position"], "layout": "interleaved"}  # up to the order of rows
    if ffn["kind"] == "moe" and ffn["router"]["kind"] == "topk":
        router = {**ffn["router"], "init_std": None}
        if router["selection_bias"] is not None:
            router["selection_bias"] = {}
        if router["score"] == "softmax" and router["weights"] == "renormalized" and router["groups"] is None:
            router["order"] = "topk_first"  # the same numbers
        ffn["router"] = router
    return {**block, "mixer": mixer, "ffn": ffn}


def _proposal(section: Mapping[str, Any], padded: int, length: int | None) -> dict[str, Any]:
    blocks = blocks_of(section)
    mixer, norm, tied = blocks[0]["mixer"], section["norm"], section["head"]["kind"] == "tied"
    ffns = [block["ffn"] for block in blocks]
    dense = next((ffn for ffn in ffns if ffn["kind"] != "moe"), None)
    mixed = next((ffn for ffn in ffns if ffn["kind"] == "moe"), None)
    biased = _biased(mixer)
    args: dict[str, Any] = {
        "num_layers": len(blocks),
        "hidden_size": section["hidden"],
        "num_attention_heads": mixer["heads"],
        "vocab_size": section["vocab"],
        "padded_vocab_size": padded,
        "make_vocab_size_divisible_by": 1,
        "normalization": NORMS.get(norm["kind"], norm["kind"]),
        "norm_epsilon": norm["eps"],
        "apply_layernorm_1p": bool(norm.get("offset")),
        "add_bias_linear": biased,
        "untie_embeddings_and_output_weights": not tied,
        "hidden_dropout": blocks[0]["residual"]["dropout"],
        "attention_dropout": 0.0,
        "init_method_std": section["init"]["std"],
        "ffn_hidden_size": (dense or mixed or {})["inner"],
        **_activation(section, dense, mixed),
        **(_latent(mixer) if mixer["kind"] == "mla" else _grouped(mixer, section["embedding"])),
        **_layers([block["mixer"] for block in blocks]),
        "max_position_embeddings": section["embedding"].get("length") or length or 4096,
    }
    args["seq_length"] = args["encoder_seq_length"] = length or args["max_position_embeddings"]
    if mixed is not None:
        every = [int(ffn["kind"] == "moe") for ffn in ffns]
        args |= {"moe_layer_freq": 1 if all(every) else every, **_moe(mixed)}
    if mtp := section.get("mtp"):
        args |= {"mtp_num_layers": mtp["depth"], "mtp_loss_scaling_factor": _number(mtp["weight"])}
    return args


def _biased(mixer: Mapping[str, Any]) -> bool:
    return mixer.get("bias") == "all"


def _number(value: Any) -> float:
    """A number, or the one that phases end with."""
    return float(value) if isinstance(value, int | float) else 0.1


def _activation(section: Mapping[str, Any], dense: Any, mixed: Any) -> dict[str, Any]:
    clamp = (mixed or {}).get("clamp")
    if clamp:
        told = {"glu_linear_offset": 1.0, "activation_func_clamp_value": clamp}
        return {"swiglu": False, "quick_geglu": True, **told}
    if gated(section):
        return {"swiglu": True}
    curve = (dense or mixed)["activation"]
    return {"swiglu": False, "squared_relu": curve == "relu2", "openai_gelu": curve == "gelu_tanh"}


def _grouped(mixer: Mapping[str, Any], embedding: Mapping[str, Any]) -> dict[str, Any]:
    groups = mixer["kv_heads"] or mixer["heads"]
    position = plainer(mixer["position"], mixer["head_dim"])
    found = {
        "group_query_attention": groups != mixer["heads"],
        "num_query_groups": groups,
        "kv_channels": mixer["head_dim"],
        "qk_layernorm": mixer["qk_norm"] is not None,
        "add_qkv_bias": mixer["bias"] != "none",
        "softmax_type": "learnable" if mixer["sinks"] == "learned" else "vanilla",
        "softmax_scale": mixer["scale"],
    }
    if embedding["kind"] == "learned":
        return found | {"position_embedding_type": "learned_absolute"}
    if position["kind"] == "nope":
        return found | {"position_embedding_type": "none"}
    return found | _rope(position)


def _rope(position: Mapping[str, Any]) -> dict[str, Any]:
    scaling = position["scaling"] or {"kind": None}
    found = {
        "position_embedding_type": "yarn" if scaling["kind"] == "yarn" else "rope",
        "rotary_base": _whole(position["base"]),
        "rotary_percent": position["fraction"],
        "rotary_interleaved": position["layout"] == "interleaved",
    }
    if scaling["kind"] == "linear":
        found["rotary_seq_len_interpolation_factor"] = scaling["factor"]
    if scaling["kind"] == "llama3":
        found |= {"use_rope_scaling": True, "rope_scaling_factor": scaling["factor"]}
    if scaling["kind"] == "yarn":
        found |= {
            "yarn_rotary_scaling_factor": scaling["factor"],
            "yarn_original_max_position_embeddings": scaling["original_length"],
            "yarn_beta_fast": scaling["beta_fast"],
            "yarn_beta_slow": scaling["beta_slow"],
            "yarn_correction_range_round_to_int": scaling["truncate"],
            "yarn_mscale": None,
            "yarn_mscale_all_dim": None,
        }
    return found


def _latent(mixer: Mapping[str, Any]) -> dict[str, Any]:
    position = plainer(mixer["position"], mixer["qk_rope_head_dim"])
    scaling = position["scaling"]
    found = {
        "multi_latent_attention": True,
        "group_query_attention": False,
        "q_lora_rank": mixer["q_lora_rank"],
        "kv_lora_rank": mixer["kv_lora_rank"],
        "qk_head_dim": mixer["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": mixer["qk_rope_head_dim"],
        "v_head_dim": mixer["v_head_dim"],
        "qk_layernorm": mixer["norm"]["kind"] != "none",
        "position_embedding_type": "rope",
        "rotary_base": _whole(position["base"]),
        "rotary_percent": position["fraction"],
        "rope_type": "rope" if scaling is None else scaling["kind"],
    }
    if scaling is None:
        return found
    sharp = scaling.get("mscale") is not None
    return found | {
        "rotary_scaling_factor": scaling["factor"],
        "original_max_position_embeddings": scaling["original_length"],
        "beta_fast": scaling["beta_fast"],
        "beta_slow": scaling["beta_slow"],
        "mscale": scaling["mscale"] if sharp else 1.0,
        "mscale_all_dim": scaling["mscale_all_dim"] if sharp else 0.0,
    }


def _whole(base: float) -> int | float:
    """Megatron's parser takes whole numbers there."""
    return int(base) if float(base).is_integer() else base


def _layers(mixers: list[dict[str, Any]]) -> dict[str, Any]:
    """How the layers differ in their mask and position."""
    sizes = {mixer["mask"]["size"] for mixer in mixers if mixer["mask"]["kind"] == "window"}
    found: dict[str, Any] = {}
    if sizes:
        near = [int(mixer["mask"]["kind"] == "window") for mixer in mixers]
        found["window_size"] = (min(sizes) - 1, 0)
        if not all(near):
            found["window_attn_skip_freq"] = near
    free = [int(mixer["position"]["kind"] == "nope") for mixer in mixers]
    if any(free) and not all(free):
        turning = next(mixer for mixer in mixers if mixer["position"]["kind"] != "nope")
        found["no_rope_freq"] = free
        if turning["kind"] == "gqa":
            found |= _rope(plainer(turning["position"], turning["head_dim"]))
    return found


def _moe(ffn: Mapping[str, Any]) -> dict[str, Any]:
    router, shared, balance = ffn["router"], ffn["shared"], ffn["balance"]
    found = {
        "num_experts": ffn["experts"],
        "moe_router_topk": ffn["k"],
        "moe_ffn_hidden_size": ffn["inner"],
        "moe_z_loss_coeff": ffn["z_loss"] or None,
        "moe_router_score_function": router["score"],
        "moe_router_pre_softmax": router["score"] == "softmax" and router["weights"] == "raw",
        "moe_router_topk_scaling_factor": None if router["scale"] == 1.0 else router["scale"],
        "moe_router_enable_expert_bias": router["selection_bias"] is not None,
        "moe_router_num_groups": router["groups"],
        "moe_router_group_topk": router["group_topk"],
        "moe_input_jitter_eps": router["jitter"] or None,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }
    if router["selection_bias"] is not None:
        found["moe_router_bias_update_rate"] = _rate(router["selection_bias"]["rate"])
    known = [each for each in balance if each["scope"] in KINDS]
    if known:
        found["moe_router_load_balancing_type"] = [KINDS[each["scope"]] for each in known]
        found["moe_aux_loss_coeff"] = [each["weight"] for each in known]
    if shared is not None:
        found["moe_shared_expert_intermediate_size"] = shared["inner"]
        found["moe_shared_expert_gate"] = ffn["shared_gate"] == "sigmoid"
    return found


def _rate(rate: Any) -> float:
    return float(rate) if isinstance(rate, int | float) else 1e-3
