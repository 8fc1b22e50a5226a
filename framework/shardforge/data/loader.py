"""`batch(step)`: a pure function of (recipe, step). Nothing is saved and nothing is resumed but the step.

    step -> global sample numbers      sizes.py
         -> (source, epoch, sample)    order.py
         -> document pieces            packing.py
         -> tokens                     corpus.py, shards.py

The rows of a step are divided between data ranks in contiguous slices, so the ranks' batches, one after the other,
are the batch that one rank would read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from shardforge.core.errors import DataError, ForgeError, Problems
from shardforge.data.corpus import Corpus, Place
from shardforge.data.order import Blend, Drawn, largest_remainder
from shardforge.data.packing import Packing, fill, pack
from shardforge.data.sizes import BatchSizes
from shardforge.nn.batch import IGNORE, PADDING, Batch
from shardforge.recipe.schema import DataConfig, SourceConfig, TrainConfig


@dataclass(frozen=True)
class Trace:
    """One document piece that fed one row. Its last token may be a target only."""

    row: int  # in the whole batch of the step
    source: str  # path of the corpus
    epoch: int  # of that source, from 0
    sample: int  # of that source, in corpus order
    place: Place


class Loader:
    """Batches of one split for one data rank. Bad sources, sizes and vocabularies are all reported at construction."""

    def __init__(
        self,
        data: DataConfig,
        train: TrainConfig,
        seed: int,
        *,
        vocab: int,
        data_rank: int = 0,
        data_ranks: int = 1,
        split: str = "train",
    ):
        assert 0 <= data_rank < data_ranks, (data_rank, data_ranks)
        self.data, self.train, self.split = data, train, split
        self.rank, self.ranks = data_rank, data_ranks
        self.sizes = BatchSizes.of(train)
        problems = self.sizes.problems(data_ranks)
        self.corpora = _open(data.sources, vocab, problems)
        problems += [] if problems else self._too_short()
        shares = _shares(data.sources, problems)
        if problems:
            raise problems[0] if len(problems) == 1 else Problems(problems, "the data of the recipe")
        self._packings: dict[tuple[str, int], Packing] = {}
        if train.eval_sequences:
            self._held_out_counts()  # an index that cannot be written stops the run here, not at its first evaluation
        counts = [self._packing(split, source).samples for source in range(len(self.corpora))]
        weights = [share if share else epochs * n for (share, epochs), n in zip(shares, counts, strict=True)]
        self.samples = sum(counts)
        """Samples of all sources together, each counted once."""
        self._blend = Blend(counts, weights, seed=seed, shuffled=data.shuffled)
        self._pool = ThreadPoolExecutor(1, "shardforge-data") if data.prefetch else None
        self._ahead: dict[int, Future[Batch]] = {}

    def _too_short(self) -> list[ForgeError]:
        need = self.train.seq_len + 1
        return [
            DataError(
                f"{corpus.stream(self.split).tokens} tokens in the {self.split} split, one sample needs {need}",
                corpus.path,
                f"lower train.seq_len below {max(2, corpus.stream(self.split).tokens)}, or build a larger corpus",
            )
            for corpus in self.corpora
            if corpus.stream(self.split).tokens < need
        ]

    def _packing(self, split: str, source: int) -> Packing:
        if (split, source) not in self._packings:
            made = pack(self.corpora[source], split, self.train.seq_len, self.data.packing)
            self._packings[split, source] = made
        return self._packings[split, source]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any source's tokens or tokenizer, or with their order."""
        parts = " ".join(corpus.fingerprint for corpus in self.corpora)
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def sequences(self, step: int) -> int:
        """Rows of one step, over all ranks."""
        return self.sizes.at(step)

    def samples_before(self, step: int) -> int:
        """Rows of all earlier steps together."""
        return self.sizes.before(step)

    def tokens_before(self, step: int) -> int:
        """Input tokens of all earlier steps together, padding included."""
        return self.sizes.before(step) * self.train.seq_len

    def batch(self, step: int) -> Batch:
        """This rank's rows of one step, on the CPU. What went wrong while reading ahead is raised here."""
        if self._pool is None:
            return self._make(step)
        ahead = range(step + 1, min(step + 1 + self.data.prefetch, self.train.steps))
        waiting = self._ahead.pop(step, None)
        for stale in set(self._ahead) - set(ahead):
            self._ahead.pop(stale).cancel()
        current = waiting or self._pool.submit(self._make, step)
        for later in ahead:
            if later not in self._ahead:
                self._ahead[later] = self._pool.submit(self._make, later)
        return current.result()

    def close(self) -> None:
        """Stop reading ahead. The loader still answers `trace` and sizes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._ahead.clear()
            self._pool = None

    def _mine(self, count: int) -> range:
        share = count // self.ranks
        return range(self.rank * share, (self.rank + 1) * share)

    def _make(self, step: int) -> Batch:
        rows = self._mine(self.sequences(step))
        return self._assemble(self.split, rows, [(d.source, d.sample) for d in self._drawn(step, rows)])

    def _assemble(self, split: str, rows: range, samples: Sequence[tuple[int, int] | None]) -> Batch:
        """None is a row that holds nothing."""
        shape = (len(rows), self.train.seq_len)
        tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels, documents = np.full(shape, IGNORE, np.int64), np.full(shape, PADDING, np.int64)
        joined = self.data.documents == "joined"
        for row, sample in enumerate(samples):
            if sample is None:
                positions[row] = np.arange(self.train.seq_len)
                continue
            source, index = sample
            corpus = self.corpora[source]
            spans = self._packing(split, source).spans(index)
            views = (tokens[row], labels[row], positions[row], documents[row])
            fill(corpus.stream(split), spans, joined, corpus.manifest.tokenizer.eos, views)
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            positions=torch.from_numpy(positions),
            documents=torch.from_numpy(documents),
            rows=torch.arange(rows.start, rows.stop),
        )

    def trace(self, step: int) -> list[Trace]:
        """The documents behind each row of this rank, row by row."""
        rows = self._mine(self.sequences(step))
        out = []
        for row, drawn in zip(rows, self._drawn(step, rows), strict=True):
            corpus = self.corpora[drawn.source]
            for start, stop in self._packing(self.split, drawn.source).spans(drawn.sample).tolist():
                for place in corpus.stream(self.split).places(start, stop):
                    out.append(Trace(row, str(corpus.path), drawn.epoch, drawn.sample, place))
        return out

    def _drawn(self, step: int, rows: range) -> list[Drawn]:
        return self._blend.draw(self.samples_before(step) + rows.start, len(rows))

    @property
    def held_out_sequences(self) -> int:
        """Samples of the held-out splits of all sources; 0 when none was built."""
        return sum(self._held_out_counts())

    def _held_out_counts(self) -> list[int]:
        return [
            self._packing("held_out", source).samples if corpus.stream("held_out").tokens > 1 else 0
            for source, corpus in enumerate(self.corpora)
        ]

    def held_out_batches(self, count: int) -> Iterator[Batch]:
        """The first `count` held-out samples, all if there are fewer: the same ones at every call, on any layout.

        Several sources give in proportion to their size. Every rank yields equally many rows; missing ones are blank.
        """
        sizes = self._held_out_counts()
        if not sum(sizes):
            raise DataError(
                f"no held-out documents in {', '.join(str(corpus.path) for corpus in self.corpora)}",
                "train.eval_sequences",
                "build the corpus with data.build.held_out above 0, or set train.eval_sequences: 0",
            )
        quotas = largest_remainder(min(count, sum(sizes)), sizes)
        samples = [(source, index) for source, quota in enumerate(quotas) for index in range(quota)]
        padded = samples + [None] * (-len(samples) % self.ranks)
        rows = self._mine(len(padded))
        size = max(1, self.train.sequences // self.ranks)  # a whole step: a pipeline fills once
        for start in range(rows.start, rows.stop, size):
            part = range(start, min(start + size, rows.stop))
            yield self._assemble("held_out", part, padded[part.start : part.stop])


def _open(sources: Sequence[SourceConfig], vocab: int, problems: list[ForgeError]) -> list[Corpus]:
    """Every source that can be opened; what cannot is added to `problems`."""
    out = []
    for source in sources:
        try:
            corpus = Corpus.open(source.path)
        except Problems as several:
            problems += several.problems
            continue
        except ForgeError as error:
            problems.append(error)
            continue
        out.append(corpus)
        wanted = corpus.manifest.tokenizer
        if wanted.vocab > vocab:
            what = f"{vocab} rows of embeddings for the {wanted.vocab} tokens of {corpus.tokenizer}"
            problems.append(DataError(what, "model.vocab", f"model.vocab must be at least {wanted.vocab}"))
        if wanted.sha256 != out[0].manifest.tokenizer.sha256:
            what = f"{corpus.path} and {out[0].path} were built with different tokenizers"
            problems.append(DataError(what, "data.sources", f"build one again with the tokenizer of {out[0].path}"))
    return out


def _shares(sources: Sequence[SourceConfig], problems: list[ForgeError]) -> list[tuple[Fraction, Fraction]]:
    """(weight or 0, epochs) of each source."""
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and (not all(weighted) or any(source.epochs is not None for source in sources)):
        what = f"{sum(weighted)} of {len(sources)} sources have a weight, the others are counted in epochs"
        problems.append(DataError(what, "data.sources", "give every source a weight, or none and use epochs"))
    return [(Fraction(s.weight or 0), Fraction(1 if s.epochs is None else s.epochs)) for s in sources]
