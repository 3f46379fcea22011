"""Checks a folder of token shards and says what is in it.

    python data/inspect_data.py data/datasets/fineweb10B_sp1024
    python data/inspect_data.py data/datasets/demo --no-overlap

Every header and token is checked. Printed are the tokens of each split, how they are spread over
the vocabulary, their bytes, the start of each split, how much of the validation text also stands in
the training text, and the fingerprint that a run's log holds.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the imports

try:
    import numpy as np
    import sentencepiece as spm
    import torch

    from data.command import bounded, progress, run_command, usable_cores
    from data.overlap import BLOCK_TOKENS, ValidationIndex, document_blocks
    from data.shards import split_bytes
    from data.tokenizer import check_token_bytes
    from train_gpt import (
        Hyperparameters,
        TokenBytes,
        UserError,
        check_tokenizer,
        data_fingerprint,
        find_data_shards,
        load_tokenizer,
        open_data_shard,
        require,
    )
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed: pip install -r requirements.txt")

SAMPLE_TOKENS = 120
FREQUENT_PIECES = 12


def find_tokenizer(folder: Path, given: Path | None) -> Path:
    """The tokenizer beside the shards, or where a download puts it. Raises UserError."""
    beside = folder / "tokenizer.model"
    if beside.is_file():
        same = given is None or not given.is_file() or given.read_bytes() == beside.read_bytes()
        require(same, f"--tokenizer {given} is not {beside}, which {folder} was made with")
    if given or beside.is_file():
        return given or beside
    downloads = folder.resolve().parent.parent / "tokenizers"
    downloaded = sorted(downloads.glob("*.model"))
    require(
        len(downloaded) == 1,
        f"{folder} has no tokenizer.model, and {downloads} has {len(downloaded)} tokenizers: name "
        "one with --tokenizer",
    )
    return downloaded[0]


def count_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """How often each token occurs in a shard, (vocab_size,). Raises UserError for other tokens."""
    tokens, histogram = open_data_shard(path), np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), BLOCK_TOKENS):  # bincount takes 8 bytes a token
        block = np.bincount(tokens[start : start + BLOCK_TOKENS], minlength=vocab_size)
        require(
            len(block) == vocab_size,
            f"data shard {path} holds token {len(block) - 1}, outside the vocabulary of "
            f"{vocab_size}: name its tokenizer with --tokenizer",
        )
        histogram += block
    return histogram


def describe_split(
    name: str, paths: Sequence[Path], tokenizer: spm.SentencePieceProcessor
) -> tuple[str, np.ndarray]:
    """What there is to say of a split, and how often each token occurs in it."""
    histogram = sum(count_tokens(path, tokenizer.vocab_size()) for path in paths)
    table = TokenBytes(tokenizer, torch.device("cpu"))
    check_token_bytes(tokenizer, table, open_data_shard(paths[0]))
    tokens, text_bytes = int(histogram.sum()), 0
    with progress(f"count the bytes of {name}", 2 * tokens) as bar:
        for block_tokens, block_bytes in split_bytes(paths, table):
            text_bytes += block_bytes
            bar.update(2 * block_tokens)
    share = histogram[histogram > 0] / tokens
    entropy = -float((share * np.log2(share)).sum())
    documents = int(histogram[tokenizer.bos_id()])
    text = (
        f"{name}: {len(paths)} shards, {documents:,} documents, {tokens:,} tokens, "
        f"{text_bytes:,} bytes, {text_bytes / tokens:.4f} bytes per token, "
        f"fingerprint {data_fingerprint(paths)}\n"
        f"  unigram entropy {entropy:.3f} bits per token, "
        f"{entropy * tokens / max(text_bytes, 1):.4f} bits per byte"
    )
    if documents == 0:
        text += f"\n  no document starts: the shards hold no BOS (token {tokenizer.bos_id()})"
    return text, histogram


def describe_vocabulary(histogram: np.ndarray, tokenizer: spm.SentencePieceProcessor) -> str:
    """How the tokens of all splits are spread over the vocabulary."""
    total, ids = histogram.sum(), range(len(histogram))
    pieces = [tokenizer.IdToPiece(i) for i in ids]
    special = {
        "byte-fallback": [i for i in ids if tokenizer.IsByte(i)],
        "unknown": [tokenizer.unk_id()],
        "control": [i for i in ids if tokenizer.IsControl(i)],
    }
    counts = {kind: int(histogram[members].sum()) for kind, members in special.items()}
    kinds = ", ".join(f"{n:,} {kind} ({n / total:.2%})" for kind, n in counts.items())
    top = np.argsort(-histogram, kind="stable")[:FREQUENT_PIECES].tolist()
    frequent = ", ".join(f"{pieces[i]} {histogram[i] / total:.1%}" for i in top if histogram[i])
    text = set(ids).difference(*special.values())
    unused = [pieces[i] for i in sorted(text) if histogram[i] == 0]
    return (
        f"vocabulary: {np.count_nonzero(histogram):,} of {len(pieces):,} pieces occur; {kinds}\n"
        f"  most frequent: {frequent}\n"
        f"  text pieces that never occur: {len(unused)} {' '.join(unused[:FREQUENT_PIECES])}"
    )


def measure_overlap(train: Sequence[Path], val: Sequence[Path], bos: int, threads: int) -> str:
    index = ValidationIndex(val, bos)
    total = sum(len(open_data_shard(path)) for path in train)
    blocks = document_blocks(train, bos)
    with progress("compare", 2 * total) as bar, ThreadPoolExecutor(threads) as pool:
        while group := list(islice(blocks, 4 * threads)):  # no more than these are in memory
            list(pool.map(index.look_up, group))
            bar.update(2 * sum(map(len, group)))
    return index.report()


def inspect(args: argparse.Namespace) -> None:
    splits = {split: find_data_shards(args.folder, split) for split in ("train", "val")}
    faults = []
    for path in (*splits["train"], *splits["val"]):
        try:
            open_data_shard(path)
        except UserError as error:
            faults.append(str(error))
    require(not faults, "\n  ".join(faults))
    path = find_tokenizer(args.folder, args.tokenizer)
    tokenizer = load_tokenizer(path)
    check_tokenizer(Hyperparameters(data_path=str(args.folder)), path)
    histogram = 0
    for name, paths in splits.items():
        text, counts = describe_split(name, paths, tokenizer)
        print(text)
        histogram = histogram + counts
    print(describe_vocabulary(histogram, tokenizer))
    if args.overlap:
        bos = tokenizer.bos_id()
        print(measure_overlap(splits["train"], splits["val"], bos, args.workers))
    for name, paths in splits.items():
        start = open_data_shard(paths[0])[:SAMPLE_TOKENS].tolist()
        print(f"{name} begins: {tokenizer.Decode(start)!r}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Checks a folder of token shards and says what is in it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder of fineweb_{train,val}_*.bin")
    add("--tokenizer", type=Path, help="SentencePiece model (default: the one found with DIR)")
    overlap_help = "look for validation text in the training text"
    add("--overlap", action=argparse.BooleanOptionalAction, default=True, help=overlap_help)
    add("--workers", type=bounded(int, 1, 1024), default=usable_cores(), help="threads")
    args = parser.parse_args(argv)
    return run_command(lambda: inspect(args), kept="nothing was changed")


if __name__ == "__main__":
    sys.exit(main())
