"""A GGUF file of a dense Llama-like model as a source of weights, quantised ones as the float32 numbers they stand for.

Reference: llama.cpp, convert_hf_to_gguf.py and gguf-py/gguf/constants.py, for the names of settings and tensors; its
"llama" turns neighbouring rotary channels (2 i, 2 i + 1), and stores the rows of queries and keys in that order.
Limits: no experts, windows or shards; the tokenizer is read where it is byte-level BPE (families.gguf_tokenizer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardforge.core.errors import CheckpointError
from shardforge.families.family import families
from shardforge.families.forms import SAME, Form, Paired
from shardforge.families.gguf_file import MAGIC, GgufFile
from shardforge.families.gguf_tokenizer import tokenizer
from shardforge.families.linked import LinkedSource
from shardforge.families.section import whole
from shardforge.families.settings import Settings
from shardforge.families.source import Beside, Info

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PRE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
BEHIND = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
FACTORS = "rope_freqs.weight"
"""What each rotary wavelength is divided by, one number a channel pair: all that a file says of Llama 3.1's scaling."""
LLAMA3 = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PLAIN = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
"""Settings behind the name of the architecture -> config.json."""
IDLE = {"rope.dimension_count", "attention.value_length"}
CAUSAL = "attention.causal"
IDLE |= {f"rope.scaling.{name}" for name in ("type", "factor", "original_context_length", "finetuned")}
TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


@dataclass(frozen=True)
class Kind:
    """One architecture of the format."""

    architecture: str  # in config.json
    model_type: str
    norms: Mapping[str, str]
    paired: bool  # rotary channels stand in pairs


KINDS = {
    "llama": Kind("LlamaForCausalLM", "llama", PRE, paired=True),
    "qwen2": Kind("Qwen2ForCausalLM", "qwen2", PRE, paired=False),
    "qwen3": Kind("Qwen3ForCausalLM", "qwen3", PRE, paired=False),
    "olmo2": Kind("Olmo2ForCausalLM", "olmo2", BEHIND, paired=False),
}


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is, or the only one of a folder; None when there is none."""
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if len(found) > 1:
            raise CheckpointError(f"there are {len(found)} GGUF files here", path, f"name one of them: {found[0].name}")
        return found[0] if found else None
    with path.open("rb") as file:
        return path if file.read(len(MAGIC)) == MAGIC else None


class GgufSource(LinkedSource):
    """See `families.source.Source`. Problems or CheckpointError say what of the file is no dense Llama-like model."""

    def __init__(self, path: Path):
        self.file = GgufFile(path)
        kind = _kind(self.file)
        settings = Settings(config(self.file, kind), path)
        _unsupported(self.file, kind, settings)
        family = families()[kind.architecture]
        told = family.model(settings)
        settings.settle()
        model = whole(told, path)
        files, why = tokenizer(self.file)
        ids = {theirs: self.file.said.get(f"tokenizer.ggml.{ours}_token_id") for ours, theirs in TOKENS.items()}
        beside = Beside(
            length=settings.get("max_position_embeddings"),
            tokens={name: number for name, number in ids.items() if number is not None},
            tokenizer=files,
            unread=(why,) if why else (),
        )
        super().__init__(_Named(self.file, kind, settings), model, family.table(model), origin=path, beside=beside)


class _Named:
    """The tensors under the names of transformers, and in its order of rows. See `families.linked.Tensors`."""

    def __init__(self, file: GgufFile, kind: Kind, settings: Settings):
        self.path, self._file = file.path, file
        self._real = {_name(name, kind): name for name in file.names if name != FACTORS}
        self.names: dict[str, Info] = {name: file.names[real] for name, real in self._real.items()}
        self._turned: dict[str, Form] = {}
        if kind.paired:
            width = _width(settings.data)
            heads = {"attn_q": settings.need("num_attention_heads"), "attn_k": settings.need("num_key_value_heads")}
            self._turned = {role: Paired(count, width) for role, count in heads.items()}

    def read(self, name: str) -> Tensor:
        real = self._real[name]
        role = real.split(".")[2] if real.count(".") > 2 else ""
        (turned,) = self._turned.get(role, SAME).ours([self._file.read(real)])
        return turned


def config(file: GgufFile, kind: Kind) -> dict[str, Any]:
    """config.json of what a file says of itself."""
    prefix = file.said["general.architecture"] + "."
    said = {name.removeprefix(prefix): value for name, value in file.said.items() if name.startswith(prefix)}
    found: dict[str, Any] = {
        "architectures": [kind.architecture],
        "model_type": kind.model_type,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.names,
        "attention_bias": "blk.0.attn_output.bias" in file.names,  # Qwen2's stand on queries, keys and values alone
        "mlp_bias": "blk.0.ffn_up.bias" in file.names,
    }
    found |= {theirs: _shortest(said[ours]) for ours, theirs in PLAIN.items() if ours in said}
    found.setdefault("num_key_value_heads", found.get("num_attention_heads"))
    if "token_embd.weight" in file.names:
        found.setdefault("vocab_size", file.names["token_embd.weight"].shape[0])
    width, turned = _width(found), said.get("rope.dimension_count")
    if turned is not None and width and turned != width:
        found["partial_rotary_factor"] = turned / width
    if scaling := _scaling(file, said, found):
        found["rope_scaling"] = scaling
    return found


def _kind(file: GgufFile) -> Kind:
    named = file.said.get("general.architecture")
    if named not in KINDS:
        what = f"general.architecture={named!r} is not one that can be read"
        raise CheckpointError(what, file.path, f"read are {', '.join(KINDS)}; or convert the original model")
    return KINDS[named]


def _unsupported(file: GgufFile, kind: Kind, settings: Settings) -> None:
    """Note every setting of the model that is not known here: it could make another model of the same weights."""
    prefix = file.said["general.architecture"] + "."
    for name, value in file.said.items():
        ours = name.removeprefix(prefix)
        known = ours in PLAIN or ours in IDLE or (value is True if ours == CAUSAL else value in (0, False))
        if name.startswith(prefix) and not known:
            settings.wrong(f"{name}={value!r} is not supported")
    width = _width(settings.data)
    for name in ("attention.value_length", *(("rope.dimension_count",) if kind.paired else ())):
        if file.said.get(prefix + name) not in (None, width):
            settings.wrong(f"{prefix}{name}={file.said[prefix + name]}, heads are {width} wide")


def _scaling(file: GgufFile, said: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` of config.json."""
    if FACTORS in file.names:
        return _llama3(file, said, found)
    kind = said.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": _shortest(said.get("rope.scaling.factor", 1.0))}
    if kind == "yarn" and "rope.scaling.original_context_length" in said:
        scaling["original_max_position_embeddings"] = said["rope.scaling.original_context_length"]
    return scaling


def _llama3(file: GgufFile, said: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The published scaling of Llama 3.1 to 3.3, when it gives the factors that are in the file."""
    told = file.read(FACTORS).double()
    width, factor = said.get("rope.dimension_count") or _width(found), _shortest(told.max().item())
    waves = 2 * torch.pi * float(found.get("rope_theta", 10000.0)) ** (torch.arange(0, width, 2).double() / width)
    turns = LLAMA3["original_max_position_embeddings"] / waves
    share = (turns - LLAMA3["low_freq_factor"]) / (LLAMA3["high_freq_factor"] - LLAMA3["low_freq_factor"])
    share = share.clamp(0, 1)
    expected = 1 / ((1 - share) / factor + share)
    if told.shape != expected.shape or not torch.allclose(told, expected, rtol=1e-5, atol=0):
        what = f"{FACTORS} is not the scaling of Llama 3.1 with factor {factor}, the only one that is known"
        raise CheckpointError(what, file.path, "convert the original model")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def _width(found: Mapping[str, Any]) -> int:
    """Of a head."""
    hidden, heads = found.get("hidden_size"), found.get("num_attention_heads")
    known = type(hidden) is int and type(heads) is int and heads > 0
    return found.get("head_dim") or (hidden // heads if known else 0)  # type: ignore[operator]


def _name(name: str, kind: Kind) -> str:
    """In transformers; a name that is not known stays, and has no place in the model."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in NAMES:
        return f"{NAMES[parts[0]]}.{parts[1]}"
    roles = {**LAYER, **kind.norms}
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in roles:
        return f"model.layers.{int(parts[1])}.{roles[parts[2]]}.{parts[3]}"
    return name


def _shortest(value: Any) -> Any:
    """A number as it was written before it was rounded to float32: 9.999999747378752e-06 is 1e-05."""
    if not isinstance(value, float):
        return value
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if torch.tensor(short, dtype=torch.float32) == torch.tensor(value, dtype=torch.float32):
            return short
    return value
