"""Documents spilled to disk, and their division into a training and a validation split.

Memory stays the same for any size of corpus: documents are on disk, and the division needs only a
histogram of their hashes.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np

from train_gpt import UserError

RECORD = struct.Struct("<QI")  # hash, length of the UTF-8 text that follows
BIN_BITS = 16


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
    """Documents in a nameless file in `folder`, each with a hash of its text and `seed`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.hash_key = seed.to_bytes(8, "little")
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as this)
        self.count, self.text_bytes = 0, 0
        self.bin_bytes = np.zeros(1 << BIN_BITS, dtype=np.int64)

    def add(self, text: str) -> None:
        data = text.encode()
        key = int.from_bytes(blake2b(data, digest_size=8, key=self.hash_key).digest())
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

    def training(self, is_val: Callable[[int], bool]) -> Iterator[str]:
        """The documents that are not held out and equal none that is."""
        return (text for key, text in self.documents() if not is_val(key))

    def validation(self, is_val: Callable[[int], bool]) -> Iterator[str]:
        """The held-out documents, each once."""
        seen: set[int] = set()
        for key, text in self.documents():
            if is_val(key) and key not in seen:
                seen.add(key)
                yield text

    def sample(self, is_val: Callable[[int], bool], sample_bytes: int) -> Iterator[str]:
        """About `sample_bytes` of the training documents, chosen by their hash."""
        limit = sample_bytes / self.text_bytes * (1 << 32)
        for key, text in self.documents():
            # The hash's high bits divide the splits; its low ones are independent of them.
            if not is_val(key) and (key & 0xFFFFFFFF) < limit:
                yield text

    def validation_limit(self, fraction: float) -> int:
        """The hash below which a document is held out: about `fraction` of the bytes are.

        Equal documents have equal hashes, so none is on both sides. Raises UserError if there are
        not two documents to divide.
        """
        filled = np.flatnonzero(self.bin_bytes)
        if len(filled) < 2:
            raise UserError(
                f"{self.count} document(s), of them {len(filled)} different: a held-out validation "
                "split needs two or more: give more text, another --separator, or name validation "
                "text with --val-input"
            )
        held_out = np.cumsum(self.bin_bytes[filled])[:-1]  # the last bin always trains
        last = int(np.argmin(np.abs(held_out - fraction * self.text_bytes)))
        return (int(filled[last]) + 1) << (64 - BIN_BITS)
