"""Our shards and Megatron-Core's IndexedDataset are the same files."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from shardforge.data.shards import ShardReader, ShardWriter

LENGTHS = [5, 1, 0, 300, 17, 64]


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optional packages that it looks for
        return pytest.importorskip(
            "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed", exc_type=ImportError
        )


@pytest.fixture(params=["uint16", "int32"])
def dtype(request: pytest.FixtureRequest) -> np.dtype:
    return np.dtype(request.param)


def documents(dtype: np.dtype) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, np.iinfo(dtype).max, length).astype(dtype) for length in LENGTHS]


def ours(prefix: Path, dtype: np.dtype) -> None:
    with ShardWriter(prefix, dtype) as writer:
        for document in documents(dtype):
            writer.add(document)
        writer.close()


def theirs(megatron: ModuleType, prefix: Path, dtype: np.dtype, sequences: int = 1) -> None:
    """Written by their builder, each document cut into `sequences` sequences."""
    builder = megatron.IndexedDatasetBuilder(str(prefix) + ".bin", dtype=dtype.type)
    for document in documents(dtype):
        for sequence in np.array_split(document, sequences):
            builder.add_item(torch.from_numpy(sequence.astype(np.int64)))
        builder.end_document()
    builder.finalize(str(prefix) + ".idx")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_both_writers_give_the_same_bytes(tmp_path: Path, megatron: ModuleType, dtype: np.dtype, suffix: str):
    ours(tmp_path / "ours", dtype)
    theirs(megatron, tmp_path / "theirs", dtype)
    assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_their_reader_reads_our_shards(tmp_path: Path, megatron: ModuleType, dtype: np.dtype):
    ours(tmp_path / "ours", dtype)
    dataset = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert all((dataset[i] == document).all() for i, document in enumerate(documents(dtype)))
    assert dataset.sequence_lengths.tolist() == LENGTHS
    assert dataset.document_indices.tolist() == list(range(len(LENGTHS) + 1))


@pytest.mark.parametrize("sequences", [1, 3])
def test_our_reader_reads_their_shards(tmp_path: Path, megatron: ModuleType, dtype: np.dtype, sequences: int):
    theirs(megatron, tmp_path / "theirs", dtype, sequences)
    reader = ShardReader(tmp_path / "theirs")
    reader.check()
    read = [reader.document(number).tolist() for number in range(reader.documents)]
    assert read == [document.tolist() for document in documents(dtype)]


@pytest.mark.parametrize("vocab", [65_499, 65_500, 200_000])
def test_both_choose_the_same_type_for_a_vocabulary(megatron: ModuleType, vocab: int):
    from shardforge.data.shards import token_type

    assert token_type(vocab).type is megatron.DType.optimal_dtype(vocab)
