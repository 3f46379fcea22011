"""Documents spilled to disk, and their division into a training and a validation split.

Memory stays the same for any size of corpus: documents are on disk, and the division needs only a
histogram of their hashes.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np

from train_gpt import UserError

RECORD = struct.Struct("<QI")  # hash, length of the UTF-8 text that follows
BIN_BITS = 16


def content_hash(text: bytes, seed: int) -> int:
    """64 bits that are equal for equal texts and, for other texts, as good as random."""
    return int.from_bytes(blake2b(text, digest_size=8, key=seed.to_bytes(8, "little")).digest())


def batches(texts: Iterable[str], batch_chars: int) -> Iterator[list[str]]:
    """Groups `texts` so that no group but one of a single text is longer than `batch_chars`."""
    batch, chars = [], 0
    for text in texts:
        if batch and chars + len(text) > batch_chars:
            yield batch
            batch, chars = [], 0
        batch.append(text)
        chars += len(text)
    if batch:
        yield batch


class Corpus:
    """Documents in a nameless file in `folder`, each with the hash of its text."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as this)
        self.count, self.text_bytes = 0, 0
        self.bin_bytes = np.zeros(1 << BIN_BITS, dtype=np.int64)

    def add(self, text: str) -> None:
        data = text.encode()
        key = content_hash(data, self.seed)
        self.file.write(RECORD.pack(key, len(data)) + data)
        self.bin_bytes[key >> (64 - BIN_BITS)] += len(data)
        self.count += 1
        self.text_bytes += len(data)

    def documents(self) -> Iterator[tuple[int, str]]:
        """Hash and text of each document, in the order they were added."""
        self.file.seek(0)
        while header := self.file.read(RECORD.size):
            key, length = RECORD.unpack(header)
            yield key, self.file.read(length).decode()

    def validation_limit(self, fraction: float) -> int:
        """The hash below which a document is held out: about `fraction` of the bytes are.

        Equal documents have equal hashes, so none is on both sides. Raises UserError if there are
        not two documents to divide.
        """
        filled = np.flatnonzero(self.bin_bytes)
        if len(filled) < 2:
            raise UserError(
                f"{self.count} document(s), of them {len(filled)} different: a held-out validation "
                "split needs two or more: give more documents, cut the text with --separator, or "
                "name validation text with --val-input"
            )
        held_out = np.cumsum(self.bin_bytes[filled])[:-1]  # the last bin always trains
        last = int(np.argmin(np.abs(held_out - fraction * self.text_bytes)))
        return (int(filled[last]) + 1) << (64 - BIN_BITS)
