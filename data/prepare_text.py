"""Makes a tokenizer and token shards of any text: what train_gpt.py reads.

    python data/prepare_text.py corpus/*.jsonl.xz --output data/datasets/mine
    python data/prepare_text.py books/*.txt --output data/datasets/books --vocab-size 2048
    zcat dump.gz | python data/prepare_text.py - --separator '<|endoftext|>' --output ...
    python data/prepare_text.py --source python-docs --output data/datasets/demo

Text is normalized and spilled to disk, divided by document into training and validation, and
encoded by all cores; every document is decoded again and compared. The folder appears when it is
complete, and not before: tokenizer.model, fineweb_{train,val}_*.bin, manifest.json.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sentencepiece as spm

from data.documents import TextFiles
from data.pipeline import TOKENIZER_NAME, Memory, Preparation, check_tokenizer
from data.python_docs import python_docs
from data.shards import staged_folder, write_json
from data.workers import Workers, usable_cores
from train_gpt import UserError

MANIFEST_NAME, MANIFEST_FORMAT = "manifest.json", 1


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Any UTF-8 text -> a SentencePiece tokenizer and token shards.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        type=Path,
        metavar="INPUT",
        help="*.txt, *.md or *.jsonl, also .gz, .xz or .zst; - is standard input",
    )
    add("--source", choices=("files", *SOURCES), default="files", help="where documents come from")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    add("--overwrite", action="store_true", help="replace the shards that DIR holds")
    add("--tokenizer", type=Path, metavar="FILE", help="SentencePiece model; none: train one")
    add("--vocab-size", type=int, default=1024, help="pieces of the tokenizer")
    add(
        "--normalization",
        choices=("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity"),
        help="of a tokenizer to train; identity loses nothing (default: nmt_nfkc)",
    )
    add(
        "--allow-unknown",
        action="store_true",
        help="take a tokenizer without byte fallback: characters are lost",
    )
    add(
        "--val-fraction", type=float, default=0.08, help="of the text's bytes, held out by document"
    )
    add(
        "--val-input",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="validation text, instead of a held-out fraction; may be repeated",
    )
    add("--text-key", default="text", help="field of a JSON line that holds the text")
    add(
        "--separator",
        help="text between the documents of a plain file; \\n is a line break "
        "(default: the file is one document)",
    )
    add("--stdin-format", choices=("plain", "jsonl"), default="plain", help="of standard input")
    add("--shard-tokens", type=int, default=100_000_000, help="tokens of a shard")
    add("--seed", type=int, default=1337, help="chooses the documents to hold out")
    add("--workers", type=int, default=usable_cores(), help="processes")
    add(
        "--memory-mb",
        type=int,
        default=2048,
        help="memory for the documents in work, all processes, MB; the program takes 300 more",
    )
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError with everything that is wrong with the arguments."""
    from_files = args.source == "files"
    rules = [
        (from_files == bool(args.inputs), "give INPUT files, or a --source that needs none"),
        (8 <= args.vocab_size <= 65_536, f"--vocab-size {args.vocab_size}: from 8 to 65,536"),
        (0 < args.val_fraction < 1, f"--val-fraction {args.val_fraction}: between 0 and 1"),
        (args.shard_tokens >= 1, f"--shard-tokens {args.shard_tokens}: at least 1"),
        (0 <= args.seed < 1 << 64, f"--seed {args.seed}: from 0 to 2^64 - 1"),
        (1 <= args.workers <= 1024, f"--workers {args.workers}: from 1 to 1,024"),
        (args.memory_mb >= 256, f"--memory-mb {args.memory_mb}: at least 256"),
        (args.separator != "", "--separator: at least one character"),
        (
            not (args.tokenizer and args.normalization),
            "--normalization is of a tokenizer to train; the one of --tokenizer has its own",
        ),
    ]
    if broken := [text for kept, text in rules if not kept]:
        raise UserError("; ".join(broken))


def open_inputs(args: argparse.Namespace, paths: list[Path]) -> TextFiles:
    return TextFiles(
        paths,
        max_document_bytes=Memory.of(args).max_document_bytes,
        text_key=args.text_key,
        separator=args.separator and args.separator.replace("\\n", "\n"),
        stdin_format=args.stdin_format,
    )


class PythonDocs:
    """The source `python-docs`: the prose of the installed Python (data/python_docs.py)."""

    total_bytes: int | None = None
    done_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for text in python_docs():
            self.done_bytes += len(text)
            yield text

    def identity(self) -> list[dict[str, Any]] | None:
        return [{"name": "python-docs", "python": sys.version}]


# A source is iterated for its documents and has the attributes of TextFiles that Progress and the
# manifest need: total_bytes, done_bytes and identity().
SOURCES: dict[str, Callable[[], Any]] = {"python-docs": PythonDocs}


def request_of(args: argparse.Namespace, inputs: Any, held_out: TextFiles) -> dict[str, Any]:
    """All that the result depends on: with an equal request there is nothing to do again."""
    names = "source vocab_size normalization allow_unknown val_fraction text_key separator"
    options = {name: getattr(args, name) for name in (*names.split(), "shard_tokens", "seed")}
    tokenizer = args.tokenizer and hashlib.sha256(args.tokenizer.read_bytes()).hexdigest()
    return {
        "format": MANIFEST_FORMAT,
        "sentencepiece": spm.__version__,
        "inputs": inputs.identity(),
        "val_inputs": held_out.identity(),
        "tokenizer": tokenizer,
        **options,
    }


def intact_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`; None if there is none or a file is not as it says."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        for file in (manifest["tokenizer"], *shards):
            if (folder / file["file"]).stat().st_size != file["bytes"]:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if "request" in manifest else None


def finished_before(
    output: Path, request: dict[str, Any], overwrite: bool
) -> dict[str, Any] | None:
    """The manifest of `output` if it is what `request` asks for; None if it is to be made.

    Raises UserError if other data is there, or anything that --overwrite must not remove.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not output.is_dir():
        raise UserError(f"--output {output} is a file: choose another name")
    ours = {TOKENIZER_NAME, MANIFEST_NAME, *(path.name for path in output.glob("fineweb_*.bin"))}
    if foreign := sorted(path.name for path in output.iterdir() if path.name not in ours):
        raise UserError(
            f"--output {output} holds {foreign[0]!r}, no token shard: choose another folder"
        )
    manifest = intact_manifest(output)
    repeatable = None not in (request["inputs"], request["val_inputs"])
    if manifest and repeatable and manifest["request"] == request:
        return manifest
    if not overwrite:
        raise UserError(
            f"--output {output} already holds other data: choose another folder, or replace it "
            "with --overwrite"
        )
    return None


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Makes `args.output`; returns its manifest. Raises UserError and OSError."""
    inputs = SOURCES[args.source]() if args.source != "files" else open_inputs(args, args.inputs)
    held_out = open_inputs(args, args.val_input)
    if args.tokenizer:
        check_tokenizer(args.tokenizer, args.vocab_size, args.allow_unknown)
    request = request_of(args, inputs, held_out)
    if manifest := finished_before(args.output, request, args.overwrite):
        print(f"{args.output} holds just this already")
        return manifest
    with staged_folder(args.output) as folder, Workers(args.workers) as workers:
        result = Preparation(args, folder, workers).run(inputs, held_out)
        write_json(folder / MANIFEST_NAME, {"request": request, **result})
    return {"request": request, **result}


def report(manifest: dict[str, Any]) -> str:
    """The manifest as a table for people."""
    rows = []
    for name, split in manifest["splits"].items():
        rows.append(
            f"{name:5} {split['documents']:>11,} documents {split['text_bytes']:>15,} bytes "
            f"{split['tokens']:>14,} tokens, {split['text_bytes'] / split['tokens']:.4f} bytes per "
            f"token, fingerprint {split['fingerprint']}"
        )
    for name, split in manifest["splits"].items():
        if split["unknown_tokens"]:
            lost = split["text_bytes"] - split["scored_bytes"]
            rows.append(
                f"warning: {name}: {split['unknown_tokens']:,} tokens are unknown characters, lost "
                f"in decoding; with them {lost:,} bytes ({lost / split['text_bytes']:.2%}) are "
                "not scored"
            )
        else:
            rows.append(f"{name}: every document decodes to its normalized text, byte for byte")
    changes = manifest["normalization_changes"]
    rows.append(
        f"normalization changed {changes['documents']:,} documents: {changes['line_breaks']:,} "
        f"line breaks, {changes['other_white_space']:,} other white space, "
        f"{changes['full_width_forms']:,} full-width forms, {changes['other_characters']:,} others"
    )
    if most := list(changes["most_changed"].items())[:8]:
        rows.append("  most of them: " + ", ".join(f"U+{ord(c):04X} {n:,}" for c, n in most))
    rows.append(
        f"dropped: {manifest['validation_duplicates_dropped']:,} duplicates of validation "
        f"documents, {manifest['empty_documents_dropped']:,} empty"
    )
    return "\n".join(rows)


def stop(number: int, frame: FrameType | None) -> None:
    """On a termination signal: leave as on an error, so that what was begun is removed."""
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_arguments(argv)
        print(report(prepare(args)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        full = " (about twice the text's size is needed)" if error.errno == errno.ENOSPC else ""
        print(f"error: {error}{full}: nothing was written", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(
        f"train on it: DATA_PATH={args.output} TOKENIZER_PATH={args.output / TOKENIZER_NAME} "
        f"VOCAB_SIZE={args.vocab_size} python train_gpt.py"
    )
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main())
