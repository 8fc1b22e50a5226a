"""Real DeepSpeed on gloo processes for test_deepspeed.py: `python -m tests.formats.deepspeed_ranks TASKS.json`.

A task is a list of plain settings for `work`, done one after another by the same processes; the answers of rank 0 come
as JSON on the last line. Packages are imported once and the ranks forked from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

os.environ["DS_ACCELERATOR"] = "cpu"

RANKS = 2
ROWS, LENGTH = 2, 9
LR = 5.0e-2
CLIP = 1.0
MOMENTS = ("exp_avg", "exp_avg_sq")
LLAMA: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 18,
    "intermediate_size": 29,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "max_position_embeddings": 32,
}
"""Odd sizes, so that every partition ends in padding."""


def warmup(step: int) -> float:
    """A rate that is another one at every step, so that a schedule that begins anew gives other losses."""
    return (step + 1) / 8


def model(settings: dict[str, Any]) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(settings["architecture"], **(LLAMA | settings["config"]))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").float()


def groups(network: torch.nn.Module, split: bool) -> list[dict[str, Any]]:
    """Matrices with weight decay and vectors without; or all in one."""
    weights = list(network.parameters())
    if not split:
        return [{"params": weights, "weight_decay": 0.1}]
    matrices, vectors = ([each for each in weights if (each.dim() > 1) == wide] for wide in (True, False))
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed is told."""
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": case["stage"], "sub_group_size": case.get("sub_group_size", 10**9)},
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}},
        "bf16": {"enabled": case["bf16"]},
        "steps_per_print": 1000,
    }
    if case["schedule"] == "WarmupLR":
        found["scheduler"] = {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.0, "warmup_max_lr": LR, "warmup_num_steps": 8, "warmup_type": "linear"},
        }
    return found | ({"checkpoint": {"load_universal": True}} if "load" in case else {})


def train(engine: Any, steps: int) -> list[float]:
    """The mean losses over all ranks; the tokens depend on nothing but the step and the rank."""
    losses = []
    for _ in range(steps):
        source = torch.Generator().manual_seed(1000 * engine.global_steps + dist.get_rank())
        tokens = torch.randint(0, LLAMA["vocab_size"], (ROWS, LENGTH), generator=source)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().double()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def kept(engine: Any) -> dict[str, dict[str, Tensor]]:
    """What DeepSpeed itself says that it has: the float32 weights and the moments, whole."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False  # it links them before the second group has any
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[str, dict[str, Tensor]] = {}
    for name, weight in engine.module.named_parameters():
        found[name] = {"": safe_get_full_fp32_param(weight).clone()}
        found[name] |= {kind: safe_get_full_optimizer_state(weight, kind).clone() for kind in MOMENTS}
    return found


def universal(folder: Path) -> None:
    """DeepSpeed's own conversion of a folder of partitions."""
    from deepspeed.checkpoint import ds_to_universal

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    names = {"input_folder": str(folder), "output_folder": f"{folder}_universal"}
    ds_to_universal.main(argparse.Namespace(**options, **names, inject_missing_state=True))


def work(case: dict[str, Any]) -> dict[str, Any]:
    """Begin or load, train, save, and train on."""
    import deepspeed

    network = model(case)
    schedule = (lambda optimizer: LambdaLR(optimizer, warmup)) if case["schedule"] == "LambdaLR" else None
    engine, *_ = deepspeed.initialize(
        model=network,
        config=settings_of(case),
        model_parameters=groups(network, case["split"]),
        lr_scheduler=schedule,
    )
    answer: dict[str, Any] = {}
    if "load" in case:
        _, client = engine.load_checkpoint(case["load"], load_module_only=case.get("bare", False))
        answer |= {"client": client["shardforge"], "step": engine.global_steps}
        engine.global_steps = case["steps"]  # which weights alone do not bring along
    if "save" in case:
        train(engine, case["steps"])
        engine.save_checkpoint(case["save"], tag="step", client_state={"place": {"document": 5}})
        whole = kept(engine)
        if dist.get_rank() == 0:
            torch.save(whole, Path(case["save"]) / "kept.pt")
            network.config.architectures = [type(network).__name__]
            network.config.save_pretrained(case["save"])
            if case.get("universal"):
                universal(Path(case["save"]) / "step")
    answer["losses"] = train(engine, case["more"])
    engine.destroy()
    return answer


def _rank(rank: int, store: Path, tasks: list[dict[str, Any]], answers: Path) -> None:
    import deepspeed
    import deepspeed.ops

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    dist.init_process_group("gloo", store=dist.FileStore(str(store), RANKS), rank=rank, world_size=RANKS)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled, which takes a minute and a half
    deepspeed.init_distributed(dist_backend="gloo")
    found = [work(task) for task in tasks]
    if rank == 0:
        answers.write_text(json.dumps(found))
    dist.destroy_process_group()


def main(file: Path) -> int:
    import deepspeed  # noqa: F401 - before the fork
    import transformers  # noqa: F401

    tasks = json.loads(file.read_text())
    context = torch.multiprocessing.get_context("fork")
    args = file.with_suffix(".store"), tasks, file.with_suffix(".answers")
    processes = [context.Process(target=_rank, args=(rank, *args)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode or 0) for process in processes)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
