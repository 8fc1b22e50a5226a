"""What the families that descend from Llama share: readers of their settings, one table of names, one config.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shardforge.families.family import ACTIVATIONS, numbered, rope, rope_config, windows
from shardforge.families.forms import Paired, Reversed
from shardforge.families.section import layers as blocks_of
from shardforge.families.section import plainer
from shardforge.families.settings import Settings
from shardforge.families.table import Row, layers, rows
from shardforge.families.turned import layouts, paired

TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
ATTENTION = {
    "mixer.q": "self_attn.q_proj",
    "mixer.k": "self_attn.k_proj",
    "mixer.v": "self_attn.v_proj",
    "mixer.out": "self_attn.o_proj",
    "mixer.q_norm": "self_attn.q_norm",
    "mixer.k_norm": "self_attn.k_norm",
}
GLU = {"ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj"}
PRE = {"mixer_residual.norm": "input_layernorm", "ffn_residual.norm": "post_attention_layernorm"}
RES_POST = {
    "mixer_residual.norm": "post_attention_layernorm",
    "ffn_residual.norm": "post_feedforward_layernorm",
}
OURS, THEIRS = "blocks.{layer}", "model.layers.{layer}"
SPARE = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")
DEEPEST = 4096
WORDS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}
"""Our activations in the words of transformers."""


def names(norms: dict[str, str]) -> dict[str, str]:
    """Module names of ours and theirs; a family without biases or norms on queries has fewer of them."""
    return TOP | layers(OURS, THEIRS, ATTENTION | GLU | norms)


def table(section: dict[str, Any], norms: dict[str, str], more: Sequence[Row] = ()) -> tuple[Row, ...]:
    """Rows of a whole model section. Theirs turn channel i with i + width/2: queries and keys of a section that turns
    neighbouring channels are written, with their biases and norms, in the other order."""
    plain = rows(names(norms))
    if layouts(section) == {"interleaved"}:
        mixer = blocks_of(section)[0]["mixer"]
        heads, kv_heads, width = mixer["heads"], mixer["kv_heads"] or mixer["heads"], mixer["head_dim"]
        over = (heads, kv_heads) if mixer["qk_norm_over"] == "all" else (1, 1)
        many = dict(zip(("q", "k", "q_norm", "k_norm"), (heads, kv_heads, *over), strict=True))
        forms = {f"{OURS}.mixer.{role}.{{leaf}}": Reversed(Paired(each, width)) for role, each in many.items()}
        plain = tuple(replace(row, form=forms.get(row.ours[0], row.form)) for row in plain)
    return (*plain, *more)


def held(section: dict[str, Any]) -> dict[str, Any]:
    """The section that the weights written by `table` are of."""
    return paired(section, "half") if layouts(section) == {"interleaved"} else section


def depth(settings: Settings, key: str = "num_hidden_layers") -> int:
    """Layers; 1 stands for a number that is none, with a problem noted."""
    found = settings.need(key)
    if found > DEEPEST:
        settings.wrong(f"{key} is {found}, more than {DEEPEST}")
        return 1
    return int(found)


def period(settings: Settings, key: str, usual: int) -> int:
    """Layers from one of a kind to the next."""
    return usual if settings.get(key) is None else int(settings.need(key))


def norm(settings: Settings, eps: float | None = None) -> dict[str, Any]:
    """The norm that a model has everywhere. `eps` is the architecture's own, None where the settings must say."""
    found = settings.get("rms_norm_eps", eps)
    if found is None:
        settings.wrong("rms_norm_eps is missing")
    return {"kind": "rmsnorm", "eps": float(found or 1e-6)}


def attention(
    settings: Settings,
    *,
    bias: str = "none",
    qk_norm: dict[str, Any] | None = None,
    qk_norm_over: str = "head",
    kv_heads: int | None = None,
    head_dim: int | None = None,
    base: float = 10000.0,
) -> dict[str, Any]:
    """Attention over rotary positions. `kv_heads`, `head_dim` and `base` are the architecture's own, where the settings
    have no say; without a `kv_heads` they must, and a `head_dim` of None is hidden_size / num_attention_heads."""
    hidden, heads = settings.need("hidden_size"), settings.need("num_attention_heads")
    width = settings.get("head_dim", head_dim)
    if width is None and hidden % heads:
        settings.wrong(f"hidden_size={hidden} is no multiple of num_attention_heads={heads}, and there is no head_dim")
    position = rope(settings, base)
    if position["fraction"] != 1.0:
        settings.wrong(f"partial_rotary_factor={position['fraction']} is not supported by this architecture, only 1.0")
    if (position.get("scaling") or {}).get("mscale") is not None:
        settings.wrong("mscale is supported in DeepSeek's architectures only; write attention_factor")
    mixer = {
        "kind": "gqa",
        "heads": heads,
        "kv_heads": settings.get("num_key_value_heads", kv_heads) or settings.need("num_key_value_heads"),
        "head_dim": width or max(1, hidden // heads),
        "position": position,
        "bias": bias,
    }
    return mixer | ({} if qk_norm is None else {"qk_norm": qk_norm, "qk_norm_over": qk_norm_over})


def biases(settings: Settings) -> str:
    """Which projections of the attention have biases, in architectures that can be told."""
    return "all" if settings.get("attention_bias", False) else "none"


def glu(settings: Settings, bias: bool = False) -> dict[str, Any]:
    """The gated unit of a layer without experts."""
    return {
        "kind": "glu",
        "inner": settings.need("intermediate_size"),
        "activation": settings.choose("hidden_act", ACTIVATIONS, "silu"),
        "bias": bias,
    }


def windows_above(settings: Settings, layers: int) -> list[int | None]:
    """Keys that each layer of a Qwen model sees at most: where its windows are used, the first `max_window_layers` see
    all of their document."""
    size, first = settings.given("sliding_window", 4096), settings.get("max_window_layers", 28)
    size = size if settings.get("use_sliding_window", False) else None
    return windows(settings, layers, size, [size if layer >= first else None for layer in range(layers)])


def model(
    settings: Settings,
    usual: dict[str, Any],
    mixer: dict[str, Any],
    ffns: Sequence[dict[str, Any]],
    *,
    residual: str = "pre",
    seen: Sequence[int | None] = (),
    turning: Sequence[bool] = (),
    tied: bool = False,
) -> dict[str, Any]:
    """The model section, of one ffn a layer. `usual` is its norm; `seen` is how many keys each layer sees at most, and
    `turning` whether it has positions, where not all do; `tied` where the settings have no say."""
    stack: list[str] = []
    blocks: dict[str, dict[str, Any]] = {}
    for layer, ffn in enumerate(ffns):
        size = seen[layer] if layer < len(seen) else None
        turns = turning[layer] if layer < len(turning) else True
        marks = ["moe" if ffn["kind"] == "moe" else "dense", *["near"] * (size is not None), *["nope"] * (not turns)]
        near = {} if size is None else {"mask": {"kind": "window", "size": size}}
        still = {} if turns else {"position": "nope"}
        stack.append("_".join(marks))
        blocks[stack[-1]] = {
            "mixer": mixer | near | still,
            "ffn": ffn,
            "residual": {"kind": residual, "norm": usual},
        }
    return {
        "vocab": settings.need("vocab_size"),
        "hidden": settings.need("hidden_size"),
        **numbered(settings, blocks, stack),
        "norm": usual,
        "head": "tied" if settings.get("tie_word_embeddings", tied) else "linear",
        "init": {"std": settings.get("initializer_range", 0.02)},
    }


def config(section: dict[str, Any], architecture: str, model_type: str) -> dict[str, Any]:
    """config.json of a whole model section but for its ffns, as far as the families agree: of its first layer.
    `families.publish` finds what it loses."""
    blocks = blocks_of(section)
    mixer = blocks[0]["mixer"]
    turning = [block["mixer"]["position"] for block in blocks if block["mixer"]["position"]["kind"] == "rope"]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": section["vocab"],
        "hidden_size": section["hidden"],
        "num_hidden_layers": len(blocks),
        "num_attention_heads": mixer["heads"],
        "num_key_value_heads": mixer["kv_heads"] or mixer["heads"],
        "head_dim": mixer["head_dim"],
        "rms_norm_eps": section["norm"]["eps"],
        "tie_word_embeddings": section["head"]["kind"] == "tied",
        "attention_bias": mixer["bias"] == "all",
        "attention_dropout": 0.0,
        "initializer_range": section["init"]["std"],
        **(rope_config(plainer(turning[0], mixer["head_dim"])) if turning else {}),
    }


def glu_config(ffn: dict[str, Any]) -> dict[str, Any]:
    """What `glu` reads."""
    return {"intermediate_size": ffn["inner"], "hidden_act": WORDS[ffn["activation"]]}


def sizes(section: dict[str, Any]) -> list[int | None]:
    """Keys that each layer sees at most, None for all of its document."""
    return [block["mixer"]["mask"].get("size") for block in blocks_of(section)]


def window_config(section: dict[str, Any]) -> dict[str, Any]:
    """Which layers see how far, where any of them may be told to see less."""
    seen = sizes(section)
    near = [layer for layer, size in enumerate(seen) if size is not None]
    if not near:
        return {"use_sliding_window": False, "sliding_window": None}
    return {
        "use_sliding_window": True,
        "sliding_window": seen[near[0]],
        "max_window_layers": near[0],
        "layer_types": ["full_attention" if size is None else "sliding_attention" for size in seen],
    }
