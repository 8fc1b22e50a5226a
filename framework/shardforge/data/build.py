"""Text to a corpus: plan, tokenizer, parts, shards, manifest. Killed at any moment, the same call goes on.

Everything unfinished lives in OUTPUT/.build; the manifest is written last, and then .build goes. Each part and each
shard is written beside its name and renamed, and what is there is not made again. Nothing depends on who made it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from shardforge.core import log
from shardforge.core.errors import DataError
from shardforge.core.workers import Workers, cores
from shardforge.data import assemble, manifest
from shardforge.data.corpus import Corpus
from shardforge.data.manifest import FILE, SPLITS, WORK, Manifest, Skipped, TokenizerRecord
from shardforge.data.shards import token_type
from shardforge.data.sources import Part, Plan, plan
from shardforge.data.tokenize import tokenize, tokens
from shardforge.data.tokenizer import eos, load, sample, threshold, train
from shardforge.recipe.schema import BuildConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
SHOWN, KEPT = 10, 100
"""Invalid documents named in an error, and in the manifest."""


@dataclass(frozen=True)
class Built:
    path: Path
    manifest: Manifest
    fresh: bool  # False: it was there already


def build(
    config: BuildConfig,
    *,
    workers: int | None = None,
    invalid: Literal["error", "skip"] = "error",
    progress: bool = True,
) -> Built:
    """Make the corpus that `config` describes, or find it made. `workers` defaults to all cores."""
    output = Path(config.output)
    planned = plan(config.inputs, config.text_field, output)
    digest = _digest(config, planned)
    if (output / FILE).is_file():
        same = _same(output, digest)
        shutil.rmtree(output / WORK, ignore_errors=True)  # of a build killed after its last write
        return Built(output, same, fresh=False)
    if not planned.parts:
        raise DataError(
            "nothing to read: 0 documents", ", ".join(config.inputs), "name files or folders that hold text"
        )
    try:
        with _claimed(output, digest) as work, Workers(workers or cores()) as pool:
            made = _Build(config, output, work, planned, digest, pool, progress).run(invalid)
            shutil.rmtree(work)
    except OSError as cause:
        if cause.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(output).free
        need = sum(part.size for part in planned.parts)
        what = f"the disk is full: {free} bytes free, a build of {need} bytes of text takes up to {2 * need}"
        raise DataError(what, output, "free some space and run the same command again; it goes on") from cause
    return Built(output, made, fresh=True)


@dataclass(frozen=True)
class _Build:
    config: BuildConfig
    output: Path
    work: Path
    plan: Plan
    digest: str
    pool: Workers
    progress: bool

    def run(self, invalid: str) -> Manifest:
        parts, journal = self.work / "parts", self.work / "shards"
        parts.mkdir(exist_ok=True)
        journal.mkdir(exist_ok=True)
        record = self._tokenizer()
        dtype = token_type(record.vocab).name
        work = partial(_tokenize, folder=parts, output=self.output, tokenizer=record, dtype=dtype)
        with self._bar("tokenizing", sum(part.size for part in self.plan.parts)) as advance:
            for size in self.pool.run(work, list(enumerate(self.plan.parts))):
                advance(size)
        skipped = self._skipped(parts, invalid)
        count = len(self.plan.parts)
        rule = assemble.choose(parts, count, threshold(self.config.held_out))
        jobs = [
            assemble.Job(
                prefix=self.output / f"{split}-{number:05d}", parts=parts, journal=journal, rule=rule, split=split,
                segments=segments, dtype=dtype, vocab=record.vocab,
            )
            for split in SPLITS
            for number, segments in enumerate(assemble.shards(parts, count, rule, split, self.config.shard_tokens))
        ]  # fmt: skip
        if not jobs:
            raise DataError(
                "the inputs hold 0 documents of text", ", ".join(self.config.inputs), "name files with text"
            )
        with self._bar("writing shards", len(jobs)) as advance:
            for _ in self.pool.run(assemble.write, jobs):
                advance(1)
        made = self._manifest(jobs, record, dtype, skipped)
        manifest.write(self.output, made)
        return manifest.read(self.output)

    def _tokenizer(self) -> TokenizerRecord:
        """Train or copy the tokenizer into the output, unless an interrupted build did."""
        path, asked = self.output / TOKENIZER, self.config.tokenizer
        marker = self.work / "tokenizer"
        if not marker.exists():
            source = Path(asked.path).expanduser() if asked.path else path
            if asked.path:
                end = eos(load(source), source)
                content = source.read_bytes()
            else:
                texts = sample(self.plan.parts, asked.sample_bytes, threshold(self.config.held_out))
                trained = train(texts, asked.vocab)
                end = eos(trained, source)
                content = trained.to_str(pretty=False).encode()
            manifest.replace(path, content)
            manifest.replace(marker, str(end).encode())
        return TokenizerRecord(
            file=TOKENIZER,
            sha256=manifest.sha256(path),
            vocab=max(load(path).get_vocab().values()) + 1,  # ids may have holes
            eos=int(marker.read_text()),
        )

    def _skipped(self, folder: Path, invalid: str) -> Skipped:
        """What was left out, or one error that lists it when it should not be."""
        found: list[str] = []
        wrong: list[str] = []
        empty = 0
        for number, part in enumerate(self.plan.parts):
            made = tokens(folder, number)
            lines = [f"{name}: {reason}" for name, reason in made.invalid]
            found += lines
            wrong += [] if part.lenient else lines
            empty += made.empty
        if wrong and invalid == "error":
            listed = [*wrong[:SHOWN], *([f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else [])]
            raise DataError(
                f"{len(wrong)} documents cannot be read as text" + "".join(f"\n      {line}" for line in listed),
                ", ".join(self.config.inputs),
                "repair them, or leave them out with --invalid skip; the manifest then counts them",
            )
        return Skipped(invalid=len(found), empty=empty, ignored=self.plan.ignored, examples=tuple(found[:KEPT]))

    def _manifest(self, jobs: list[assemble.Job], tokenizer: TokenizerRecord, dtype: str, skipped: Skipped) -> Manifest:
        shards: dict[str, list[manifest.ShardRecord]] = {split: [] for split in SPLITS}
        text_bytes = dict.fromkeys(SPLITS, 0)
        counts = {split: np.zeros(tokenizer.vocab, np.int64) for split in SPLITS}
        for job in jobs:
            made = assemble.read(job.journal, job.prefix.name)
            shards[job.split].append(made.record)
            text_bytes[job.split] += made.text_bytes
            counts[job.split] += made.counts
        entropy, unigram = manifest.unigram(counts["train"], counts["held_out"])
        return Manifest(
            tokenizer=tokenizer,
            dtype=dtype,
            splits={split: tuple(records) for split, records in shards.items()},
            text_bytes=text_bytes,
            entropy_nats=entropy,
            unigram_nats=unigram,
            skipped=skipped,
            digest=self.digest,
            inputs=self.config.inputs,
        )

    @contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A function that moves a progress bar on stderr."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f}%"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), disable=not self.progress) as bar:
            task = bar.add_task(title, total=max(1, total))
            yield lambda amount: bar.advance(task, amount)


@lru_cache(maxsize=1)
def _loaded(path: str, _sha256: str) -> Tokenizer:
    return load(Path(path))


def _tokenize(job: tuple[int, Part], *, folder: Path, output: Path, tokenizer: TokenizerRecord, dtype: str) -> int:
    number, part = job
    return tokenize(part, number, folder, _loaded(str(output / TOKENIZER), tokenizer.sha256), tokenizer.eos, dtype)


def _digest(config: BuildConfig, planned: Plan) -> str:
    """What the bytes of the corpus depend on."""
    asked = config.tokenizer
    tokenizer: list[object] = [asked.vocab, asked.sample_bytes]
    if asked.path:
        path = Path(asked.path).expanduser()
        load(path)
        tokenizer = [manifest.sha256(path)]
    content = [
        manifest.FORMAT, [part.identity() for part in planned.parts], tokenizer, config.held_out, config.shard_tokens,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _same(output: Path, digest: str) -> Manifest:
    found = Corpus.open(output).manifest
    if found.digest != digest:
        raise DataError(
            f"a corpus of other inputs or options is here: digest {found.digest[:12]}, this build has {digest[:12]}",
            output,
            "choose another output folder, or delete this one to build it anew",
        )
    return found


@contextmanager
def _claimed(output: Path, digest: str) -> Iterator[Path]:
    """The work folder, for this process alone and with nothing of another plan in it."""
    work = output / WORK
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            raise DataError("another build is writing here", output, "wait for it, or stop it first") from cause
        planned = work / "plan"
        if planned.is_file() and planned.read_text() != digest:
            log.logger("data").warning(
                "%s: inputs or options changed since the unfinished build; starting anew", output
            )
            for path in work.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
        for torn in output.glob("*.tmp"):
            torn.unlink()
        manifest.replace(planned, digest.encode())
        yield work
