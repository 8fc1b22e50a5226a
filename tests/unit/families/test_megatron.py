"""Checkpoints of Megatron, laid out by hand as megatron-core 0.16 names and cuts them, read as the same model.

Where megatron-core is installed, its own GPTModel saves one and its logits are compared.
"""

from __future__ import annotations

import argparse
import enum
import io
import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from shardforge.checkpoint.tensorfile import Part
from shardforge.convert.torchdist import Index, write_pieces
from shardforge.core.errors import CheckpointError, Problems
from shardforge.families.megatron import MegatronSource, model
from shardforge.families.open import open_source
from shardforge.families.settings import Settings
from tests.tiny import tiny
from tests.unit.families.conftest import model_of

H, F, N, M, D, L, V = 16, 24, 4, 2, 4, 3, 32


class Backend(enum.Enum):
    """Settings hold enums of Megatron; here is one whose class a reader must not need."""

    AUTO = 1


ARGS: dict[str, Any] = {
    "num_layers": L,
    "hidden_size": H,
    "ffn_hidden_size": F,
    "num_attention_heads": N,
    "group_query_attention": True,
    "num_query_groups": M,
    "kv_channels": D,
    "padded_vocab_size": V,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "rotary_base": 500000,
    "num_experts": None,
    "params_dtype": torch.bfloat16,
    "attention_backend": Backend.AUTO,
}
BIASED = {"add_bias_linear": True, "normalization": "LayerNorm", "swiglu": False, "group_query_attention": False}
ABSOLUTE = {"position_embedding_type": "learned_absolute", "max_position_embeddings": 8}
TIED = {"untie_embeddings_and_output_weights": False}
KINDS = {
    "llama": {},
    "gpt": BIASED | ABSOLUTE | TIED,
    "qk norm, qkv bias": {"qk_layernorm": True, "add_qkv_bias": True},
}


def weights_of(args: Mapping[str, Any]) -> dict[str, Tensor]:
    """Ours, random, of the model that these settings describe."""
    recipe = tiny(model=model(Settings(args, Path("args"))))
    return {name: weight.detach() for name, weight in model_of(recipe, 5).named_parameters()}


def theirs(ours: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same weights as Megatron keeps them, written down apart from the reader's tables."""
    groups = M if args["group_query_attention"] else N
    out = {"embedding.word_embeddings.weight": ours["embed.weight"]}
    if "embed.places.weight" in ours:
        out["embedding.position_embeddings.weight"] = ours["embed.places.weight"]
    if "head.weight" in ours:
        out["output_layer.weight"] = ours["head.weight"]
    for leaf in ("weight", "bias"):
        if f"norm.{leaf}" in ours:
            out[f"decoder.final_layernorm.{leaf}"] = ours[f"norm.{leaf}"]
        for layer in range(L):
            mine = {name.removeprefix(f"blocks.{layer}."): value for name, value in ours.items()}
            at = f"decoder.layers.{layer}"
            if f"mixer.q.{leaf}" in mine:
                parts = [
                    mine[f"mixer.{role}.{leaf}"].reshape(groups, -1, *mine[f"mixer.q.{leaf}"].shape[1:])
                    for role in "qkv"
                ]
                out[f"{at}.self_attention.linear_qkv.{leaf}"] = torch.cat(parts, 1).flatten(0, 1)
            into = [mine[f"ffn.{role}.{leaf}"] for role in ("gate", "up") if f"ffn.{role}.{leaf}" in mine]
            if into:
                out[f"{at}.mlp.linear_fc1.{leaf}"] = torch.cat(into)
            for role, name in {
                "mixer.out": "self_attention.linear_proj",
                "ffn.down": "mlp.linear_fc2",
                "mixer.q_norm": "self_attention.q_layernorm",
                "mixer.k_norm": "self_attention.k_layernorm",
            }.items():
                if f"{role}.{leaf}" in mine:
                    out[f"{at}.{name}.{leaf}"] = mine[f"{role}.{leaf}"]
            for role, name in {
                "mixer_residual.norm": "self_attention.linear_qkv.layer_norm_",
                "ffn_residual.norm": "mlp.linear_fc1.layer_norm_",
            }.items():
                if f"{role}.{leaf}" in mine:
                    out[f"{at}.{name}{leaf}"] = mine[f"{role}.{leaf}"]
    return out


def stacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All layers of a weight as one tensor, as sharded_state_dict saves them."""
    out = {name: value for name, value in state.items() if ".layers." not in name}
    for name in state:
        if name.startswith("decoder.layers.0."):
            rest = name.removeprefix("decoder.layers.0.")
            out[f"decoder.layers.{rest}"] = torch.stack([state[f"decoder.layers.{layer}.{rest}"] for layer in range(L)])
    return out


def save_dist(path: Path, args: Mapping[str, Any]) -> dict[str, Tensor]:
    """A torch_dist folder, with part of an optimizer in it; our weights come back."""
    ours = weights_of(args)
    state = stacked(theirs(ours, args)) | {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(H)}
    save(path, state, args)
    return ours


def save(path: Path, state: Mapping[str, Tensor], args: Mapping[str, Any], **common: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process saves is no mistake
        dcp.save(dict(state), checkpoint_id=path, no_dist=True)
    torch.save({"args": argparse.Namespace(**args), "iteration": 7, **common}, path / "common.pt")


def save_legacy(
    path: Path, args: Mapping[str, Any], tp: int = 1, pp: int = 1, local: bool = False
) -> dict[str, Tensor]:
    """mp_rank folders of tp x pp ranks; `local` names norms as layers without Transformer Engine do."""
    ours = weights_of(args)
    whole = theirs(ours, args)
    for t in range(tp):
        for p in range(pp):
            state: dict[str, Any] = {"decoder.layers.0.mlp.linear_fc1._extra_state": None}
            per = L // pp
            for name, value in whole.items():
                words = name.split(".")
                if words[1] == "layers":
                    if int(words[2]) // per != p:
                        continue
                    name = ".".join([*words[:2], str(int(words[2]) % per), *words[3:]])
                elif (p > 0 and "embedding" in name) or (p < pp - 1 and ("final" in name or "output" in name)):
                    continue
                if local:
                    name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
                    name = name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
                state[name] = shard(name, value, t, tp, args).clone()
            folder = path / "iter_0000007" / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else ""))
            folder.mkdir(parents=True)
            saved = {"model": state, "args": argparse.Namespace(**args), "rng_state": [Backend.AUTO]}
            torch.save(saved, folder / "model_optim_rng.pt")
    (path / "latest_checkpointed_iteration.txt").write_text("7\n")
    return ours


def shard(name: str, value: Tensor, rank: int, tp: int, args: Mapping[str, Any]) -> Tensor:
    if "linear_proj.weight" in name or "linear_fc2.weight" in name:
        return value.chunk(tp, 1)[rank]
    if "linear_fc1." in name and "layer_norm" not in name and args["swiglu"]:
        return torch.cat([half.chunk(tp)[rank] for half in value.chunk(2)])
    split = ("word_embeddings", "output_layer", "linear_qkv", "linear_fc1")
    if any(each in name for each in split) and "layer_norm" not in name:
        return value.chunk(tp)[rank]
    return value


def same(path: Path, ours: Mapping[str, Tensor]) -> bool:
    source = open_source(path)
    read = {name: source.read(name) for name in source.names}
    shapes = {name: info.shape for name, info in source.names.items()} == {n: tuple(w.shape) for n, w in ours.items()}
    return shapes and read.keys() == ours.keys() and all(torch.equal(read[name], ours[name]) for name in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_a_torch_dist_checkpoint_is_read(tmp_path, kind):
    assert same(tmp_path / "x", save_dist(tmp_path / "x", ARGS | KINDS[kind]))


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_shards_of_a_legacy_checkpoint_are_joined(tmp_path, kind, tp, pp):
    assert same(tmp_path, save_legacy(tmp_path, ARGS | KINDS[kind], tp, pp))


def test_norms_that_stand_alone_are_the_same_norms(tmp_path):
    assert same(tmp_path, save_legacy(tmp_path, ARGS, local=True))


def test_the_model_is_what_the_arguments_say(tmp_path):
    save_dist(tmp_path / "x", ARGS)
    found = MegatronSource(tmp_path / "x").model
    mixer = found["blocks"]["dense"]["mixer"]
    assert (mixer["heads"], mixer["kv_heads"], mixer["position"]["base"]) == (N, M, 500000.0)
    assert (found["norm"]["kind"], found["head"]["kind"], found["stack"]) == ("rmsnorm", "linear", [f"dense x {L}"])


def test_a_pickle_that_would_run_something_runs_nothing(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    save_dist(tmp_path / "x", ARGS)
    torch.save({"args": argparse.Namespace(**ARGS), "evil": Evil()}, tmp_path / "x" / "common.pt")
    MegatronSource(tmp_path / "x")
    assert not marker.exists()


def test_the_index_of_a_torch_dist_checkpoint_runs_nothing_either(tmp_path):
    marker = tmp_path / "ran"
    save_dist(tmp_path / "x", ARGS)
    (tmp_path / "x" / ".metadata").write_bytes(f"cos\nmkdir\n(S'{marker}'\ntR.".encode())
    with pytest.raises(CheckpointError, match=r"no torch.distributed checkpoint"):
        MegatronSource(tmp_path / "x")
    assert not marker.exists()


def test_without_arguments_the_model_is_unknown(tmp_path):
    save_dist(tmp_path / "x", ARGS)
    (tmp_path / "x" / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"does not hold the arguments"):
        open_source(tmp_path / "x")


def test_what_is_not_supported_is_refused_with_all_reasons(tmp_path):
    save_dist(tmp_path / "x", ARGS)
    args = argparse.Namespace(**ARGS | {"qk_l2_norm": True, "normalization": "Other", "window_size": (4, 4)})
    torch.save({"args": args}, tmp_path / "x" / "common.pt")
    with pytest.raises(Problems) as caught:
        open_source(tmp_path / "x")
    told = str(caught.value)
    assert all(word in told for word in ("qk_l2_norm=True", "normalization='Other'", "window_size=(4, 4)"))


def test_a_mixture_in_the_older_format_is_refused(tmp_path):
    save_legacy(tmp_path, ARGS)
    file = tmp_path / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    saved = torch.load(file, weights_only=False)
    saved["args"].num_experts = 4
    torch.save(saved, file)
    with pytest.raises(Problems, match=r"mixtures and latent attention are not read of this format"):
        open_source(tmp_path)


def test_rows_beyond_the_vocabulary_are_padding(tmp_path):
    ours = save_dist(tmp_path / "x", ARGS)
    told = argparse.Namespace(**ARGS | {"vocab_size": V - 3})
    torch.save({"args": told}, tmp_path / "x" / "common.pt")
    assert torch.equal(open_source(tmp_path / "x").read("embed.weight"), ours["embed.weight"][: V - 3])


def test_the_wrapper_of_a_training_does_not_count_in_names(tmp_path):
    state = stacked(theirs(ours := weights_of(ARGS), ARGS))
    save(tmp_path / "x", {f"module.{name}": value for name, value in state.items()}, ARGS)
    assert same(tmp_path / "x", ours)


def test_arguments_inside_of_the_tensors_files_count(tmp_path):
    """As megatron-core keeps them since 0.17."""
    ours, args = weights_of(ARGS), argparse.Namespace(**ARGS)
    stream = io.BytesIO()
    torch.save([{"args": args, "iteration": 9}], stream)
    path = tmp_path / "x"
    path.mkdir()
    stored = [
        Part(name, "float32", tuple(each.shape), partial(_same, each)) for name, each in theirs(ours, ARGS).items()
    ]
    pieces = write_pieces(path / "0.distcp", stored, [each.shape for each in stored])["pieces"]
    (path / "1.distcp").write_bytes(stream.getvalue())
    index = Index()
    for part, piece in zip(stored, pieces, strict=True):
        index.add(part.key, part.dtype, ((0,) * len(part.shape), part.shape, part.shape), ("0.distcp", *piece))
    index.add_object("common_state/shard_0_1", ("1.distcp", 0, len(stream.getvalue())))
    index.write(path / ".metadata", "save")
    assert same(path, ours) and open_source(path).beside.step == 9


def _same(tensor: Tensor) -> Tensor:
    return tensor


def test_halves_experts_and_layers_by_themselves_are_the_same_model(tmp_path):
    """As singleton_local_shards saves them."""
    state = theirs(ours := weights_of(ARGS), ARGS)
    for name in [name for name in state if "linear_fc1.weight" in name]:
        whole = state.pop(name)
        state |= {f"{name}_w": whole[:F].clone(), f"{name}_v": whole[F:].clone()}
    save(tmp_path / "x", state, ARGS)
    assert same(tmp_path / "x", ours)


def test_weights_that_the_optimizer_keeps_take_the_place_of_the_rounded_ones(tmp_path):
    state = stacked(theirs(ours := weights_of(ARGS), ARGS))
    rounded = {name: value.bfloat16() for name, value in state.items()}
    save(tmp_path / "x", rounded | {f"optimizer.state.fp32_param.{name}": each for name, each in state.items()}, ARGS)
    assert same(tmp_path / "x", ours)


def test_moments_and_steps_are_read_under_our_names(tmp_path):
    state = stacked(theirs(ours := weights_of(ARGS), ARGS))
    kinds = {"exp_avg": 2.0, "exp_avg_sq": 3.0}
    more = {f"optimizer.state.{k}.{name}": x * each for k, x in kinds.items() for name, each in state.items()}
    save(tmp_path / "x", state | more, ARGS, optimizer={"optimizer": {"param_groups": [{"step": 9.0}]}})
    source = open_source(tmp_path / "x")
    assert (source.moments, source.counts) == (("exp_avg", "exp_avg_sq"), ("step",))
    assert source.read_moment("step", "norm.weight") == 9.0
    assert all(torch.equal(source.read_moment(k, name), x * ours[name]) for k, x in kinds.items() for name in ours)


def with_moments(tmp_path: Path, without: str = "", **more: Tensor) -> Any:
    """A checkpoint with the moments of Adam but for one that is left out."""
    state = stacked(theirs(weights_of(ARGS), ARGS))
    kinds = ("exp_avg", "exp_avg_sq")
    held = {f"optimizer.state.{kind}.{name}": each for kind in kinds for name, each in state.items()}
    held.pop(without, None)
    save(tmp_path / "x", state | held | {f"optimizer.state.{name}": each for name, each in more.items()}, ARGS)
    return open_source(tmp_path / "x")


def test_a_moment_that_is_missing_of_one_weight_is_a_problem_for_whoever_reads_moments(tmp_path):
    source = with_moments(tmp_path, without="optimizer.state.exp_avg_sq.decoder.final_layernorm.weight")
    assert source.moments == ("exp_avg", "exp_avg_sq") and source.read("norm.weight").shape == (H,)
    with pytest.raises(Problems, match=r"exp_avg_sq of decoder.final_layernorm.weight is missing(.|\n)*--moments drop"):
        source.read_moment("exp_avg", "embed.weight")


def test_what_an_optimizer_keeps_that_is_no_moment_is_told(tmp_path):
    source = with_moments(tmp_path, **{"row.decoder.final_layernorm.weight": torch.zeros(3)})
    assert source.moments == ("exp_avg", "exp_avg_sq")
    assert "row, which the optimizer kept: it has the shape of no weight" in source.beside.unread


def test_shards_of_an_optimizer_that_cannot_be_read_are_told(tmp_path):
    state = stacked(theirs(weights_of(ARGS), ARGS)) | {"optimizer.distributed.dp_group_idx_0.x": torch.zeros(4)}
    save(tmp_path / "x", state, ARGS, optimizer={})
    source = open_source(tmp_path / "x")
    assert source.moments == () and "fully-reshardable" in source.beside.unread[0]


def test_a_missing_rank_is_named(tmp_path):
    save_legacy(tmp_path, ARGS, tp=2)
    (tmp_path / "iter_0000007" / "mp_rank_00").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"1 of 2 x 1 folders \(tp x pp\) are missing, first rank \(0, 0\)"):
        open_source(tmp_path)


def test_weights_unlike_the_arguments_are_told_with_both_shapes(tmp_path):
    save_dist(tmp_path / "x", ARGS)
    torch.save({"args": argparse.Namespace(**ARGS | {"ffn_hidden_size": 20})}, tmp_path / "x" / "common.pt")
    with pytest.raises(
        Problems, match=r"linear_fc2.weight gives blocks.0.ffn.down.weight \[16, 24\], x says \[16, 20\]"
    ):
        open_source(tmp_path / "x")
