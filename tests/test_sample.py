"""What a model writes: logits, the choice among them, and scripts/sample.py as its user runs it."""

import contextlib
import hashlib
import io
import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHALLOW, even_floors
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "scripts"))

import sample

from train_gpt import FINEST_FLOOR_INDEX, compress, read_artifact


@pytest.mark.parametrize("num_passes", [1, 3])
def test_logits_are_those_that_the_scorer_uses(tiny, random_model, num_passes):
    """Also of texts that are shorter than the window."""
    model = random_model(tiny(**SHALLOW))
    rows = torch.randint(model.hp.vocab_size, (2, 33), dtype=torch.int32)
    for length in (32, 7, 1):
        ids, targets = rows[:, :length], rows[:, 1 : length + 1]
        logits = model.logits(ids, num_passes)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), reduction="none")
        expected, _ = model(ids, targets, num_passes)
        torch.testing.assert_close(losses.view(2, length), expected, rtol=1e-5, atol=1e-5)


def test_logits_see_no_later_token(tiny, random_model):
    model = random_model(tiny(**SHALLOW))
    ids = torch.randint(model.hp.vocab_size, (1, 32), dtype=torch.int32)
    changed = ids.clone()
    changed[0, 20] = (changed[0, 20] + 1) % model.hp.vocab_size
    before, after = model.logits(ids, 3), model.logits(changed, 3)
    assert torch.equal(before[0, :20], after[0, :20])
    assert not torch.equal(before[0, 20:], after[0, 20:])


def shares(count: int = 4000, **changes) -> list[float]:
    """How often each of four tokens of probability 0.5, 0.25, 0.15 and 0.1 is chosen."""
    args = Namespace(**({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | changes))
    logits = torch.tensor([0.25, 0.5, 0.1, 0.15]).log()
    generator = torch.Generator().manual_seed(0)
    chosen = [sample.choose(logits, args, generator) for _ in range(count)]
    return [chosen.count(token) / count for token in (1, 0, 3, 2)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.725, 0.181, 0.065, 0.029]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_from_the_likeliest(changes, expected):
    assert shares(**changes) == pytest.approx(expected, abs=0.025)


# ------------------------------------------------------------------------------------ as a command


@pytest.fixture(scope="module")
def artifact(corpus, tiny, random_model, tmp_path_factory) -> Path:
    """An artifact with its tokenizer beside it."""
    model = random_model(tiny(**SHALLOW, eval_passes=2))
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    path = tmp_path_factory.mktemp("sample") / "run.int6.xz"
    floors = even_floors(model.hp, FINEST_FLOOR_INDEX)
    path.write_bytes(compress(model.hp.architecture(), tensors, floors))
    path.with_name("tokenizer.model").write_bytes(corpus.tokenizer_path.read_bytes())
    return path


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(*argv: str | Path) -> Done:
    """The script in this process, which has torch imported already."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = sample.main([*map(str, argv)])
    return Done(code, out.getvalue(), err.getvalue())


def test_it_is_a_command(artifact):
    """In a process of its own it writes what it writes in this one."""
    argv = [str(artifact), "the river", "--tokens", "9"]
    command = [sys.executable, str(ROOT / "scripts" / "sample.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, run(*argv).stdout)


def test_a_text_of_any_length_begins_with_the_prompt_and_repeats_with_its_seed(artifact):
    """100 tokens slide through a window of 32; pass counts stand side by side."""
    done = run(artifact, "the river", "--tokens", 100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the river")
    assert len(done.stdout) > 60
    assert run(artifact, "the river", "--tokens", 100).stdout == done.stdout
    assert run(artifact, "the river", "--tokens", 100, "--seed", 1).stdout != done.stdout
    both = run(artifact, "the river", "--tokens", 100, "--passes", "2,1").stdout
    assert both.startswith(f"--- passes: 2\n{done.stdout}--- passes: 1\nthe river")


def test_the_log_beside_the_artifact_names_the_tokenizer(artifact, corpus, tmp_path):
    (tmp_path / "run.int6.xz").write_bytes(artifact.read_bytes())
    line = f"config name:tokenizer_path value:{corpus.tokenizer_path} source:default\n"
    for name in ("run.txt", "run.log"):  # the trainer's, and that of a finished seed
        (tmp_path / name).write_text(line)
        assert run(tmp_path / "run.int6.xz", "the", "--tokens", 3).returncode == 0
        (tmp_path / name).unlink()
    assert "--tokenizer" in run(tmp_path / "run.int6.xz", "the").stderr


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["the", "--tokens", "0"], "--tokens 0"),
        (["the", "--passes", "0,x"], "--passes 0,x"),
        (["the", "--seed", str(1 << 63)], "--seed 9223372036854775808"),
        (["the", "--temperature", "inf"], "--temperature inf"),
        (["the", "--temperature", "1e-320"], "--temperature 1e-320"),
        (["the", "--temperature", "-1", "--top-p", "2"], "--top-p 2"),
        ([b"a\xff".decode(errors="surrogateescape")], "no valid text"),
        (["the", "--tokenizer", "none.model"], "none.model"),
        (["--export", "no/folder/model.safetensors"], "cannot be written"),
    ],
)
def test_mistakes_end_with_a_sentence(artifact, argv, named):
    done = run(artifact, *argv)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_artifact_and_another_tokenizer_are_refused(artifact, tmp_path):
    cut = tmp_path / "cut.int6.xz"
    cut.write_bytes(artifact.read_bytes()[:-9])
    assert "damaged" in run(cut, "the").stderr
    for name in ("run.int6.xz", "tokenizer.model"):
        (tmp_path / name).write_bytes(artifact.with_name(name).read_bytes())
    hp, tensors = read_artifact(artifact)
    for own, code in ((artifact.with_name("tokenizer.model").read_bytes(), 0), (b"another", 2)):
        pinned = hp.architecture() | {"tokenizer_sha256": hashlib.sha256(own).hexdigest()}
        floors = even_floors(hp, FINEST_FLOOR_INDEX)
        (tmp_path / "run.int6.xz").write_bytes(compress(pinned, tensors, floors))
        done = run(tmp_path / "run.int6.xz", "the", "--tokens", 2)
        assert (done.returncode, "is not the model's" in done.stderr) == (code, code == 2)
    done = run(artifact, "x " * 40, "--tokens", 2)
    assert "sees the last 32" in done.stderr
    assert done.returncode == 0


def test_exported_weights_are_those_of_the_artifact(artifact, tmp_path):
    path = tmp_path / "model.safetensors"
    assert run(artifact, "--export", path).returncode == 0
    hp, tensors = read_artifact(artifact)
    weights = load_file(path)
    assert set(weights) == set(tensors)
    assert all(torch.equal(weights[name], t) for name, t in tensors.items())
    assert json.loads(path.with_suffix(".json").read_text()) == hp.architecture()
    assert "would be overwritten" in run(artifact, "--export", path).stderr
    assert not math.isnan(sum(t.sum().item() for t in weights.values()))
