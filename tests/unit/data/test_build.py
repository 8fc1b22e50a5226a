from __future__ import annotations

import errno
import hashlib
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shardforge.core.errors import DataError
from shardforge.data import build as module
from shardforge.data.build import build
from shardforge.data.corpus import Corpus
from shardforge.data.manifest import WORK
from shardforge.data.tokenizer import load, train
from shardforge.recipe.schema import BuildConfig, TokenizerConfig

Asked = Callable[..., BuildConfig]

KILLED = """
import os, signal, sys
from shardforge.data import sources
from shardforge.data.build import build
from shardforge.recipe.schema import BuildConfig, TokenizerConfig
sources.SMALLEST = 1200
replace, left = os.replace, int(sys.argv[3])
def counted(*paths):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    replace(*paths)
os.replace = counted
build(BuildConfig(inputs=(sys.argv[1],), output=sys.argv[2], tokenizer=TokenizerConfig(vocab=300),
                  held_out=0.1, shard_tokens=1024), workers=1, progress=False)
"""


def quiet(config: BuildConfig, **options: object) -> module.Built:
    return build(config, progress=False, **{"workers": 1, **options})


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file, the work folder included."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def killed(config: BuildConfig, renames: int) -> subprocess.CompletedProcess[str]:
    """Run the build in a process that dies before a rename."""
    command = [sys.executable, "-c", KILLED, config.inputs[0], config.output, str(renames)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_documents_come_back_with_their_names(asked: Asked, texts: Path):
    made = quiet(asked())
    tokenizer = load(made.path / "tokenizer.json")
    corpus = Corpus.open(made.path)
    found = {}
    for split in ("train", "held_out"):
        stream = corpus.stream(split)
        for shard in range(len(stream.shards)):
            for number in range(stream.reader(shard).documents):
                tokens = stream.reader(shard).document(number).tolist()
                assert tokens.pop() == made.manifest.tokenizer.eos
                found[stream.name(shard, number)] = tokenizer.decode(tokens)
    assert found == {f"texts/{path.name}": path.read_text() for path in texts.iterdir()}


def test_a_build_passes_its_own_verification(asked: Asked):
    Corpus.open(quiet(asked()).path).verify()


def test_the_number_of_workers_does_not_change_a_byte(asked: Asked):
    quiet(asked("one"), workers=1)
    quiet(asked("three"), workers=3)
    one, three = (Path(asked(name).output) for name in ("one", "three"))
    assert contents(one) == contents(three) and len(list(one.glob("train-*.bin"))) > 2


@pytest.mark.parametrize("renames", [0, 2, 5, 24, 27, 31])
def test_a_killed_build_goes_on_to_the_same_bytes(asked: Asked, renames: int):
    whole, torn = asked("whole"), asked("torn")
    quiet(whole)
    assert killed(torn, renames).returncode == -signal.SIGKILL
    with pytest.raises(DataError, match="not finished"):
        Corpus.open(torn.output)
    assert quiet(torn).fresh
    assert contents(Path(torn.output)) == contents(Path(whole.output))


def test_a_build_goes_on_where_it_was_killed(asked: Asked, monkeypatch: pytest.MonkeyPatch):
    assert killed(asked(), 9).returncode == -signal.SIGKILL
    finished = len(list((Path(asked().output) / WORK / "parts").glob("*.npz")))
    made = []
    monkeypatch.setattr("shardforge.data.tokenize._settle", made.append)
    quiet(asked())
    assert finished == 3 and len(made) == 2 * (len(module.plan(asked().inputs).parts) - 3)


def test_a_finished_build_is_found_at_once(asked: Asked, monkeypatch: pytest.MonkeyPatch):
    quiet(asked())
    monkeypatch.setattr(module, "Workers", None)
    assert not quiet(asked()).fresh


def test_a_finished_build_of_other_options_is_not_overwritten(asked: Asked):
    quiet(asked())
    before = contents(Path(asked().output))
    with pytest.raises(DataError, match="other inputs or options"):
        quiet(asked(held_out=0.2))
    assert contents(Path(asked().output)) == before


def test_an_unfinished_build_of_other_inputs_starts_anew(asked: Asked, texts: Path):
    killed(asked("torn"), 27)
    (texts / "000.txt").write_text("changed")
    quiet(asked("torn"))
    quiet(asked("whole"))
    assert contents(Path(asked("torn").output)) == contents(Path(asked("whole").output))


def test_a_second_build_in_the_same_folder_is_refused(asked: Asked):
    with module._claimed(Path(asked().output), "x"), pytest.raises(DataError, match="another build"):
        quiet(asked())


def test_the_split_depends_on_names_alone(asked: Asked, texts: Path):
    def held(config: BuildConfig) -> set[str]:
        stream = Corpus.open(quiet(config).path).stream("held_out")
        return {stream.name(0, number) for number in range(stream.documents)}

    before = held(asked("before"))
    for path in texts.iterdir():
        path.write_text("something else " * 9)
    assert held(asked("after", shard_tokens=5000)) == before != set()


@pytest.mark.parametrize(("count", "share"), [(2, 0.0001), (3, 0.5), (2, 0.5)])
def test_neither_split_is_empty_with_two_documents(asked: Asked, texts: Path, count: int, share: float):
    inputs = tuple(str(texts / f"{number:03d}.txt") for number in range(count))
    made = quiet(asked(inputs=inputs, held_out=share)).manifest
    assert made.documents("train") > 0 and made.documents("held_out") > 0


def test_nothing_is_held_out_when_nothing_is_asked_for(asked: Asked):
    made = quiet(asked(held_out=0.0)).manifest
    assert made.documents("train") == 40 and made.splits["held_out"] == () and made.unigram_nats is None


def test_a_shard_ends_with_the_document_that_fills_it(asked: Asked):
    made = Corpus.open(quiet(asked()).path)
    shards = made.manifest.splits["train"]
    for number, shard in enumerate(shards[:-1]):
        last = made.stream("train").reader(number).document(shard.documents - 1).size
        assert shard.tokens - last < 1024 <= shard.tokens


def test_all_invalid_documents_are_reported_together(asked: Asked, texts: Path):
    for number in range(12):
        (texts / f"{number:03d}.txt").write_bytes(b"ab\xff")
    with pytest.raises(DataError) as error:
        quiet(asked())
    assert "12 documents" in error.value.what and error.value.what.count("byte 2 (0xff)") == 10
    assert "and 2 more" in error.value.what and "--invalid skip" in error.value.fix


def test_invalid_documents_can_be_left_out_and_are_counted(asked: Asked, texts: Path):
    (texts / "005.txt").write_bytes(b"\xff")
    (texts / "006.txt").write_text("")
    made = quiet(asked(), invalid="skip").manifest
    assert (made.skipped.invalid, made.skipped.empty) == (1, 1)
    assert made.skipped.examples == ("texts/005.txt: byte 0 (0xff) is not UTF-8",)
    assert made.documents("train") + made.documents("held_out") == 38


def test_an_existing_tokenizer_is_used_as_it_is(asked: Asked, tmp_path: Path):
    train(["some other text"] * 3, 280).save(str(tmp_path / "mine.json"))
    made = quiet(asked(tokenizer=TokenizerConfig(path=str(tmp_path / "mine.json"))))
    assert (made.path / "tokenizer.json").read_bytes() == (tmp_path / "mine.json").read_bytes()


@pytest.mark.parametrize("content", [None, ""])
def test_an_empty_corpus_is_refused(asked: Asked, tmp_path: Path, content: str | None):
    (tmp_path / "empty").mkdir()
    if content is not None:
        (tmp_path / "empty" / "a.txt").write_text(content)
    with pytest.raises(DataError, match="0 documents"):
        quiet(asked(inputs=(str(tmp_path / "empty"),)))


def test_a_full_disk_says_what_is_free_and_loses_nothing(asked: Asked, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(module.assemble, "write", full)
        with pytest.raises(DataError, match="the disk is full"):
            quiet(asked())
    assert quiet(asked()).fresh


def test_text_bytes_are_those_of_the_documents(asked: Asked, texts: Path):
    made = quiet(asked()).manifest
    assert sum(made.text_bytes.values()) == sum(path.stat().st_size for path in texts.iterdir())
