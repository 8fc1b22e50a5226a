"""The same step in another framework, for bench/parallel.py: OLMo-core's Llama under its own FSDP2 and tensor parallel.

Its dense model of the same sizes, its parallel layers, torch's fused AdamW and torch's clipping, as its train module
calls them. One document a row and a plain causal mask, which is what its torch attention knows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from shardforge.bench.by_hand import Sizes, scored
from shardforge.core.optional import require
from shardforge.nn.batch import Batch


class OlmoCore:
    """tp2 or dp2 on two ranks."""

    def __init__(self, sizes: Sizes, layout: str, length: int):
        require("olmo_core", for_="bench parallel --peer", extra="bench")
        from olmo_core.nn.feed_forward import FeedForwardConfig
        from olmo_core.nn.transformer import TransformerConfig

        config = TransformerConfig.llama_like(
            d_model=sizes.hidden,
            vocab_size=sizes.vocab,
            n_layers=sizes.layers,
            n_heads=sizes.heads,
            feed_forward=FeedForwardConfig(hidden_size=sizes.inner, bias=False),
        )
        self.model = config.build(init_device="meta")
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp" if layout == "tp2" else "dp",))
        if layout == "tp2":
            self.model.apply_tp(mesh["tp"])
        else:
            self.model.apply_fsdp(dp_mesh=mesh["dp"])
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.set_reshard_after_forward(False)  # ZeRO-2, as the others
                    module.set_gradient_divide_factor(1.0)
                    module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
        self.model.init_weights(device=torch.device("cpu"), max_seq_len=length)
        self.group = dist.group.WORLD if layout == "dp2" else None
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    def step(self, batch: Batch) -> float:
        count = scored(batch, self.group)
        out = self.model(batch.tokens, labels=batch.labels, loss_reduction="sum", loss_div_factor=count)
        loss = out.loss.full_tensor() if isinstance(out.loss, DTensor) else out.loss
        out.loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        total = loss.detach().clone()
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total.item()
