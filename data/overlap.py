"""How much of the validation text also stands in the training text.

Documents are compared whole, by a hash of their tokens, and by shingles: every run of 50 tokens
inside a document has a rolling hash, and validation shingles are looked up among the training
ones. Of a large validation split only the shingles with certain hash bits count: the same ones on
both sides, so the fractions stay unbiased.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from train_gpt import open_data_shard

SHINGLE_TOKENS = 50
MAX_SHINGLES = 1 << 22  # of the validation split; more are sampled
BLOCK_TOKENS, MAX_DOCUMENT_TOKENS = 1 << 20, 1 << 26
FILTER_BITS = 27  # a byte for each value of the first bits of a hash: 128 MB

# Polynomial hashing modulo 2^64. Prefix sums of token * BASE^i give the hash of every run, times
# BASE^start; the inverse of the odd BASE takes that factor away again.
BASE = 0x9E3779B97F4A7C15
RANDOM = np.random.default_rng(0).integers(1 << 64, size=1 << 16, dtype=np.uint64)  # per token


def powers(base: int, count: int) -> np.ndarray:
    """base^0, base^1, ... modulo 2^64, (count,) uint64."""
    factors = np.full(count, base, dtype=np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


RAISE = powers(BASE, BLOCK_TOKENS)
LOWER = powers(pow(BASE, -1, 1 << 64), BLOCK_TOKENS)


def mixed(hashes: np.ndarray) -> np.ndarray:
    """Spreads the entropy of polynomial hashes, whose low bits are poor, over all 64 bits."""
    hashes = (hashes ^ (hashes >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return hashes ^ (hashes >> np.uint64(32))


def shingles(tokens: np.ndarray, bos: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and hashes of the runs of 50 tokens that hold no BOS; at most BLOCK_TOKENS tokens."""
    if len(tokens) < SHINGLE_TOKENS:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64)
    sums = np.zeros(len(tokens) + 1, dtype=np.uint64)
    np.cumsum(RANDOM[tokens] * RAISE[: len(tokens)], out=sums[1:])
    hashes = mixed(
        (sums[SHINGLE_TOKENS:] - sums[:-SHINGLE_TOKENS]) * LOWER[: len(sums) - SHINGLE_TOKENS]
    )
    inside = np.ones(len(hashes), dtype=bool)
    for start in np.flatnonzero(tokens == bos):
        inside[max(0, start - SHINGLE_TOKENS + 1) : start + 1] = False
    starts = np.flatnonzero(inside)
    return starts, hashes[starts]


@dataclass
class DocumentBlock:
    """Consecutive tokens; `starts` are those of the documents that begin in them."""

    tokens: np.ndarray
    starts: np.ndarray

    def documents(self) -> Iterator[np.ndarray]:
        return iter(np.split(self.tokens, self.starts[1:]))


def shard_documents(paths: Sequence[Path], index: int, bos: int) -> Iterator[DocumentBlock]:
    """The documents that begin in shard `index`, in blocks; the last may end in a later shard."""
    tokens = open_data_shard(paths[index])
    starts = np.flatnonzero(tokens == bos)
    first = 0
    while first < len(starts):
        # As many whole documents as fit a block, at least one; the shard's last comes alone.
        fitting = np.searchsorted(starts, starts[first] + BLOCK_TOKENS, side="right") - 1
        last = max(first + 1, int(fitting))
        if last < len(starts):
            block = tokens[starts[first] : starts[last]]
        else:
            block = np.concatenate([tokens[starts[first] :], *rest_of_document(paths, index, bos)])
        yield DocumentBlock(block, starts[first:last] - starts[first])
        first = last


def rest_of_document(paths: Sequence[Path], index: int, bos: int) -> Iterator[np.ndarray]:
    """The tokens up to the next BOS in the shards after `index`, but no more than memory holds."""
    total = 0
    for path in paths[index + 1 :]:
        tokens = open_data_shard(path)
        for start in range(0, len(tokens), BLOCK_TOKENS):
            block = tokens[start : start + BLOCK_TOKENS]
            ends = np.flatnonzero(block == bos)
            yield block[: ends[0]] if len(ends) else block
            total += len(block)
            if len(ends) or total > MAX_DOCUMENT_TOKENS:
                return


def block_shingles(block: DocumentBlock, bos: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Starts in the block, and hashes, of all its shingles."""
    step = BLOCK_TOKENS - SHINGLE_TOKENS + 1
    for first in range(0, len(block.tokens), step):
        starts, hashes = shingles(block.tokens[first : first + BLOCK_TOKENS], bos)
        yield first + starts, hashes


def document_hash(tokens: np.ndarray) -> int:
    return int.from_bytes(blake2b(tokens.tobytes(), digest_size=8).digest())


class ValidationIndex:
    """The validation documents' hashes and a table of their shingles."""

    def __init__(self, paths: Sequence[Path], bos: int) -> None:
        total = sum(len(open_data_shard(path)) for path in paths)
        self.bos = bos
        self.sample_shift = max(0, (total // MAX_SHINGLES).bit_length())
        documents: list[int] = []
        hashes, owners = [], []
        for index in range(len(paths)):
            for block in shard_documents(paths, index, bos):
                for starts, found in block_shingles(block, bos):
                    kept = self.sampled(found)
                    hashes.append(found[kept])
                    owner = np.searchsorted(block.starts, starts[kept], side="right") - 1
                    owners.append(owner + len(documents))
                documents += map(document_hash, block.documents())
        self.documents = np.array(documents, dtype=np.uint64)
        self.owners = np.concatenate(owners)
        self.shingles, self.places = np.unique(np.concatenate(hashes), return_inverse=True)
        self.filter = np.zeros(1 << FILTER_BITS, dtype=bool)
        self.filter[self.shingles >> np.uint64(64 - FILTER_BITS)] = True

    def sampled(self, hashes: np.ndarray) -> np.ndarray:
        """Which shingles count: those whose lowest hash bits are 0."""
        return (hashes & np.uint64((1 << self.sample_shift) - 1)) == 0

    def found(self, hashes: np.ndarray) -> np.ndarray:
        """Places in `self.shingles` of those of `hashes` that are there."""
        if len(self.shingles) == 0:
            return np.zeros(0, dtype=np.int64)
        likely = hashes[self.filter[hashes >> np.uint64(64 - FILTER_BITS)]]
        places = np.minimum(np.searchsorted(self.shingles, likely), len(self.shingles) - 1)
        return np.unique(places[self.shingles[places] == likely])
