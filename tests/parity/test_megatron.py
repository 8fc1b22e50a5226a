"""What megatron-core's own GPTModel saves is read as a model with its logits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shardforge.core.optional import installed
from shardforge.families.open import open_source
from shardforge.model.build import build
from shardforge.nn.sequence import Sequence
from tests.tiny import tiny

pytestmark = pytest.mark.slow
TOLERANCE = 2e-6  # float32, relative to the norm of the expected tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    if not installed("megatron.core"):
        pytest.skip("megatron-core saves the checkpoints")
    path = tmp_path_factory.mktemp("megatron")
    program = Path(__file__).with_name("megatron_model.py")
    done = subprocess.run([sys.executable, str(program), str(path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("kind", ["dist", "legacy"])
def test_the_logits_of_a_checkpoint_are_those_of_megatron(folder, kind):
    source = open_source(folder / kind)
    recipe = tiny(model=source.model)
    ours = build(recipe.model, recipe.objective.build()).to_empty(device="cpu")
    ours.load_state_dict({name: source.read(name) for name in source.names})
    said = torch.load(folder / "said.pt")
    places = torch.arange(said["tokens"].shape[1]).expand(2, -1)
    with torch.no_grad():
        got = ours.eval()(said["tokens"], Sequence(places, torch.zeros_like(places), torch.arange(2)))
    assert ((got - said["logits"]).norm() / said["logits"].norm()).item() < TOLERANCE
