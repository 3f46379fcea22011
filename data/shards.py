"""Writing data shards, and the folders that hold them, so that no reader ever sees half of one."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from data.command import note
from train_gpt import (
    SHARD_HEADER_WORDS,
    SHARD_MAGIC,
    SHARD_VERSION,
    TokenBytes,
    UserError,
    open_data_shard,
    require,
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


def split_bytes(paths: Sequence[Path], table: TokenBytes) -> Iterator[tuple[int, int]]:
    """The tokens of a split block by block: how many, and the bytes that val_bpb divides by.

    The very first token is not scored.
    """
    previous = np.zeros(0, dtype=np.uint16)
    for path in paths:
        tokens = open_data_shard(path)
        for start in range(0, len(tokens), COUNT_TOKENS):
            block = tokens[start : start + COUNT_TOKENS]
            ids = torch.from_numpy(np.concatenate([previous, block]).astype(np.int64))
            yield len(block), int(table.of(ids[:-1], ids[1:]).sum())
            previous = block[-1:]


def describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A new folder that takes the place of `output`, through links, once the block has ended well.

    Whatever stood there is gone then. If the block fails, `output` is as before and the new folder
    is removed. Raises UserError at once if the place cannot be taken.
    """
    target = Path(os.path.realpath(output))
    held = target.is_dir() and any(target.iterdir())
    require(
        target.exists() or not output.is_symlink(),
        f"--output {output} is a link to {target}, which does not exist: make that folder, or "
        "choose another",
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        leftovers = sorted(target.parent.glob(f".{target.name}.partial-*"))
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise UserError(
            f"--output {output}: its folder cannot be written ({error.strerror}): choose another"
        ) from None
    for leftover in leftovers:
        note(f"note: {leftover} is of another run, at work now or killed: remove it if killed")
    try:
        folder = aside / "new"
        folder.mkdir()
        if target.exists():
            check_movable(target, aside, output)
        yield folder
        filled = not held and target.is_dir() and any(target.iterdir())
        require(not filled, f"--output {output} was filled meanwhile: choose another folder")
        put_in_place(folder, target, aside / "replaced")
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_movable(target: Path, full_folder: Path, output: Path) -> None:
    """Raises UserError if `target` could not be replaced, as a mount point cannot.

    To rename it to a folder that is not empty fails in any case: the reason tells.
    """
    try:
        target.rename(full_folder)
    except OSError as error:
        require(
            error.errno in (errno.ENOTEMPTY, errno.EEXIST),
            f"--output {output} cannot be replaced ({error.strerror}; a mount point?): choose a "
            "folder below it",
        )


def put_in_place(folder: Path, target: Path, replaced: Path) -> None:
    """Renames `folder` to `target`; what stood there moves to `replaced`, or back on a failure."""
    if not target.exists():
        folder.rename(target)
        return
    try:
        target.rename(replaced)
        folder.rename(target)
    finally:
        if not target.exists():
            replaced.rename(target)
