"""Makes the file that is submitted, and run, from the readable train_gpt.py.

    python scripts/minify.py                            build/train_gpt.py
    python scripts/minify.py --self-extracting          the same, compressed inside a short stub
    python scripts/minify.py --verify                   and prove that it does what the source does

Comments, docstrings (but the module's: --help shows it) and annotations that nothing reads go;
all names stay, as log keys and state dicts use them as strings. --verify compares --help, a tiny
CPU run's losses and scores to the last digit, and the bytes and sha256 in its log with the file;
its data are those of --env. A file minified by one Python runs with that version and later ones.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import lzma
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import python_minifier
from run_log import Run
from trainer_runs import DEMO_ENV, ROOT, TINY_RUN, RunError, help_text, read_env_file, run_trainer

# Annotations of class attributes stay: dataclasses and named tuples are made of them.
ANNOTATIONS = python_minifier.RemoveAnnotationsOptions(
    remove_variable_annotations=True,
    remove_return_annotations=True,
    remove_argument_annotations=True,
    remove_class_attribute_annotations=False,
)

# `__file__` stays the stub, so the bytes and hash that a run logs are those of the file that ran.
# linecache gives tracebacks and inspect.getsource (which Triton's kernels need) the lines.
STUB = """import base64,linecache,lzma
_=lzma.decompress(base64.b85decode("{payload}")).decode()
linecache.cache["<train_gpt>"]=len(_),None,_.splitlines(True),"<train_gpt>"
exec(compile(_,"<train_gpt>","exec"))
"""


class DropStrings(ast.NodeTransformer):
    """Removes docstrings and other strings that are statements; the module keeps its own."""

    def visit_Module(self, node: ast.Module) -> ast.AST:
        kept = node.body[:1] if ast.get_docstring(node) is not None else []
        node.body = kept + [new for s in node.body[len(kept) :] if (new := self.visit(s))]
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if getattr(node, "body", None) == []:
            node.body = [ast.Pass()]
        return node


def minify(source: str) -> str:
    """The same program in fewer bytes. Raises SyntaxError if `source` is not Python."""
    tree = ast.fix_missing_locations(DropStrings().visit(ast.parse(source)))
    code = python_minifier.minify(
        ast.unparse(tree),
        remove_annotations=ANNOTATIONS,
        rename_locals=False,
        rename_globals=False,
        hoist_literals=False,  # its aliases cost more, once compressed, than they save
        remove_asserts=False,
        # It drops the `/` after which keywords may repeat a parameter's name, as log events do.
        convert_posargs_to_args=False,
    )
    return code + "\n"


def compress(code: bytes) -> bytes:
    """`code` as the smallest stream that lzma.decompress reads without being told a format."""
    streams = [
        lzma.compress(
            code,
            lzma.FORMAT_ALONE,
            filters=[
                {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME}
                | {"lc": context_bits, "lp": 0, "pb": 0}
            ],
        )
        for context_bits in range(5)
    ]
    return min(streams, key=len)


def self_extracting(code: str) -> str:
    return STUB.format(payload=base64.b85encode(compress(code.encode())).decode())


def outcome(run: Run) -> dict[str, object]:
    """What two runs of the same program with the same settings must have in common."""
    scores = {f"{k} {f}": s._asdict()[f] for k, s in run.scores.items() for f in s._fields[:4]}
    losses = {
        f"step {line.step} {key}": line.event.pairs.get(key)
        for line in run.steps_logged
        for key in ("train_loss", "grad_norm", "growth")
    }
    return scores | losses | {"parameters": run.last("model").pairs.get("parameters")}


def compare_runs(expected: Run, run: Run, shipped: Path) -> int:
    """How many values agree between a run of the source and one of the file at `shipped`.

    Raises RunError at the first that does not, or if the log counts other bytes than the file has.
    """
    missing = expected.missing or run.missing
    if missing:
        raise RunError(f"the log is missing {'; '.join(missing)}")
    ours, theirs = outcome(run), outcome(expected)
    for key in theirs:
        if ours.get(key) != theirs[key]:
            raise RunError(f"{key} is {ours.get(key)} in {shipped}, {theirs[key]} in the source")
    data, code = shipped.read_bytes(), run.last("code")
    logged = (code.integer("bytes"), code.pairs.get("sha256"), run.bytes["code_bytes"])
    if logged != (len(data), hashlib.sha256(data).hexdigest(), len(data)):
        raise RunError(f"the log of {shipped} says {logged}, the file has {len(data)} bytes")
    return len(theirs)


def verify(source: Path, shipped: Path, env: Mapping[str, str]) -> str:
    """Runs both files. Returns what was found equal; raises RunError at the first difference."""
    if help_text(source) != help_text(shipped):
        raise RunError(f"{shipped}: --help differs from that of {source}")
    with tempfile.TemporaryDirectory() as folder:
        expected = run_trainer(source, env, Path(folder, "source"))
        run = run_trainer(shipped, env, Path(folder, "shipped"))
    count = compare_runs(expected, run, shipped)
    return (
        f"verified: the same --help; {count} values of a tiny run equal to the last digit (final "
        f"val_bpb {run.scores[str(run.final)].val_bpb:.8f}); the log has this file's bytes and hash"
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, nargs="?", default=ROOT / "train_gpt.py")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "train_gpt.py")
    parser.add_argument("--self-extracting", action="store_true", help="compress it into a stub")
    parser.add_argument("--verify", action="store_true", help="run both files and compare")
    parser.add_argument(
        "--env", type=Path, default=DEMO_ENV, help="KEY=value lines with the data of --verify"
    )
    args = parser.parse_args(argv)
    try:
        source = args.source.resolve()
        if source == args.output.resolve():
            raise RunError(f"{source} would be overwritten: name another --output")
        text = source.read_text(encoding="utf-8")
        code = minify(text)
        code = self_extracting(code) if args.self_extracting else code
        write(args.output, code)
        print(f"{args.output}: {len(code.encode()):,} bytes (source {len(text.encode()):,})")
        if args.verify:
            env = read_env_file(args.env) | TINY_RUN
            print(verify(source, args.output.resolve(), env))
    except (OSError, SyntaxError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(path: Path, text: str) -> None:
    """Replaces the file at `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
