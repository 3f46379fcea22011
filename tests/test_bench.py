"""Speed figures, and settings compared in branches of one run."""

import json
import os
import re
import signal
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SETTINGS, SHALLOW, Lines, plain_attention
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "scripts"))

import bench_speed
import compare_branches

import train_gpt

BENCH = {"vocab_size": 320, "train_batch_tokens": 64, "warmup_steps": 1}
BENCH |= {"seq_len_schedule": "0.0:4,0.3:2,0.6:1"}  # the demo has another


@pytest.fixture(autouse=True)
def eager():
    """Nothing is compiled, not even by a test that has made its own Runtime."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def settings(monkeypatch):
    """settings(name=value, ...) sets the variables of a tiny run on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def change(**changes) -> None:
        for name, value in (SETTINGS | SHALLOW | changes).items():
            monkeypatch.setenv(name.upper(), str(value))

    return change


@pytest.mark.parametrize(
    "changes", [{}, {"feedback_mode": "none", "bigram_vocab_size": 0, "num_kv_heads": 1}]
)
def test_model_flops_are_what_torch_counts(changes, tiny, runtime, monkeypatch):
    """Plain attention multiplies the masked half too, so torch counts attention twice."""

    def plain(q, k, v, **_):
        return plain_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    monkeypatch.setattr(train_gpt.F, "scaled_dot_product_attention", plain)
    hp = tiny(**SHALLOW | BENCH, **changes)
    trainer, _ = bench_speed.build(hp, runtime)
    for passes, cuts in ((1, 4), (1, 1), (2, 2), (3, 1)):
        with FlopCounterMode(display=False) as counter:
            trainer.accumulate(trainer.data.loader.batch(0), passes, cuts=cuts)
        flops = bench_speed.model_flops(hp, passes, cuts)
        assert sum(flops.values()) + flops["attention"] == counter.get_total_flops()


def test_the_bench_measures_every_kind_of_step(settings, capsys):
    settings(**BENCH)
    options = ["--steps", "2", "--peak-tflops", "0.5", "--format", "json"]
    assert bench_speed.main(options) == 0
    report = json.loads(capsys.readouterr().out)
    steps = report["steps"]
    # Windows of 32 tokens in the bench, cut in four, in two, and whole.
    kinds = [(1, 8, False), (1, 16, False), (1, 32, False), (2, 32, False), (3, 32, False)]
    kinds.append((3, 32, True))
    assert [(step["passes"], step["seq_len"], step["qat"]) for step in steps] == kinds
    for step in steps:
        assert 0 < step["fastest_ms"] <= step["ms"] <= step["slowest_ms"]
        rate = step["tflops"] / (step["ms"] / 1000)
        assert step["tflops_per_second"] == pytest.approx(rate)
        assert step["utilization"] == pytest.approx(rate / 0.5)
    work = [step["tflops"] for step in steps]
    assert work[:5] == sorted({*work})
    assert work[5] == work[4], "QAT is no work of the model"
    spent = [kernel["ms"] for kernel in report["kernels"]]
    assert spent == sorted(spent, reverse=True)
    assert "aten::mm" in {kernel["name"] for kernel in report["kernels"]}
    assert report["chunk_scoring_seconds"] > 0
    assert report["cold_start_seconds"] > 0
    assert "no figure here is the recipe's" in report["setup"]["device"]


def test_the_bench_leaves_out_what_is_skipped(settings, capsys):
    settings(**BENCH | {"num_passes": 1, "late_qat_threshold": 0, "seq_len_schedule": "0.0:1"})
    skip = ["--skip", "compile", "evaluation"]
    options = ["--steps", "1", "--format", "markdown", "--kernels", "3"]
    assert bench_speed.main([*skip, *options]) == 0
    text = capsys.readouterr().out
    head = r"^\|  \| passes=1, T=32 \|\n\|--\|--:\|\n\| step, ms \| [0-9.]+ \|$"
    assert re.search(head, text, re.MULTILINE)
    shares = re.findall(r"^\| (\S+).* \| ([0-9.]+)% \|$", text, re.MULTILINE)
    assert len(shares) == 4
    assert shares[-1] == ("all", "100.0")
    assert "seconds" not in text


def test_the_bench_says_what_is_wrong(settings, monkeypatch, capsys):
    settings(**BENCH)
    for arguments, text in (
        (["--no-such-setting", "1"], "unknown argument --no-such-setting"),
        (["--steps", "0"], "--steps 0: time at least one"),
    ):
        assert bench_speed.main(arguments) == 2
        assert text in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bench_speed.main([]) == 2
    assert "without torchrun" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- branches


@pytest.fixture
def branches(settings, corpus, tmp_path):
    """branches(*arguments) -> the exit code; its folder is tmp_path / "branches"."""
    settings(**corpus.settings, iterations=8, weight_average="ema_swa", swa_lr_scale=1.1)

    def run(*arguments: str) -> int:
        return compare_branches.main(["--output", str(tmp_path / "branches"), *arguments])

    return run


def table_rows(text: str) -> dict[str, list[str]]:
    """The cells of a Markdown table by the first one."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_a_branch_goes_on_as_if_never_cut(branches, tmp_path, capsys, runtime):
    chosen = ["num_passes=1 muon_wd=0.5", "residual_scale_init=1.0", "matrix_lr=1e30"]
    words = [word for text in chosen for word in ("--branch", text)]
    assert branches("--at", "0.6", *words, "--format", "markdown") == 0
    hp, data = train_gpt.open_data(compare_branches.read_run([]), runtime)
    trainer, evaluator = compare_branches.prepare(hp, data, runtime, tmp_path / "whole.txt")
    trainer.train(evaluator, tmp_path)
    whole, whole_int6 = compare_branches.score(trainer, evaluator)
    rows = table_rows(capsys.readouterr().out)
    assert rows["run"] == ["8", f"{whole:.5f}", "+0.00000", f"{whole_int6:.5f}", "+0.00000"]
    assert len({rows[name][1] for name in ("run", *chosen)}) == 4
    assert rows["matrix_lr=1e30"][1] == "nan"
    assert table_rows((tmp_path / "branches" / "table.md").read_text()).items() <= rows.items()
    log = (tmp_path / "branches" / "1_num_passes=1_muon_wd=0.5.txt").read_text()
    assert "config name:num_passes value:1 " in log


def test_without_a_trunk_branches_are_whole_runs(branches, tmp_path, capsys, runtime):
    other = "seed=7 train_seq_len=16 train_batch_tokens=64 mlp_mult=1"
    assert branches("--at", "0", "--branch", other, "--format", "markdown") == 0
    rows = table_rows(capsys.readouterr().out)
    settings = [f"--{word.replace('_', '-')}" for word in other.split()]
    for argv, row in (([], "run"), (settings, other)):
        hp, data = train_gpt.open_data(compare_branches.read_run(argv), runtime)
        log = tmp_path / f"{row[:4]}.txt"
        trainer, evaluator = compare_branches.prepare(hp, data, runtime, log)
        trainer.train(evaluator, tmp_path)
        whole, int6 = compare_branches.score(trainer, evaluator)
        assert [rows[row][1], rows[row][3]] == [f"{whole:.5f}", f"{int6:.5f}"]


def test_a_branch_takes_over_what_the_trunk_has_moved(tiny, corpus, runtime):
    """The branch has another table of parameters, so that AdamW's moments lie elsewhere."""

    def trainer(**changes) -> train_gpt.Trainer:
        average = {"weight_average": "swa", "swa_lr_scale": 1.1, "swa_frac": 0.0}
        hp, data = train_gpt.open_data(tiny(**SHALLOW | average, **changes), runtime)
        model = train_gpt.build_model(hp, runtime, Lines())
        return train_gpt.Trainer(model, data, runtime, Lines(), train_gpt.Interrupts())

    trunk = trainer(feedback_mode="none")
    trunk.elapsed = 3.0
    for step in range(2):
        trunk.take_step(step / 24)
    branch = trainer(feedback_mode="diagonal", residual_scale_init=0.9)
    moved = set(trunk.flat.shapes) - {"residual_scale"}
    compare_branches.continue_from(trunk, moved, branch)
    assert (branch.step, branch.elapsed) == (2, 3.0)
    assert (branch.model.residual_scale == 0.9).all()
    assert (branch.flat.named(branch.average.result())["feedback_d"] == 1).all()
    old, new = (compare_branches.flat_state(t) for t in (trunk, branch))
    for kind in ("data", "momentum", "swa", "exp_avg", "exp_avg_sq"):
        before, after = trunk.flat.named(old[kind]), branch.flat.named(new[kind])
        assert all(after[name].equal(before[name]) for name in moved & set(before))
        assert any(after[name].any() for name in moved & set(before))


def test_a_signal_ends_the_comparison_and_keeps_what_is_done(branches, monkeypatch, capsys):
    kept = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    train, calls = train_gpt.Trainer.train, []

    def train_twice(self, *arguments, **more) -> bool:
        calls.append(self)
        if len(calls) == 3:  # the trunk, the run, the first branch
            os.kill(os.getpid(), signal.SIGINT)
        return train(self, *arguments, **more)

    monkeypatch.setattr(train_gpt.Trainer, "train", train_twice)
    train_gpt.Interrupts().install()
    try:
        with pytest.raises(SystemExit, match="stopped by SIGINT"):
            branches("--branch", "muon_wd=0", "--format", "markdown")
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    assert list(table_rows(capsys.readouterr().out))[2:] == ["run"]


def test_branches_say_what_is_wrong(branches, tmp_path, capsys):
    for arguments, text in (
        (["--branch", "seed=1"], "seed is shared by all"),
        (["--branch", "no_setting=1"], "there is no setting no_setting"),
        (["--branch", "num_passes=x"], "--branch 'num_passes=x': num_passes=x"),
        (["--branch", "num_passes=65"], "passes are 1..64"),
        (["--at", "1"], "must be at least 0 and below 1"),
        (["--data-path", "nowhere", "--tokenizer-path", "x"], "data_path=nowhere holds no"),
        (["--data-path", "nowhere", "--tokenizer-path", "x"], "tokenizer_path=x is missing"),
    ):
        assert branches(*arguments) == 2
        assert text in capsys.readouterr().err
        assert not (tmp_path / "branches").exists()
    (tmp_path / "branches").mkdir()
    assert branches() == 2
    assert "name a folder to make" in capsys.readouterr().err
    replaced = replace(compare_branches.read_run([]), num_passes=2)
    assert (
        compare_branches.read_branch("num_passes=2", compare_branches.read_run([]), ()) == replaced
    )
