from __future__ import annotations

import json
import shutil

import pytest
import torch

from shardforge.checkpoint import tensorfile
from shardforge.cli.main import main
from shardforge.convert.format import Options
from shardforge.convert.plan import design
from shardforge.core.errors import CheckpointError, ForgeError
from shardforge.families.deepspeed import DeepSpeedSource
from shardforge.families.open import open_source
from shardforge.recipe.load import load
from tests.unit.convert.folders import converted, weights
from tests.unit.upcycle import dense

MOE = {"kind": "moe", "experts": 4, "k": 2, "inner": 6}


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    """The trained run as a universal checkpoint."""
    return converted(run, tmp_path_factory.mktemp("made") / "universal", "deepspeed")


def saved(path):
    return torch.load(path, weights_only=False)


def zero(made):
    return made.path / "global_step7_universal" / "zero"


def test_there_and_back_again_is_the_same_to_the_bit(run, made, tmp_path):
    back = converted(made.path, tmp_path / "back", "shardforge")
    one, other = open_source(run), open_source(back.path)
    assert weights(run).keys() == weights(back.path).keys()
    for kind in ("", *one.moments, *one.counts):
        for name in one.names:
            read = [each.read_moment(kind, name) if kind else each.read(name) for each in (one, other)]
            assert torch.equal(*read) and read[0].dtype == read[1].dtype, (kind, name)
    assert other.beside.step == one.beside.step == 7


def test_names_are_those_that_transformers_trains_with(made):
    folders = {path.name for path in zero(made).iterdir() if path.is_dir()}
    assert folders >= {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"}
    for folder in (zero(made) / name for name in folders):
        assert {path.name for path in folder.iterdir()} == {"fp32.pt", "exp_avg.pt", "exp_avg_sq.pt", "step.pt"}


def test_experts_are_stacked_as_transformers_has_them_in_memory(tmp_path):
    path = dense.save(tmp_path / "moe", ffn=MOE)
    made = converted(path, tmp_path / "u", "deepspeed", moments="drop")
    experts = [name for name in made.certificate["tensors"] if ".experts." in str(name)]
    folder = made.path / "global_step7_universal" / "zero" / "model.layers.0.mlp.experts.gate_up_proj"
    assert experts and saved(folder / "fp32.pt")["param"].shape == (4, 12, 16)
    assert weights(path).keys() == weights(made.path).keys()
    assert all(torch.equal(weight, weights(made.path)[name]) for name, weight in weights(path).items())


def test_a_model_that_no_family_says_has_our_names(tmp_path):
    path = dense.save(tmp_path / "odd", ffn={"kind": "mlp", "inner": 24, "activation": "relu2"})
    made = converted(path, tmp_path / "u", "deepspeed")
    assert (made.path / "global_step7_universal/zero/blocks.0.ffn.up.weight/fp32.pt").is_file()
    assert any(line.startswith("published names") for line in made.certificate["left"])
    assert not (made.path / "config.json").exists()
    assert all(torch.equal(weight, weights(made.path)[name]) for name, weight in weights(path).items())


def test_the_folder_is_found_by_its_latest_and_says_its_model_itself(made, tmp_path):
    source = open_source(made.path)
    assert isinstance(source, DeepSpeedSource) and source.path.name == "global_step7_universal"
    alone = shutil.copytree(source.path, tmp_path / "alone")
    assert open_source(alone).model == source.model


def test_the_learning_rate_of_the_next_step_is_that_of_the_recipe(run, made):
    recipe = load(run / "recipe.yaml").recipe
    groups = saved(zero(made) / "optimizer_state.pt")["param_groups"]
    assert {group["lr"] for group in groups} == {recipe.schedule.at(7, recipe.train.steps)}
    assert len(groups) >= len(open_source(run).names)  # a group of the engine that finds none here keeps random weights


def test_steps_and_samples_are_counted_as_deepspeed_does(run, made):
    states = saved(zero(made).parent / "mp_rank_00_model_states.pt")
    sequences = load(run / "recipe.yaml").recipe.train.sequences
    assert (states["global_steps"], states["global_samples"], states["skipped_steps"]) == (7, 7 * sequences, 0)
    assert (states["lr_scheduler"]["last_batch_iteration"], states["lr_scheduler"]["last_epoch"]) == (6, 7)
    assert states.keys() == saved(zero(made).parent / "zero_pp_rank_0_mp_rank_00_model_states.pt").keys()


def test_published_weights_have_no_moments_and_keep_their_tokenizer(published, tmp_path):
    made = converted(published, tmp_path / "u", "deepspeed")
    files = {path.name for path in made.path.rglob("*.pt")}
    assert "exp_avg.pt" not in files and "step.pt" not in files
    assert (made.path / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()
    source = open_source(made.path)
    assert source.moments == () and source.beside.tokens == open_source(published).beside.tokens
    assert all(torch.equal(weight, weights(published)[name]) for name, weight in weights(made.path).items())


def test_config_json_names_what_the_weights_are(published, tmp_path):
    made = converted(published, tmp_path / "u", "deepspeed")
    told = json.loads((made.path / "config.json").read_text())
    said = json.loads((published / "config.json").read_text())
    kept = ("architectures", "max_position_embeddings", "bos_token_id", "eos_token_id")
    assert {key: told.get(key) for key in kept} == {key: said.get(key) for key in kept}


def test_buffers_that_deepspeed_does_not_load_are_named(tmp_path):
    made = converted(
        dense.save(tmp_path / "moe", ffn=MOE | {"router": {"kind": "topk", "selection_bias": {"rate": 0.001}}}),
        tmp_path / "u",
        "deepspeed",
        moments="drop",
    )
    assert any("loads no buffers" in line and "selection_bias" in line for line in made.certificate["left"])


def test_moments_that_are_dropped_are_named(run, tmp_path):
    made = converted(run, tmp_path / "u", "deepspeed", moments="drop")
    assert "exp_avg.pt" not in {path.name for path in made.path.rglob("*.pt")}
    assert any("--moments drop" in line for line in made.certificate["left"])


@pytest.mark.parametrize("asked", [{"dtype": "bf16"}, {"layout": {"tp": 2}}], ids=str)
def test_what_such_a_checkpoint_cannot_be_is_refused(run, tmp_path, asked):
    with pytest.raises(CheckpointError, match="universal checkpoint h"):
        converted(run, tmp_path / "u", "deepspeed", **asked)
    assert not (tmp_path / "u").exists()


def test_weights_of_different_steps_are_refused_with_both(run, monkeypatch):
    source = open_source(run)
    real, name = source.read_moment, next(iter(source.names))
    monkeypatch.setattr(source, "read_moment", lambda kind, of: real(kind, of) + (of == name and kind == "step"))
    with pytest.raises(CheckpointError, match="DeepSpeed keeps one number for all"):
        design(source, Options(to="deepspeed"))


def test_a_file_holds_its_tensor_and_nothing_else(made):
    file = zero(made) / "model.layers.0.self_attn.q_proj.weight" / "fp32.pt"
    tensor = saved(file)["param"]
    assert tensor.untyped_storage().nbytes() == tensor.nbytes and file.stat().st_size < tensor.nbytes + 4096


def test_a_full_disk_is_told_as_one(run, tmp_path, monkeypatch):
    def full(file, block):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorfile, "put", full)
    with pytest.raises((OSError, ForgeError), match="No space left on device"):
        converted(run, tmp_path / "u", "deepspeed")
    assert not (tmp_path / "u").exists()


def test_a_model_that_is_described_elsewhere_is_converted_and_proved(made, published, tmp_path, capsys):
    alone = shutil.copytree(open_source(made.path).path, tmp_path / "alone")
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        states = saved(alone / name)
        states.pop("shardforge")
        torch.save(states, alone / name)
    call = ["convert", str(alone), str(tmp_path / "hf"), "--to", "huggingface", "--proof", "own", "--processes", "1"]
    assert main(call) != 0 and "--config" in capsys.readouterr().err
    assert main([*call, "--config", str(published / "config.json")]) == 0
    assert all(torch.equal(weight, weights(made.path)[name]) for name, weight in weights(tmp_path / "hf").items())
