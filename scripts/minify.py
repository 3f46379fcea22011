"""Makes the file that is submitted, and run, from the readable train_gpt.py.

    python scripts/minify.py                            build/train_gpt.py
    python scripts/minify.py --self-extracting          the same, compressed inside a short stub
    python scripts/minify.py --verify                   and prove that it does what the source does

What goes: comments, docstrings (but the module's: --help shows it), annotations that nothing reads,
what only they used, and long names of variables, parameters, functions and classes. What stays, as
it is read as a string or from outside: attributes, methods, fields, keywords, all texts, and the
parameters, annotations and globals of a function whose decorator may read its source (Triton's).
Names are changed one for one within each function, so no scope can change, and an unforeseen use of
names as strings (locals(), eval) is an error.

--verify compares --help, the messages for wrong settings, a tiny CPU run's losses and scores to the
last digit, and the bytes and sha256 in its log with the file; its data are those of --env.

A file minified by one Python runs with that version and later ones. The self-extracting form holds
compressed bytes as Latin-1 text. What changes line ends (git's autocrlf) or re-encodes the file (an
editor) changes its hash or breaks it: .gitattributes keeps git from it, and no one should edit it.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import bz2
import hashlib
import itertools
import keyword
import lzma
import re
import string
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from run_log import Run
from trainer_runs import DEMO_ENV, ROOT, TINY_RUN, RunError, help_text, read_env_file, run_trainer

try:
    import python_minifier
except ImportError:
    sys.exit("error: python-minifier is missing: pip install -r requirements.txt")

# These look at nothing but the function's behaviour. Any other decorator (of a Triton kernel, of a
# custom operator) may read a function's source, annotations or names of parameters.
PLAIN_DECORATORS = {
    "cache", "classmethod", "contextlib.contextmanager", "functools.cache", "property",
    "staticmethod", "torch.compile", "torch.inference_mode", "torch.no_grad",
}  # fmt: skip
# These look names of variables up as text.
READS_NAMES = {"eval", "exec", "globals", "locals"}
READS_NAMES_BARE = {"dir", "vars"}

# The field of a node that holds a name which the program binds or looks up, or a list of them.
NAME_FIELDS: dict[type[ast.AST], str] = {
    ast.Name: "id", ast.arg: "arg", ast.FunctionDef: "name", ast.AsyncFunctionDef: "name",
    ast.ClassDef: "name", ast.alias: "asname", ast.ExceptHandler: "name", ast.Global: "names",
    ast.Nonlocal: "names", ast.MatchAs: "name", ast.MatchStar: "name", ast.MatchMapping: "rest",
}  # fmt: skip
# What a type alias such as tuple[Tensor, ...] | None is made of: dropping it drops no effect.
TYPE_NODES = (
    ast.Name, ast.Attribute, ast.Subscript, ast.Tuple, ast.List, ast.BinOp, ast.BitOr,
    ast.Constant, ast.expr_context,
)  # fmt: skip
# The trainer refuses each of these, and tells every mistake: no argument, no number, out of bounds,
# and what only settings together can break.
WRONG_SETTINGS = (
    ("--sead", "1", "--iterations", "many", "--num-layers", "0", "--qat-scope", "half"),
    ("--core-start", "9", "--core-end", "3", "--passes-schedule", "0:1,5", "--rope-dims", "3",
     "--train-batch-tokens", "4095", "--micro-batch-tokens", "1", "--ve-layers", "9,x"),
)  # fmt: skip

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPORTS = (ast.Import, ast.ImportFrom)
FUTURE = "annotations"  # a promise to the compiler, not a name

# `__file__` stays the stub, so the bytes and hash that a run logs are those of the file that ran,
# and no rank writes a file. linecache gives tracebacks and inspect.getsource (which Triton's
# kernels need) the lines; without a time of change it never looks for a file of that name.
STUB = '''# coding: latin-1
import {module},linecache
n="<train_gpt>"
_={module}.decompress("""{payload}""".encode("latin-1")).decode()
linecache.cache[n]=len(_),None,_.splitlines(True),n
exec(compile(_,n,"exec"))
'''


class MinifyError(ValueError):
    """The source has what shorter names would break; the text names the line and the remedy."""


# ------------------------------------------------------------------------- what goes altogether


def parameters(arguments: ast.arguments) -> list[ast.arg]:
    lone = filter(None, (arguments.vararg, arguments.kwarg))
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *lone]


def may_be_read(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a decorator may look at the function's source, annotations or parameters' names."""
    calls = (d.func if isinstance(d, ast.Call) else d for d in function.decorator_list)
    return any(ast.unparse(call) not in PLAIN_DECORATORS for call in calls)


class Strip(ast.NodeTransformer):
    """Removes docstrings and other strings that are statements, and annotations that nothing reads.

    The module keeps its docstring, attributes of classes their annotations (dataclasses and named
    tuples are made of them), and so does a function that may be read.
    """

    keeps_annotations = False

    def visit_Module(self, node: ast.Module) -> ast.AST:
        kept = node.body[:1] if ast.get_docstring(node) is not None else []
        node.body = kept + [new for s in node.body[len(kept) :] if (new := self.visit(s))]
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self.visit_inside(node, True)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        keeps = may_be_read(node)
        if not keeps:
            node.returns = None
            for parameter in parameters(node.args):
                parameter.annotation = None
        return self.visit_inside(node, keeps)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_inside(self, node: ast.AST, keeps_annotations: bool) -> ast.AST:
        outside, self.keeps_annotations = self.keeps_annotations, keeps_annotations
        self.generic_visit(node)
        self.keeps_annotations = outside
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if self.keeps_annotations or node.value is None:
            return node
        return ast.copy_location(ast.Assign([node.target], node.value), node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if getattr(node, "body", None) == []:
            node.body = [ast.Pass()]
        return node


# ------------------------------------------------------------------------- names and their scopes


def scope_nodes(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The nodes of one scope: of a function or class in it only what is evaluated outside it."""
    for node in nodes:
        yield node
        if isinstance(node, FUNCTIONS):
            arguments = node.args
            outside = [*node.decorator_list, *arguments.defaults, *arguments.kw_defaults]
            outside += [node.returns, *(p.annotation for p in parameters(arguments))]
            yield from scope_nodes(filter(None, outside))
        elif isinstance(node, ast.ClassDef):
            yield from scope_nodes([*node.decorator_list, *node.bases, *node.keywords])
        else:
            yield from scope_nodes(ast.iter_child_nodes(node))


def names_of(node: ast.AST) -> list[str]:
    """The names that this node itself binds or looks up."""
    names = getattr(node, NAME_FIELDS.get(type(node), ""), None) or []
    return [names] if isinstance(names, str) else names


def is_load(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)


def loaded(nodes: Iterable[ast.AST]) -> set[str]:
    return {name for node in nodes if is_load(node) for name in names_of(node)}


def bound(nodes: Iterable[ast.AST]) -> set[str]:
    """The names that `nodes` bind: all but those they only look up, such as builtins."""
    return {name for node in nodes if not is_load(node) for name in names_of(node)}


def kept_parameters(tree: ast.AST) -> set[ast.arg]:
    """The parameters that someone may know by name.

    A keyword may name them; so may any string, by way of a `**` mapping; whoever is handed the
    function as a value; and a decorator.
    """
    nodes = list(ast.walk(tree))
    spoken = {n.arg for n in nodes if isinstance(n, ast.keyword)}
    spoken |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    called = {n.func for n in nodes if isinstance(n, ast.Call)}
    values = [n for n in nodes if isinstance(getattr(n, "ctx", None), ast.Load) and n not in called]
    names, attributes = loaded(values), {n.attr for n in values if isinstance(n, ast.Attribute)}
    methods = {statement for n in nodes if isinstance(n, ast.ClassDef) for statement in n.body}
    kept = {n for n in nodes if isinstance(n, ast.arg) and n.arg in spoken}
    for node in (n for n in nodes if isinstance(n, FUNCTIONS)):
        handed = node.name in (attributes if node in methods else names)
        if handed or may_be_read(node):
            kept |= {p for p in parameters(node.args) if p.arg not in ("self", "cls")}
    return kept


class Unit(NamedTuple):
    """An outermost function, a class's body without its methods, or the module without both."""

    nodes: list[ast.AST]
    kept: set[str]  # names that must stay as they are in this unit


def split(body: Iterable[ast.stmt], kept: set[ast.arg], is_class: bool = False) -> Iterator[Unit]:
    """The units of a module or class; attributes and the parameters in `kept` keep their names."""
    outside = list(scope_nodes(body))
    yield Unit(outside, bound(outside) if is_class else bound(kept.intersection(outside)))
    for node in outside:
        if isinstance(node, ast.ClassDef):
            yield from split(node.body, kept, is_class=True)
        elif isinstance(node, FUNCTIONS):
            inside = parameters(node.args) + [n for s in node.body for n in ast.walk(s)]
            stay = bound(kept.intersection(inside))
            for scope in (n for n in (node, *inside) if isinstance(n, (*FUNCTIONS, ast.ClassDef))):
                if isinstance(scope, ast.ClassDef):
                    stay |= bound(scope_nodes(scope.body))
                elif may_be_read(scope):
                    stay |= loaded(n for part in (scope.args, *scope.body) for n in ast.walk(part))
            yield Unit(inside, stay)


# ------------------------------------------------------------------------------ shorter names


def short_names() -> Iterator[str]:
    """a, b, ... Z, aa, ab, ...: what is neither a keyword nor a builtin."""
    taken = {*keyword.kwlist, *dir(builtins)}
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_letters, repeat=length):
            if (name := "".join(letters)) not in taken:
                yield name


def choose_names(units: Sequence[Unit], renamable: set[str]) -> dict[str, str]:
    """A new name for each of `renamable`, the most frequent first.

    A name is written alike in all units, as that compresses best; and two names that meet in a
    unit get two names, so that no scope can change.
    """
    count: Counter[str] = Counter()
    homes: dict[str, list[set[str]]] = defaultdict(list)  # what each unit of a name has taken
    for unit in units:
        names = Counter(name for node in unit.nodes for name in names_of(node))
        changing = renamable & names.keys() - unit.kept
        taken = names.keys() - changing
        for name in changing:
            homes[name].append(taken)
            count[name] += names[name]
    chosen = {}
    for name in sorted(count, key=lambda name: (-count[name], name)):
        free = (s for s in short_names() if not any(s in taken for taken in homes[name]))
        chosen[name] = next(free)
        for taken in homes[name]:
            taken.add(chosen[name])
    return chosen


def rename(tree: ast.Module) -> None:
    """Shortens the names of variables, parameters, functions, classes and imports, in place."""
    aliases = [a for n in ast.walk(tree) if isinstance(n, IMPORTS) for a in n.names]
    for alias in aliases:
        if alias.asname is None and alias.name.isidentifier() and alias.name != FUTURE:
            alias.asname = alias.name
    units = list(split(tree.body, kept_parameters(tree)))
    everything = bound(node for unit in units for node in unit.nodes)
    at_the_top = bound(units[0].nodes)
    kept = {*dir(builtins), *(name for name in everything if name.startswith("__"))}
    kept |= {a.name.split(".")[0] for a in aliases if a.asname is None}  # by import a.b
    for unit in units:
        kept |= unit.kept & at_the_top
    new = choose_names(units, everything - kept)
    for unit in units:
        for node in unit.nodes:
            names = [n if n in unit.kept else new.get(n, n) for n in names_of(node)]
            if names:
                field = NAME_FIELDS[type(node)]
                is_list = isinstance(getattr(node, field), list)
                setattr(node, field, names if is_list else names[0])
    for alias in aliases:
        if alias.asname == alias.name:
            alias.asname = None


def refuse_unknown_names(tree: ast.Module) -> None:
    """Raises MinifyError at what uses names that this file cannot see, or all of them as text."""
    at_the_top = bound(scope_nodes(tree.body))
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) if name in READS_NAMES:
                problem = f"{name} sees the names of variables: pass the values"
            case ast.Call(func=ast.Name(id=name), args=[]) if name in READS_NAMES_BARE:
                problem = f"{name}() sees the names of variables: pass the values"
            case ast.ImportFrom(names=[ast.alias(name="*")]):
                problem = "import * brings unknown names: import each by its own"
            case ast.Global(names=names) if not at_the_top.issuperset(names):
                problem = f"global {', '.join(names)}: give it a first value at the top"
            case _:
                continue
        raise MinifyError(f"line {node.lineno}: {problem}")


def is_alias(statement: ast.stmt, names: set[str]) -> bool:
    """Whether it only gives a type, a constant or the like a name, and that name is in `names`."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            return name in names and all(isinstance(n, TYPE_NODES) for n in ast.walk(value))
    return False


def drop_unread(tree: ast.Module) -> None:
    """Drops the aliases and imports at the top that only annotations needed."""
    unread = bound(scope_nodes(tree.body)) - loaded(ast.walk(tree))
    tree.body = [s for s in tree.body if not is_alias(s, unread)]
    read = loaded(ast.walk(tree)) | {FUTURE}
    for node in tree.body:
        if isinstance(node, IMPORTS):
            node.names = [a for a in node.names if (a.asname or a.name.split(".")[0]) in read]
    tree.body = [s for s in tree.body if not isinstance(s, IMPORTS) or s.names]


def minify(source: str) -> str:
    """The same program in fewer bytes.

    Raises SyntaxError if `source` is not Python, MinifyError if it would not stay the same program.
    """
    tree = ast.parse(source)
    refuse_unknown_names(tree)
    tree = Strip().visit(tree)
    drop_unread(tree)
    rename(tree)
    code = python_minifier.minify(
        ast.unparse(ast.fix_missing_locations(tree)),
        remove_annotations=False,
        rename_locals=False,
        rename_globals=False,
        hoist_literals=False,  # its aliases cost more, once compressed, than they save
        remove_asserts=False,
        # It drops the `/` after which keywords may repeat a parameter's name, as log events do.
        convert_posargs_to_args=False,
    )
    return code + "\n"


# ------------------------------------------------------------------------- the self-extracting form


def compress(code: bytes) -> tuple[str, bytes]:
    """`code` as the smallest stream, and the module whose `decompress` reads it unaided."""
    coder = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "lp": 0, "pb": 0}
    streams = [
        ("lzma", lzma.compress(code, lzma.FORMAT_ALONE, filters=[coder | {"lc": context_bits}]))
        for context_bits in range(5)
    ]
    return min([*streams, ("bz2", bz2.compress(code))], key=lambda named: len(named[1]))


def latin1_literal(data: bytes) -> str:
    """`data` for between triple double quotes in a Latin-1 source: about 1% longer.

    Only what Python's reader would change is escaped: it ends lines at a carriage return, too.
    """
    text = data.decode("latin-1").replace("\\", r"\\").replace("\r", r"\r")
    text = re.sub(r"\0(?=[0-7])", r"\\x00", text).replace("\0", r"\0")
    return re.sub(r'"(?="|\Z)', r"\\\g<0>", text)


def self_extracting(code: str) -> bytes:
    module, stream = compress(code.encode())
    return STUB.format(module=module, payload=latin1_literal(stream)).encode("latin-1")


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


def refusal(script: Path, arguments: Sequence[str]) -> str:
    """How `script` refuses wrong settings: its exit code and all that it says."""
    command = [sys.executable, "-B", script.name, *arguments]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True)
    return f"{done.returncode}: {done.stdout}{done.stderr}"


def verify(source: Path, shipped: Path, env: Mapping[str, str]) -> str:
    """Runs both files. Returns what was found equal; raises RunError at the first difference."""
    if help_text(source) != help_text(shipped):
        raise RunError(f"{shipped}: --help differs from that of {source}")
    for arguments in WRONG_SETTINGS:
        expected, found = refusal(source, arguments), refusal(shipped, arguments)
        if expected != found or not expected.startswith("2: "):
            text = f"with {' '.join(arguments)} {source} ends with {expected}"
            raise RunError(f"{text}and {shipped} with {found}")
    with tempfile.TemporaryDirectory() as folder:
        expected = run_trainer(source, env, Path(folder, "source"))
        run = run_trainer(shipped, env, Path(folder, "shipped"))
    count = compare_runs(expected, run, shipped)
    return (
        f"verified: the same --help and the same words for wrong settings; {count} values of a "
        f"tiny run equal to the last digit (final val_bpb {run.scores[str(run.final)].val_bpb:.8f})"
        "; the log has this file's bytes and hash"
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
        data = self_extracting(code) if args.self_extracting else code.encode()
        write(args.output, data)
        print(f"{args.output}: {len(data):,} bytes (source {len(text.encode()):,})")
        if args.verify:
            env = read_env_file(args.env) | TINY_RUN
            print(verify(source, args.output.resolve(), env))
    except (OSError, SyntaxError, MinifyError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(path: Path, data: bytes) -> None:
    """Replaces the file at `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
