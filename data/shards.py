"""Writing data shards, and the folders that hold them, so that no reader ever sees half of one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from train_gpt import (
    SHARD_HEADER_WORDS,
    SHARD_MAGIC,
    SHARD_VERSION,
    TokenBytes,
    UserError,
    open_data_shard,
)

COUNT_TOKENS = 1 << 20  # tokens looked at together when a whole split is counted


class ShardWriter:
    """Writes the tokens of one split to shards of `shard_tokens` each; the last may be shorter."""

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.paths: list[Path] = []
        self.file: BinaryIO | None = None
        self.room = 0

    def write(self, tokens: np.ndarray) -> None:
        """Appends `tokens` (uint16); they may run on into the next shard."""
        while len(tokens):
            if self.room == 0:
                self.next_shard()
            part, tokens = tokens[: self.room], tokens[self.room :]
            self.file.write(part.astype("<u2", copy=False).tobytes())
            self.room -= len(part)

    def next_shard(self) -> None:
        self.close()
        path = self.folder / f"fineweb_{self.split}_{len(self.paths):06d}.bin"
        self.paths.append(path)
        self.file, self.room = path.open("xb"), self.shard_tokens
        self.file.write(bytes(4 * SHARD_HEADER_WORDS))

    def close(self) -> None:
        """Writes the header, last of all: a shard cut off before is refused by its magic."""
        if self.file is None:
            return
        header = np.zeros(SHARD_HEADER_WORDS, dtype="<i4")
        header[:3] = SHARD_MAGIC, SHARD_VERSION, self.shard_tokens - self.room
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.close()
        self.file = None


def shard_text_bytes(paths: Sequence[Path], index: int, table: TokenBytes) -> int:
    """The bytes that val_bpb divides by when it scores shard `index` of a split's `paths`.

    The first token of all is not scored; those that open later shards follow the shard before.
    """
    tokens, total = open_data_shard(paths[index]), 0
    previous = open_data_shard(paths[index - 1])[-1:] if index else tokens[:0]
    for start in range(0, len(tokens), COUNT_TOKENS):
        block = tokens[start : start + COUNT_TOKENS]
        ids = torch.from_numpy(np.concatenate([previous, block]).astype(np.int64))
        total += int(table.of(ids[:-1], ids[1:]).sum())
        previous = block[-1:]
    return total


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content`, under a temporary name until it is complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place once the block has ended well.

    Whatever stood at `target` is gone then. If the block fails, `target` is as before and the new
    folder is removed.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        leftovers = sorted(target.parent.glob(f".{target.name}.*-*"))
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise UserError(
            f"--output {target}: its folder cannot be written ({error.strerror}): choose another"
        ) from None
    for leftover in leftovers:
        print(f"note: {leftover} is left from a run that was killed; remove it if none is at work")
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp makes folders that nobody else can read
        put_in_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def put_in_place(staging: Path, target: Path) -> None:
    """Renames `staging` to `target`; what stood there is removed only after that."""
    if not target.exists():
        staging.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.replaced-", dir=target.parent))
    try:
        target.rename(aside / target.name)
        staging.rename(target)
    finally:
        if not target.exists():
            (aside / target.name).rename(target)
        shutil.rmtree(aside)
