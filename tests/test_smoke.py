"""The program end to end: one process, its log, `--evaluate`, and every clean failure."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import (
    METRICS,
    ROOT,
    SETTINGS,
    Finished,
    Lines,
    corpus_paths,
    even_floors,
    steps,
    write_shard,
)

import train_gpt
from train_gpt import Hyperparameters, Log, UserError, build_model, write_aside

PAIR = re.compile(r"[a-z0-9_]+:\S+")
LONG_FLOAT = {"MATRIX_LR": "0.025123412345678"}

FIELDS = {f.name.upper() for f in fields(Hyperparameters)}


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
    env = variables | {"RUN_ID": "first", "TOKEN_LOSSES": str(folder / "losses.npy"), **LONG_FLOAT}
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


def test_the_same_seed_gives_the_same_numbers(first, variables, tmp_path):
    """Without warm-up, and without docstrings and assertions: python -OO."""
    env = variables | {"RUN_ID": "second", "WARMUP_STEPS": "0", **LONG_FLOAT}
    second = execute([sys.executable, "-OO", "train_gpt.py"], env, tmp_path)
    assert second.code == 0, second.printed
    assert second.metrics("second") == first.metrics("first"), "to the last digit"
    assert steps(second.log("second")) == steps(first.log("first"))
    artifacts = [first.folder / "first.int6.xz", tmp_path / "second.int6.xz"]
    assert artifacts[0].read_bytes() == artifacts[1].read_bytes()


def test_help_needs_neither_docstrings_nor_packages(tmp_path):
    """Without packages it names the missing one and the remedy."""
    done = execute([sys.executable, "-OO", "train_gpt.py", "--help"], {}, tmp_path)
    assert done.code == 0
    assert "--matrix-lr" in done.printed
    done = execute([sys.executable, "-S", "train_gpt.py", "--help"], {"PYTHONPATH": ""}, tmp_path)
    assert done.code != 0
    assert re.fullmatch(r"error: \w+ is not installed: run pip install .*\n", done.printed)


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
    assert "warning" not in again.log("again")
    flags = [*flags[:2], "--eval-passes", "9", "--no-ttt-enabled", "--no-sliding-eval"]
    more = launch(*flags, base=env, RUN_ID="more")
    assert "scores%20with%209%20passes,%20more%20than" in more.log("more")


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
    given = {*variables, *LONG_FLOAT, "RUN_ID", "OUTPUT_DIR", "TOKEN_LOSSES"}
    [defaults] = [line.split(" ")[1:] for line in lines if line.startswith("defaults ")]
    assert {word.split(":")[0].upper() for word in defaults} == FIELDS - given
    configured = [line.split(" ") for line in lines if line.startswith("config ")]
    assert {words[1].removeprefix("name:").upper() for words in configured} == given
    assert all(words[-1] == "source:env" for words in configured)
    read_by_people = [line for line in lines if not line.startswith("defaults ")]
    assert max(map(len, read_by_people)) <= 220
    artifact = next(line for line in lines if line.startswith("artifact "))
    size = (first.folder / "first.int6.xz").stat().st_size
    assert f" model_bytes:{size} total_bytes:{size + len(code)} " in artifact
    assert "graphs_compiled_after_start:0" in log
    phases = re.findall(r"^phase name:(\S+) seconds:[\d.]+$", log, re.MULTILINE)
    later = ["warm_up", "training", "pre_quant_evaluation", "export", "evaluation"]
    assert phases == ["start", *later]
    growth = re.findall(r"^progressive_passes .*num_passes:(\d)$", log, re.MULTILINE)
    assert growth == ["1", "2", "3"]
    assert "\nlate_qat " in log
    assert "\nswa " in log
    last = steps(log)[-1]
    assert (last["step"], last["passes"], last["qat"]) == ("24/24", "3", "1")
    passes = [line for line in lines if line.startswith("passes ")][-1]
    last = dict(word.split(":", 1) for word in passes.split(" ")[1:])
    assert len(last["growth"].split(",")) == len(last["feedback_norm"].split(",")) == 3
    assert len(last["residual_scale"].split(",")) == 2
    assert float(last["feedback_norm"].split(",")[2]) > 0
    assert all(line in first.printed for line in lines)


def test_a_step_that_takes_minutes_on_a_cpu_is_announced(tiny, runtime):
    """By its work: the model's parameters times the tokens of a step."""
    for tokens, count in ((1 << 12, 0), (1 << 24, 1)):
        log = Lines()
        build_model(tiny(train_batch_tokens=tokens), runtime, log)
        assert len(log.of("warning")) == count


def test_a_model_beyond_all_sense_is_refused_before_it_takes_memory(tiny, runtime):
    for changes in ({"model_dim": 1 << 32}, {"bigram_vocab_size": 1 << 40}):
        with pytest.raises(UserError, match="bytes of weights"):
            build_model(tiny(**changes), runtime, Lines())


def test_a_file_is_written_through_a_link(tmp_path):
    link, target = tmp_path / "link", tmp_path / "there" / "file"
    target.parent.mkdir()
    link.symlink_to(target)
    write_aside(link, b"x")
    assert link.is_symlink()
    assert target.read_bytes() == b"x"


def test_settings_read_back_equal(first, variables):
    """To the last digit, so that two configurations never look like one."""
    settings = variables | LONG_FLOAT | {"OUTPUT_DIR": str(first.folder), "RUN_ID": "first"}
    settings["TOKEN_LOSSES"] = str(first.folder / "losses.npy")
    hp, _ = train_gpt.read_configuration(settings, [])
    logged = re.findall(r"^config name:(\S+) value:(\S+) ", first.log("first"), re.MULTILINE)
    env = {name.upper(): unquote(value) for name, value in logged}
    assert train_gpt.read_configuration(env, [])[0] == hp
    assert hp.matrix_lr == 0.025123412345678


def test_no_value_breaks_a_line_of_the_log(tmp_path, capsys):
    values = ["a b", "tab\there", "two\nlines", "größe", "", None, "100%"]
    log = Log(tmp_path / "a" / "x.txt")
    for value in values:
        log.event("config", name="n", value=value, more=(1, 2.5))
    lines = (tmp_path / "a" / "x.txt").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    for line, value in zip(lines, values, strict=True):
        words = line.split(" ")
        assert [words[0], words[1], words[3]] == ["config", "name:n", "more:1,2.5"]
        assert all(PAIR.fullmatch(word) for word in words[1:])
        assert unquote(words[2].removeprefix("value:")) == ("none" if value == "" else str(value))


def test_a_run_without_results_leaves_no_log(tmp_path):
    for has_results in (False, True):
        log = Log(tmp_path / "x.txt")
        log.has_results = has_results
        log.abandon(ValueError("it broke\nbadly"))
        assert log.path.exists() == has_results
    assert log.path.read_text() == "failed text:it%20broke\n"
    with pytest.raises(UserError, match=r"x\.txt"):
        Log(tmp_path / "x.txt")
    log.file.close()  # its lock
    for name, stays in (("x.txt", True), ("y.txt", False)):  # a resumed run that fails
        log = Log(tmp_path / name, resume=True)
        log.abandon(ValueError())
        assert log.path.exists() == stays


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


# ----------------------------------------------------------------------------------- clean failures


def test_a_run_that_diverges_stops_with_the_step_and_keeps_its_log(launch):
    done = launch(RUN_ID="nan", SCALAR_LR="1e30", TRAIN_LOG_EVERY="1")
    assert done.code == 3
    step = re.search(r"^error: step (\d+): .*lower", done.printed, re.MULTILINE)
    assert 1 < int(step[1]) < 24
    assert [p.name for p in done.folder.iterdir()] == ["nan.txt"]
    logged = [int(row["step"].split("/")[0]) for row in steps(done.log("nan"))]
    assert logged == list(range(1, len(logged) + 1))
    assert len(logged) in (int(step[1]) - 1, int(step[1]))
    assert "Traceback" not in done.printed


def failed_cleanly(done: Finished, *named: str) -> None:
    """Exit code 2, each error a line that names what is wrong, and nothing was trained."""
    assert done.code == 2, done.printed
    errors = [line for line in done.printed.splitlines() if line.startswith("error: ")]
    assert errors
    assert all(any(name in error for error in errors) for name in named), errors
    assert "Traceback" not in done.printed
    assert "warm_up" not in done.printed
    assert "progressive_passes" not in done.printed


def test_all_mistakes_in_paths_are_told_together_before_there_is_a_log(launch, tmp_path):
    paths = {"DATA_PATH": "none", "TOKENIZER_PATH": "no.model", "TOKEN_LOSSES": "none/a.npy"}
    changes = {name: str(tmp_path / path) for name, path in paths.items()}
    done = launch(RUN_ID="x", **changes, ARTIFACT_LIMIT_BYTES=str(10**18))
    failed_cleanly(done, "data_path=", "tokenizer_path=", "token_losses=", "output_dir=")
    assert "config" not in done.printed
    assert not done.folder.exists()


def test_bad_settings_paths_and_names_end_the_run_before_it_starts(launch, tmp_path, first):
    failed_cleanly(launch("--no-such", SEED="-1"), "--no-such", "seed=-1")
    failed_cleanly(launch(TOKENIZER_PATH=__file__), "no SentencePiece model")
    file = tmp_path / "file"
    file.write_text("kept")
    for folder in (file, file / "inside"):
        failed_cleanly(launch(folder=folder, RUN_ID="x"), "output_dir: cannot write")
    assert file.read_text() == "kept"


def test_bad_data_leave_no_log_and_spare_one_that_is_resumed(launch, corpus, tmp_path, first):
    data, logs = tmp_path / "data", tmp_path / "logs"
    shutil.copytree(corpus.data_path, data)
    write_shard(data / "fineweb_train_000001.bin", np.array([1, 5, 400] * 200))
    bad = {"DATA_PATH": str(data), "RUN_ID": "first", "folder": logs}
    failed_cleanly(launch(**bad), "largest token is 400")
    assert not logs.exists(), "the run_id can be used again"
    logs.mkdir()
    unfinished = first.log("first").split("\nstop ")[0] + "\n"
    (logs / "first.txt").write_text(unfinished)
    failed_cleanly(launch("--resume", **bad), "largest token is 400")
    assert (logs / "first.txt").read_text() == unfinished


def test_bad_artifacts_end_the_evaluation_before_it_starts(launch, tmp_path, first):
    artifact = (first.folder / "first.int6.xz").read_bytes()
    bad = tmp_path / "bad.xz"
    for content in (artifact[:-1], artifact[:5000] + b"x" + artifact[5001:]):
        bad.write_bytes(content)
        failed_cleanly(launch("--evaluate", str(bad)), "bad.xz is damaged or foreign")
    failed_cleanly(launch("--evaluate", str(tmp_path / "none.xz")), "none.xz cannot be read")
    hp = Hyperparameters(**SETTINGS, vocab_size=500)
    tensors = {name: p.detach() for name, p in train_gpt.GPT(hp).named_parameters()}
    floors = even_floors(hp, train_gpt.FINEST_FLOOR_INDEX)
    bad.write_bytes(train_gpt.compress(hp.architecture(), tensors, floors))
    failed_cleanly(launch("--evaluate", str(bad)), "has 320 pieces, not vocab_size=500")
