"""Which sample comes when: pure functions of (seed, sample number), with nothing stored and nothing to resume.

A `Permutation` is a keyed Feistel network over the rectangle a x b >= size, both sides near the square root, with
additions instead of xor so that the sides need not be powers of two (Black and Rogaway 2002, "Ciphers with Arbitrary
Finite Domains"). A result outside [0, size) is sent through again until it falls inside; at most a numbers are outside.

A `Blend` deals the global sample numbers to sources in blocks. A source other than the largest has had
floor(samples * share) of its own after each whole block, the largest has the rest; so no share is ever rounded away,
however small, and each count follows from the block number alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import numpy as np

ROUNDS = 8
MASK = 2**64 - 1
BLOCK = 4096


def _mix(x: int, key: int) -> int:
    """64-bit finalizer of SplitMix64 (Steele et al. 2014) after adding the key."""
    x = (x + key) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def _mix_array(x: np.ndarray, key: int) -> np.ndarray:
    x = x + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A bijection of [0, size), chosen by `key`; any index costs the same."""

    def __init__(self, size: int, *key: int | str):
        assert 0 < size < 2**62, size
        self.size = size
        self._rows = isqrt(size - 1) + 1  # smallest a with a * a >= size
        self._columns = -(-size // self._rows)
        stream = hashlib.blake2b(repr(key).encode(), digest_size=64).digest()
        self._keys = [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]

    def __getitem__(self, index: int) -> int:
        assert 0 <= index < self.size, (index, self.size)
        while True:
            row, column = divmod(index, self._columns)
            for even, odd in zip(self._keys[::2], self._keys[1::2], strict=True):
                row = (row + _mix(column, even)) % self._rows
                column = (column + _mix(row, odd)) % self._columns
            index = row * self._columns + column
            if index < self.size:
                return index

    def apply(self, indices: np.ndarray) -> np.ndarray:
        """`self[i]` for each i of an int64 array."""
        out = np.array(indices, np.uint64).reshape(-1)
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        left = np.arange(out.size)
        while left.size:
            row, column = np.divmod(out[left], columns)
            for even, odd in zip(self._keys[::2], self._keys[1::2], strict=True):
                row = (row + _mix_array(column, even) % rows) % rows
                column = (column + _mix_array(row, odd) % columns) % columns
            out[left] = row * columns + column
            left = left[out[left] >= self.size]
        return out.astype(np.int64).reshape(np.shape(indices))


class Drawn(NamedTuple):
    """One sample of one source."""

    source: int
    epoch: int
    sample: int  # in corpus order


class Blend:
    """Global sample number -> (source, epoch, sample). Each source's samples come exactly once in each of its epochs.

    `sizes` are the samples of each source, `shares` their relative frequencies.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[Fraction], *, seed: int, shuffled: bool):
        assert len(sizes) == len(shares) > 0 and min(sizes) > 0 and min(shares) > 0, (sizes, shares)
        self.sizes, self.seed, self.shuffled = list(sizes), seed, shuffled
        self.shares = [share / sum(shares) for share in shares]
        self.block = max(BLOCK, len(sizes) ** 2)  # the largest source then has room for all the rounding
        self._largest = max(range(len(sizes)), key=lambda source: self.shares[source])
        self._dealt = lru_cache(maxsize=8)(self._deal)
        self._permutation = lru_cache(maxsize=64)(self._permute)

    def _permute(self, source: int, epoch: int) -> Permutation:
        return Permutation(self.sizes[source], self.seed, epoch, source)

    def before(self, block: int) -> list[int]:
        """Samples that each source has given before a block begins."""
        counts = [int(block * self.block * share) for share in self.shares]
        counts[self._largest] += block * self.block - sum(counts)
        return counts

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, its running sample count) of each number of a block."""
        first, counts = self.before(block), np.diff([self.before(block), self.before(block + 1)], axis=0)[0]
        sources = np.repeat(np.arange(len(counts)), counts)
        sources = sources[Permutation(self.block, self.seed, "block", block).apply(np.arange(self.block))]
        running = np.empty(self.block, np.int64)
        for source, start in enumerate(first):
            mine = sources == source
            running[mine] = start + np.arange(counts[source])
        return sources, running

    def draw(self, first: int, count: int) -> list[Drawn]:
        """The samples with global numbers first .. first + count - 1."""
        out = []
        for number in range(first, first + count):
            source, running = 0, number
            if len(self.sizes) > 1:
                block, place = divmod(number, self.block)
                sources, runs = self._dealt(block)
                source, running = int(sources[place]), int(runs[place])
            epoch, index = divmod(running, self.sizes[source])
            if self.shuffled:
                index = self._permutation(source, epoch)[index]
            out.append(Drawn(source, epoch, index))
        return out


def largest_remainder(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` divided in proportion to `sizes`, in whole numbers that sum to it."""
    whole = sum(sizes)
    parts = [total * size // whole for size in sizes]
    by_rest = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % whole), i))
    for i in by_rest[: total - sum(parts)]:
        parts[i] += 1
    return parts
