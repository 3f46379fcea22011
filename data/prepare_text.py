"""Makes a tokenizer and token shards of any text: what train_gpt.py reads.

    python data/prepare_text.py book.txt --output data/datasets/book
    python data/prepare_text.py notes/ --output data/datasets/notes --vocab-size 2048
    python data/prepare_text.py corpus/*.jsonl.xz --output data/datasets/mine
    zcat dump.gz | python data/prepare_text.py - --separator '<|endoftext|>' --output ...
    python data/prepare_text.py --source python-docs --output data/datasets/demo

Text is normalized and spilled to disk, divided by document into training and validation, and
encoded by all cores; every document is decoded again and compared. The folder appears when it is
complete, and not before: tokenizer.model, fineweb_{train,val}_*.bin, manifest.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the imports

try:
    import sentencepiece as spm
    import torch

    from data.command import bounded, read_json, run_command, usable_cores
    from data.documents import TextFiles, find_inputs
    from data.pipeline import TOKENIZER_NAME, Preparation
    from data.python_docs import PythonDocs
    from data.shards import staged_folder
    from data.tokenizer import RESERVED_PIECES, check_tokenizer
    from train_gpt import UserError, load_tokenizer, read_configuration, require
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed: pip install -r requirements.txt")

MANIFEST_NAME, MANIFEST_FORMAT = "manifest.json", 2
NORMALIZATIONS = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Any UTF-8 text -> a SentencePiece tokenizer and token shards.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    text = "*.txt, *.md, *.rst, *.py, *.jsonl, also .gz, .xz or .zst; a folder of them; - is stdin"
    add("inputs", nargs="*", type=Path, metavar="INPUT", help=text)
    text = "where documents come from"
    add("--source", choices=("files", "python-docs"), default="files", help=text)
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    add("--overwrite", action="store_true", help="replace the shards that DIR holds")
    add("--tokenizer", type=Path, metavar="FILE", help="SentencePiece model; none: train one")
    sizes = bounded(int, RESERVED_PIECES + 20, 65_536)
    add("--vocab-size", type=sizes, default=1024, help="pieces of the tokenizer to train, at most")
    text = "of the tokenizer to train; identity loses nothing (default: nmt_nfkc)"
    add("--normalization", choices=NORMALIZATIONS, help=text)
    text = "take a tokenizer without byte fallback: characters are lost"
    add("--allow-unknown", action="store_true", help=text)
    text = "of the text's bytes, held out by document"
    add("--val-fraction", type=bounded(float, 0.0001, 0.9999), default=0.08, help=text)
    text = "validation text, instead of a held-out fraction; may be repeated"
    add("--val-input", type=Path, action="append", default=[], metavar="INPUT", help=text)
    add("--text-key", default="text", help="field of a JSON line that holds the text")
    text = (
        "text between the documents of a plain file; \\n is a line break (default: a file is one "
        "document; fewer than 20 documents are cut into passages)"
    )
    add("--separator", help=text)
    add("--stdin-format", choices=("plain", "jsonl"), default="plain", help="of standard input")
    text = "tokens of a shard"
    add("--shard-tokens", type=bounded(int, 1, 1 << 30), default=100_000_000, help=text)
    text = "chooses the documents to hold out"
    add("--seed", type=bounded(int, 0, (1 << 53) - 1), default=1337, help=text)
    add("--workers", type=bounded(int, 1, 1024), default=usable_cores(), help="threads")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for arguments that do not go together."""
    no_input = "give INPUT files, or a --source that needs none"
    require((args.source == "files") == bool(args.inputs), no_input)
    require(args.separator != "", "--separator: at least one character")
    require(
        not (args.tokenizer and args.normalization),
        "--normalization is of a tokenizer to train; the one of --tokenizer has its own",
    )
    if args.tokenizer:
        require(args.tokenizer.is_file(), f"--tokenizer {args.tokenizer}: no such file")
        check_tokenizer(load_tokenizer(args.tokenizer), args.tokenizer, args.allow_unknown)
    else:
        args.normalization = args.normalization or "nmt_nfkc"


def read_separator(text: str) -> str:
    """With line breaks as they are read from a file, whatever its line ends."""
    return text.replace("\\r", "").replace("\\n", "\n").replace("\r", "")


def open_inputs(args: argparse.Namespace, paths: list[Path]) -> TextFiles:
    separator = args.separator and read_separator(args.separator)
    return TextFiles(find_inputs(paths), args.text_key, separator, args.stdin_format)


def request_of(args: argparse.Namespace, inputs: Any, held_out: TextFiles) -> dict[str, Any]:
    """All that the result depends on: with an equal request there is nothing to do again."""
    how = ("output", "overwrite", "workers")
    tokenizer = args.tokenizer and hashlib.sha256(args.tokenizer.read_bytes()).hexdigest()
    return {
        **{name: value for name, value in vars(args).items() if name not in how},
        "inputs": inputs.identity(),
        "val_input": held_out.identity(),
        "tokenizer": tokenizer,
        "sentencepiece": spm.__version__,
        "format": MANIFEST_FORMAT,
    }


def finished_before(output: Path, request: dict[str, Any], overwrite: bool) -> Any:
    """The manifest of `output` if it is what `request` asks for; None if it is to be made.

    Raises UserError if other data is there, or anything that --overwrite must not remove.
    """
    require(output.is_dir() or not output.exists(), f"--output {output} is a file: choose a folder")
    there = {path.name for path in output.iterdir()} if output.exists() else set()
    shards = {name for name in there if name.startswith("fineweb_") and name.endswith(".bin")}
    foreign = sorted(there - shards - {TOKENIZER_NAME, MANIFEST_NAME})
    text = f"--output {output} holds {foreign[:1]}, which is no token shard: choose another folder"
    require(not foreign, text)
    if overwrite or not there:
        return None
    try:
        manifest = read_json(output / MANIFEST_NAME)
        repeatable = None not in (request["inputs"], request["val_input"])  # not standard input
        if repeatable and manifest["request"] == request:
            return manifest
    except (OSError, UserError, KeyError, TypeError):
        pass  # a manifest of something else
    raise UserError(
        f"--output {output} already holds other data: choose another folder, or replace it with "
        "--overwrite"
    )


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Makes `args.output`; returns its manifest. Raises UserError and OSError."""
    check_arguments(args)
    inputs = PythonDocs() if args.source == "python-docs" else open_inputs(args, args.inputs)
    held_out = open_inputs(args, args.val_input)
    request = request_of(args, inputs, held_out)
    if manifest := finished_before(args.output, request, args.overwrite):
        print(f"{args.output} holds just this already (--overwrite makes it again)")
        return manifest
    with staged_folder(args.output) as folder:
        manifest = {"request": request, **Preparation(args, folder).run(inputs, held_out)}
        # ASCII only, as names of files need not be Unicode.
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def report(manifest: dict[str, Any]) -> str:
    """The manifest as lines for people."""
    rows = []
    for name, split in manifest["splits"].items():
        rows.append(
            f"{name:5} {split['documents']:>11,} documents {split['text_bytes']:>15,} bytes "
            f"{split['tokens']:>14,} tokens, {split['text_bytes'] / split['tokens']:.4f} bytes per "
            f"token, fingerprint {split['fingerprint']}"
        )
        if split["unknown_tokens"]:
            lost = split["text_bytes"] - split["scored_bytes"]
            rows.append(
                f"warning: {name}: {split['unknown_tokens']:,} tokens are unknown characters; with "
                f"them {lost:,} bytes ({lost / split['text_bytes']:.2%}) are not scored"
            )
    changes = manifest["normalization_changes"]
    names = {"U+0020": "spaces", "U+000A": "line breaks", "U+0009": "tabs"}
    lost = list(changes["lost_characters"].items())[:8]
    most = ", ".join(f"{n:,} {names.get(c, c)}" for c, n in lost)
    rows.append(f"tokenizer: {manifest['tokenizer']['pieces']:,} pieces")
    if changes["documents"]:
        rows.append(
            f"normalization changed {changes['documents']:,} documents; most often it changed "
            f"{most or 'nothing'} (--normalization identity keeps them)"
        )
    rows += [f"left out: {n:,} documents: {why}" for why, n in manifest["left_out"].items()]
    return "\n".join(rows)


def training_command(output: Path, splits: dict[str, Any]) -> str:
    """How to train on `output` with what this machine has, in a window that its text fills."""
    on_gpu = torch.cuda.is_available()
    env = [] if on_gpu else ["--env", "scripts/demo.env"]
    window = read_configuration({}, env and ["--env", str(ROOT / env[1])])[0].train_seq_len
    most = min(splits["val"]["tokens"] - 1, splits["train"]["tokens"] // 2)
    if most < window:
        if most < 64:
            return "not possible, as its text fills no window of 64 tokens: prepare more"
        env += ["--train-seq-len", str(1 << most.bit_length() - 1)]
    return shlex.join(["python", "train_gpt.py", *env, "--data-path", str(output)])


def stop(number: int, frame: FrameType | None) -> None:
    """On a termination signal: leave as on an error, so that what was begun is removed."""
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)

    def work() -> None:
        manifest = prepare(args)
        print(report(manifest))
        print(f"train on it: {training_command(args.output, manifest['splits'])}")

    return run_command(work, kept="nothing was written")


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stop)
    sys.exit(main())
