"""Our modules of further tokens compute what those of the transformers library compute: logits and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardforge.model.decoder import Decoder
from tests.tiny import LENGTH, VOCAB, assert_same
from tests.tiny_mtp import DEPTH, MTP, made, one_document, read, run

pytest.importorskip("transformers", reason="the transformers package is the reference")

TOLERANCE = 1e-5  # they round norms and angles to float32, also in a float64 model


class Theirs:
    """transformers' modules of further tokens behind a small Llama, with the weights of `ours`."""

    ROLES = {"embed_norm": "enorm", "hidden_norm": "hnorm", "project": "eh_proj", "norm": "post_norm"}
    BLOCK = {"mixer_residual.norm": "input_layernorm", "ffn_residual.norm": "post_attention_layernorm"}
    BLOCK |= {f"mixer.{role}": f"self_attn.{role}_proj" for role in "qkv"} | {"mixer.out": "self_attn.o_proj"}
    BLOCK |= {f"ffn.{role}": f"mlp.{role}_proj" for role in ("gate", "up", "down")}

    def __init__(self, ours: Decoder, concat: str, hidden: str):
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.modeling_layers import MtpModel

        shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "vocab_size": VOCAB}
        config = LlamaConfig(**shape, num_hidden_layers=2, rms_norm_eps=1e-6, attn_implementation="eager")
        config.num_mtp_layers, config.mtp_hidden_states_first = DEPTH, concat == "hidden_first"
        self.trunk = LlamaForCausalLM(config).double()
        self.mtp = MtpModel(self.trunk, DEPTH).double()
        self.after_norm = hidden == "after_norm"
        for layer in self.mtp.layers:
            layer.use_post_norm = self.after_norm
        self.weights = {name: self.find(name) for name, _ in ours.named_parameters()}
        for name, weight in ours.named_parameters():
            self.weights[name].data.copy_(weight.data)

    def find(self, name: str) -> nn.Parameter:
        where, _, rest = name.removesuffix(".weight").partition(".")
        if where == "mtp":
            j, _, rest = rest.partition(".")
            role = self.ROLES.get(rest) or f"mtp_block.{self.BLOCK[rest.removeprefix('block.')]}"
            return self.mtp.layers[int(j)].get_submodule(role).weight
        if where == "blocks":
            layer, _, rest = rest.partition(".")
            return self.trunk.model.layers[int(layer)].get_submodule(self.BLOCK[rest]).weight
        return {"embed": self.trunk.model.embed_tokens, "norm": self.trunk.model.norm, "head": self.trunk.lm_head}[
            where
        ].weight

    def logits(self, tokens: Tensor) -> list[Tensor]:
        """For the next token, and of each depth at the places that have the token ahead."""
        place = torch.arange(tokens.shape[1])[None]
        kept: list[Tensor] = []
        handle = self.trunk.model.norm.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        found = self.trunk(tokens, output_hidden_states=-1)
        handle.remove()
        out, x = [found.logits], found.hidden_states[-1] if self.after_norm else kept[0]
        for j in range(DEPTH):
            x = self.mtp.forward_layer(j, x[:, : tokens.shape[1] - j - 1], place[:, j + 1 :], None, tokens[:, j + 1 :])
            out.append(self.mtp.shared_head(x if self.after_norm else self.mtp.layers[j].post_norm(x)))
        return out


@pytest.mark.parametrize("concat", ["embed_first", "hidden_first"])
@pytest.mark.parametrize("hidden", ["after_norm", "before_norm"])
def test_logits_and_gradients_of_each_depth_equal_those_of_transformers(concat, hidden):
    """after_norm and embed_first is how transformers 5.23 runs the released weights of DeepSeek-V3."""
    ours = made(MTP | {"concat": concat, "hidden": hidden, "weight": 1.0})
    for name, weight in ours.named_parameters():
        if weight.dim() == 1:  # gains of norms: equal ones would hide which is which
            weight.data += 0.5 * torch.rand(len(weight), generator=torch.Generator().manual_seed(len(name)))
    theirs, given = Theirs(ours, concat, hidden), one_document()
    expected = theirs.logits(given.tokens)
    for j, (x, want) in enumerate(zip(read(ours, given), expected, strict=True)):
        assert_same({str(j): F.linear(x[:, : LENGTH - j], ours.head.operand())}, {str(j): want}, rtol=TOLERANCE)
    run(ours, given)["total"].backward()
    total = sum(
        (1.0 if j == 0 else 1.0 / DEPTH)
        * F.cross_entropy(logits.flatten(0, 1), given.labels[:, j:].flatten(), reduction="sum")
        for j, logits in enumerate(expected)
    )
    total.backward()
    found = {name: weight.grad for name, weight in ours.named_parameters()}
    assert_same(found, {name: theirs.weights[name].grad for name in found}, rtol=TOLERANCE)
