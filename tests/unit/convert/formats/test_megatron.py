"""What goes into a torch_dist folder comes back from it, and torch itself finds it there."""

from __future__ import annotations

import argparse
import json
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from shardforge.checkpoint.state import table
from shardforge.cli.convert import layout
from shardforge.convert.design import updated
from shardforge.convert.format import Options
from shardforge.convert.formats import megatron
from shardforge.convert.pieces import Pieces
from shardforge.core.errors import CheckpointError
from shardforge.families.megatron import NOTE
from shardforge.families.open import open_source
from shardforge.families.section import config
from shardforge.families.source import Beside, Info
from shardforge.model.build import build
from shardforge.recipe.provenance import plain
from tests.tiny import tiny
from tests.unit.families.test_megatron_args import GQA, MLA, MOE, NORM, SIGMOID, section

MIXED = MOE | {"router": SIGMOID, "shared": {"kind": "glu", "inner": 8}}
MIXED |= {"balance": [{"scope": "batch", "weight": 0.1, "counts": "previous"}]}
RESIDUAL = {"kind": "pre", "norm": NORM}
MODELS = {
    "dense": section(),
    "tied, biased": section(GQA | {"bias": "all"}, {"kind": "mlp", "inner": 24, "bias": True}, head="tied"),
    "mixture": section(GQA, MIXED),
    "latent mixtures, further": section(
        blocks={
            "one": {"mixer": MLA, "ffn": {"kind": "glu", "inner": 24}, "residual": RESIDUAL},
            "two": {"mixer": MLA, "ffn": MIXED, "residual": RESIDUAL},
        },
        stack=["one", "two x 2"],
        mtp={"block": "two", "hidden": "after_norm", "norm": NORM},
    ),
}
STEP = 7
COSINE = {"kind": "cosine", "lr": 0.5, "warmup": 4}
TRAIN = {"steps": 20, "sequences": 8, "seq_len": 16}


class Memory:
    """A source whose numbers follow from their names."""

    def __init__(self, model: dict[str, Any], dtype: str = "float32", moments: bool = True):
        self.path = Path("memory")
        built = build(config(model, "test"), nn.Identity())
        self.model = model
        self.names = {name: Info(tuple(each["shape"]), dtype) for name, each in table(built).items()}
        self.moments = ("exp_avg", "exp_avg_sq") if moments else ()
        self.counts = ("step",) if moments else ()
        optim = {"kind": "adamw", "beta2": 0.99, "eps": 1e-7}
        recipe = plain(tiny(model=model, optim=optim, schedule=COSINE, train=TRAIN))
        self.beside = Beside(step=STEP, recipe=recipe, extra={"data": {"step": STEP}}, length=16)

    def read(self, name: str) -> Tensor:
        return self._drawn(name).to(getattr(torch, self.names[name].dtype))

    def read_moment(self, kind: str, name: str) -> Tensor:
        return torch.tensor(float(STEP)) if kind == "step" else self._drawn(name, kind)

    def _drawn(self, name: str, kind: str = "") -> Tensor:
        draw = torch.Generator().manual_seed(zlib.crc32(f"{kind} {name}".encode()))
        return torch.randn(self.names[name].shape, generator=draw)


def written(source: Any, folder: Path, **how: Any) -> megatron.TorchDist:
    writer = megatron.design(source, Options(to="megatron", **how))
    records = {}
    for file in writer.files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with Pieces(source) as pieces:
            records[file.name] = writer.write(path, [pieces.part(item) for item in file.items])
            pieces.found()
    writer.finish(folder, json.loads(json.dumps(records)))
    return writer


def same(one: Any, other: Any) -> bool:
    kinds = one.moments
    weights = all(torch.equal(one.read(name), other.read(name)) for name in one.names)
    return weights and all(
        torch.equal(one.read_moment(kind, name), other.read_moment(kind, name))
        for name in updated(one)
        for kind in kinds
    )


@pytest.mark.parametrize("limit", [1, 1 << 30])
@pytest.mark.parametrize("name", MODELS)
def test_weights_and_moments_come_back(tmp_path, name, limit):
    source = Memory(MODELS[name])
    written(source, tmp_path, shard_bytes=limit)
    back = open_source(tmp_path)
    assert list(back.names) == list(source.names) and back.moments == source.moments and same(source, back)


def test_the_run_comes_back(tmp_path):
    source = Memory(MODELS["mixture"])
    written(source, tmp_path)
    back = open_source(tmp_path)
    assert (back.model, back.beside.recipe) == (source.model, source.beside.recipe)
    assert (back.beside.step, back.beside.extra, back.beside.length) == (STEP, {"data": {"step": STEP}}, 16)
    assert (back.beside.unread, back.read_moment("step", "norm.weight")) == ((), float(STEP))


def test_a_later_save_in_the_same_folder_does_not_get_the_run(tmp_path):
    writer = written(Memory(MODELS["dense"]), tmp_path)
    note = writer.opened(tmp_path) / NOTE
    note.write_text(json.dumps(json.loads(note.read_text()) | {"save": "another"}))
    beside = open_source(tmp_path).beside
    assert beside.recipe is None and beside.extra is None
    assert f"{NOTE}: it belongs to an earlier save in this folder" in beside.unread


def test_rounded_weights_keep_their_numbers_in_the_optimizer(tmp_path):
    source = Memory(MODELS["mixture"])
    writer = written(source, tmp_path, dtype="bf16")
    assert same(source, open_source(tmp_path))
    metadata = dcp.FileSystemReader(writer.opened(tmp_path)).read_metadata().state_dict_metadata
    types = {key: metadata[key].properties.dtype for key in ("output_layer.weight", BIAS)}
    assert types == {"output_layer.weight": torch.bfloat16, BIAS: torch.float32}


BIAS = "decoder.layers.mlp.router.expert_bias"


def test_weights_alone_have_no_optimizer(tmp_path):
    writer = written(Memory(MODELS["dense"]), tmp_path, moments="drop")
    keys = dcp.FileSystemReader(writer.opened(tmp_path)).read_metadata().state_dict_metadata
    assert not any(key.startswith("optimizer.") for key in keys)
    assert any("--moments drop" in line for line in writer.left)


def test_weights_of_no_step_are_a_release(tmp_path):
    source = Memory(MODELS["dense"], moments=False)
    source.beside = replace(source.beside, step=None)
    written(source, tmp_path)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert same(source, open_source(tmp_path))


def test_torch_loads_a_tensor_under_each_of_its_names(tmp_path):
    source = Memory(MODELS["dense"])
    folder = written(source, tmp_path).opened(tmp_path)
    norm = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
    keys = (norm, "decoder.layers.input_layernorm.weight", f"optimizer.state.param.{norm}")
    state = {key: torch.empty(3, 16) for key in keys}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process loads is no mistake
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    expected = torch.stack([source.read(f"blocks.{layer}.mixer_residual.norm.weight") for layer in range(3)])
    assert all(torch.equal(state[key], expected) for key in keys)


def test_the_same_weights_are_on_the_disk_once(tmp_path):
    source = Memory(MODELS["dense"])
    numbers = sum(source.read(name).numel() for name in source.names)
    writer = written(source, tmp_path)
    assert sum(file.bytes for file in writer.files) == 3 * 4 * numbers


def test_words_are_padded_to_the_ranks_of_tp(tmp_path):
    source = Memory(MODELS["dense"])
    writer = written(source, tmp_path, layout={"tp": 5, "pp": 3})
    item = next(item for file in writer.files for item in file.items if item.key == "output_layer.weight")
    told = writer.common["args"]
    assert (item.shape[0], told.padded_vocab_size, told.vocab_size) == (35, 35, 32)
    assert (told.tensor_model_parallel_size, told.pipeline_model_parallel_size) == (5, 3)
    assert same(source, open_source(tmp_path))


def test_an_axis_that_megatron_does_not_have_is_refused():
    with pytest.raises(CheckpointError, match="xp is no axis"):
        megatron.design(Memory(MODELS["dense"]), Options(to="megatron", layout={"xp": 2}))


@pytest.mark.parametrize("text", ["dp2-tp2", "rep2-dp2-tp2"])
def test_axes_that_share_the_data_are_no_arguments(text):
    writer = megatron.design(Memory(MODELS["dense"]), Options(to="megatron", layout=layout(text)))
    told = vars(writer.common["args"])
    sizes = {name: size for name, size in told.items() if name.endswith("parallel_size") and size != 1}
    assert sizes == {"tensor_model_parallel_size": 2}


def test_experts_on_several_ranks_have_an_optimizer_of_their_own(tmp_path):
    writer = written(Memory(MODELS["mixture"]), tmp_path, layout={"ep": 2})
    kinds = [
        [each["is_expert_parallel"] for each in one["param_groups"]] for one in writer.common["optimizer"].values()
    ]
    assert kinds == [[False, False], [True]]


def test_rates_and_position_stand_beside_the_tensors(tmp_path):
    source = Memory(MODELS["dense"])
    common = megatron.design(source, Options(to="megatron")).common
    group, schedule = common["optimizer"]["optimizer"]["param_groups"][0], common["opt_param_scheduler"]
    assert (group["betas"], group["eps"], group["step"], schedule["max_lr"]) == ((0.9, 0.99), 1e-7, STEP, 0.5)
    assert (schedule["num_steps"], schedule["lr_warmup_steps"]) == (STEP * 8, 4 * 8)
    assert (common["iteration"], common["args"].consumed_train_samples) == (STEP, STEP * 8)


def test_what_training_does_otherwise_there_is_told():
    left = megatron.design(Memory(MODELS["mixture"]), Options(to="megatron")).left
    assert any("balance with scope: batch and counts: previous" in line for line in left)


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    writer = written(Memory(MODELS["dense"]), tmp_path)
    file = writer.opened(tmp_path) / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    source = open_source(tmp_path)
    with pytest.raises(CheckpointError, match=r"would end at byte \d+, the file has \d+"):
        for name in source.names:
            source.read_moment("exp_avg_sq", name)


def test_a_file_that_is_missing_is_named(tmp_path):
    writer = written(Memory(MODELS["dense"]), tmp_path)
    (writer.opened(tmp_path) / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing"):
        open_source(tmp_path).read("norm.weight")


def test_a_moment_of_another_optimizer_stays_behind():
    source = Memory(MODELS["dense"])
    source.moments = ("exp_avg",)
    writer = megatron.design(source, Options(to="megatron"))
    assert any("Megatron keeps those of Adam alone" in line for line in writer.left)
    assert not any(item.kind for file in writer.files for item in file.items)


def test_weights_that_were_updated_more_often_than_others_are_refused():
    source = Memory(MODELS["dense"])
    source.read_moment = lambda kind, name: torch.tensor(float(len(name)))  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="counted other steps for other weights"):
        megatron.design(source, Options(to="megatron"))


def test_what_lies_beside_the_tensors_needs_no_class_but_one(tmp_path):
    writer = written(Memory(MODELS["mixture"]), tmp_path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = torch.load(writer.opened(tmp_path) / "common.pt", weights_only=True)
    assert found["args"].num_experts == 4 and found["iteration"] == STEP


def test_the_same_source_gives_the_same_bytes(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        written(Memory(MODELS["mixture"]), folder, shard_bytes=4096)
    one, two = ({each.name: each.read_bytes() for each in folder.rglob("*") if each.is_file()} for folder in folders)
    assert one == two


def test_rates_of_megatron_itself_are_taken_along(tmp_path):
    writer = written(Memory(MODELS["dense"]), tmp_path)
    (writer.opened(tmp_path) / NOTE).unlink()
    common = megatron.design(open_source(tmp_path), Options(to="megatron")).common
    group = common["optimizer"]["optimizer"]["param_groups"][0]
    assert (group["betas"], group["eps"], common["opt_param_scheduler"]["max_lr"]) == ((0.9, 0.99), 1e-7, 0.5)
