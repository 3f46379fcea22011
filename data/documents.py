"""Text files -> documents: plain or JSON lines, compressed or not, or from standard input."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from train_gpt import UserError

READ_BYTES = 1 << 20
ZSTD_READ_BYTES = 4096  # compressed; up to 32,000 times as many come out of them
STDIN = Path("-")
FORMATS = {".txt": "plain", ".md": "plain", ".jsonl": "jsonl"}
COMPRESSIONS = (".gz", ".xz", ".zst")
# What a JSON line may take beside and around its text: \\u escapes triple it.
JSON_OVERHEAD = 4


def text_format(path: Path) -> str:
    """`plain` or `jsonl`, by the name. Raises UserError for any other."""
    name = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    if name.suffix not in FORMATS:
        raise UserError(
            f"{path}: an input is named *{', *'.join(FORMATS)}, or so and then "
            f"{', '.join(COMPRESSIONS)}: rename it, or pipe its text into standard input (-)"
        )
    return FORMATS[name.suffix]


class ZstdFile:
    """Reads zstandard frames; the package's own reader takes a file that was cut off for whole."""

    def __init__(self, raw: BinaryIO, zstandard: Any) -> None:
        self.raw, self.zstandard = raw, zstandard
        self.frame, self.unused = None, b""

    def read(self, about_bytes: int) -> bytes:
        """The next bytes, about so many; none at the end. Raises EOFError if the data is broken."""
        parts, size = [], 0
        while size < about_bytes and (data := self.unused or self.raw.read(ZSTD_READ_BYTES)):
            if self.frame is None:
                self.frame = self.zstandard.ZstdDecompressor().decompressobj()
            try:
                parts.append(self.frame.decompress(data))
            except self.zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            size += len(parts[-1])
            self.unused = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        if size == 0 and self.frame is not None:
            raise EOFError("it ends within a frame")
        return b"".join(parts)


def decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    """The content of the open file `raw`, decompressed as the name says."""
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".xz":
        return lzma.LZMAFile(raw)
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UserError(
                f"{path}: reading .zst needs a package more: pip install zstandard"
            ) from None
        return ZstdFile(raw, zstandard)
    return raw


def decode(data: bytes, where: str) -> str:
    """UTF-8 text. Raises UserError, with the position, if it is none."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: its byte {error.start} (0x{data[error.start]:02x}) is no UTF-8: inputs are "
            "UTF-8 text; convert others, e.g. with iconv -f UTF-16 -t UTF-8"
        ) from None
    if "\0" in text:
        raise UserError(f"{where}: holds a zero byte, so it is binary data, not text: leave it out")
    return text


@dataclass
class TextFiles:
    """The documents of `paths`, in order, read as a stream. Iterating raises UserError.

    A plain file is one document, or several between `separator`s; a line of JSON is one, its text
    in the field `text_key`. `max_document_bytes` bounds what is held at once.
    """

    paths: Sequence[Path]
    max_document_bytes: int
    text_key: str = "text"
    separator: str | None = None
    stdin_format: str = "plain"
    done_bytes: int = field(default=0, init=False)  # of the files as they lie on disk

    def __post_init__(self) -> None:
        for path in self.paths:
            if path == STDIN:
                continue
            if not path.is_file():
                raise UserError(
                    f"input {path} is no file: check its name, or name a folder's files"
                )
            text_format(path)

    @property
    def total_bytes(self) -> int | None:
        """The size of all files on disk; None if one is standard input."""
        if STDIN in self.paths:
            return None
        return sum(path.stat().st_size for path in self.paths)

    def identity(self) -> list[dict[str, Any]] | None:
        """What tells these inputs from changed ones; None if nothing can."""
        if STDIN in self.paths:
            return None
        stats = [(path, path.stat()) for path in self.paths]
        return [{"name": p.name, "bytes": s.st_size, "changed_ns": s.st_mtime_ns} for p, s in stats]

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            if path == STDIN:
                yield from self.parse(sys.stdin.buffer, self.stdin_format, "standard input")
                continue
            before = self.done_bytes
            with path.open("rb") as raw:
                documents = self.parse(decompressed(path, raw), text_format(path), str(path))
                try:
                    for text in documents:
                        self.done_bytes = before + raw.tell()
                        yield text
                except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
                    raise UserError(
                        f"{path}: broken {path.suffix} data ({error}): get it again"
                    ) from None
            self.done_bytes = before + path.stat().st_size

    def parse(self, stream: BinaryIO, kind: str, where: str) -> Iterator[str]:
        if kind == "jsonl":
            limit = JSON_OVERHEAD * self.max_document_bytes
            for number, line in enumerate(self.records(stream, b"\n", limit, where), 1):
                if line.strip():
                    yield self.parse_json(line, f"{where}, line {number}")
            return
        separator = self.separator.encode() if self.separator else None
        records = self.records(stream, separator, self.max_document_bytes, where)
        for number, data in enumerate(records, 1):
            yield decode(data, f"{where}, document {number}" if separator else where)

    def records(
        self, stream: BinaryIO, separator: bytes | None, limit: int, where: str
    ) -> Iterator[bytes]:
        """The bytes between separators; none larger than `limit` is ever held."""
        rest, number = b"", 1
        while chunk := stream.read(READ_BYTES):
            rest += chunk
            if separator:
                *records, rest = rest.split(separator)
                number += len(records)
                yield from records
            if len(rest) > limit:
                raise UserError(
                    f"{where}, document {number} is longer than the {limit / 1e6:.1f} MB that the "
                    "memory allows: raise --memory-mb, lower --workers, or cut the text with "
                    "--separator"
                )
        yield rest

    def parse_json(self, line: bytes, where: str) -> str:
        try:
            record = json.loads(decode(line, where))
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: no JSON ({error.msg}): a line is one JSON object") from None
        text = record.get(self.text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(
                f"{where}: no text in a field {self.text_key!r}: name the field with --text-key"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where}: half of a surrogate pair is no text: mend the escape"
            ) from None
        return text
