"""What a recipe may say: every field with its type, its default, its unit and one line of meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shardforge.core.layout import Layout
from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import Engine, Objective, Observer, Optimizer, Schedule
from shardforge.recipe.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    path: str = option(REQUIRED, "folder written by `shardforge data build`")
    weight: float | None = option(None, "share of all samples, relative to the other sources' weights", above=0)
    epochs: float | None = option(None, "how often this source is seen for each full pass of the blend", above=0)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    path: str | None = option(None, "an existing tokenizer.json; empty trains a byte-level BPE on the corpus")
    vocab: int = option(32768, "entries of a trained tokenizer, special tokens included", unit="tokens", at_least=257)
    sample_bytes: int = option(200_000_000, "text that a tokenizer is trained on", unit="bytes", at_least=1)


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    inputs: tuple[str, ...] = option(
        REQUIRED,
        "files or folders (.txt .py .md ... .jsonl .jsonl.gz .jsonl.zst .parquet), hf:NAME for a Hugging Face "
        "dataset, or stdlib for the source of the running Python",
    )
    output: str = option(REQUIRED, "folder for the shards, the tokenizer and the manifest")
    tokenizer: TokenizerConfig = option(TokenizerConfig(), "which tokenizer")
    text_field: str = option("text", "field or column that holds the text")
    held_out: float = option(0.01, "share of the documents kept out of training", at_least=0, at_most=0.5)
    shard_tokens: int = option(100_000_000, "tokens after which a new shard begins", unit="tokens", at_least=1024)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    sources: tuple[SourceConfig, ...] = option(REQUIRED, "corpora and their shares")
    packing: Literal["cut", "best_fit"] = option(
        "cut", "cut: documents end to end, cut every seq_len; best_fit: whole documents, padded at the end"
    )
    documents: Literal["isolated", "joined"] = option(
        "isolated", "isolated: attention, positions and targets stop at a document's end; joined: they do not"
    )
    shuffled: bool = option(True, "draw samples in a keyed random order instead of corpus order")
    prefetch: int = option(2, "batches prepared ahead by a background thread", unit="batches", at_least=0)
    build: BuildConfig | None = option(None, "how `shardforge data build RECIPE` makes the corpus")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    master: Literal["fp32", "fp64"] = option("fp32", "type of the stored weights and the optimizer states")
    compute: Literal["bf16", "fp32", "fp64"] = option("bf16", "type of matmuls and activations")
    reduce: Literal["bf16", "fp32", "fp64"] = option("fp32", "type in which gradients are summed over ranks")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = option(500, "distance between checkpoints; 0 saves only at the end", unit="steps", at_least=0)
    keep_last: int = option(3, "newest checkpoints kept", at_least=1)
    keep_every: int | None = option(None, "multiples of this are never deleted", unit="steps", at_least=1)
    asynchronous: bool = option(
        True, "write in the background; training waits only for a copy in memory. false: it waits, without a copy"
    )


@dataclass(frozen=True, kw_only=True)
class BatchWarmupConfig:
    start: int = option(REQUIRED, "sequences per step at step 0", unit="sequences", at_least=1)
    increment: int = option(REQUIRED, "sequences added at a time", unit="sequences", at_least=1)
    steps: int = option(REQUIRED, "steps until the full batch", unit="steps", at_least=1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = option(REQUIRED, "optimizer steps of the whole run", unit="steps", at_least=1)
    sequences: int = option(REQUIRED, "sequences per step over all ranks", unit="sequences", at_least=1)
    seq_len: int = option(REQUIRED, "tokens of one sequence", unit="tokens", at_least=2)
    micro_batch: int | None = option(
        None, "sequences in one forward pass of one data rank; empty takes the rank's whole share", at_least=1
    )
    batch_warmup: BatchWarmupConfig | None = option(None, "smaller batches at the start")
    start: str | None = option(
        None,
        "weights that step 0 begins with: a Hugging Face or Megatron folder, a ShardForge run or one of its steps; a "
        "run that has a checkpoint of its own goes on from that",
    )
    start_moments: Literal["dropped", "carried"] = option(
        "dropped", "what the optimizer kept in train.start: the optimizer begins fresh, or with it and its step counts"
    )
    timeout: int = option(
        600, "time without progress after which a run of several ranks ends and says why", unit="seconds", at_least=1
    )
    eval_every: int = option(0, "distance between held-out evaluations; 0: at the end only", unit="steps", at_least=0)
    eval_sequences: int = option(64, "held-out sequences of one evaluation", unit="sequences", at_least=0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str = option(REQUIRED, "name of the run; the run directory is runs/<name> unless run_dir says otherwise")
    seed: int = option(0, "the one seed: weights, dropout and data order follow from it", at_least=0)
    run_dir: str | None = option(None, "folder of the run")
    model: ModelConfig = option(REQUIRED, "the model")
    objective: Objective = option("next_token", "what is predicted and how it is scored")
    data: DataConfig = option(REQUIRED, "the corpus")
    optim: Optimizer = option("adamw", "the optimizer")
    schedule: Schedule = option(REQUIRED, "the learning rate at each step")
    parallel: Layout = option(Layout(), "degrees of parallelism")
    precision: PrecisionConfig = option(PrecisionConfig(), "number types")
    engine: Engine = option("native", "what runs a step")
    checkpoint: CheckpointConfig = option(CheckpointConfig(), "when to save and what to keep")
    train: TrainConfig = option(REQUIRED, "sizes of a step and length of the run")
    observe: tuple[Observer, ...] = option((), "wandb, tensorboard; console and metrics.jsonl are always there")
