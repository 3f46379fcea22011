"""Documents -> a tokenizer and checked token shards, in bounded memory."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.corpus import Corpus, batches
from data.documents import TextFiles
from data.progress import Progress
from data.shards import ShardWriter, shard_text_bytes
from data.tokenizing import (
    CACHED_WORD_BYTES,
    Changes,
    Normalization,
    byte_fallback_is_complete,
    encode_batch,
    normalize_batch,
    sampled,
    train_tokenizer,
)
from data.workers import Workers
from train_gpt import TokenBytes, UserError, data_fingerprint, load_tokenizer

TOKENIZER_NAME = "tokenizer.model"
# Measured at worst: 75 bytes of memory per byte of a document in encoding (one of emoji), 34 per
# byte of the sample in training a tokenizer (random words).
MEMORY_PER_DOCUMENT_BYTE, MEMORY_PER_SAMPLE_BYTE = 100, 48
MAX_BATCH_BYTES = 1 << 20


def check_tokenizer(path: Path, vocab_size: int, allow_unknown: bool) -> None:
    """Raises UserError unless the tokenizer fits the shards and represents every text."""
    tokenizer = load_tokenizer(path, vocab_size)
    if tokenizer.bos_id() < 0:
        raise UserError(f"tokenizer {path} has no BOS piece, which every document begins with")
    if not (allow_unknown or byte_fallback_is_complete(tokenizer)):
        raise UserError(
            f"tokenizer {path} has no byte fallback (256 byte pieces): characters it does not know "
            "would be lost, and val_bpb would not count them; use one that has, or let "
            "--allow-unknown count what is lost"
        )


@dataclass(frozen=True)
class Memory:
    """How much of everything fits the memory; sizes in bytes."""

    max_document_bytes: int
    batch_bytes: int
    max_words: int
    tokenizer_sample_bytes: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Memory:
        total = args.memory_mb * 1_000_000
        share = total // (args.workers + 1)  # the workers' and this process's
        return cls(
            max_document_bytes=share // MEMORY_PER_DOCUMENT_BYTE,
            batch_bytes=min(share // MEMORY_PER_DOCUMENT_BYTE, MAX_BATCH_BYTES),
            max_words=share // 4 // CACHED_WORD_BYTES,
            tokenizer_sample_bytes=total // MEMORY_PER_SAMPLE_BYTE,
        )


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

    def __init__(self, args: argparse.Namespace, folder: Path, workers: Workers) -> None:
        self.args, self.folder, self.workers = args, folder, workers
        self.memory = Memory.of(args)
        self.model = folder / TOKENIZER_NAME
        self.normalization = Normalization(rule=args.normalization or "nmt_nfkc")
        if args.tokenizer:
            shutil.copyfile(args.tokenizer, self.model)
            self.normalization = Normalization(model=str(self.model))
        self.changes = Changes()
        self.empty_documents = 0

    def spill(self, what: str, source: Any) -> Corpus:
        """The normalized documents of `source`, on disk. Empty ones are left out."""
        corpus = Corpus(self.folder, self.args.seed)
        texts = batches(source, self.memory.batch_bytes)
        with Progress(f"read {what}", source.total_bytes) as progress:
            for normalized, changes in self.workers.map(
                partial(normalize_batch, self.normalization), texts
            ):
                self.changes.add(changes)
                for text in normalized:
                    if text:
                        corpus.add(text)
                self.empty_documents += sum(not text for text in normalized)
                progress.update(source.done_bytes)
        if corpus.count == 0:
            raise UserError(f"the {what} holds no text: give files that do")
        return corpus

    def train_tokenizer(self, corpus: Corpus, is_val: Callable[[int], bool]) -> None:
        """Trains on the training documents, or a sample of them as large as the memory allows."""
        fraction = self.memory.tokenizer_sample_bytes / corpus.text_bytes
        print(f"training a tokenizer on {min(1.0, fraction):.0%} of the text", file=sys.stderr)
        try:
            model = train_tokenizer(
                sampled(((k, t) for k, t in corpus.documents() if not is_val(k)), fraction),
                self.args.vocab_size,
                self.normalization,
                self.args.workers,
            )
        except RuntimeError as error:
            raise UserError(
                f"--vocab-size {self.args.vocab_size}: SentencePiece cannot train it on "
                f"{corpus.text_bytes:,} bytes of text ({error}): give more text or another size"
            ) from None
        self.model.write_bytes(model)
        check_tokenizer(self.model, self.args.vocab_size, self.args.allow_unknown)

    def encode(self, split: str, documents: Iterator[str], about_bytes: int) -> Split:
        """Writes the shards of a split and checks them against the text."""
        report, writer = Split(), ShardWriter(self.folder, split, self.args.shard_tokens)
        encode = partial(encode_batch, str(self.model), self.memory.max_words)
        with Progress(f"encode {split}", about_bytes) as progress:
            for batch in self.workers.map(encode, batches(documents, self.memory.batch_bytes)):
                if batch.altered_documents and not self.args.allow_unknown:
                    raise UserError(
                        f"the document that starts {batch.altered_example!r} decodes to another "
                        "text: the tokenizer cannot represent it; use one with byte fallback"
                    )
                writer.write(batch.tokens)
                report.documents += batch.documents
                report.text_bytes += batch.text_bytes
                report.scored_bytes += batch.scored_bytes
                report.unknown_tokens += batch.unknown_tokens
                report.tokens += len(batch.tokens)
                progress.update(report.text_bytes)
        writer.close()
        if not writer.paths:
            raise UserError(f"no {split} documents are left: all equal validation documents")
        report.shards = [describe_file(path) for path in writer.paths]
        report.fingerprint = data_fingerprint(writer.paths)
        self.check(report)
        return report

    def check(self, split: Split) -> None:
        """Counts the shards' bytes as the evaluation will: they must be the text's."""
        table = TokenBytes(load_tokenizer(self.model, self.args.vocab_size), torch.device("cpu"))
        paths = [self.folder / shard["file"] for shard in split.shards]
        counted = sum(shard_text_bytes(paths, i, table) for i in range(len(paths)))
        if split.unknown_tokens:
            split.scored_bytes = counted
        elif counted != split.scored_bytes:
            raise UserError(
                f"the pieces of {split.shards[0]['file']} and on count {counted:,} bytes for "
                f"{split.scored_bytes:,} of text: val_bpb would be wrong; use another tokenizer"
            )

    def run(self, inputs: Any, held_out: TextFiles) -> dict[str, Any]:
        """Makes the tokenizer and all shards; returns what the manifest says of them."""
        corpus = self.spill("input", inputs)
        val_corpus = self.spill("validation input", held_out) if held_out.paths else corpus
        if held_out.paths:
            is_val = {key for key, _ in val_corpus.documents()}.__contains__
        else:
            is_val = corpus.validation_limit(self.args.val_fraction).__gt__
        if not self.args.tokenizer:
            self.train_tokenizer(corpus, is_val)
        val_bytes = round(self.args.val_fraction * corpus.text_bytes)
        splits = {
            "train": self.encode("train", training(corpus, is_val), corpus.text_bytes - val_bytes),
            "val": self.encode("val", unique(val_corpus, is_val), val_bytes),
        }
        found = corpus.count + (val_corpus.count if held_out.paths else 0)
        written = sum(split.documents for split in splits.values())
        return {
            "tokenizer": {"trained": not self.args.tokenizer, **describe_file(self.model)},
            "empty_documents_dropped": self.empty_documents,
            "validation_duplicates_dropped": found - written,
            "normalization_changes": self.changes.summary(),
            "splits": {name: asdict(split) for name, split in splits.items()},
        }


def training(corpus: Corpus, is_val: Callable[[int], bool]) -> Iterator[str]:
    """The documents that are not held out and equal none that is."""
    return (text for key, text in corpus.documents() if not is_val(key))


def unique(corpus: Corpus, is_val: Callable[[int], bool]) -> Iterator[str]:
    """The held-out documents, each once."""
    seen: set[int] = set()
    for key, text in corpus.documents():
        if is_val(key) and key not in seen:
            seen.add(key)
            yield text


def describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}
