"""Makes the file that ships, and runs, from the readable train_gpt.py.

    python scripts/minify.py                     build/train_gpt.py
    python scripts/minify.py --self-extracting   the same code, compressed inside a short stub
    python scripts/minify.py --verify            also prove that it does what the source does

python-minifier shortens names and spaces. Comments go, and so do docstrings and annotations that
nothing reads. The texts of the program stay: the log, --help, messages and state dicts are made of
them. A function with a decorator keeps its annotations, because the decorator may read them.

--verify compares --help, the messages for wrong settings, the losses, scores and artifact of a tiny
run on the CPU, and the bytes and sha256 in the log with the file. The run needs the demo's data
(scripts/demo.sh) or the folder that --data names.

A file that one version of Python minified runs with that version and later ones. The stub holds
compressed bytes as Latin-1 text. An editor that saves it as UTF-8 breaks it, and so would git by
changing line ends; .gitattributes prevents the latter.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import bz2
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

try:
    import python_minifier
except ImportError:
    sys.exit("error: python-minifier is missing: pip install -r requirements.txt")

from inspect_logs import run_command

ROOT = Path(__file__).resolve().parent.parent

# `__file__` stays the stub, so a run logs the bytes and hash of the file that was started.
# linecache gives the source to tracebacks and to inspect.getsource, which Triton calls. It never
# looks on the disk for an entry that has no time of change.
STUB = '''# coding: latin-1
import bz2,linecache
n="<train_gpt>"
_=bz2.decompress("""{payload}""".encode("latin-1")).decode()
linecache.cache[n]=len(_),None,_.splitlines(True),n
exec(compile(_,n,"exec"))
'''

# A model with every mechanism of the recipe, so small that a CPU trains it in seconds.
TINY_RUN = """
CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 MAX_WALLCLOCK_SECONDS=none ITERATIONS=6 WARMUP_STEPS=1
TRAIN_LOG_EVERY=1 TRAIN_SEQ_LEN=64 TRAIN_BATCH_TOKENS=512 MODEL_DIM=64 NUM_HEADS=4 NUM_KV_HEADS=2
ROPE_DIMS=4 VE_DIM=16 BIGRAM_DIM=16 LATE_QAT_THRESHOLD=0.5 EVAL_STRIDE=32
TTT_CHUNK_TOKENS=512 TTT_EPOCHS=1
"""
# An unknown flag, no number, a value out of bounds, no such choice; then settings that do not fit
# together, which the trainer finds later.
WRONG_SETTINGS = (
    ["--sead", "1", "--iterations", "many", "--num-layers", "0", "--on-signal", "half"],
    ["--core-start", "9", "--core-end", "3", "--passes-schedule", "0:1,5", "--rope-dims", "3"],
)
COMPARED = re.compile(
    r"\b(parameters|train_loss|grad_norm|growth|update|residual_scale|val_loss|val_bpb):(\S+)"
)


class Difference(RuntimeError):
    """The shipped file does not do what the source does, or one of them does not run."""


# ---------------------------------------------------------------------------------- the short code


def drop_annotations(tree: ast.Module) -> None:
    """Drops the annotations of parameters and results, but of functions that have a decorator."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.decorator_list:
            node.returns = None
            for parameter in ast.walk(node.args):
                if isinstance(parameter, ast.arg):
                    parameter.annotation = None


def is_kernel(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(name).endswith("jit") for name in function.decorator_list)


def kept_names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """The global and the local names that someone reads as text.

    The names of types stay where a class has fields, because settings are parsed by them. What a
    Triton kernel takes from outside stays, because Triton knows some of it by name.
    """
    top, local = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            fields = [s.annotation for s in node.body if isinstance(s, ast.AnnAssign)]
            types = {n.id for f in fields for n in ast.walk(f) if isinstance(n, ast.Name)}
            top |= types.intersection([*dir(builtins), "Literal"])
        if isinstance(node, ast.FunctionDef) and is_kernel(node):
            names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
            stored = {n.id for n in names if isinstance(n.ctx, ast.Store)}
            parameters = {n.arg for n in ast.walk(node.args) if isinstance(n, ast.arg)}
            top |= {n.id for n in names} - stored - parameters
            local |= parameters
    return top, local


def minify(source: str) -> str:
    """The same program in fewer bytes. Raises SyntaxError."""
    tree = ast.parse(source)
    docstring = ast.get_docstring(tree, clean=False)
    drop_annotations(tree)
    top, local = kept_names(tree)
    code = python_minifier.minify(
        ast.unparse(tree),
        remove_literal_statements=True,  # docstrings
        remove_annotations=False,
        rename_globals=True,
        preserve_globals=sorted(top),
        preserve_locals=sorted(local),
        # Names for repeated texts cost more, once compressed, than they save.
        hoist_literals=False,
        # Without the `/` a keyword could no longer have a parameter's name, as keys of the log do.
        convert_posargs_to_args=False,
    )
    head = f"{docstring!r}\n" if docstring else ""  # --help shows it
    return f"{head}{code}\n"


# ------------------------------------------------------------------------- the self-extracting form


def latin1_literal(data: bytes) -> str:
    """`data` for between triple double quotes in a Latin-1 source: about 1% longer.

    Only what Python's reader would change is escaped. It ends lines at a carriage return, too.
    """
    text = data.decode("latin-1").replace("\\", r"\\").replace("\r", r"\r")
    text = re.sub(r"\0(?=[0-7])", r"\\x00", text).replace("\0", r"\0")
    return re.sub(r'"(?="|\Z)', r"\\\g<0>", text)


def self_extracting(code: str) -> bytes:
    stream = bz2.compress(code.encode())  # lzma takes 1% more
    return STUB.format(payload=latin1_literal(stream)).encode("latin-1")


# ------------------------------------------------------------------------------------- the proof


def run(script: Path, arguments: Sequence[str], env: Mapping[str, str]) -> tuple[int, str]:
    """The exit code of `script` and all that it prints."""
    done = subprocess.run(
        [sys.executable, "-B", script.name, *arguments],
        cwd=script.parent,
        env={**os.environ, "COLUMNS": "100", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stdout


def tiny_run(script: Path, data: Path, folder: Path) -> tuple[str, bytes]:
    """The log and the artifact of a tiny run of `script`. Raises Difference if it fails."""
    paths = {"DATA_PATH": data, "TOKENIZER_PATH": data / "tokenizer.model", "OUTPUT_DIR": folder}
    env = dict(setting.split("=") for setting in TINY_RUN.split())
    env |= {name: str(path.resolve()) for name, path in paths.items()}
    code, output = run(script, [], env | {"RUN_ID": "run"})
    if code != 0:
        tail = "\n".join(output.splitlines()[-15:])
        raise Difference(f"{script} ended with {code}; --data names other data\n{tail}")
    return (folder / "run.txt").read_text("utf-8"), (folder / "run.int6.xz").read_bytes()


def compare_logs(expected: str, found: str, shipped: bytes) -> int:
    """How many losses, norms and scores agree between the logs of the source and of `shipped`.

    Raises Difference at the first that does not, or if the log has not `shipped`'s bytes and hash.
    """
    pairs, others = COMPARED.findall(expected), COMPARED.findall(found)
    if not pairs or len(pairs) != len(others):
        raise Difference(f"the logs have {len(pairs)} and {len(others)} values to compare")
    for (name, value), other in zip(pairs, others, strict=True):
        if other != (name, value):
            raise Difference(f"{name} is {value} with the source, then {':'.join(other)}")
    known = f"bytes:{len(shipped)} sha256:{hashlib.sha256(shipped).hexdigest()}"
    if known not in found:
        raise Difference(f"the log does not say {known}")
    return len(pairs)


def verify(source: Path, shipped: Path, data: Path) -> str:
    """Runs both files; returns what was equal. Raises Difference at the first difference."""
    for arguments in (["--help"], *WRONG_SETTINGS):
        expected, found = run(source, arguments, {}), run(shipped, arguments, {})
        if expected != found:
            raise Difference(f"{' '.join(arguments)}: {expected[1]}\nis now\n{found[1]}")
    with tempfile.TemporaryDirectory() as folder:
        expected_log, expected_artifact = tiny_run(source, data, Path(folder, "source"))
        log, artifact = tiny_run(shipped, data, Path(folder, "shipped"))
    count = compare_logs(expected_log, log, shipped.read_bytes())
    if artifact != expected_artifact:
        raise Difference("the artifacts differ")
    return (
        f"verified: the same --help and messages, {count} equal losses, norms and scores of a tiny "
        "run, the same artifact, and this file's bytes and hash in the log"
    )


# ------------------------------------------------------------------------------------ command line


def write(path: Path, data: bytes) -> None:
    """Replaces the file at `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, nargs="?", default=ROOT / "train_gpt.py")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "train_gpt.py")
    parser.add_argument("--self-extracting", action="store_true", help="compress it into a stub")
    parser.add_argument("--verify", action="store_true", help="run both files and compare")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "data/datasets/demo", help="shards for --verify"
    )
    args = parser.parse_args(argv)
    source, output = args.source.resolve(), args.output.resolve()
    if source == output:
        parser.error(f"{source} would be overwritten: name another --output")
    if output.is_dir():
        parser.error(f"{output} is a folder: name a file with --output")
    if args.verify and not args.data.is_dir():
        parser.error(f"no data in {args.data}: run scripts/demo.sh, or name a folder with --data")
    try:
        text = source.read_text(encoding="utf-8")
        code = minify(text)
        shipped = self_extracting(code) if args.self_extracting else code.encode()
        write(output, shipped)
        print(f"{args.output}: {len(shipped):,} bytes (source {len(text.encode()):,})", flush=True)
        if args.verify:
            print(verify(source, output, args.data))
    except (SyntaxError, UnicodeDecodeError) as error:
        print(f"error: {source} is no Python in UTF-8: {error}", file=sys.stderr)
        return 2
    except Difference as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise  # run_command's
    except OSError as error:
        print(f"error: {error.filename or output}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)
