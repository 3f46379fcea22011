"""Text files, folders and standard input -> documents."""

from __future__ import annotations

import codecs
import gzip
import io
import lzma
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from data.command import note, parse_json
from train_gpt import UserError, require

try:
    from backports import zstd
except ImportError:  # only .zst files need it
    zstd = None

STDIN = Path("-")
FORMATS = {".txt": "plain", ".md": "plain", ".rst": "plain", ".py": "plain", ".jsonl": "jsonl"}
COMPRESSIONS = (".gz", ".xz", ".zst")
BROKEN = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
if zstd is not None:
    BROKEN += (zstd.ZstdError,)

READ_CHARS = 1 << 20
MAX_LINE_CHARS = 1 << 26
# Longer documents are cut: so memory is bounded, and training loses nothing, as its windows are
# hundreds of times shorter.
MAX_DOCUMENT_CHARS = 1 << 20
END_OF_TEXT = "<|endoftext|>"  # what many published corpora put between documents
# Fewer documents than this cannot be divided well, so they are cut into about 100 passages.
FEW_DOCUMENTS, PASSAGES, MIN_PASSAGE_CHARS = 20, 100, 500


class NotText(UserError):
    """A file's content is no text in UTF-8."""


def text_format(path: Path) -> str | None:
    """`plain` or `jsonl`, by the name; None for any other."""
    name = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return FORMATS.get(name.suffix)


def find_inputs(paths: Iterable[Path]) -> list[Path]:
    """The files that `paths` name; of a folder, all text files below it. Raises UserError."""
    files = []
    for path in paths:
        if path.is_dir():
            names = (file.relative_to(path) for file in sorted(path.rglob("*")))
            visible = (n for n in names if not any(part.startswith(".") for part in n.parts))
            below = [path / n for n in visible if text_format(n) and (path / n).is_file()]
            require(bool(below), f"input {path} holds no file named *{', *'.join(FORMATS)}")
            files += below
            continue
        require(path == STDIN or path.is_file(), f"input {path} does not exist: check its name")
        require(
            path == STDIN or text_format(path) is not None,
            f"input {path}: its name must end in {', '.join(FORMATS)}, or so and then in "
            f"{', '.join(COMPRESSIONS)}: rename it, or pipe its text into standard input (-)",
        )
        files.append(path)
    return files


def decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    """The content of the open file `raw`, decompressed as the name says."""
    if path.suffix == ".gz":
        return gzip.open(raw)
    if path.suffix == ".xz":
        return lzma.open(raw)
    if path.suffix == ".zst":
        require(zstd is not None, f"{path}: to read .zst, pip install backports.zstd")
        return zstd.open(raw)
    return raw


def cut(text: str, max_chars: int) -> Iterator[str]:
    """`text` in parts: cut at a blank line if there is one, or a line end, a space, anywhere."""
    start = 0
    while len(text) - start > max_chars:
        end = start + max_chars
        for mark in ("\n\n", "\n", " "):
            place = text.rfind(mark, start + max_chars // 2, end)
            if place >= 0:
                end = place + len(mark)
                break
        yield text[start:end]
        start = end
    yield text[start:]


@dataclass
class TextFiles:
    """The documents of `paths`, in order, read as a stream. Iterating raises UserError.

    A plain file is one document, or several between `separator`s; a line of JSON is one, its text
    in the field `text_key`. Some lines without it are left out, and files that are no text and hold
    up to a tenth of the bytes: more is an error.
    """

    paths: list[Path]
    text_key: str = "text"
    separator: str | None = None
    stdin_format: str = "plain"
    left_out: Counter[str] = field(default_factory=Counter)  # lines or files, by the reason

    def identity(self) -> list[Any] | None:
        """What tells these inputs from changed ones; None if nothing can."""
        if STDIN in self.paths:
            return None
        stats = [(path.name, path.stat()) for path in self.paths]
        return [[name, stat.st_size, stat.st_mtime] for name, stat in stats]

    def __iter__(self) -> Iterator[str]:
        bad_bytes, size = 0, lambda file: 0 if file == STDIN else file.stat().st_size
        for path in self.paths:
            if path == STDIN:
                yield from self.documents(sys.stdin.buffer, self.stdin_format, "standard input")
                continue
            try:
                with path.open("rb") as raw:
                    stream = decompressed(path, raw)
                    yield from self.documents(stream, text_format(path), str(path))
            except NotText as error:
                bad_bytes += size(path)
                require(10 * bad_bytes <= sum(map(size, self.paths)), str(error))
                note(f"note: left out: {error}")
                self.left_out["files, or the rest of them, that are no text in UTF-8"] += 1
            except BROKEN as error:
                raise UserError(
                    f"{path}: its {path.suffix} data are broken ({error}): get it again"
                ) from None

    def documents(self, stream: BinaryIO, kind: str, where: str) -> Iterator[str]:
        """The documents of one file; its line ends become \\n, whichever they are."""
        text = io.TextIOWrapper(stream, encoding="utf-8-sig")
        parse = self.json_documents if kind == "jsonl" else self.plain_documents
        try:
            for document in parse(text, where):
                yield from cut(document, MAX_DOCUMENT_CHARS)
        except UnicodeDecodeError as error:
            before = error.object[max(0, error.start - 30) : error.start].decode(errors="replace")
            before = f"after {before!r}" if before else "at the start of a read"
            marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            likely = "UTF-16" if error.object.startswith(marks) else "LATIN1"
            raise NotText(
                f"{where}: byte 0x{error.object[error.start]:02x} {before} is not UTF-8: convert "
                f"the file, with iconv -f {likely} -t UTF-8 if that is what it is"
            ) from None

    def plain_documents(self, stream: TextIO, where: str) -> Iterator[str]:
        separator, rest = self.separator, ""
        while chunk := stream.read(READ_CHARS):
            if "\0" in chunk:
                text = "is no text, or text in UTF-16: leave it out, or convert it to UTF-8"
                raise NotText(f"{where}: holds a zero byte, so it {text}")
            rest += chunk
            if separator is None and END_OF_TEXT in chunk:
                separator = END_OF_TEXT
                note(f"note: {where} is divided at {END_OF_TEXT}")
            if separator:
                *documents, rest = rest.split(separator)
                yield from documents
            if len(rest) > 2 * MAX_DOCUMENT_CHARS:
                *parts, rest = cut(rest, MAX_DOCUMENT_CHARS)
                yield from parts
        yield rest

    def json_documents(self, stream: TextIO, where: str) -> Iterator[str]:
        number, good, bad, first = 0, 0, 0, None
        while line := stream.readline(MAX_LINE_CHARS):
            number += 1
            place = f"{where}, line {number}"
            require(len(line) < MAX_LINE_CHARS, f"{place}: is too long for a line of JSON")
            if not line.strip():
                continue
            try:
                text = self.text_of(parse_json(line.removeprefix("\ufeff"), place), place)
            except UserError as error:
                bad, first = bad + 1, first or error
                require(bad <= 10 + good // 10, f"{first}; {bad} of {bad + good} lines are so")
                self.left_out[f"no JSON with a text in {self.text_key!r}"] += 1
                continue
            good += 1
            yield text
        require(bad <= good, f"{first}; {bad} of {bad + good} lines are so")

    def text_of(self, record: Any, place: str) -> str:
        """Raises UserError."""
        require(isinstance(record, dict), f"{place}: is no JSON object, which has fields")
        text, names = record.get(self.text_key), list(record)[:5]
        remedy = f"name it with --text-key; it has {', '.join(names) or 'none'}"
        require(isinstance(text, str), f"{place}: has no text in {self.text_key!r}: {remedy}")
        return text


def enough_documents(texts: Iterable[str]) -> Iterator[str]:
    """`texts`; if they are few, passages of them instead, so that some can be held out."""
    texts = iter(texts)
    first = list(islice(texts, FEW_DOCUMENTS))
    if len(first) == FEW_DOCUMENTS:
        yield from chain(first, texts)
        return
    passage_chars = max(MIN_PASSAGE_CHARS, sum(map(len, first)) // PASSAGES)
    passages = [passage for text in first for passage in cut(text, passage_chars)]
    if len(passages) > len(first):
        note(
            f"note: {len(first)} document(s) are few to hold some out of: cut at blank lines, line "
            f"ends or spaces into {len(passages)} of up to {passage_chars:,} characters "
            "(--separator says otherwise)"
        )
    yield from passages
