"""Normalizing, tokenizing and checking documents; runs in the worker processes.

SentencePiece encodes 3 MB/s on a core, mostly by merging the same words again and again. BPE pieces
do not reach over a space (checked per tokenizer), so a word's tokens do not depend on its
neighbours, and a table of the words already seen gives the same tokens three times as fast.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import sentencepiece as spm

SPACE = "▁"  # how SentencePiece writes a space
CACHED_WORD_CHARS = 48  # longer words hardly repeat
CACHED_WORD_BYTES = 250  # memory of one cached word, its tokens and its place in the table
CHECKED_WORDS = 500  # of each batch, encoded a second time as a whole
FULL_WIDTH = re.compile("[\u3000\uff01-\uff5e]")


@dataclass(frozen=True)
class Normalization:
    """How text is normalized: by the tokenizer in the file `model`, or by the rule of that name."""

    model: str | None = None
    rule: str = "nmt_nfkc"

    @property
    def keeps_spaces(self) -> bool:
        """Whether a tokenizer trained with the rule leaves runs of spaces alone."""
        return self.rule == "identity"


@cache
def normalizer(how: Normalization) -> spm.SentencePieceNormalizer | spm.SentencePieceProcessor:
    if how.model:
        return spm.SentencePieceProcessor(model_file=how.model)
    return spm.SentencePieceNormalizer(
        rule_name=how.rule,
        add_dummy_prefix=False,
        escape_whitespaces=True,
        remove_extra_whitespaces=not how.keeps_spaces,
    )


@dataclass
class Changes:
    """What normalization changed in documents: counts of documents and of characters."""

    documents: int = 0
    line_breaks: int = 0
    other_white_space: int = 0
    full_width_forms: int = 0
    other_characters: int = 0
    most_changed: Counter[str] = field(default_factory=Counter)

    def add(self, other: Changes) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def summary(self) -> dict[str, int | dict[str, int]]:
        """The counts, for JSON; of the single characters only the most frequent."""
        return {**vars(self), "most_changed": dict(self.most_changed.most_common(20))}

    def compare(self, before: str, after: str) -> None:
        if before == after:
            return
        self.documents += 1
        lines = before.count("\n") - after.count("\n")
        words_before, words_after = "".join(before.split()), "".join(after.split())
        white_before, white_after = len(before) - len(words_before), len(after) - len(words_after)
        self.line_breaks += lines
        self.other_white_space += max(0, white_before - white_after - lines)
        if words_before != words_after:
            gone = Counter(words_before) - Counter(words_after)
            wide = sum(n for c, n in gone.items() if FULL_WIDTH.match(c))
            self.full_width_forms += wide
            self.other_characters += gone.total() - wide
            self.most_changed += gone


def normalize_batch(how: Normalization, texts: list[str]) -> tuple[list[str], Changes]:
    """The normalized `texts`, with real spaces, and what that changed.

    SentencePiece cannot tell U+2581 from a space, so that character becomes one up front.
    """
    rule, changes, normalized = normalizer(how), Changes(), []
    prefix = len(rule.Normalize("x")) - 1  # a model with a dummy prefix adds a space
    for text in texts:
        after = rule.Normalize(text.replace(SPACE, " "))[prefix:].replace(SPACE, " ")
        changes.compare(text, after)
        normalized.append(after)
    return normalized, changes


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, how: Normalization, threads: int
) -> bytes:
    """A SentencePiece BPE model with the options of the field's tokenizer. Raises RuntimeError."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=0.999,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name=how.rule,
        remove_extra_whitespaces=not how.keeps_spaces,
        add_dummy_prefix=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        max_sentence_length=1 << 30,  # a document is one sentence; longer ones would be left out
        num_threads=threads,
        minloglevel=2,
    )
    return model.getvalue()


@dataclass
class Encoded:
    """Tokens of a batch of documents, BOS before each, and what was checked about them."""

    tokens: np.ndarray  # (tokens,) uint16
    documents: int = 0
    text_bytes: int = 0
    scored_bytes: int = 0  # as val_bpb counts: without the space that opens a document
    unknown_tokens: int = 0
    altered_documents: int = 0  # that decode to another text
    altered_example: str = ""


class WordTokens(dict[str, bytes]):
    """Word -> its tokens (uint16 as bytes) where it follows a space; encodes what it lacks."""

    def __init__(self, tokenizer: spm.SentencePieceProcessor, max_words: int) -> None:
        self.tokenizer, self.max_words = tokenizer, max_words
        # The space that opens a text may be dropped, so words are encoded behind another one.
        self.anchor_tokens = len(tokenizer.Encode("x"))

    def __missing__(self, word: str) -> bytes:
        ids = self.tokenizer.Encode(f"x {word}")[self.anchor_tokens :]
        tokens = np.array(ids, dtype="<u2").tobytes()
        if len(word) <= CACHED_WORD_CHARS:
            if len(self) >= self.max_words:
                self.clear()
            self[word] = tokens
        return tokens


class Encoder:
    """A tokenizer with a table of the words that it has encoded."""

    def __init__(self, model: str, max_words: int) -> None:
        self.tokenizer = spm.SentencePieceProcessor(model_file=model)
        pieces = [self.tokenizer.IdToPiece(i) for i in range(self.tokenizer.vocab_size())]
        self.piece_bytes = [self.bytes_of(i, piece) for i, piece in enumerate(pieces)]
        # BPE scores its pieces by the rank of their merge. Unigram models, whose scores are no
        # integers, choose among equally likely segmentations by what else is in the text.
        is_bpe = all(self.tokenizer.GetScore(i).is_integer() for i in range(len(pieces)))
        self.words_are_separate = is_bpe and not any(SPACE in piece[1:] for piece in pieces)
        self.adds_prefix = self.tokenizer.Normalize("x") != "x"
        self.word_tokens = WordTokens(self.tokenizer, max_words)

    def bytes_of(self, token: int, piece: str) -> bytes:
        """What `token` decodes to: nothing for a control, one byte for a byte-fallback piece."""
        if self.tokenizer.IsByte(token):
            return bytes([int(piece[3:5], 16)])
        if self.tokenizer.IsControl(token) or self.tokenizer.IsUnknown(token):
            return b""
        return piece.replace(SPACE, " ").encode()

    def encode_whole(self, text: str) -> bytes:
        return np.array(self.tokenizer.Encode(text), dtype="<u2").tobytes()

    def encode(self, text: str) -> bytes:
        """The tokens of `text`, uint16 as bytes."""
        if not self.words_are_separate:
            return self.encode_whole(text)
        first, *words = text.split(" ")
        return self.encode_whole(first) + b"".join(map(self.word_tokens.__getitem__, words))

    def encode_batch(self, texts: list[str]) -> Encoded:
        encoded = [self.encode(text) for text in texts]
        self.check_words(texts[0], encoded[0])
        return self.checked(texts, encoded)

    def check_words(self, text: str, encoded: bytes) -> None:
        """Compares the tokens of the start of `text` with what SentencePiece makes of it whole."""
        start = self.encode_whole(" ".join(text.split(" ")[:CHECKED_WORDS]))
        if not encoded.startswith(start):
            raise RuntimeError(f"{text[:60]!r}: its words encode otherwise than the whole text")

    @staticmethod
    def ids(encoded: bytes) -> np.ndarray:
        return np.frombuffer(encoded, dtype="<u2")

    def checked(self, texts: list[str], encoded: list[bytes]) -> Encoded:
        """Decodes all again and compares with the text, byte for byte."""
        bos = np.array([self.tokenizer.bos_id()], dtype="<u2").tobytes()
        tokens = self.ids(b"".join(part for ids in encoded for part in (bos, ids)))
        batch = Encoded(tokens, documents=len(texts))
        batch.unknown_tokens = int((tokens == self.tokenizer.unk_id()).sum())
        for text, ids in zip(texts, encoded, strict=True):
            expected = text.encode()
            decoded = b"".join(map(self.piece_bytes.__getitem__, self.ids(ids).tolist()))
            if self.adds_prefix:
                decoded = decoded.removeprefix(b" ")
            batch.text_bytes += len(expected)
            batch.scored_bytes += len(expected) - expected.startswith(b" ")
            if decoded != expected:
                batch.altered_documents += 1
                batch.altered_example = batch.altered_example or text[:60]
        return batch


@cache
def encoder(model: str, max_words: int) -> Encoder:
    return Encoder(model, max_words)


def encode_batch(model: str, max_words: int, texts: list[str]) -> Encoded:
    """`texts` as tokens of the SentencePiece file `model`, checked."""
    return encoder(model, max_words).encode_batch(texts)


def byte_fallback_is_complete(tokenizer: spm.SentencePieceProcessor) -> bool:
    return sum(tokenizer.IsByte(i) for i in range(tokenizer.vocab_size())) == 256


def sampled(documents: Iterable[tuple[int, str]], fraction: float) -> Iterator[str]:
    """The texts of about `fraction` of `documents`, chosen by their hash, so always the same."""
    for key, text in documents:
        if (key & 0xFFFFFFFF) < fraction * (1 << 32):
            yield text
