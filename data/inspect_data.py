"""Checks a folder of token shards and says what is in it.

    python data/inspect_data.py data/datasets/fineweb10B_sp1024
    python data/inspect_data.py data/datasets/demo --no-overlap

Every header and token is checked. Printed are the tokens of each split, how they are spread over
the vocabulary, their bytes, the start of a document of each split, how much of the validation text
also stands in the training text, and the fingerprint that a run's log holds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import sentencepiece as spm
import torch

from data.overlap import (
    BLOCK_TOKENS,
    SHINGLE_TOKENS,
    ValidationIndex,
    block_shingles,
    document_hash,
    shard_documents,
)
from data.progress import Progress
from data.shards import shard_text_bytes
from data.workers import Workers, usable_cores
from train_gpt import (
    TokenBytes,
    UserError,
    data_fingerprint,
    find_data_shards,
    load_tokenizer,
    open_data_shard,
)

SAMPLE_TOKENS = 120
FREQUENT_PIECES = 12
NOWHERE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Task:
    """One shard of a split, and what to look at it with."""

    paths: tuple[Path, ...]  # of the split
    index: int
    tokenizer: Path
    vocab_size: int
    val_paths: tuple[Path, ...]  # to compare with; empty: do not


@dataclass
class Found:
    """What is in a shard, or in a split."""

    histogram: np.ndarray  # (vocabulary,) counts
    text_bytes: int
    documents: int
    val_documents: set[int]  # hashes of validation documents seen
    val_shingles: np.ndarray  # places in the validation index, of shingles seen

    def add(self, other: Found) -> None:
        self.histogram = self.histogram + other.histogram
        self.text_bytes += other.text_bytes
        self.documents += other.documents
        self.val_documents |= other.val_documents
        self.val_shingles = np.union1d(self.val_shingles, other.val_shingles)

    @property
    def tokens(self) -> int:
        return int(self.histogram.sum())


@cache
def open_tokenizer(path: Path, vocab_size: int) -> tuple[spm.SentencePieceProcessor, TokenBytes]:
    torch.set_num_threads(1)  # the shards are what is worked on in parallel
    tokenizer = load_tokenizer(path, vocab_size)
    return tokenizer, TokenBytes(tokenizer, torch.device("cpu"))


@cache
def validation_index(paths: tuple[Path, ...], bos: int) -> ValidationIndex:
    return ValidationIndex(paths, bos)


def count_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """How often each token occurs in a shard, (vocab_size,). Raises UserError for other tokens."""
    tokens, histogram = open_data_shard(path), np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), BLOCK_TOKENS):  # bincount takes 8 bytes a token
        block = np.bincount(tokens[start : start + BLOCK_TOKENS], minlength=vocab_size)
        if len(block) > vocab_size:
            raise UserError(
                f"data shard {path} holds token {len(block) - 1}, outside the vocabulary of "
                f"{vocab_size}: name its tokenizer with --tokenizer and --vocab-size"
            )
        histogram += block
    return histogram


def look_at_shard(task: Task) -> Found:
    """All that is printed of a shard. Raises UserError if a token is outside the vocabulary."""
    histogram = count_tokens(task.paths[task.index], task.vocab_size)
    tokenizer, table = open_tokenizer(task.tokenizer, task.vocab_size)
    text_bytes = shard_text_bytes(task.paths, task.index, table)
    bos = tokenizer.bos_id()
    found = Found(histogram, text_bytes, int(histogram[bos]), set(), NOWHERE)
    if task.val_paths:
        compare(task, bos, found)
    return found


def compare(task: Task, bos: int, found: Found) -> None:
    """Looks for validation documents and shingles among the documents of a training shard."""
    index = validation_index(task.val_paths, bos)
    known, places = set(index.documents.tolist()), [NOWHERE]
    for block in shard_documents(task.paths, task.index, bos):
        found.val_documents |= known.intersection(map(document_hash, block.documents()))
        for _, hashes in block_shingles(block, bos):
            places.append(index.found(hashes[index.sampled(hashes)]))
    found.val_shingles = np.unique(np.concatenate(places))


def look_at_split(tasks: list[Task], split: str, workers: Workers) -> Found:
    sizes = [len(open_data_shard(path)) for path in tasks[0].paths]
    total = Found(np.zeros(tasks[0].vocab_size, dtype=np.int64), 0, 0, set(), NOWHERE)
    with Progress(f"look at {split}", 2 * sum(sizes)) as progress:
        for found in workers.map(look_at_shard, tasks):
            total.add(found)
            progress.update(2 * total.tokens)  # bytes
    return total


def describe_split(split: str, paths: Sequence[Path], found: Found) -> str:
    share = found.histogram / found.tokens
    entropy = -float((share[share > 0] * np.log2(share[share > 0])).sum())
    return (
        f"{split}: {len(paths)} shards, {found.documents:,} documents, {found.tokens:,} tokens, "
        f"{found.text_bytes:,} bytes, {found.text_bytes / found.tokens:.4f} bytes per token, "
        f"fingerprint {data_fingerprint(paths)}\n"
        f"  unigram entropy {entropy:.3f} bits per token, "
        f"{entropy * found.tokens / found.text_bytes:.4f} bits per byte"
    )


def describe_vocabulary(histogram: np.ndarray, tokenizer: spm.SentencePieceProcessor) -> str:
    """How the tokens of all splits are spread over the vocabulary."""
    total, pieces = histogram.sum(), range(len(histogram))
    count = {
        "byte-fallback": sum(int(histogram[i]) for i in pieces if tokenizer.IsByte(i)),
        "unknown": int(histogram[tokenizer.unk_id()]),
        "control": sum(int(histogram[i]) for i in pieces if tokenizer.IsControl(i)),
    }
    text = [i for i in pieces if not (tokenizer.IsByte(i) or tokenizer.IsControl(i))]
    unused = [tokenizer.IdToPiece(i) for i in text if histogram[i] == 0]
    top = np.argsort(-histogram, kind="stable")[:FREQUENT_PIECES]
    frequent = ", ".join(f"{tokenizer.IdToPiece(int(i))} {histogram[i] / total:.1%}" for i in top)
    kinds = ", ".join(f"{n:,} {kind} ({n / total:.2%})" for kind, n in count.items())
    return (
        f"vocabulary: {np.count_nonzero(histogram):,} of {len(histogram):,} pieces occur; {kinds}\n"
        f"  most frequent: {frequent}\n"
        f"  text pieces that never occur: {len(unused)} {' '.join(unused[:FREQUENT_PIECES])}"
    )


def describe_overlap(index: ValidationIndex, found: Found) -> str:
    documents = index.documents.tolist()
    same = sum(document in found.val_documents for document in documents)
    seen = np.zeros(len(index.shingles), dtype=bool)
    seen[found.val_shingles] = True
    seen = seen[index.places]  # of every shingle of the split, in order
    total = np.bincount(index.owners, minlength=len(documents))
    share = np.bincount(index.owners, weights=seen, minlength=len(documents)) / np.maximum(total, 1)
    some, half = int((share > 0).sum()), int((share >= 0.5).sum())
    sampled = f" (1 in {1 << index.sample_shift} looked at)" if index.sample_shift else ""
    return (
        f"overlap: {same:,} of {len(documents):,} validation documents are training documents, "
        f"{len(documents) - len(set(documents)):,} repeat within validation\n"
        f"  {int(seen.sum()):,} of {len(seen):,} runs of {SHINGLE_TOKENS} validation tokens"
        f"{sampled} occur in training ({seen.sum() / max(len(seen), 1):.3%})\n"
        f"  {some:,} documents have such a run; in {half:,} half of all runs are such"
    )


def sample(paths: Sequence[Path], tokenizer: spm.SentencePieceProcessor) -> str:
    ids = open_data_shard(paths[0])[:SAMPLE_TOKENS].tolist()
    return repr(tokenizer.Decode(ids))


def find_tokenizer(folder: Path, given: Path | None) -> Path:
    """The tokenizer beside the shards, or where a download puts it. Raises UserError."""
    if given:
        return given
    beside = folder / "tokenizer.model"
    downloaded = sorted((folder.parent.parent / "tokenizers").glob("*.model"))
    if beside.is_file():
        return beside
    if len(downloaded) != 1:
        raise UserError(
            f"{folder} has no tokenizer.model, and {len(downloaded)} tokenizers are in "
            f"{folder.parent.parent / 'tokenizers'}: name one with --tokenizer"
        )
    return downloaded[0]


def open_all(paths: Sequence[Path]) -> None:
    """Checks all headers. Raises UserError with everything that is wrong."""
    faults = []
    for path in paths:
        try:
            open_data_shard(path)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n  ".join([f"{len(faults)} of {len(paths)} shards:", *faults]))


def inspect(args: argparse.Namespace) -> None:
    splits = {split: tuple(find_data_shards(args.folder, split)) for split in ("train", "val")}
    open_all([path for paths in splits.values() for path in paths])
    model = find_tokenizer(args.folder, args.tokenizer)
    tokenizer, _ = open_tokenizer(model, args.vocab_size)
    index = validation_index(splits["val"], tokenizer.bos_id()) if args.overlap else None
    found = {}
    with Workers(args.workers) as workers:
        for split, paths in splits.items():
            val_paths = splits["val"] if index and split == "train" else ()
            common = (model, args.vocab_size, val_paths)
            tasks = [Task(paths, i, *common) for i in range(len(paths))]
            found[split] = look_at_split(tasks, split, workers)
            print(describe_split(split, paths, found[split]))
    print(describe_vocabulary(found["train"].histogram + found["val"].histogram, tokenizer))
    if index:
        print(describe_overlap(index, found["train"]))
    for split, paths in splits.items():
        print(f"{split} begins: {sample(paths, tokenizer)}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Checks a folder of token shards and says what is in it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder of fineweb_{train,val}_*.bin")
    add("--tokenizer", type=Path, help="SentencePiece model (default: the one found with DIR)")
    add("--vocab-size", type=int, default=1024, help="pieces of the tokenizer")
    add(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="look for validation text in the training text",
    )
    add("--workers", type=int, default=usable_cores(), help="processes")
    try:
        inspect(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
