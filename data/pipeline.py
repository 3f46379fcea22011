"""Documents -> two splits, a tokenizer and checked token shards.

Memory stays the same for any size of corpus: documents are spilled to disk, and the division into
splits needs only a histogram of their hashes.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.command import note, progress
from data.documents import TextFiles, enough_documents
from data.shards import ShardWriter, describe_file, split_bytes
from data.tokenizer import (
    UNICODE_SIZE,
    Normalizer,
    check_tokenizer,
    count_characters,
    rare_characters,
    train_tokenizer,
)
from train_gpt import TokenBytes, UserError, data_fingerprint, load_tokenizer, require

TOKENIZER_NAME = "tokenizer.model"
BATCH_CHARS = 1 << 21  # encoded together by all threads; at worst 75 bytes of memory for each
# SentencePiece takes up to 34 bytes of memory for each.
TOKENIZER_SAMPLE_BYTES = 40_000_000

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


@dataclass
class Split:
    """What was written of a split."""

    documents: int = 0
    text_bytes: int = 0  # UTF-8 of the normalized text
    scored_bytes: int = 0  # as val_bpb counts them
    tokens: int = 0  # with a BOS for each document
    unknown_tokens: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    fingerprint: str = ""


class Preparation:
    """One run, in the order of its methods."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.model = folder / TOKENIZER_NAME
        if args.tokenizer:
            shutil.copyfile(args.tokenizer, self.model)
            self.tokenizer = load_tokenizer(self.model)
            self.normalize = Normalizer(self.tokenizer)
        else:
            self.normalize = Normalizer(args.normalization)
        self.left_out: Counter[str] = Counter()  # documents, by the reason
        self.changed_documents = 0
        self.characters = np.zeros(UNICODE_SIZE, dtype=np.int64)  # of the normalized text
        self.lost_characters = np.zeros(UNICODE_SIZE, dtype=np.int64)  # by normalization, net

    def spill(self, what: str, texts: Iterable[str]) -> Corpus:
        """The normalized documents, on disk."""
        corpus = Corpus(self.folder, self.args.seed)
        with progress(f"read {what}", None) as bar:
            for batch in batches(texts, BATCH_CHARS):
                self.add(corpus, batch)
                bar.update(corpus.text_bytes - bar.n)
        require(corpus.count > 0, f"the {what} holds no text: give files that do")
        return corpus

    def add(self, corpus: Corpus, batch: list[str]) -> None:
        """Adds documents to the corpus, but for those that cannot be normalized."""
        before, after = [], []
        for text in batch:
            try:
                normalized = self.normalize(text)
            except UnicodeEncodeError:
                self.left_out["half of a surrogate pair, which is no character"] += 1
                continue
            if normalized is None:
                self.left_out["normalization does not come to rest"] += 1
            elif not normalized:
                self.left_out["empty"] += 1
            else:
                corpus.add(normalized)
                before.append(text)
                after.append(normalized)
        self.changed_documents += sum(a != b for a, b in zip(before, after, strict=True))
        counts = count_characters("".join(after))
        self.characters += counts
        self.lost_characters += count_characters("".join(before)) - counts

    def train(self, corpus: Corpus, is_val: Callable[[int], bool]) -> None:
        """Trains a tokenizer on the training documents, or a sample of them."""
        size, rule = self.args.vocab_size, self.args.normalization
        rare = rare_characters(self.characters, size)
        if rare:
            text = f"{size:,} pieces have no room for {len(rare):,} rare characters"
            note(f"note: {text}, which become bytes: a larger --vocab-size keeps more")
        sample = corpus.sample(is_val, TOKENIZER_SAMPLE_BYTES)
        note(f"training a tokenizer of {size:,} pieces")
        texts = (text.translate(rare) for text in sample) if rare else sample
        self.model.write_bytes(train_tokenizer(texts, size, rule, self.args.workers))
        self.tokenizer = load_tokenizer(self.model)
        if (pieces := self.tokenizer.vocab_size()) < size:
            note(f"note: --vocab-size is lowered from {size:,} to {pieces:,}: the text has no more")

    def encode(self, name: str, documents: Iterator[str], about_bytes: int) -> Split:
        """Writes the shards of a split and checks them against the text."""
        split, writer = Split(), ShardWriter(self.folder, name, self.args.shard_tokens)
        with progress(f"encode {name}", about_bytes) as bar:
            for batch in batches(documents, BATCH_CHARS):
                self.encode_batch(batch, split, writer)
                bar.update(split.text_bytes - bar.n)
        writer.close()
        require(bool(writer.paths), f"no {name} documents are left: give more, different text")
        split.shards = [describe_file(path) for path in writer.paths]
        split.fingerprint = data_fingerprint(writer.paths)
        self.check_bytes(split, writer.paths)
        return split

    def encode_batch(self, batch: list[str], split: Split, writer: ShardWriter) -> None:
        """Writes documents, but for those that decode to another text."""
        bos, unknown = self.tokenizer.bos_id(), self.tokenizer.unk_id()
        encoded = self.tokenizer.Encode(batch, num_threads=self.args.workers)
        decoded = self.tokenizer.Decode(encoded, num_threads=self.args.workers)
        for text, ids, back in zip(batch, encoded, decoded, strict=True):
            if text != back and not self.args.allow_unknown:
                self.left_out["its tokens decode to another text"] += 1
                continue
            tokens = np.array([bos, *ids], dtype=np.uint16)
            writer.write(tokens)
            text_bytes = len(text.encode())
            split.documents += 1
            split.text_bytes += text_bytes
            split.scored_bytes += text_bytes - text.startswith(" ")  # BOS comes before the space
            split.tokens += len(tokens)
            split.unknown_tokens += int((tokens == unknown).sum())

    def check_bytes(self, split: Split, paths: list[Path]) -> None:
        """Counts the shards' bytes as the evaluation will: they must be the text's."""
        table = TokenBytes(self.tokenizer, torch.device("cpu"))
        counted = sum(scored for _, scored in split_bytes(paths, table))
        if split.unknown_tokens:
            split.scored_bytes = counted
        elif counted != split.scored_bytes:
            raise UserError(
                f"the pieces of {paths[0].name} and on count {counted:,} bytes for "
                f"{split.scored_bytes:,} of text: val_bpb would be wrong; use another tokenizer"
            )

    def run(self, inputs: Any, held_out: TextFiles) -> dict[str, Any]:
        """Makes the tokenizer and all shards; returns what the manifest says of them."""
        divide_few = not held_out.paths and self.args.separator is None
        corpus = self.spill("input", enough_documents(inputs) if divide_few else inputs)
        if held_out.paths:
            val_corpus = self.spill("validation input", held_out)
            is_val = {key for key, _ in val_corpus.documents()}.__contains__
            found = corpus.count + val_corpus.count
        else:
            val_corpus, found = corpus, corpus.count
            is_val = corpus.validation_limit(self.args.val_fraction).__gt__
        text = "each training document equals a validation document: give other text"
        require(any(not is_val(key) for key, _ in corpus.documents()), text)
        if not self.args.tokenizer:
            self.train(corpus, is_val)
        check_tokenizer(self.tokenizer, self.model, self.args.allow_unknown)
        val_bytes = round(self.args.val_fraction * corpus.text_bytes)
        train = self.encode("train", corpus.training(is_val), corpus.text_bytes - val_bytes)
        val = self.encode("val", val_corpus.validation(is_val), val_bytes)
        found -= self.left_out["its tokens decode to another text"]
        self.left_out["equals a validation document"] = found - train.documents - val.documents
        for source in (inputs, held_out):
            self.left_out.update(getattr(source, "left_out", {}))
        top = np.argsort(-self.lost_characters, kind="stable")[:20]
        lost = {f"U+{c:04X}": int(self.lost_characters[c]) for c in top}
        return {
            "tokenizer": {**describe_file(self.model), "pieces": self.tokenizer.vocab_size()},
            "left_out": dict(+self.left_out),
            "normalization_changes": {
                "documents": self.changed_documents,
                "lost_characters": {c: count for c, count in lost.items() if count > 0},
            },
            "splits": {"train": asdict(train), "val": asdict(val)},
        }
