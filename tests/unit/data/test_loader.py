from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from shardforge.core.errors import DataError, Problems
from shardforge.data.corpus import Corpus
from shardforge.data.loader import Loader
from shardforge.nn.batch import IGNORE, PADDING, Batch
from shardforge.recipe.schema import BatchWarmupConfig, DataConfig, SourceConfig, TrainConfig

LENGTHS = [9, 3, 14, 1, 30, 6, 22, 8, 17, 5, 41, 12]
VOCAB = 60_001
TENSORS = ("tokens", "labels", "positions", "documents", "rows")
WARMUP = BatchWarmupConfig(start=12, increment=12, steps=5)


@pytest.fixture
def loader(tmp_path: Path, corpus: Callable[..., Corpus]) -> Iterator[Callable[..., Loader]]:
    """loader(packing="cut", data_ranks=2, sequences=8): a loader over two small corpora."""
    corpus(LENGTHS, held_out=(11, 4, 7, 25), name="one")
    corpus(LENGTHS[::-1] * 2, held_out=(6, 9), name="two")
    made: list[Loader] = []

    def make(*, sequences: int = 24, seq_len: int = 7, vocab: int = VOCAB, seed: int = 3, **options: object) -> Loader:
        names = [name for name in ("warmup", "micro_batch", "eval_sequences") if name in options]
        train_options = {name.replace("warmup", "batch_warmup"): options.pop(name) for name in names}
        ranks = {name: options.pop(name) for name in ("data_rank", "data_ranks", "split") if name in options}
        sources = options.pop(
            "sources", (SourceConfig(path=str(tmp_path / "one")), SourceConfig(path=str(tmp_path / "two")))
        )
        train = TrainConfig(steps=40, sequences=sequences, seq_len=seq_len, **train_options)
        made.append(Loader(DataConfig(sources=sources, **options), train, seed, vocab=vocab, **ranks))
        return made[-1]

    yield make
    for each in made:
        each.close()


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS)


def end_to_end(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in TENSORS))


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 12])
def test_the_ranks_batches_end_to_end_are_the_batch_of_one_rank(
    loader: Callable[..., Loader], packing: str, ranks: int
):
    options = {"packing": packing, "warmup": WARMUP}
    alone = loader(**options)
    split = [loader(**options, data_rank=rank, data_ranks=ranks) for rank in range(ranks)]
    for step in (0, 2, 7):
        assert equal(end_to_end([each.batch(step) for each in split]), alone.batch(step))


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_a_batch_does_not_depend_on_what_was_asked_before(loader: Callable[..., Loader], prefetch: int):
    plain = loader(prefetch=0)
    expected = [plain.batch(step) for step in range(12)]
    asked = random.Random(1).choices(range(12), k=30) + list(range(12))
    other = loader(prefetch=prefetch)
    assert all(equal(other.batch(step), expected[step]) for step in asked)


def test_another_seed_reads_other_samples(loader: Callable[..., Loader]):
    assert not torch.equal(loader(seed=1).batch(0).tokens, loader(seed=2).batch(0).tokens)


def test_rows_number_the_sequences_of_the_whole_step(loader: Callable[..., Loader]):
    assert loader(data_rank=1, data_ranks=3).batch(4).rows.tolist() == list(range(8, 16))


def test_the_first_epoch_of_one_source_predicts_every_token_once(loader: Callable[..., Loader], tmp_path: Path):
    one = loader(sources=(SourceConfig(path=str(tmp_path / "one")),), sequences=1)
    labels = torch.cat([one.batch(step).labels for step in range(one.samples)]).flatten().tolist()
    firsts = {1 + sum(LENGTHS[:number]) for number in range(len(LENGTHS))}
    assert Counter(labels) - Counter({IGNORE: len(labels)}) == Counter(set(range(1, sum(LENGTHS) + 1)) - firsts)


def test_sources_share_an_epoch_by_their_weights(loader: Callable[..., Loader], tmp_path: Path):
    sources = (SourceConfig(path=str(tmp_path / "one"), weight=3), SourceConfig(path=str(tmp_path / "two"), weight=1))
    one = loader(sources=sources, sequences=4096, data_ranks=1)
    came = Counter(trace.source for trace in {t.row: t for t in one.trace(0)}.values())
    assert came == {str(tmp_path / "one"): 3072, str(tmp_path / "two"): 1024}


def test_epochs_of_a_source_multiply_its_size(loader: Callable[..., Loader], tmp_path: Path):
    sources = (SourceConfig(path=str(tmp_path / "one"), epochs=2), SourceConfig(path=str(tmp_path / "two")))
    one = loader(sources=sources, sequences=4096)
    came = Counter(trace.source for trace in {t.row: t for t in one.trace(0)}.values())
    assert came[str(tmp_path / "one")] == 2048  # half the size, twice as often


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_trace_names_the_documents_whose_tokens_are_in_the_row(
    loader: Callable[..., Loader], tmp_path: Path, packing: str
):
    one = loader(packing=packing, documents="joined", prefetch=0)
    batch = one.batch(3)
    rows: dict[int, list[int]] = {row: [] for row in range(24)}
    for found in one.trace(3):
        stream = Corpus.open(found.source).stream("train")
        number = int(found.place.name.removeprefix("train/"))
        lengths = LENGTHS if found.source.endswith("one") else LENGTHS[::-1] * 2
        assert stream.documents == len(lengths)
        first = sum(lengths[:number]) + 1
        rows[found.row] += range(first + found.place.start, first + found.place.stop)
    for row, tokens in rows.items():
        kept = batch.documents[row] != PADDING
        assert batch.tokens[row][kept].tolist() == tokens[: int(kept.sum())]


def test_tokens_before_a_step_count_the_warm_up(loader: Callable[..., Loader]):
    one = loader(warmup=WARMUP)
    assert one.tokens_before(9) == 7 * sum(len(one.batch(step)) for step in range(9))


def test_batches_hold_as_many_rows_as_the_warm_up_says(loader: Callable[..., Loader]):
    one = loader(warmup=WARMUP, data_ranks=2)
    assert [len(one.batch(step)) for step in range(7)] == [one.sequences(step) // 2 for step in range(7)]


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_held_out_rows_are_the_same_on_any_number_of_ranks(loader: Callable[..., Loader], packing: str, ranks: int):
    options = {"packing": packing, "micro_batch": 2, "sequences": 30}
    alone = end_to_end(list(loader(**options).held_out_batches(7)))
    split = [list(loader(**options, data_rank=r, data_ranks=ranks).held_out_batches(7)) for r in range(ranks)]
    assert len({tuple(len(batch) for batch in batches) for batches in split}) == 1
    together = end_to_end([batch for batches in split for batch in batches])
    assert equal(Batch(*(getattr(together, name)[:7] for name in TENSORS)), alone)
    assert (together.labels[7:] == IGNORE).all() and (together.documents[7:] == PADDING).all()


def test_more_held_out_samples_than_there_are_give_each_once(loader: Callable[..., Loader]):
    one = loader()
    batches = end_to_end(list(one.held_out_batches(1000)))
    assert len(batches) == one.held_out_sequences
    assert (batches.labels != IGNORE).sum() == 11 + 4 + 7 + 25 - 4 + 6 + 9 - 2


def test_held_out_of_a_corpus_without_it_says_how_to_get_it(
    loader: Callable[..., Loader], corpus: Callable[..., Corpus]
):
    made = corpus([40, 40], name="bare")
    one = loader(sources=(SourceConfig(path=str(made.path)),))
    assert one.held_out_sequences == 0
    with pytest.raises(DataError) as error:
        next(one.held_out_batches(3))
    assert "held_out above 0" in error.value.fix


def test_an_error_while_reading_ahead_is_raised_for_its_own_step(
    loader: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
):
    one = loader(prefetch=2)
    make = one._make

    def torn(step: int) -> Batch:
        if step == 2:
            raise DataError("torn", "shard", "fix")
        return make(step)

    monkeypatch.setattr(one, "_make", torn)
    one.batch(0), one.batch(1)
    with pytest.raises(DataError, match="torn"):
        one.batch(2)
    assert len(one.batch(3)) == 24


def test_a_closed_loader_still_makes_batches(loader: Callable[..., Loader]):
    one = loader(prefetch=2)
    before = one.batch(1)
    one.close()
    assert equal(one.batch(1), before)


def test_the_fingerprint_follows_the_tokens(
    loader: Callable[..., Loader], corpus: Callable[..., Corpus], tmp_path: Path
):
    before = loader().fingerprint
    assert loader(seed=9, packing="best_fit").fingerprint == before
    corpus([*LENGTHS[:-1], 13], name="one")
    assert loader().fingerprint != before


@contextmanager
def refused(*words: str) -> Iterator[None]:
    with pytest.raises((DataError, Problems)) as error:
        yield
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_model_with_too_few_rows_is_refused_with_both_numbers(loader: Callable[..., Loader]):
    with refused("60000", "60001", "model.vocab"):
        loader(vocab=60_000)


def test_a_corpus_shorter_than_one_sample_is_refused_with_both_numbers(loader: Callable[..., Loader]):
    with refused(str(sum(LENGTHS)), "301"):
        loader(seq_len=300)


def test_rows_that_cannot_be_divided_between_ranks_are_refused(loader: Callable[..., Loader]):
    with refused("24 sequences", "7 data ranks", "use 28"):
        loader(data_ranks=7)


def test_all_problems_of_the_sources_come_together(loader: Callable[..., Loader], tmp_path: Path):
    sources = (SourceConfig(path="nowhere", weight=1), SourceConfig(path=str(tmp_path / "one")))
    with refused("3 problems", "nowhere", "model.vocab", "1 of 2 sources have a weight"):
        loader(sources=sources, vocab=10)


def test_sources_of_different_tokenizers_are_refused(loader: Callable[..., Loader], tmp_path: Path):
    folder = tmp_path / "two"
    text = (folder / "manifest.json").read_text()
    before = Corpus.open(folder).manifest.tokenizer.sha256
    (folder / "tokenizer.json").write_bytes(b"{}")
    after = __import__("hashlib").sha256(b"{}").hexdigest()
    (folder / "manifest.json").write_text(text.replace(before, after))
    with refused("different tokenizers"):
        loader()
