"""The program end to end: one process, torchrun, `--evaluate`, and every clean failure."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from conftest import METRICS, ROOT, SETTINGS, Finished, corpus_paths, steps, write_shard

import train_gpt
from train_gpt import Clock, Hyperparameters, Log, Runtime

PAIR = re.compile(r"[a-z0-9_]+:\S+")


def execute(command: list[str], env: dict[str, str], folder: Path) -> Finished:
    env = os.environ | env | {"OUTPUT_DIR": str(folder)}
    done = subprocess.run(
        command, env=env, cwd=ROOT, text=True, timeout=120,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, folder)


@pytest.fixture(scope="module")
def first(variables, tmp_path_factory) -> Finished:
    """`python train_gpt.py`, as a user types it, with the losses of single tokens."""
    folder = tmp_path_factory.mktemp("first")
    env = variables | {"RUN_ID": "first", "TOKEN_LOSSES": str(folder / "losses.npy")}
    done = execute([sys.executable, "train_gpt.py"], env, folder)
    assert done.code == 0, done.printed
    return done


# ----------------------------------------------------------------------------------------- the run


def test_the_run_learns_and_leaves_nothing_but_its_files(first):
    assert sorted(p.name for p in first.folder.iterdir()) == [
        "first.int6.xz", "first.txt", "losses.npy",
    ]  # fmt: skip
    losses = [float(step["train_loss"]) for step in steps(first.log("first"))]
    assert losses[0] == pytest.approx(np.log(320), abs=0.1)
    assert losses[-1] < losses[0] - 0.7
    metrics = {name: float(loss) for name, (loss, _) in first.metrics("first").items()}
    assert tuple(metrics) == METRICS
    plain, quantized, sliding, ttt = metrics.values()
    assert plain < losses[0] - 0.5
    assert 0 < abs(quantized - plain) < 0.05
    assert ttt < sliding != quantized


def test_the_same_seed_gives_the_same_numbers_with_and_without_warm_up(first, launch):
    second = launch(RUN_ID="second", WARMUP_STEPS="0")
    assert second.code == 0, second.printed
    assert second.metrics("second") == first.metrics("first"), "to the last digit"
    assert steps(second.log("second")) == steps(first.log("first"))
    artifacts = [done.folder / name for done, name in (
        (first, "first.int6.xz"), (second, "second.int6.xz"))]  # fmt: skip
    assert artifacts[0].read_bytes() == artifacts[1].read_bytes()


def test_another_seed_gives_other_numbers(first, launch):
    other = launch("--seed", "5", "--no-ttt-enabled", "--no-sliding-eval", RUN_ID="other")
    assert tuple(other.metrics("other")) == METRICS[:2]
    assert not set(other.metrics("other").values()) & set(first.metrics("first").values())


def test_an_artifact_is_scored_again_with_the_same_numbers(first, launch, corpus, tmp_path):
    """In a fresh process that is told nothing of the architecture, token by token."""
    evaluation = ("eval_stride", "eval_batch_seqs", "ttt_chunk_tokens", "ttt_batch_seqs")
    env = {name.upper(): str(SETTINGS[name]) for name in evaluation} | corpus_paths(corpus)
    flags = ["--evaluate", str(first.folder / "first.int6.xz")]
    flags += ["--token-losses", str(tmp_path / "losses.npy")]
    again = launch(*flags, base=env, RUN_ID="again", TTT_LR="0.01")
    assert again.code == 0, again.printed
    expected = first.metrics("first")
    assert again.metrics("again") == {name: expected[name] for name in METRICS[1:]}
    assert (tmp_path / "losses.npy").read_bytes() == (first.folder / "losses.npy").read_bytes()


def test_the_losses_of_single_tokens(first, corpus):
    losses = np.load(first.folder / "losses.npy", allow_pickle=False)
    assert losses.dtype == np.float32
    assert losses.shape == (len(corpus.val_tokens) - 1,)
    val_loss, val_bpb = map(float, first.metrics("first")["legal_ttt_exact"])
    assert losses.astype(float).mean() == pytest.approx(val_loss, abs=2e-8)
    text_bytes = sum(len(document.encode()) for document in corpus.val_documents)
    bits = losses.astype(float).sum() / np.log(2)
    assert bits / text_bytes == pytest.approx(val_bpb, abs=2e-8)


# ----------------------------------------------------------------------------------------- the log


def test_the_log_keeps_its_grammar_and_says_what_ran(first, variables):
    log = first.log("first")
    lines = log.splitlines()
    for line in lines:
        words = line.split(" ")
        pairs = words if ":" in words[0] else words[1:]
        assert all(PAIR.fullmatch(word) for word in pairs), line
    code = (ROOT / "train_gpt.py").read_bytes()
    digest = hashlib.sha256(code).hexdigest()
    assert f"code name:train_gpt.py bytes:{len(code)} sha256:{digest}" in lines
    for f in fields(Hyperparameters):
        source = "env" if f.name.upper() in {**variables, "RUN_ID": "", "OUTPUT_DIR": "",
                                             "TOKEN_LOSSES": ""} else "default"  # fmt: skip
        configured = [line for line in lines if line.startswith(f"config name:{f.name} ")]
        assert len(configured) == 1
        assert configured[0].endswith(f" source:{source}"), configured
    artifact = next(line for line in lines if line.startswith("artifact "))
    size = (first.folder / "first.int6.xz").stat().st_size
    assert f" model_bytes:{size} total_bytes:{size + len(code)} " in artifact
    assert "graphs_compiled_after_start:0" in log
    phases = re.findall(r"^phase name:(\S+) seconds:[\d.]+$", log, re.MULTILINE)
    later = ["warm_up", "training", "pre_quant_evaluation", "export", "evaluation"]
    assert phases == ["start", "data", *later]
    growth = re.findall(r"^progressive_passes .*num_passes:(\d)$", log, re.MULTILINE)
    assert growth == ["1", "2", "3"]
    assert "\nlate_qat " in log
    assert "\nswa " in log
    last = steps(log)[-1]
    assert (last["step"], last["passes"], last["qat"]) == ("24/24", "3", "1")
    assert len(last["growth"].split(",")) == len(last["feedback_norm"].split(",")) == 3
    assert len(last["residual_scale"].split(",")) == 2
    assert float(last["feedback_norm"].split(",")[2]) > 0
    assert all(line in first.printed for line in lines)


def test_no_value_breaks_a_line_of_the_log(tmp_path, capsys):
    log, values = (
        Log(tmp_path / "a" / "x.txt"),
        ["a b", "tab\there", "two\nlines", "", None, "100%"],
    )
    for i, value in enumerate(values):
        if i == 2:
            assert not (tmp_path / "a").exists(), "no trace before it is known that there is a run"
            log.open()
        log.event("config", name="n", value=value, more=(1, 2.5))
    lines = (tmp_path / "a" / "x.txt").read_text().splitlines()
    assert len(lines) == len(values)
    assert capsys.readouterr().out.splitlines() == lines
    for line, value in zip(lines, values, strict=True):
        words = line.split(" ")
        assert [words[0], words[1], words[3]] == ["config", "name:n", "more:1,2.5"]
        assert all(PAIR.fullmatch(word) for word in words[1:])
        if isinstance(value, str) and value:
            assert unquote(words[2].removeprefix("value:")) == value


# ------------------------------------------------------------------------------------------- limits


def test_an_artifact_that_cannot_fit_is_kept_aside_and_the_run_fails(launch):
    limit = (ROOT / "train_gpt.py").stat().st_size + 1000
    done = launch(RUN_ID="big", ITERATIONS="0", ARTIFACT_LIMIT_BYTES=str(limit))
    assert done.code == 2
    assert "error: artifact_limit_bytes=" in done.printed
    assert sorted(p.name for p in done.folder.iterdir()) == ["big.int6.oversize.xz", "big.txt"]
    assert "legal_ttt_exact" not in done.log("big")


def test_a_limit_between_is_met(launch, first):
    """The knob spends the bytes there are: a tenth fewer than the finest artifact has."""
    finest = (first.folder / "first.int6.xz").stat().st_size
    limit = (ROOT / "train_gpt.py").stat().st_size + int(0.9 * finest)
    done = launch(
        "--no-ttt-enabled", "--no-sliding-eval", RUN_ID="tight", ITERATIONS="12",
        ARTIFACT_LIMIT_BYTES=str(limit),
    )  # fmt: skip
    assert done.code == 0, done.printed
    total = int(re.search(r" total_bytes:(\d+) ", done.log("tight"))[1])
    assert 0.99 * limit < total <= limit
    sizes = [p.stat().st_size for p in (done.folder / "tight.int6.xz", ROOT / "train_gpt.py")]
    assert total == sum(sizes)


def test_the_wall_clock_ends_the_run_and_drives_its_schedules(launch):
    done = launch(
        "--no-ttt-enabled", "--no-sliding-eval", RUN_ID="clock", ITERATIONS="none",
        MAX_WALLCLOCK_SECONDS="2", TRAIN_LOG_EVERY="1",
    )  # fmt: skip
    assert done.code == 0, done.printed
    log = done.log("clock")
    stop = re.search(r"^stop step:(\d+) train_time:(\d+)ms", log, re.MULTILINE)
    assert int(stop[1]) > 3
    assert 500 < int(stop[2]) < 4000
    scales = [float(step["lr_scale"]) for step in steps(log)]
    assert scales[0] == 1
    assert scales == sorted(scales, reverse=True)
    assert scales[-1] < 0.5
    assert int(steps(log)[-1]["passes"]) > 1


def follow_the_clock(runtime: Runtime, hp: Hyperparameters) -> list[float]:
    clock, seen = Clock(hp, runtime), []
    while (progress := clock.progress(len(seen))) < 1:
        seen.append(progress)
        time.sleep(0.01 + 0.005 * runtime.rank)
    return [*seen, progress]


def test_every_rank_follows_the_clock_of_the_first(tiny, on_ranks):
    hp = tiny(iterations=None, max_wallclock_seconds=0.5)
    seen = on_ranks(2, follow_the_clock, hp)
    assert seen[0] == seen[1]
    assert len(seen[0]) > 5
    assert seen[0] == sorted(seen[0])
    assert seen[0][-2] < 1 <= seen[0][-1]


# ----------------------------------------------------------------------------------- clean failures


def test_a_run_that_diverges_stops_with_the_step_and_keeps_its_log(launch):
    done = launch(RUN_ID="nan", SCALAR_LR="1e30", TRAIN_LOG_EVERY="1")
    assert done.code == 3
    step = re.search(r"^error: step (\d+): .*lower", done.printed, re.MULTILINE)
    assert 1 < int(step[1]) < 24
    assert [p.name for p in done.folder.iterdir()] == ["nan.txt"]
    logged = [int(row["step"].split("/")[0]) for row in steps(done.log("nan"))]
    assert logged == list(range(1, int(step[1])))
    assert "Traceback" not in done.printed


@pytest.fixture
def broken(corpus, tmp_path):
    """broken(kind) -> the changed variables of a run whose data have that defect."""

    def data_path(**files: bytes | None) -> dict[str, str]:
        folder = tmp_path / "data"
        folder.mkdir()
        for path in corpus.data_path.glob("*.bin"):
            content = files.get(path.stem, path.read_bytes())
            if content is not None:
                (folder / path.name).write_bytes(content)
        return {"DATA_PATH": str(folder)}

    def make(kind: str) -> dict[str, str]:
        name = "fineweb_train_000001"
        shard = (corpus.data_path / f"{name}.bin").read_bytes()
        if kind == "no validation":
            return data_path(fineweb_val_000000=None, fineweb_val_000001=None)
        if kind == "short text":
            short = write_shard(tmp_path / "short", corpus.val_tokens[:20]).read_bytes()
            return data_path(fineweb_val_000000=short, fineweb_val_000001=None)
        if kind == "foreign token":
            tokens = np.array([1, 5, 400] * 200)
            return data_path(**{name: write_shard(tmp_path / "foreign", tokens).read_bytes()})
        content = {"truncated": shard[:-100], "empty": b"", "wrong magic": b"\1" + shard[1:],
                   "count": shard[:8] + b"\7" + shard[9:]}[kind]  # fmt: skip
        return data_path(**{name: content})

    return make


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("truncated", "fineweb_train_000001.bin"),
        ("empty", "fineweb_train_000001.bin"),
        ("wrong magic", "magic"),
        ("count", "counts"),
        ("foreign token", "token 400, outside vocab_size=320"),
        ("no validation", "fineweb_val_"),
        ("short text", "20 validation tokens"),
    ],
)
def test_bad_data_end_the_run_before_it_starts(launch, broken, kind, named):
    done = launch(RUN_ID="bad", **broken(kind))
    failed_cleanly(done, named)
    assert not done.folder.exists(), "the run_id can be used again"


def test_data_that_only_another_rank_looks_at_leave_no_log_either(start, broken):
    job = start(ranks=2, RUN_ID="bad", **broken("foreign token"))
    codes = job.wait()
    assert codes[0] != 0
    assert codes[1] == 2
    assert "fineweb_train_000001.bin holds token 400" in job.outputs[1].read_text()
    assert not job.folder.exists()


def test_a_log_that_is_resumed_survives_bad_data(launch, broken, first, tmp_path):
    log = first.folder / "first.txt"
    shutil.copy(log, tmp_path)
    done = launch("--resume", folder=tmp_path, RUN_ID="first", **broken("empty"))
    failed_cleanly(done, "fineweb_train_000001.bin")
    assert (tmp_path / "first.txt").read_bytes() == log.read_bytes()


def failed_cleanly(done: Finished, *named: str) -> None:
    """Exit code 2, each error a line that names what is wrong, and nothing was trained."""
    assert done.code == 2, done.printed
    errors = [line for line in done.printed.splitlines() if line.startswith("error: ")]
    assert errors
    assert all(any(name in error for error in errors) for name in named), errors
    assert "Traceback" not in done.printed
    assert "warm_up" not in done.printed
    assert "progressive_passes" not in done.printed


def test_bad_settings_paths_and_names_end_the_run_before_it_starts(launch, tmp_path, first):
    failed_cleanly(launch("--no-such", SEED="-1"), "--no-such", "seed=-1")
    failed_cleanly(launch(TOKENIZER_PATH=str(tmp_path / "none")), "tokenizer_path=")
    failed_cleanly(launch(TOKENIZER_PATH=__file__), "no SentencePiece model")
    failed_cleanly(launch(VOCAB_SIZE="1024"), "VOCAB_SIZE=320")
    failed_cleanly(launch(DATA_PATH=str(tmp_path / "none")), "data_path=")
    failed_cleanly(launch(TOKEN_LOSSES=str(tmp_path / "none" / "a.npy")), "token_losses=")
    file = tmp_path / "file"
    file.write_text("kept")
    for folder in (file, file / "inside"):
        failed_cleanly(launch(folder=folder, RUN_ID="x"), "output_dir: cannot write")
    assert file.read_text() == "kept"
    before = first.log("first")
    failed_cleanly(launch(folder=first.folder, RUN_ID="first", ITERATIONS="1"), "first.txt exists")
    assert first.log("first") == before


def test_bad_artifacts_end_the_evaluation_before_it_starts(launch, tmp_path, first):
    artifact = (first.folder / "first.int6.xz").read_bytes()
    bad = tmp_path / "bad.xz"
    for content in (artifact[:-1], artifact[:5000] + b"x" + artifact[5001:], b"", b"PK\3\4"):
        bad.write_bytes(content)
        failed_cleanly(launch("--evaluate", str(bad)), "bad.xz is damaged or foreign")
    failed_cleanly(launch("--evaluate", str(tmp_path / "none.xz")), "none.xz cannot be read")
    hp = Hyperparameters(vocab_size=500, **{k: v for k, v in SETTINGS.items() if k != "vocab_size"})
    torch.manual_seed(0)
    tensors = {name: p.detach() for name, p in train_gpt.GPT(hp).named_parameters()}
    bad.write_bytes(train_gpt.compress(hp, tensors, 7000))
    failed_cleanly(launch("--evaluate", str(bad)), "VOCAB_SIZE=320")
