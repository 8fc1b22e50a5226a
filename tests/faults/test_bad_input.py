"""Every mistake is one message with a fix, a code that is not 0, and not a byte of the earlier run is lost."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardforge.data.synthetic import markov
from tests.faults import runs
from tests.faults.runs import Ended

pytestmark = pytest.mark.slow


def check(ended: Ended, *told: str) -> None:
    assert ended.code not in (0, 1), ended
    assert [line for line in ended.err.splitlines() if line.startswith("error:")] != [], ended.err
    assert ended.err.count("error:") == 1 and "Traceback" not in ended.err, ended.err
    assert [words for words in told if words not in ended.err] == [], ended.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a corpus, a recipe and a run of three steps."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = runs.write_recipe(folder)
    assert runs.run(folder, "train", str(recipe), "--set", "train.steps=3").code == 0
    return folder


@pytest.fixture
def earlier(finished, tmp_path) -> Path:
    """A copy of it, whose recipe names the copy."""
    shutil.copytree(finished, tmp_path / "here")
    recipe = tmp_path / "here" / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace(str(finished), str(tmp_path / "here")))
    stored = tmp_path / "here" / "run" / "recipe.yaml"
    stored.write_text(stored.read_text().replace(str(finished), str(tmp_path / "here")))
    return tmp_path / "here"


def without_wandb() -> None:
    sys.modules["wandb"] = None


def new_corpus(folder: Path, **changes: Any) -> None:
    shutil.rmtree(folder / "corpus")
    markov(folder / "corpus", **{"vocab": runs.VOCAB, "documents": 80, "tokens": 60} | changes)


def cut_tokens(folder: Path) -> None:
    (path,) = (folder / "corpus").glob("train-*.bin")
    path.write_bytes(path.read_bytes()[:-10])


def cut_checkpoint(folder: Path) -> None:
    path = max((folder / "run" / "checkpoints" / "step-00000003").iterdir(), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-10])


MISTAKES: dict[str, tuple[Callable[[Path], None], list[str], list[str]]] = {
    "another corpus": (lambda folder: new_corpus(folder, seed=1), [], ["the corpus has changed since", "step 3"]),
    "another model": (lambda folder: None, ["model.hidden=32"], ["model.hidden: 16 there, 32 here", "run_dir="]),
    "another model, its recipe gone": (
        lambda folder: (folder / "run" / "recipe.yaml").unlink(),
        ["model.hidden=32"],
        ["checkpoint of another model"],
    ),
    "a larger vocabulary": (
        lambda folder: new_corpus(folder, vocab=2 * runs.VOCAB),
        [],
        [f"{runs.VOCAB} rows of embeddings for the {2 * runs.VOCAB} tokens", "model.vocab must be at least 128"],
    ),
    "a truncated shard": (cut_tokens, [], ["train-00000.bin"]),
    "a missing corpus": (lambda folder: shutil.rmtree(folder / "corpus"), [], ["corpus", "fix:"]),
    "a truncated checkpoint": (cut_checkpoint, [], ["the checkpoint is damaged"]),
    "heads that tp cannot split": (
        lambda folder: None,
        ["parallel.tp=8"],
        ["heads=4 cannot be split 8 ways over tp", "tp=4 keeps the same 8 ranks"],
    ),
    "sequences that ranks cannot share": (
        lambda folder: None,
        ["parallel.dp_shard=3"],
        ["4 sequences cannot be shared"],
    ),
    "a misspelt field": (lambda folder: None, ["train.stepz=3"], ["stepz", "did you mean 'steps'"]),
    "no wandb": (lambda folder: None, ["observe=[wandb]"], ["needs the package wandb", "shardforge[wandb]"]),
    "a stored recipe that is no recipe": (
        lambda folder: (folder / "run" / "recipe.yaml").write_text("name: [\n"),
        [],
        ["recipe.yaml"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_the_earlier_run_stays_as_it_was(earlier, mistake):
    make, sets, told = MISTAKES[mistake]
    make(earlier)
    before = runs.contents(earlier / "run")
    words = [word for text in ["train.steps=6", *sets] for word in ("--set", text)]
    check(runs.run(earlier, "train", str(earlier / "tiny.yaml"), *words, prepare=without_wandb), *told)
    assert runs.contents(earlier / "run") == before


def test_numbers_that_are_lost_stop_the_run_before_they_reach_a_checkpoint(earlier):
    kept = earlier / "run" / "checkpoints"
    newest = max(path.name for path in kept.iterdir())
    before = {name: digest for name, digest in runs.contents(kept).items() if name.startswith(newest)}
    words = ("--set", "train.steps=6", "--set", "schedule.lr=1.0e+30")
    ended = runs.run(earlier, "train", str(earlier / "tiny.yaml"), *words)
    check(ended, "lower schedule.lr")
    assert before and before.items() <= runs.contents(kept).items()  # an older one may give way to a later good one
    saved = runs.saved(earlier / "run", max(int(path.name[5:]) for path in kept.iterdir()))
    assert all(tensor.isfinite().all() for tensor in saved.values())


@pytest.mark.parametrize("layout", ["dp_shard=1", "dp_shard=2"])
def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path, layout):
    (tmp_path / "file").touch()
    words = ("--set", f"run_dir={tmp_path / 'file' / 'run'}", "--set", f"parallel.{layout}")
    check(
        runs.run(tmp_path, "train", str(runs.write_recipe(tmp_path)), *words), "cannot be a run directory", "run_dir="
    )


def test_torchrun_with_another_number_of_processes_is_one_message(tmp_path):
    recipe = str(runs.write_recipe(tmp_path, parallel={"dp_shard": 4}))
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "shardforge", "train", recipe)
    with runs.Command(tmp_path, sys.executable, *words) as command:
        ended = command.ended()
    ours = ended.err[ended.err.index("error:") :]
    assert ended.code != 0 and ended.err.count("error:") == 1
    assert "the layout dp4 needs 4 processes and 2 were started" in ours and "--set parallel.dp_shard=2" in ours


def test_a_package_that_is_missing_is_one_message_of_all_ranks(earlier):
    blocked = earlier / "blocked"
    blocked.mkdir()
    (blocked / "wandb.py").write_text("raise ImportError('blocked')\n")
    before = runs.contents(earlier / "run")
    words = ("train", str(earlier / "tiny.yaml"), "--set", "observe=[wandb]", "--set", "parallel.dp_shard=2")
    with runs.shardforge(earlier, *words, env={"PYTHONPATH": str(blocked)}) as command:
        check(command.ended(), "needs the package wandb", "shardforge[wandb]")
    assert runs.contents(earlier / "run") == before


def test_a_mistake_leaves_a_record_for_the_launcher(earlier):
    runs.run(earlier, "train", str(earlier / "tiny.yaml"), "--set", "model.hidden=32")
    said = json.loads((earlier / "run" / "failure.json").read_text())
    assert said["rank"] == 0 and said["message"].startswith("error: ")
