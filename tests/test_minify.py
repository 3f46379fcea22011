"""The file that ships does what the readable one does."""

import ast
import itertools
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import minify

# It prints what shorter names could break; `jit` reads a function's source as Triton does.
TOY = '''"""What --help shows."""
from __future__ import annotations
import dataclasses, inspect, os.path, sys
from collections.abc import Callable
from pathlib import Path

scale, size = 3, 4

def jit(function: Callable) -> tuple:
    constants = compile(inspect.getsource(function), "kernel", "exec").co_consts
    code = next(c for c in constants if inspect.iscode(c))
    parameters = code.co_varnames[:3]
    return parameters, sorted(code.co_names), function.__annotations__["block"]

class language:
    constexpr = int

@jit
def kernel(source, target, block: language.constexpr):
    """Gone."""
    half: language.constexpr = block // 2
    return source[:half] * scale + len(target)

@dataclasses.dataclass
class Settings:
    rate: float = 0.5
    size: int | None = size
    """Gone."""

    @property
    def half(self) -> float:
        return self.rate / 2

class Log:
    """Gone."""
    def event(self, name: str = "", /, **pairs: int) -> dict[str, int]:
        """Gone."""
        total: int = sum(pairs.values())
        assert total >= 0, f"{total=}"
        return {"event": name, "total": total, **pairs}

def nothing() -> None:
    """Gone."""

def foreign(function: Callable) -> object:
    sum = function(**{"con" + "text": 7})
    return sum

def callback(context: int) -> int:
    return context + context * context - float(context) - float(int(context))

def counter() -> Callable[[], int]:
    count = 0
    def step(by: int = 1) -> int:
        nonlocal count
        count += by
        return [count for count in range(count + 1)][-1]
    class Local:
        count = 5
    return lambda: (step(), step(by=2), count, Local.count)

def bump() -> None:
    global scale
    os = 1
    scale += os

def failure() -> str:
    try:
        Log().event(x=-1)
    except AssertionError as error:
        return f"{error} {scale = }"

if __name__ == "__main__":
    settings = Settings(size=int(float("8")))
    bump()
    print(__doc__, kernel, [(f.name, f.type) for f in dataclasses.fields(settings)], settings.half)
    print(Log().event("code", name=1), foreign(callback), counter()(), failure())
    print(os.path.basename(__file__), (lambda size=size: size)(), int("1"), float("2"), int("3"))
    print(len(Path(__file__).read_bytes()) == int(sys.argv[1]))
'''


def printed(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    command = [sys.executable, "-B", path, str(len(data))]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_short_and_the_self_extracting_code_do_what_the_source_does(tmp_path):
    path, code = tmp_path / "train_gpt.py", minify.minify(TOY)
    expected = printed(path, TOY.encode())
    for text in ("What --help shows.", "total=-1 scale = 4", "'int | None'", "True"):
        assert text in expected
    assert printed(path, code.encode()) == expected
    assert printed(path, minify.self_extracting(code)) == expected
    assert [word for word in ("Gone", "counter", "settings", "foreign") if word in code] == []


def test_two_processes_make_the_same_file(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    for seed in "12":
        command = [sys.executable, ROOT / "scripts/minify.py", "toy.py", "-o", seed]
        env = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run(command, check=True, cwd=tmp_path, env=env)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_every_pair_of_bytes_survives_in_a_literal(tmp_path):
    data = b"".join(bytes(pair) for pair in itertools.product(range(256), repeat=2)) + b'\n""'
    path, literal = tmp_path / "bytes.py", minify.latin1_literal(data)
    path.write_bytes(f'# coding: latin-1\ndata = """{literal}"""\n'.encode("latin-1"))
    assert runpy.run_path(str(path))["data"].encode("latin-1") == data
    assert len(literal) < 1.02 * len(data)


def texts(source: str) -> Counter:
    """The strings in the code, without docstrings."""
    nodes = list(ast.walk(ast.parse(source)))
    docstrings = [n.value for n in nodes if isinstance(n, ast.Expr)]
    strings = (n for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return Counter(n.value for n in strings if n not in docstrings)


def test_every_text_of_the_trainer_stays():
    """Those of the GPU's paths, too, which no run here reaches."""
    source = (ROOT / "train_gpt.py").read_text("utf-8")
    code = minify.minify(source)
    assert len(code) < 0.52 * len(source), "vars() or locals() would keep every name long"
    assert texts(code) == texts(source)
    assert ast.get_docstring(ast.parse(code)) == ast.get_docstring(ast.parse(source))


def test_the_shipped_trainer_is_proved_equal(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VOCAB_SIZE", str(corpus.vocab_size))
    for shard in corpus.data_path.glob("*.bin"):
        (tmp_path / shard.name).symlink_to(shard)
    (tmp_path / "tokenizer.model").symlink_to(corpus.tokenizer_path)
    options = ["--self-extracting", "--verify", "--data", str(tmp_path)]
    assert minify.main(["-o", str(tmp_path / "train_gpt.py"), *options]) == 0, capsys.readouterr()
    assert re.search("verified: .* [0-9]{2,} equal losses", capsys.readouterr().out)


LOG = "code bytes:1 sha256:{}\nstep:1 train_loss:{} grad_norm:2\nfinal val_bpb:1.5\n"


def test_a_difference_is_found():
    code = b"x"
    same = LOG.format(minify.hashlib.sha256(code).hexdigest(), 3)
    assert minify.compare_logs(same, same, code) == 3
    with pytest.raises(minify.Difference, match="train_loss is 3 with the source, then train_loss"):
        minify.compare_logs(same, same.replace("train_loss:3", "train_loss:4"), code)
    with pytest.raises(minify.Difference, match="3 and 2 values"):
        minify.compare_logs(same, same.replace("val_bpb:1.5", ""), code)
    with pytest.raises(minify.Difference, match="the log does not say bytes:2"):
        minify.compare_logs(same, same, b"xy")


def test_mistakes_get_a_sentence_and_leave_files_alone(tmp_path, capsys):
    source = tmp_path / "train_gpt.py"
    source.write_text("x = (")
    assert minify.main([str(source), "-o", str(tmp_path / "out.py")]) == 2
    assert not (tmp_path / "out.py").exists()
    source.write_text("x = 1\n")
    with pytest.raises(SystemExit):
        minify.main([str(source), "-o", str(source)])
    with pytest.raises(SystemExit):
        minify.main([str(source), "-o", str(tmp_path)])
    assert source.read_text() == "x = 1\n"
    options = ["-o", str(tmp_path / "out.py"), "--verify", "--data", str(tmp_path / "none")]
    (tmp_path / "out.py").write_text("an older one")
    with pytest.raises(SystemExit):
        minify.main([str(source), *options])
    assert (tmp_path / "out.py").read_text() == "an older one"
    message = capsys.readouterr().err
    assert "never closed" in message
    assert "name another --output" in message
    assert "is a folder" in message
    assert "run scripts/demo.sh" in message


SLOW = '''"""Sleeps in its tiny run."""
import os, pathlib, time
pathlib.Path("pid.tmp").write_text(str(os.getpid()))
pathlib.Path("pid.tmp").rename("pid")
time.sleep(60)
'''


def test_a_signal_ends_the_trainer_too(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, ROOT / "scripts/minify.py", "slow.py", "-o", "out/slow.py"]
    process = subprocess.Popen([*command, "--verify", "--data", "."], cwd=tmp_path)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
