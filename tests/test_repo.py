"""The repository's promises about itself: one readable file, nothing dead, a small top level."""

import ast
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

import train_gpt

SOURCE = (ROOT / "train_gpt.py").read_text()
TREE = ast.parse(SOURCE)
LINES = SOURCE.splitlines()
FUNCTIONS = [n for n in ast.walk(TREE) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def tracked() -> list[str]:
    """Paths under version control; nothing to check in a copy without it."""
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for path in done.stdout.splitlines() if (ROOT / path).exists()]


def test_the_contents_are_the_banners():
    banners = [LINES[i + 1] for i, line in enumerate(LINES[:-2]) if line == "# " + "-" * 98]
    titles = [m for line in banners if (m := re.match(r"# (\d+)\. ([^:]+)", line))]
    listed = re.findall(
        r"(\d+)\. +(\w+(?: \w+)*)", SOURCE.split("# Contents")[1].split("# Shapes")[0]
    )
    assert [(m[1], m[2].strip()) for m in titles] == listed
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))


def test_the_file_stays_readable_in_one_sitting():
    """1,500 lines of code and 50 of the fused product; blanks, comments, docstrings don't count."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [
        n.body[0] for n in ast.walk(TREE) if isinstance(n, documented) and ast.get_docstring(n)
    ]
    lines = {i for i, line in enumerate(LINES, 1) if line.strip() and line.lstrip()[0] != "#"}
    lines -= {i for text in texts for i in range(text.lineno, text.end_lineno + 1)}
    assert len(lines) <= 1550


def test_lines_functions_and_signatures_are_short():
    assert [i for i, line in enumerate(LINES, 1) if len(line) > 100] == []
    long = [f.name for f in FUNCTIONS if f.end_lineno - f.lineno > 60]
    assert long == []
    wide = [f.name for f in FUNCTIONS if len(f.args.args) + len(f.args.kwonlyargs) > 7]
    assert wide == []


def test_every_setting_is_read():
    """As hp.NAME or something.hp.NAME, or as self.NAME in what is derived from settings."""
    [configuration] = [n for n in TREE.body if getattr(n, "name", "") == "Hyperparameters"]

    def attributes(tree: ast.AST, owner: str) -> set[str]:
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
        return {n.attr for n in nodes if owner in (getattr(n.value, a, "") for a in ("id", "attr"))}

    checks = ("rules", "__post_init__")  # to be checked is not to be read
    derived = [n for n in configuration.body if getattr(n, "name", "") not in checks]
    read = attributes(TREE, "hp").union(*(attributes(n, "self") for n in derived))
    assert [f.name for f in fields(train_gpt.Hyperparameters) if f.name not in read] == []


def test_no_function_or_constant_is_dead():
    """Each name that the file defines at its top, and each method, is used in it."""
    used = {n.id for n in ast.walk(TREE) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    used |= {n.attr for n in ast.walk(TREE) if isinstance(n, ast.Attribute)}
    defined = {n.name for n in TREE.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    defined |= {f.name for f in FUNCTIONS if not f.name.startswith("__")} - {"forward"}
    for node in TREE.body:
        if isinstance(node, ast.Assign):
            defined |= {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    assert defined - used == set()


def test_the_file_alone_is_the_trainer():
    """It imports the standard library, three packages and Triton, which a torch for GPUs brings; it
    can load no code and keeps no global.

    numpy.load and pickle can execute what a file says, and torch.load unless weights_only.
    """
    modules = [a.name for n in ast.walk(TREE) if isinstance(n, ast.Import) for a in n.names]
    modules += [n.module for n in ast.walk(TREE) if isinstance(n, ast.ImportFrom)]
    names = {module.split(".")[0] for module in modules}
    packages = {"torch", "numpy", "sentencepiece", "triton"}
    assert names - set(sys.stdlib_module_names) == packages
    assert not names & {"pickle", "marshal", "shelve", "subprocess", "socket"}
    attributes = {n.attr for n in ast.walk(TREE) if isinstance(n, ast.Attribute)}
    calls = {n.id for n in ast.walk(TREE) if isinstance(n, ast.Name)}
    assert not (attributes | calls) & {"eval", "exec", "__import__", "urlopen", "system"}
    loads = [n for n in ast.walk(TREE) if getattr(getattr(n, "func", 0), "attr", "") == "load"]
    in_kernel = ("a.load", "b.load", "s.load")
    [load] = [n for n in loads if ast.unparse(n.func) not in in_kernel]
    assert ast.unparse(load.func) == "torch.load"
    assert {k.arg: getattr(k.value, "value", 0) for k in load.keywords}["weights_only"] is True
    assert not any(isinstance(n, ast.Global) for n in ast.walk(TREE))


def test_public_functions_are_typed():
    untyped = [
        f.name
        for f in FUNCTIONS
        if f.returns is None
        or any(a.annotation is None for a in f.args.args if a.arg not in ("self", "cls"))
    ]
    assert untyped == []


def test_the_top_level_is_what_the_readme_says():
    top = {path.split("/")[0] for path in tracked()}
    visible = {name for name in top if not name.startswith(".")}
    assert visible <= {
        "data", "records", "scripts", "tests", "README.md", "submission.json",
        "requirements.txt", "train_gpt.py", "LICENSE", "pyproject.toml",
    }  # fmt: skip
    assert {"data", "scripts", "tests", "train_gpt.py", "LICENSE", "pyproject.toml"} <= visible


def test_nothing_that_is_published_names_a_machine():
    """No path of a home or a workplace, and no host of a package registry."""
    paths, hosts = r"/(?:home|Users|root|work|tmp)/\w", r"\bpypi\.org|files\.pythonhosted"
    found = []
    for path in tracked():
        text = (ROOT / path).read_bytes().decode(errors="replace")
        if not path.startswith("records/"):
            found += [f"{path}: {m[0]}" for m in re.finditer(f"{paths}|{hosts}", text)]
    assert found == []
