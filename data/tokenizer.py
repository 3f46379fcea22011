"""The tokenizer: training, normalizing as it does, and the checks that it fits text and shards."""

from __future__ import annotations

import io
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch

from train_gpt import TokenBytes, UserError, load_tokenizer, require

SPACE = "▁"  # how SentencePiece writes a space
UNICODE_SIZE = 0x110000
MAX_ROUNDS = 4  # of normalization; two are enough for all but made-up texts
RESERVED_PIECES = 260  # 256 bytes and pad, BOS, EOS, unknown
COVERAGE = 0.999  # of the characters get pieces of their own, as in the field's tokenizer
CHECKED_TOKENS = 200_000


def open_tokenizer(path: Path) -> spm.SentencePieceProcessor:
    """The SentencePiece model at `path`, with as many pieces as it has. Raises UserError."""
    try:
        pieces = spm.SentencePieceProcessor(model_proto=path.read_bytes()).vocab_size()
    except (RuntimeError, OSError):
        pieces = 0  # load_tokenizer says what is wrong
    return load_tokenizer(path, pieces)


def check_tokenizer(tokenizer: spm.SentencePieceProcessor, path: Path, allow_unknown: bool) -> None:
    """Raises UserError unless the tokenizer can write every text, with a BOS before it."""
    require(tokenizer.bos_id() >= 0, f"tokenizer {path} has no BOS piece, which opens a document")
    pieces = [tokenizer.IdToPiece(i) for i in range(tokenizer.vocab_size())]
    inner_spaces = [piece for piece in pieces if SPACE in piece[1:]]
    require(
        not inner_spaces,
        f"tokenizer {path} has pieces with a space inside, such as {inner_spaces[:1]}: val_bpb "
        "would miscount their bytes",
    )
    byte_pieces = sum(tokenizer.IsByte(i) for i in range(len(pieces)))
    require(
        allow_unknown or byte_pieces == 256,
        f"tokenizer {path} has no byte fallback (256 byte pieces): characters it does not know "
        "would be lost, and val_bpb would not count them; use one that has, or let --allow-unknown "
        "count what is lost",
    )


class Normalizer:
    """Text as the tokenizer sees it, with real spaces; by a tokenizer, or by a rule's name.

    SentencePiece cannot tell U+2581 from a space, so that character becomes one.
    """

    def __init__(self, source: spm.SentencePieceProcessor | str) -> None:
        if isinstance(source, str):
            source = spm.SentencePieceNormalizer(
                rule_name=source,
                add_dummy_prefix=False,
                escape_whitespaces=True,
                remove_extra_whitespaces=source != "identity",
            )
        self.source = source
        self.prefix_chars = len(source.Normalize("x")) - 1  # a dummy prefix is a space more

    def __call__(self, text: str) -> str | None:
        """The normalized text; None if normalizing it again and again never comes to rest.

        Once is not enough: a control character that is taken out may bring together what is
        composed only the next time, and encoding would see another text than this. Raises
        UnicodeEncodeError for half of a surrogate pair.
        """
        text.encode()
        text = text.replace(SPACE, " ")
        for _ in range(MAX_ROUNDS):
            before = text
            text = self.source.Normalize(before)[self.prefix_chars :].replace(SPACE, " ")
            if text == before:
                return text
        return None


def count_characters(text: str) -> np.ndarray:
    """How often each code point occurs, (0x110000,) int64."""
    return np.bincount(np.frombuffer(text.encode("utf-32-le"), "<u4"), minlength=UNICODE_SIZE)


def rare_characters(counts: np.ndarray, vocab_size: int) -> dict[int, str]:
    """The characters to leave to byte fallback where they would fill the vocabulary; as a table
    for str.translate that puts a space for each.

    Three quarters of the pieces that are not reserved may be single characters.
    """
    room = (vocab_size - RESERVED_PIECES) * 3 // 4
    by_frequency = np.argsort(-counts, kind="stable")
    if counts[by_frequency[:room]].sum() >= COVERAGE * counts.sum():
        return {}
    return dict.fromkeys(by_frequency[room : np.count_nonzero(counts)].tolist(), " ")


def train_tokenizer(texts: Iterable[str], vocab_size: int, rule: str, threads: int) -> bytes:
    """A SentencePiece BPE model of at most `vocab_size` pieces. Raises UserError.

    The options are those of the field's tokenizer.
    """
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.Train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # little text supports fewer pieces
            character_coverage=COVERAGE,
            required_chars=SPACE,  # also where the language writes no spaces
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name=rule,
            remove_extra_whitespaces=rule != "identity",
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            max_sentence_length=1 << 30,  # a document is one sentence; longer ones are left out
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"--vocab-size {vocab_size}: SentencePiece cannot train it on this text ({error})"
        ) from None
    return model.getvalue()


def check_token_bytes(
    tokenizer: spm.SentencePieceProcessor, table: TokenBytes, tokens: np.ndarray
) -> None:
    """Raises UserError unless the table counts the bytes of the text of a prefix of `tokens`.

    Decoding is the independent reference: it knows nothing of the table. The space that opens a
    document (its first `▁`) is not counted, as in the table.
    """
    prefix = tokens[:CHECKED_TOKENS].astype(np.int64)
    while len(prefix) > 1 and tokenizer.IsByte(int(prefix[-1])):
        prefix = prefix[:-1]  # a character cut in two would decode to U+FFFD
    no_text = (tokenizer.IsControl, tokenizer.IsUnknown, tokenizer.IsUnused)
    ends = [i for i, token in enumerate(prefix.tolist()) if any(kind(token) for kind in no_text)]
    text_bytes = 0
    for start, end in pairwise([-1, *ends, len(prefix)]):
        text = tokenizer.Decode(prefix[start + 1 : end].tolist())
        text_bytes += len(text.removeprefix(" " if start >= 0 else "").encode())
    ids = torch.from_numpy(prefix)
    counted = len(tokenizer.Decode(prefix[:1].tolist()).encode())  # no token stands before it
    counted += int(table.of(ids[:-1], ids[1:]).sum())
    require(
        counted == text_bytes,
        f"the tokenizer's pieces count {counted:,} bytes for a text of {text_bytes:,}: use the "
        "tokenizer that the shards were made with, with byte fallback",
    )
