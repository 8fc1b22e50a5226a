"""DeepSeek's folders beyond the main model: modules of further tokens, rotary channels in another order, FP8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardforge.families.huggingface import HuggingFaceSource
from shardforge.families.publish import publish
from shardforge.model.build import build
from shardforge.model.decoder import Decoder
from shardforge.nn.batch import Batch
from shardforge.nn.sequence import Sequence
from tests.parity.compare import TOLERANCE, distance, quiet
from tests.parity.family_cases.deepseek import CASES
from tests.parity.test_families import their_model, write
from tests.tiny import tiny
from tests.tiny_deepseek import SOFTMAX, decoder, released, section, weights, written

transformers = pytest.importorskip("transformers", reason="the transformers package is the reference")

FURTHER = {"deepseek-v3-further": 1, "deepseek-v3-tied-further": 2}
LENGTH, VOCABULARY = 13, 48
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}


def tokens(vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(0, vocabulary, (2, LENGTH), generator=torch.Generator().manual_seed(4))


def ours(source: HuggingFaceSource) -> Decoder:
    recipe = tiny(model=source.model | {"core": "eager"})
    model = build(recipe.model, recipe.objective.build()).to_empty(device="cpu")
    model.load_state_dict({name: source.read(name) for name in source.names})
    return model.eval()


def our_logits(source: HuggingFaceSource) -> list[Tensor]:
    """For the next token, and of each depth at the places that have the token ahead."""
    model, given = ours(source), tokens()
    place = torch.arange(LENGTH).expand(2, -1)
    batch = Batch(given, given.roll(-1, 1), place, torch.zeros_like(place), torch.arange(2))
    ahead = batch.look_ahead(model.ahead).ahead
    seen: list[Tensor] = []
    model.objective.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(given, Sequence(place, batch.documents, batch.rows, ahead=ahead), batch.labels)
    return [F.linear(x[:, : LENGTH - j], model.head.operand()) for j, x in enumerate(seen)]


def their_logits(folder: Path) -> list[Tensor]:
    """The same of what transformers makes of a folder."""
    from transformers.modeling_layers import MtpModel

    with quiet(), torch.no_grad():
        main = transformers.AutoModelForCausalLM.from_pretrained(folder, **PLAIN).eval()
        main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[34]\..*"]  # how it finds modules; as released, 61
        mtp: Any = MtpModel.from_pretrained(main).eval()
        given, place = tokens(), torch.arange(LENGTH)[None]
        found = main(given, output_hidden_states=True)
        out, x = [found.logits], found.hidden_states[-1]
        for j in range(mtp.num_mtp_layers):
            x = x[:, : LENGTH - j - 1]
            x = mtp.forward_layer(j, x, place[:, j + 1 :], None, given[:, j + 1 :])
            out.append(mtp.shared_head(x))
    return out


@pytest.fixture(params=FURTHER)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    case = CASES[request.param]
    with quiet():
        their_model(case).save_pretrained(tmp_path / "theirs")
    case.stored(tmp_path / "theirs")
    return tmp_path / "theirs"


def all_close(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(distance(one, other) < TOLERANCE for one, other in zip(got, expected, strict=True))


def test_logits_of_each_depth_are_those_that_transformers_reads_from_the_same_folder(folder):
    assert all_close(our_logits(HuggingFaceSource(folder)), their_logits(folder))


def test_transformers_reads_the_modules_that_we_write(folder, tmp_path):
    source = HuggingFaceSource(folder)
    write(tmp_path / "back", publish(source.model, "here"), source)
    got, expected = their_logits(tmp_path / "back"), their_logits(folder)
    assert [bool(torch.equal(one, other)) for one, other in zip(got, expected, strict=True)] == [True] * len(expected)


def test_a_model_whose_channels_turn_in_halves_computes_the_same_in_transformers(tmp_path):
    model = section(SOFTMAX, layout="half", kv_lora_rank=4)
    mine = weights(model)
    folder = written(tmp_path, *released(model, mine))
    given, place = tokens(32), torch.arange(LENGTH).expand(2, -1)
    with quiet(), torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, **PLAIN).eval()
        expected = theirs(given).logits
        got = decoder(model, mine)(given, Sequence(place, torch.zeros_like(place), torch.arange(2)))
    assert distance(got, expected) < TOLERANCE
