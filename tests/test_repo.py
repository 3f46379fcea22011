"""The repository's promises about itself: one readable file, a README that works, a small top."""

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
FUNCTIONS = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef)]


def tracked() -> list[str]:
    """Paths under version control; nothing to check in a copy without it."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for path in done.stdout.splitlines() if (ROOT / path).exists()]


def test_the_contents_are_the_banners():
    titles = [m for line in LINES if (m := re.fullmatch(r"# --- (\d+)\. ([^:]+): .* -+", line))]
    contents = SOURCE.split("# Contents")[1].split("# Shapes")[0]
    listed = re.findall(r"(\d+)\. +(\w+(?: \w+)*)", contents)
    assert [(m[1], m[2].strip()) for m in titles] == listed
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))


def test_the_file_stays_readable_in_one_sitting():
    assert SOURCE.count("\n") <= 2348, "by wc -l"


def test_no_function_is_long():
    assert [f.name for f in FUNCTIONS if f.end_lineno - f.lineno >= 40] == []


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
    defined |= {f.name for f in FUNCTIONS if not f.name.startswith("__")} - {"forward", "backward"}
    for node in TREE.body:
        if isinstance(node, ast.Assign):
            defined |= {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    assert defined - used == set()


def test_the_file_alone_is_the_trainer_and_executes_no_data():
    """It imports the standard library, three packages and Triton, which a torch for GPUs brings.

    numpy.load and pickle can execute what a file says, and torch.load unless weights_only.
    """
    modules = [a.name for n in ast.walk(TREE) if isinstance(n, ast.Import) for a in n.names]
    modules += [n.module for n in ast.walk(TREE) if isinstance(n, ast.ImportFrom)]
    names = {module.split(".")[0] for module in modules}
    packages = {"torch", "numpy", "sentencepiece", "triton"}
    assert names - set(sys.stdlib_module_names) == packages
    assert not names & {"pickle", "marshal", "shelve", "subprocess", "socket"}
    calls = [n for n in ast.walk(TREE) if isinstance(n, ast.Call)]
    called = {ast.unparse(n.func): n for n in calls}
    assert not called.keys() & {"eval", "exec", "__import__", "os.system", "np.load"}
    safely = {k.arg: ast.unparse(k.value) for k in called["torch.load"].keywords}
    assert safely["weights_only"] == "True"


def readme_commands() -> list[str]:
    """Each line of a code block that starts a program, without its prompt and comment."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(?:bash|sh|console)?\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").split("#")[0].strip() for line in lines]


def test_the_commands_of_the_readme_exist():
    """Scripts that are there, and flags that the trainer has."""
    commands, scripts, unknown = readme_commands(), [], []
    for command in commands:
        scripts += re.findall(r"\b(?:data|scripts|tests)/\w+\.(?:py|sh|env)\b", command)
        if "train_gpt.py" in command:
            flags = command.split("train_gpt.py", 1)[1].split()
            names = [f.split("=")[0] for f in flags if f.startswith("--")]
            unknown += train_gpt.build_parser().parse_known_args(
                [n for name in names for n in (name, "x")]
            )[1]
    assert [path for path in scripts if not (ROOT / path).exists()] == []
    assert [word for word in unknown if word.startswith("--")] == []
    assert any("train_gpt.py" in command for command in commands)


def test_the_top_level_is_what_the_readme_says():
    top = {path.split("/")[0] for path in tracked()}
    assert {name for name in top if not name.startswith(".")} == {
        "data", "records", "scripts", "tests", "README.md", "submission.json",
        "requirements.txt", "train_gpt.py", "LICENSE", "pyproject.toml",
    }  # fmt: skip


def test_nothing_that_is_published_names_a_machine():
    """No path of a home or a workplace, and no host of a package registry."""
    paths, hosts = r"/(?:home|Users|root|work|tmp)/\w", r"\bpypi\.org|files\.pythonhosted"
    found = []
    for path in tracked():
        text = (ROOT / path).read_bytes().decode(errors="replace")
        if not path.startswith("records/"):
            found += [f"{path}: {m[0]}" for m in re.finditer(f"{paths}|{hosts}", text)]
    assert found == []
