"""How much of the validation text also stands in the training text.

Documents are compared whole, by a hash of their tokens, and by shingles: the runs of 50 tokens
inside a document. Of a large validation split only the shingles with certain hash bits count: the
same ones on both sides, so the fractions stay unbiased.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from train_gpt import open_data_shard

SHINGLE_TOKENS = 50
MAX_SHINGLES = 1 << 20  # of the validation split; more are sampled
BLOCK_TOKENS, MAX_DOCUMENT_TOKENS = 1 << 20, 1 << 24
RANDOM = np.random.default_rng(0).integers(1 << 64, size=1 << 16, dtype=np.uint64)  # per token


def document_blocks(paths: Sequence[Path], bos: int) -> Iterator[np.ndarray]:
    """The tokens of a split, across its shards, in blocks of whole documents.

    Only a document of more than MAX_DOCUMENT_TOKENS is divided.
    """
    rest = np.zeros(0, dtype=np.uint16)
    for path in paths:
        tokens = open_data_shard(path)
        for start in range(0, len(tokens), BLOCK_TOKENS):
            rest = np.concatenate([rest, tokens[start : start + BLOCK_TOKENS]])
            starts = np.flatnonzero(rest == bos)
            whole = int(starts[-1]) if len(starts) else 0
            if len(rest) - whole > MAX_DOCUMENT_TOKENS:
                whole = len(rest)
            if whole:
                yield rest[:whole]
                rest = rest[whole:]
    if len(rest):
        yield rest


def combined(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Hashes of pairs of hashes."""
    hashes = (left ^ (left >> np.uint64(31))) * np.uint64(0xD6E8FEB86659FD93) + right
    return hashes ^ (hashes >> np.uint64(32))


def shingle_hashes(tokens: np.ndarray) -> np.ndarray:
    """A hash of every run of 50 tokens, (tokens - 49,) uint64.

    Runs of 1, 2, 4, ... 32 tokens have the hash of their two halves; a run of 50 that of its first
    and its last 32, which overlap.
    """
    if len(tokens) < SHINGLE_TOKENS:
        return np.zeros(0, dtype=np.uint64)
    hashes, width = RANDOM[tokens], 1
    while 2 * width <= SHINGLE_TOKENS:
        hashes = combined(hashes[:-width], hashes[width:])
        width *= 2
    overhang = SHINGLE_TOKENS - width
    return combined(hashes[:-overhang], hashes[overhang:])


def block_hashes(
    tokens: np.ndarray, bos: int, sample_shift: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of documents and of shingles inside them, and each shingle's place in the documents.

    Tokens before the first BOS count as a document, too. Only shingles whose lowest `sample_shift`
    hash bits are 0 are there.
    """
    is_start = tokens == bos
    is_start[0] = True
    texts = np.split(tokens, np.flatnonzero(is_start)[1:])
    digests = b"".join(blake2b(text.tobytes(), digest_size=8).digest() for text in texts)
    hashes, document = shingle_hashes(tokens), np.cumsum(is_start) - 1
    first, last = document[: len(hashes)], document[SHINGLE_TOKENS - 1 :]
    kept = (first == last) & (tokens[: len(hashes)] != bos)
    kept &= (hashes & np.uint64((1 << sample_shift) - 1)) == 0
    return np.frombuffer(digests, dtype="<u8"), hashes[kept], first[kept]


class ValidationIndex:
    """The documents and shingles of the validation split, and which of them training has."""

    def __init__(self, paths: Sequence[Path], bos: int) -> None:
        total = sum(len(open_data_shard(path)) for path in paths)
        self.bos, self.sample_shift = bos, max(0, (total // MAX_SHINGLES).bit_length())
        documents, shingles, owners, count = [], [], [], 0
        for tokens in document_blocks(paths, bos):
            found = block_hashes(tokens, bos, self.sample_shift)
            documents.append(found[0])
            shingles.append(found[1])
            owners.append(found[2] + count)
            count += len(found[0])
        self.documents, self.owners = np.concatenate(documents), np.concatenate(owners)
        self.shingles, self.places = np.unique(np.concatenate(shingles), return_inverse=True)
        self.document_seen = np.zeros(len(self.documents), dtype=bool)
        self.shingle_seen = np.zeros(len(self.shingles), dtype=bool)

    def look_up(self, tokens: np.ndarray) -> None:
        """Marks what stands in a block of training documents; several threads may do so at once."""
        documents, shingles, _ = block_hashes(tokens, self.bos, self.sample_shift)
        self.document_seen[np.isin(self.documents, documents)] = True
        if len(self.shingles):
            places = np.searchsorted(self.shingles, shingles)
            places = np.minimum(places, len(self.shingles) - 1)
            self.shingle_seen[places[self.shingles[places] == shingles]] = True

    def report(self) -> str:
        seen, documents = self.shingle_seen[self.places], len(self.documents)
        total = np.bincount(self.owners, minlength=documents)
        share = np.bincount(self.owners, weights=seen, minlength=documents) / np.maximum(total, 1)
        sampled = f" (1 in {1 << self.sample_shift} looked at)" if self.sample_shift else ""
        repeated = documents - len(np.unique(self.documents))
        near = seen.sum() > 0.01 * len(seen)
        verdict = "clean"
        if near or self.document_seen.any():
            verdict = "not clean, so scores on it flatter: leave out copies, or give --val-input"
        return (
            f"overlap: {self.document_seen.sum():,} of {documents:,} validation documents are "
            f"training documents, {repeated:,} repeat within validation\n"
            f"  {seen.sum():,} of {len(seen):,} runs of {SHINGLE_TOKENS} validation tokens"
            f"{sampled} occur in training ({seen.sum() / max(len(seen), 1):.3%})\n"
            f"  {(share > 0).sum():,} documents have such a run; in {(share >= 0.5).sum():,} half "
            f"of all runs are such\n  the split is {verdict}"
        )
