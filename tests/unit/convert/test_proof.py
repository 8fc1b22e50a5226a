"""What a conversion must not have done to a model is found, and found where it was done."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from shardforge.checkpoint.state import collect, table
from shardforge.checkpoint.store import Store
from shardforge.convert.proof import LENGTH, foresee, lines, prove
from shardforge.core.errors import CheckpointError, Problems
from shardforge.families.open import open_source
from shardforge.model.build import build
from shardforge.model.positions.rope import Rope
from shardforge.nn.init import fill
from shardforge.recipe.load import from_mapping
from shardforge.recipe.provenance import dump
from tests.tiny import GQA, HIDDEN, VOCAB, mapping

FP32 = {"master": "fp32", "compute": "fp32", "reduce": "fp32"}
SQUARE = {"kind": "moe", "experts": 4, "k": 2, "inner": HIDDEN}
MANY = {"kind": "moe", "experts": 64, "k": 1, "inner": 4}
FURTHER = {"mtp": {"depth": 2, "block": "one", "weight": 0.3}}


def ours(path, change=lambda state: None, dtype=torch.float32, **changes):
    """A run of ours whose weights, always the same, were changed."""
    recipe = from_mapping(mapping(**{"precision": FP32} | changes)).recipe
    model = build(recipe.model, recipe.objective.build(), torch.float32).to_empty(device="cpu")
    fill(model, 3)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    tensors = collect(model)
    with torch.no_grad():
        change({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(dump(recipe))
    store = Store(path / "checkpoints", recipe.checkpoint, describe={"model": table(model)})
    store.save(1, tensors, {}, wait=True)
    store.close()
    return path


def own(source, target, **how):
    return prove(source, target, **{"how": "own", "cast": False, "bisect": False} | how)


def swap(name, rows=(0, 1)):
    def change(state):
        state[name][list(rows)] = state[name][list(reversed(rows))]

    return change


def add(name, index, amount=1.0):
    def change(state):
        state[name][index] += amount

    return change


def transpose(name, expert):
    def change(state):
        state[name][expert] = state[name][expert].clone().mT

    return change


def told(source, target, **how):
    with pytest.raises(Problems) as found:
        own(source, target, **how)
    return str(found.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    path = tmp_path_factory.mktemp("llama") / "folder"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def changed(folder, path, change=lambda state: state, **settings):
    """A copy with other weights and other settings."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | settings))
    save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors", {"format": "pt"})
    return path


def test_equal_models_are_equal_bit_for_bit(tmp_path):
    proof = own(ours(tmp_path / "a"), ours(tmp_path / "b"))
    (comparison,) = proof.comparisons
    assert proof.method == "own" and proof.passed and proof.weights == 21
    assert (comparison.max_abs, comparison.cosine, comparison.error, comparison.tolerance) == (0.0, 1.0, 0.0, 0.0)


def test_a_proof_is_plain_data(tmp_path):
    plain = own(ours(tmp_path / "a"), ours(tmp_path / "b"), bisect=True).plain()
    again = json.loads(json.dumps(plain))
    names = [layer["name"] for layer in again["comparisons"][0]["layers"]]
    assert again["passed"] and names == ["embed", "blocks.0", "blocks.1", "norm", "logits"]


def test_layers_are_listed_on_request_alone(tmp_path):
    assert own(ours(tmp_path / "a"), ours(tmp_path / "b")).comparisons[0].layers == ()


def test_a_proof_is_told_to_people(tmp_path):
    source = ours(tmp_path / "a")
    text = "\n".join(lines(own(source, source, bisect=True).plain()))
    assert "21 weights equal the source's; 16 tokens computed" in text and "bit for bit" in text
    assert "    blocks.1     max-abs 0         cosine 1.000000  relative error 0" in text


def test_a_proof_that_fails_lists_the_layers_on_request(tmp_path):
    source, target = ours(tmp_path / "a"), ours(tmp_path / "b", swap("blocks.1.mixer.q.weight"))
    assert "      blocks.0     max-abs 0 " in told(source, target, bisect=True)
    assert "blocks.0" not in told(source, target)


def test_swapped_rows_are_found_in_their_weight_and_their_layer(tmp_path):
    text = told(ours(tmp_path / "a"), ours(tmp_path / "b", swap("blocks.1.mixer.q.weight")))
    assert "blocks.1.mixer.q.weight[0, 0] is" in text and "the first of 32 numbers that differ" in text
    assert "blocks.1 is the first that leaves tolerance" in text


def test_what_is_wrong_in_the_first_layer_is_not_blamed_on_the_last(tmp_path):
    text = told(ours(tmp_path / "a"), ours(tmp_path / "b", swap("blocks.0.ffn.down.weight")))
    assert "blocks.0 is the first" in text and "blocks.1" not in text


def test_a_wrong_rope_base_is_found(tmp_path):
    other = GQA | {"position": {"kind": "rope", "base": 10001.0}}
    text = told(ours(tmp_path / "a"), ours(tmp_path / "b", mixer=other))
    assert "layers.mixer.position.base is 10001.0 here and 10000.0 in the source" in text
    assert "blocks.0 is the first that leaves tolerance" in text


def test_a_transposed_expert_is_found(tmp_path):
    change = transpose("blocks.1.ffn.experts.gate", 2)
    text = told(ours(tmp_path / "a", ffn=SQUARE), ours(tmp_path / "b", change, ffn=SQUARE))
    assert "blocks.1.ffn.experts.gate[2, 0, 1] is" in text and "blocks.1 is the first" in text


def test_an_expert_that_no_token_chooses_is_compared_too(tmp_path):
    def silent(state):
        for layer in (0, 1):
            state[f"blocks.{layer}.ffn.router.weight"][5] = 0.0
            state[f"blocks.{layer}.ffn.router.weight"][:5] *= 100

    def harmed(state):
        silent(state)
        state["blocks.0.ffn.experts.down"][5, 0, 0] += 1

    text = told(ours(tmp_path / "a", silent, ffn=MANY), ours(tmp_path / "b", harmed, ffn=MANY))
    assert "blocks.0.ffn.experts.down[5, 0, 0] is" in text and "leaves tolerance" not in text


def test_rows_of_tokens_that_were_not_computed_are_compared_too(tmp_path):
    big = {"model": {"vocab": 1000}}
    source = ours(tmp_path / "a", **big)
    row = next(token for token in range(1000) if token not in own(source, source).tokens)
    text = told(source, ours(tmp_path / "b", add("embed.weight", row), **big))
    assert f"embed.weight[{row}, 0] is" in text and "leaves tolerance" not in text


def test_a_wrong_row_of_the_head_is_found_in_the_logits(tmp_path):
    text = told(ours(tmp_path / "a"), ours(tmp_path / "b", swap("head.weight", (0, VOCAB - 1))))
    assert "head.weight[0, 0] is" in text and "logits is the first that leaves tolerance" in text


def test_a_module_that_predicts_further_tokens_is_computed(tmp_path):
    change = swap("mtp.1.project.weight")
    text = told(ours(tmp_path / "a", model=FURTHER), ours(tmp_path / "b", change, model=FURTHER))
    assert "mtp.1.project.weight[0, 0] is" in text and "mtp.1 is the first that leaves tolerance" in text


def test_another_number_of_layers_is_said_before_anything_is_computed(tmp_path):
    text = told(ours(tmp_path / "a"), ours(tmp_path / "b", model={"stack": ["one x 3"]}))
    assert "blocks.2.mixer.q.weight is [16, 16] here and absent in the source" in text


def test_what_a_model_remembers_for_training_alone_may_be_left_behind(tmp_path):
    balance = [{"scope": "batch", "weight": 0.1, "counts": "previous"}]
    source = ours(tmp_path / "a", ffn=SQUARE | {"balance": balance})
    assert own(source, ours(tmp_path / "b", ffn=SQUARE)).comparisons[0].error == 0.0


def test_a_bias_on_the_choice_of_experts_may_not(tmp_path):
    biased = SQUARE | {"router": {"kind": "topk", "selection_bias": {}}}
    text = told(ours(tmp_path / "a", ffn=biased), ours(tmp_path / "b", ffn=SQUARE))
    assert "selection_bias" in text


def test_a_cast_that_was_asked_for_is_proved_exactly_and_its_effect_is_measured(tmp_path):
    proof = own(ours(tmp_path / "a"), ours(tmp_path / "b", dtype=torch.bfloat16), cast=True)
    (comparison,) = proof.comparisons
    assert 1e-4 < comparison.error < comparison.tolerance == 0.03 and "2^-9" in comparison.why


def test_a_cast_to_a_wider_type_changes_nothing(tmp_path):
    source = ours(tmp_path / "a", dtype=torch.bfloat16)
    target = ours(tmp_path / "b", lambda state: None, dtype=torch.bfloat16)
    widened = ours(tmp_path / "c", lambda state: [each.copy_(each.bfloat16().float()) for each in state.values()])
    assert own(source, widened, cast=True).comparisons[0].tolerance == 0.0
    assert own(source, target).passed


def test_a_cast_that_nobody_asked_for_is_named(tmp_path):
    text = told(ours(tmp_path / "a"), ours(tmp_path / "b", dtype=torch.bfloat16))
    assert "embed.weight is float32 in the source and bfloat16 here, and no cast was asked for" in text


def test_numbers_that_were_cut_instead_of_rounded_are_found(tmp_path):
    def cut(state):
        for name, weight in state.items():
            weight.copy_((weights[name].view(torch.int32) & -65536).view(torch.float32))

    weights: dict[str, torch.Tensor] = {}
    source = ours(tmp_path / "a", lambda state: weights.update({name: each.clone() for name, each in state.items()}))
    text = told(source, ours(tmp_path / "b", cut, dtype=torch.bfloat16), cast=True)
    assert "numbers that differ" in text and "leaves tolerance" not in text


def test_a_weight_that_is_no_number_is_the_same_on_both_sides(tmp_path):
    change = add("blocks.1.ffn.up.weight", (3, 4), float("nan"))
    assert own(ours(tmp_path / "a", change), ours(tmp_path / "b", change)).comparisons[0].error == 0.0


def test_a_weight_that_became_no_number_is_found(tmp_path):
    text = told(ours(tmp_path / "a"), ours(tmp_path / "b", add("blocks.1.ffn.up.weight", (3, 4), float("nan"))))
    assert "blocks.1.ffn.up.weight[3, 4] is" in text and "nan here" in text and "blocks.1 is the first" in text


def test_without_a_proof_nothing_is_read(tmp_path):
    proof = prove(tmp_path / "nowhere", tmp_path / "nothing", how="none", cast=False, bisect=False)
    assert proof.method == "none" and not proof.passed


def test_where_transformers_has_no_say_the_reasons_are_told(tmp_path):
    source, target = ours(tmp_path / "a"), ours(tmp_path / "b")
    proof = own(source, target, how="auto")
    assert proof.method == "own" and "the target: step-00000001 is no Hugging Face folder" in proof.why
    with pytest.raises(CheckpointError, match="--proof transformers is not possible"):
        own(source, target, how="transformers")


def test_transformers_computes_the_target(llama, tmp_path):
    proof = own(llama, changed(llama, tmp_path / "b"), how="auto", bisect=True)
    exact, other = proof.comparisons
    assert proof.method == "transformers" and exact.error == 0.0 and len(proof.tokens) == LENGTH
    assert "of the target against transformers" in other.what and 0.0 < other.error < other.tolerance
    assert [layer.name for layer in other.layers] == ["embed", "blocks.0", "blocks.1", "norm", "logits"]


def test_a_model_that_memory_cannot_hold_whole_is_computed_by_us(llama, monkeypatch):
    monkeypatch.setattr("shardforge.convert.independent.free", lambda: 4 * 48 * 16)
    proof = own(llama, llama, how="auto")
    assert proof.method == "own" and "transformers would take" in proof.why


def test_a_model_whose_blocks_memory_cannot_hold_is_refused_before_a_conversion(llama, monkeypatch):
    monkeypatch.setattr("shardforge.families.streamed.free", lambda: 1000)
    foresee(open_source(llama), "none")
    with pytest.raises(CheckpointError, match="--proof none"):
        foresee(open_source(llama), "auto")


def test_what_we_read_wrongly_on_both_sides_is_found_by_transformers(llama, monkeypatch):
    rates = Rope.rates
    monkeypatch.setattr(Rope, "rates", lambda self, *args: rates(self, *args) * 1.001)
    assert own(llama, llama).passed
    text = told(llama, llama, how="auto")
    assert "blocks.0 is the first that leaves tolerance, our forward of the target against transformers" in text


def test_a_wrong_norm_is_found_by_transformers(llama, monkeypatch):
    """An eps that both readings of the folder would have in common."""
    from shardforge.families.kinds import llama as kind

    model = kind.FAMILY.model

    def wrong(settings):
        return {**model(settings), "norm": {"kind": "rmsnorm", "eps": 0.1}}

    monkeypatch.setitem(vars(kind.FAMILY), "model", wrong)
    assert "norm is the first that leaves tolerance" in told(llama, llama, how="auto")


def test_swapped_rows_are_found_in_a_folder_that_transformers_computes(llama, tmp_path):
    name = "model.layers.2.mlp.down_proj.weight"

    def change(state):
        return state | {name: state[name].flip(0)}

    text = told(llama, changed(llama, tmp_path / "b", change), how="auto")
    assert "blocks.2.ffn.down.weight[0, 0] is" in text and "blocks.2 is the first that leaves tolerance" in text
