"""The parser of logs, the table over seeds, comparisons, pictures; on any terminal."""

import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from tensorboard.backend.event_processing import event_accumulator

sys.path.insert(0, str(ROOT / "scripts"))

import inspect_logs
import plot_logs
from inspect_logs import Base, LogError, Run, Spread

import train_gpt

SCRIPT_TEXT = 'import argparse\nargparse.ArgumentParser(description="a trainer").parse_args()\n'
SCRIPT_SHA = hashlib.sha256(SCRIPT_TEXT.encode()).hexdigest()
TRACE = " growth:1.5,1.2,1.1 feedback_norm:0,0.1,0.2 residual_scale:0.4,0.3"


def complete_log(seed: int, *, best: float = 2.0, text_bytes: int = 151080891, **config) -> str:
    """A log of 40 steps of 10, 20 and 30 ms with 1, 2 and 3 passes, as the trainer writes it.

    Its final bpb is `best` and 0.01 for each seed.
    """
    settings = {"seed": seed, "max_wallclock_seconds": 600.0, "data_path": "data/datasets/x"}
    settings |= {"tokenizer_path": "data/t.model", "sliding_eval": True, "ttt_enabled": True}
    settings |= {"passes_schedule": "0.0:1,0.5:2,0.75:3"}
    bpb = best + seed % 7 / 100
    lines = [
        f"run run_id:train_seed{seed} started:20260102_030405",
        f"code name:train_gpt.py bytes:{len(SCRIPT_TEXT)} sha256:{SCRIPT_SHA}",
        "versions python:3.12.1 torch:2.9.1+cu128 cuda:12.8 numpy:2.3.5 sentencepiece:0.2.1",
        "device name:NVIDIA%20H100%2080GB%20HBM3 world_size:8 dtype:bfloat16",
        *(
            f"config name:{key} value:{str(value).replace(' ', '%20')} source:env"
            for key, value in (settings | config).items()
        ),
        "data split:train shards:80 tokens:8000000000 fingerprint:00ff",
        "data split:val shards:1 tokens:62021846 fingerprint:ff00",
        "model parameters:26700800 attention:sdpa compile:on",
        "phase name:warm_up seconds:30.5",
    ]
    clock, growth = 0, {0: 1, 20: 2, 30: 3}
    for step in range(41):
        if step in growth:
            lines.append(f"progressive_passes step:{step} num_passes:{growth[step]}")
        if step and step % 5 == 0:
            lines.append(
                f"step:{step}/40 train_loss:2.5 train_bpb:1.5{TRACE} train_time:{clock}ms "
                "step_avg:1ms"
            )
        clock += 10 * growth[max(s for s in growth if s <= step)]

    def score(name: str, bpb: float) -> str:
        nats = bpb * math.log(2) * text_bytes / 62021845
        counts = f"tokens:62021845 bytes:{text_bytes} seconds:9.5"
        return f"{name} val_loss:{nats:.8f} val_bpb:{bpb:.8f} {counts}"

    return "\n".join(
        [
            *lines,
            "stop step:40 train_time:700ms step_avg:17.50ms peak_memory_mib:21000",
            "phase name:training seconds:0.7",
            score("pre_quant_exact", bpb + 0.01),
            f"artifact path:x code_bytes:{len(SCRIPT_TEXT)} model_bytes:15900000 "
            f"total_bytes:{15900000 + len(SCRIPT_TEXT)} margin_bytes:1",
            "phase name:export seconds:20.25",
            score("final_int6_roundtrip_exact", bpb + 0.02),
            score("final_int6_sliding_window_exact", bpb + 0.005),
            "ttt_chunk chunk:10/20 val_bpb:2.1 time:4.0s",
            f"ttt_chunk chunk:20/20 val_bpb:{bpb:.6g} time:9.0s",
            f"{score('legal_ttt_exact', bpb)} epochs:57/57",
            "phase name:evaluation seconds:300.5\n",
        ]
    )


OLDER_LOG = """\
import train  # the source stands in the log
world_size:8 grad_accum_steps:1
seed:1337
progressive_passes: step:0 num_passes:1
step:50/6500 train_loss:3.7892 grad_norm:1.0422 train_time:4097ms step_avg:81.94ms
step:4000/6500 train_loss:2.1 train_time:334000ms step_avg:83.50ms
step:4000/6500 val_loss:2.0584 val_bpb:1.2191 train_time:334000ms step_avg:83.50ms
progressive_passes: step:4500 num_passes:2
step:4600/6500 train_loss:2.0 train_time:390000ms step_avg:84ms
step:4700/6500 train_loss:2.0 train_time:401190ms step_avg:85ms
stopping_early: wallclock_cap train_time:600078ms step:6328/6500
DIAGNOSTIC post_ema val_loss:1.9172 val_bpb:1.1353 eval_time:2000ms
Code size: 88253 bytes
Serialized model int6+lzma: 15850832 bytes
Total submission size int6+lzma: 15939085 bytes
  ttt_chunk [11/1893] bpb=1.141819 time=3.5s
legal_ttt val_loss:1.8838 val_bpb:1.1157 eval_time:565600ms
legal_ttt_exact val_loss:1.88375543 val_bpb:1.11566902
"""


def build(text: str, name: str = "train_seed1.log") -> Run:
    return inspect_logs.build_run(Path(name), text)


def write_log(folder: Path, text: str, name: str = "train_seed1.log") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def script(name: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
    """What a script prints, in a process of its own."""
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | variables, capture_output=True)


# ------------------------------------------------------------------------------------- the parser


def test_a_name_that_is_not_utf8_can_be_logged():
    assert train_gpt.log_text("data/o_\udcff") == "data/o_%FF"


def test_the_parser_is_the_inverse_of_the_writer(tmp_path, capsys):
    rng = random.Random(0)
    alphabet = "ab:,=%/\\ \t\n\r\x00\x1f\x85\u2028é漢🙂'\"#[]{}" + "none"
    for trial in range(100):
        texts = {
            f"k{i}": "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 12)))
            for i in range(rng.randint(1, 5))
        }
        numbers = [rng.uniform(-1, 1) * 10 ** rng.randint(-9, 9) for _ in range(3)]
        whole, name = rng.randint(-(10**12), 10**12), rng.choice(["", "event", "ttt_chunk"])
        log = train_gpt.Log(tmp_path / f"{trial}.txt")
        log.event(name, **texts, x=numbers[0], xs=numbers, n=whole)
        lines = (tmp_path / f"{trial}.txt").read_text(encoding="utf-8").splitlines()
        event = inspect_logs.parse_line(lines[0])
        assert len(lines) == 1, "a value must not break the line"
        assert event.name == name
        assert {key: event.pairs[key] for key in texts} == texts
        assert event.number("n") == whole
        assert event.number("x") == pytest.approx(numbers[0], rel=1e-5)
        assert event.numbers("xs") == pytest.approx(numbers, rel=1e-5)
    capsys.readouterr()


def test_a_complete_log_in_numbers():
    run = build(complete_log(3))
    assert (run.missing, run.problems, run.final, run.seed) == ([], [], "ttt", 3)
    found = inspect_logs.figures(run)
    # 5 of the 40 steps lie between two lines of different passes and belong to neither.
    assert [found[f"step_ms_{p}_passes"] for p in (1, 2, 3)] == pytest.approx([10, 20, 30])
    assert found["step_avg_ms"] == pytest.approx(17.5)
    assert found["ttt_gain_bpb"] == pytest.approx(-0.005)
    assert found["pre_quant_val_bpb"] == pytest.approx(2.04)
    assert (found["train_seconds"], found["eval_seconds"], found["steps"]) == (0.7, 300.5, 40)
    assert found["bytes_left"] == 16_000_000 - 15_900_000 - len(SCRIPT_TEXT)
    assert (found["passes_trained"], found["passes_scored"]) == (3, 3)


def test_passes_scored_are_those_of_the_line_then_of_the_settings():
    text = complete_log(3, eval_passes=2)
    assert build(text).passes_scored() == 2
    assert build(text.replace("epochs:57", "passes:4 epochs:57")).passes_scored() == 4
    early = text.replace("progressive_passes step:30 num_passes:3\n", "")
    assert inspect_logs.figures(build(early))["passes_trained"] == 2


def test_the_older_format_is_read_as_far_as_it_goes():
    run = build(OLDER_LOG)
    assert (run.seed, run.steps, run.train_seconds) == (1337, 6328, 600.078)
    assert run.step_ms() == pytest.approx({1: 83.51, 2: 111.9}, rel=1e-3)
    assert run.scores["pre_quant"].val_bpb == 1.1353
    assert run.scores["ttt"] == (1.88375543, 1.11566902, None, None)
    assert (run.bytes["total_bytes"], run.phases["evaluation"]) == (15939085, 565.6)
    assert run.all("ttt_chunk")[0].pairs["chunk"] == "11/1893"
    assert not run.problems
    assert [text for text in run.missing if "score" in text] == [
        "the quantized score (final_int6_roundtrip_exact)",
        "the sliding score (final_int6_sliding_window_exact)",
    ]


@pytest.mark.parametrize("text", [complete_log(3), OLDER_LOG], ids=["ours", "older"])
def test_a_cut_log_never_gives_a_number_that_the_whole_one_does_not(text):
    whole = build(text)
    for end in range(0, len(text), 17):
        run = build(text[:end])
        assert run.scores.items() <= whole.scores.items()
        assert run.bytes.items() <= whole.bytes.items()
        assert run.config.items() <= whole.config.items()
        assert run.missing
        assert not end or text[end - 1] == "\n" or "cut off" in run.problems[-1]


def test_damaged_logs_are_read_without_a_crash_and_reported(tmp_path):
    rng = random.Random(1)
    whole = complete_log(3) + complete_log(4)
    for trial in range(80):
        lines = whole.splitlines(keepends=trial % 2 == 0)
        rng.shuffle(lines)
        text = list("".join(lines[: rng.randint(1, len(lines))]))
        for _ in range(rng.randint(0, 60)):
            text[rng.randrange(len(text))] = rng.choice("0:,%\n \x00é-e./9")
        run = build("".join(text))
        assert run.missing or run.problems
        inspect_logs.plain_table(inspect_logs.table_rows([run, run]))
        json.dumps(inspect_logs.as_json([run], None))
    glued = complete_log(3).replace("\nstep:10/40", " step:10/40")
    assert "is damaged" in build(glued).problems[0]
    assert "several runs wrote" in " ".join(build(whole).problems)
    huge = complete_log(3).replace("tokens:62021845", "tokens:" + "9" * 5000)
    assert build(huge).scores["ttt"].tokens is None
    with pytest.raises(LogError, match="cannot be read"):
        inspect_logs.read_run(tmp_path)


KILLED = """\
progressive_passes step:0 num_passes:1
step:5/40 train_loss:2.5 train_bpb:1.5 train_time:50ms step_avg:1ms
step:10/40 train_loss:2.5 train_bpb:1.5 train_time:100ms step_avg:1ms
step:15/40 train_loss:2.5 train_bpb:1.5 train_time:150ms step_avg:1ms
step:20/40 train_loss:2.5 train_bpb:1.5 train_time:200ms step_avg:1ms
checkpoint step:20 path:x bytes:9
progressive_passes step:20 num_passes:2
step:25/40 train_loss:9.9 train_bpb:9.9 train_time:999ms step_avg:1ms
stop step:26 train_time:1000ms interrupted:1
final_int6_roundtrip_exact val_loss:9.9 val_bpb:9.9
"""


def resumed(checkpoint: int | None) -> str:
    """A run that was killed after step 25, then goes on from `checkpoint`."""
    text = complete_log(3, resume=True).replace(TRACE, "")
    header, training = text.split("progressive_passes step:0", 1)
    if checkpoint is None:
        return header + KILLED + "\n" + text
    lines = ("progressive_passes step:0" + training).splitlines(keepends=True)
    later = []
    for line in lines:
        match = re.match(r"(?:step|progressive_passes step):(\d+)", line)
        if not match or int(match[1]) > checkpoint - line.startswith("progressive"):
            later.append(line)
    again = f"{header}resume step:{checkpoint} train_time:1ms\n{''.join(later)}"
    return f"{header}{KILLED}step:26/40 cut with\n{again}"


def test_a_log_without_its_beginning_is_not_taken_for_an_older_one():
    text = complete_log(1)
    run = build(text[text.index("progressive_passes") :])
    assert not run.older_format
    assert "the run line" in run.missing


def test_what_is_no_log_is_refused_and_unlike_runs_are_told(tmp_path, capsys):
    prose = write_log(tmp_path, "some text\nof no run\n", "prose.txt")
    assert inspect_logs.main([prose]) == 2
    assert "no line of a run's log" in capsys.readouterr().err
    logs = [write_log(tmp_path, complete_log(1)), write_log(tmp_path, complete_log(2), "2.log")]
    assert inspect_logs.main(logs) == 0
    printed = capsys.readouterr().out
    assert " differ in " not in printed
    assert " mean " in printed
    fewer = complete_log(2, muon_wd=0.1).replace("step:30 num_passes:3", "step:30 num_passes:2")
    logs[1] = write_log(tmp_path, fewer, "2.log")
    assert inspect_logs.main(logs) == 0
    printed = capsys.readouterr().out
    assert " mean " not in printed
    assert "2.log differ in muon_wd (" in printed
    assert "the passes that they reached ([1, 2, 3], [1, 2, 2])" in printed


def test_a_run_that_a_signal_ended_is_no_whole_run(tmp_path, capsys):
    """Not by itself, and not as what others are compared with."""
    pytest.importorskip("scipy")
    logs = [write_log(tmp_path, complete_log(1)), write_log(tmp_path, complete_log(2), "2.log")]
    early = complete_log(3).replace("stop step:40 ", "stop step:40 interrupted:1 ")
    early = early.replace("fingerprint:00ff", "fingerprint:0bad")
    ended = write_log(tmp_path, early, "3.log")
    assert inspect_logs.main([ended, "--require-complete"]) == 1
    text = "3.log is missing: the rest of training, which a signal ended at step 40"
    assert text in capsys.readouterr().out
    assert inspect_logs.main([*logs, "--against", ended]) == 0
    said = capsys.readouterr().out
    assert "40, 40 steps, of 10.0 ms at first; the base " in said
    assert text in said
    assert inspect_logs.main([logs[0], ended]) == 0
    assert "3.log differ in train data (" in capsys.readouterr().out


@pytest.mark.parametrize("checkpoint", [20, 10, None])
def test_what_a_resumed_run_did_again_counts_once(checkpoint):
    """From checkpoints after steps 20 and 10, and from the start, there being none."""
    expected, run = build(complete_log(3).replace(TRACE, "")), build(resumed(checkpoint))
    assert (run.problems, run.missing) == ([], [])
    assert run.step_lines == expected.step_lines
    assert (run.growth, run.scores, run.steps) == (expected.growth, expected.scores, 40)
    assert run.step_ms() == expected.step_ms()
    ended_early = complete_log(3, resume=True).split("progressive_passes step:0")[0]
    again = resumed(checkpoint).replace(KILLED, KILLED + "\n" + ended_early)
    assert build(again).step_lines == expected.step_lines
    mixture = resumed(checkpoint).replace("resume value:True", "x value:1")
    assert "several runs wrote" in "".join(build(mixture).problems)


@pytest.mark.parametrize("ended_at", ["final_int6_sliding", "legal_ttt"])
def test_a_run_that_was_scored_when_it_was_resumed_is_complete(ended_at):
    whole = complete_log(3).replace(TRACE, "")
    header, training = complete_log(3, resume=True).split("progressive_passes step:0", 1)
    first = f"{whole.split(ended_at)[0]}failed text:stopped\n"
    scores = training[training.index("final_int6_roundtrip") :]
    expected, run = build(whole), build(f"{first}\n{header}{scores}")
    assert (run.problems, run.missing) == ([], [])
    assert (run.step_lines, run.scores) == (expected.step_lines, expected.scores)
    assert run.phases.keys() == expected.phases.keys()
    assert not run.all("failed")
    header = header.replace("fingerprint:00ff", "fingerprint:0bad")
    [problem] = build(f"{first}\n{header}{scores}").problems
    assert "another train data" in problem


def test_a_run_resumed_with_something_else_says_so():
    for old, new, text in (
        ("fingerprint:00ff", "fingerprint:0bad", "train data (shards:80 tokens:8000000000 fing"),
        ("data/t.model", "data/u.model", "tokenizer_path (data/t.model, data/u.model)"),
        (SCRIPT_SHA, "0" * 64, "another script"),
        ("world_size:8", "world_size:4", "another device"),
    ):
        first, second = resumed(20).split("\nrun ")
        [problem] = build(f"{first}\nrun {second.replace(old, new)}").problems
        assert "it was resumed with another" in problem
        assert text in problem


# -------------------------------------------------------------------------- table and comparison


def runs_with(bpbs: list[float]) -> list[Run]:
    runs = [build(complete_log(seed)) for seed in range(1, len(bpbs) + 1)]
    for run, bpb in zip(runs, bpbs, strict=True):
        run.scores["ttt"] = run.scores["ttt"]._replace(val_bpb=bpb)
    return runs


def test_comparisons_agree_with_scipy_on_the_raw_values():
    stats = pytest.importorskip("scipy.stats")
    ours, theirs = [1.10, 1.11, 1.09], [1.15, 1.13, 1.16, 1.14]
    found = inspect_logs.compare(
        runs_with(ours), inspect_logs.base_of_runs("base", runs_with(theirs))
    )
    expected = stats.ttest_ind(ours, theirs, equal_var=False)
    assert (found["t"], found["p"]) == pytest.approx((expected.statistic, expected.pvalue))
    assert found["p_lower"] == pytest.approx(expected.pvalue / 2)
    assert found["val_bpb"] == pytest.approx(-0.045)
    nats = -0.045 * 0.693147 * 151080891 / 62021845
    assert found["nats_per_token"] == pytest.approx(nats, rel=1e-5)
    single = inspect_logs.compare(runs_with(ours), Base("a figure", Spread(1.15, None, 1)))
    assert single["p"] == pytest.approx(stats.ttest_1samp(ours, 1.15).pvalue)
    assert "the base taken as exact" in single["test"]


def test_comparisons_say_why_there_is_none(monkeypatch):
    base = Base("base", Spread(1.2, 0.1, 3), 10, 20)
    assert "one seed" in inspect_logs.compare(runs_with([1.1]), base)["test"]
    assert "another text" in inspect_logs.compare(runs_with([1.1, 1.2]), base)["note"]
    assert "no value deviates" in inspect_logs.t_test([1.0, 1.0], Spread(1.0, 0.0, 2))[0]
    with pytest.raises(LogError, match="different evaluations"):
        inspect_logs.final_scores([*runs_with([1.1]), build(complete_log(3, ttt_enabled=False))])
    with pytest.raises(LogError, match="different validation texts"):
        inspect_logs.final_scores([*runs_with([1.1]), build(complete_log(3, text_bytes=7))])
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(LogError, match="pip install scipy"):
        inspect_logs.compare(runs_with([1.1, 1.2]), base)


def test_inspect_prints_what_is_asked(tmp_path, capsys):
    pytest.importorskip("scipy")
    paths = [write_log(tmp_path, complete_log(seed), f"{seed}.log") for seed in (1, 2, 3)]
    assert inspect_logs.main([*paths, "--require-complete", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["ttt_val_bpb"] for run in found["runs"]] == [2.01, 2.02, 2.03]
    assert found["spread"]["ttt_val_bpb"] == pytest.approx({"mean": 2.02, "std": 0.01, "n": 3})
    figure = ["--format", "markdown", "--against-figure", "2.5,0.01,3"]
    assert inspect_logs.main([*paths, *figure]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\| ttt val bpb \| 2.01000 .* 2.02000 \| 0.01000 \|", text)
    assert "-0.48000 bpb" in text
    write_log(tmp_path, complete_log(1).replace("legal_ttt_exact", "x"), "1.log")
    assert inspect_logs.main([*paths, "--require-complete"]) == 1
    assert "is missing: the ttt score" in capsys.readouterr().out
    assert inspect_logs.main([*paths, "--against", paths[0]]) == 2
    assert "no final score in" in capsys.readouterr().err


@pytest.mark.parametrize("figure", ["x", "1.1,2", "-1", "1.1,0.1,0", "1.1,-1,3", "1,1,1,1", "nan"])
def test_what_is_no_figure_is_refused(figure, capsys):
    with pytest.raises(SystemExit):
        inspect_logs.main(["x.log", f"--against-figure={figure}"])
    assert "is no figure" in capsys.readouterr().err


def test_baselines_need_no_test_time_training(corpus, tmp_path, capsys):
    """The demo's last table, of a run that skipped the evaluation's last part."""
    settings = corpus.settings | {"ttt_enabled": False, "sliding_eval": False}
    text = complete_log(1, text_bytes=900, **settings)
    text = re.sub("(?m)^(legal_ttt|final_int6_sliding|ttt_chunk).*\n", "", text)
    for split in ("train", "val"):
        count = len(inspect_logs.read_tokens(corpus.data_path, split))
        text = re.sub(
            f"split:{split} shards:\\d+ tokens:\\d+", f"split:{split} tokens:{count}", text
        )
    path = write_log(tmp_path, text)
    assert inspect_logs.main([path, "--baselines", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["baselines"]
    assert 0.5 < found["lzma"] < 8
    assert found["unigrams"] > 1
    changed = write_log(tmp_path, re.sub(r"split:val tokens:\d+", "split:val tokens:5", text))
    assert inspect_logs.main([changed, "--baselines"]) == 2
    assert "not those of the run any more" in capsys.readouterr().err
    for line in ("--baselines needs numpy", "--baselines: cannot read the data"):
        with pytest.MonkeyPatch.context() as patch:
            if "needs" in line:
                patch.setitem(sys.modules, "numpy", None)
            else:
                write_log(tmp_path, text.replace("tiny.model", "none.model"))
            assert inspect_logs.main([path, "--baselines"]) == 2
        assert line in capsys.readouterr().err


# -------------------------------------------------------------------------- terminals and pipes


def test_any_terminal_will_do(tmp_path):
    """One that cannot show the seed's file name, and one whose reader leaves early."""
    path = write_log(tmp_path, "run run_id:é\n", "模型.log")
    for encoding in ("ascii", "cp1252"):
        done = script("inspect_logs.py", path, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"??.log is missing" in done.stdout
    command = f"{sys.executable} {ROOT}/scripts/inspect_logs.py {path} --format json | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True
    )
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


def test_a_hangup_that_nohup_ignores_stays_ignored():
    code = (
        "import os, signal, inspect_logs\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "def main(argv):\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    return 7\n"
        "inspect_logs.run_command(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts")
    assert done.returncode == 7


@pytest.mark.parametrize("name", ["inspect_logs.py", "plot_logs.py", "record.py"])
def test_help_needs_no_package_and_no_utf8(name):
    command = [sys.executable, "-S", str(ROOT / "scripts" / name), "--help"]  # -S: no packages
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": ""}
    done = subprocess.run(command, env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"usage:" in done.stdout


# ------------------------------------------------------------------------------------- pictures


def test_pictures_are_drawn_from_what_a_log_has(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    scored = "validation step:{} val_loss:3 val_bpb:2 tokens:62021845 bytes:151080891\nstep:{}/"
    texts = [complete_log(1), complete_log(2, muon_wd=0.1)]  # two configurations
    for step in (10, 20):
        texts = [text.replace(f"step:{step}/", scored.format(step, step)) for text in texts]
    runs = [build(text, f"{i}.log") for i, text in enumerate(texts)]
    written, lacking = plot_logs.draw_all(runs, tmp_path / "one")
    assert {path.stem for path in written} == set(plot_logs.PICTURES)
    assert not lacking
    again, _ = plot_logs.draw_all(runs, tmp_path / "two")
    assert [p.read_bytes() for p in written] == [p.read_bytes() for p in again]
    assert plot_logs.draw_all([build("")], tmp_path / "none")[0] == []


def test_a_cut_log_among_others_costs_no_picture(tmp_path, capsys):
    """It ends before its first step, within its first phase, and before its scores."""
    pytest.importorskip("matplotlib")
    whole = write_log(tmp_path, complete_log(1))
    text = complete_log(2)
    for i, end in enumerate(("step:5/40", "step:10/40", "stop step")):
        cut = write_log(tmp_path, text[: text.index(end)] + "step:5/40 trai", f"cut{i}.log")
        assert plot_logs.main([cut, whole, "-o", str(tmp_path / "plots")]) == 0
        printed = capsys.readouterr().out
        one_configuration = end == "stop step"
        assert printed.count(".png\n") == len(plot_logs.PICTURES) - one_configuration
        assert f"{cut} is missing: " in printed


def test_growth_marks_are_each_runs_own(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    text = complete_log(2).replace("progressive_passes step:20", "progressive_passes step:22")
    figure = plot_logs.draw_step_time(plt, [build(complete_log(1)), build(text)])
    lines = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    marks = {(line.get_color(), line.get_xdata()[0]) for line in lines}
    first, second = plot_logs.COLOURS[:2]
    assert marks == {(first, 20), (first, 30), (second, 22), (second, 30)}


def test_configurations_are_told_by_their_passes_and_settings():
    flat = complete_log(1, num_passes=1)
    flat = re.sub("progressive_passes step:[^0].*\n", "", flat)
    runs = [build(complete_log(1)), build(flat), build(complete_log(2, muon_wd=0.1))]
    names = plot_logs.configurations(runs)
    assert [name.split(",")[0] for name in names[:2]] == ["passes 1 → 2 → 3", "passes 1"]
    assert names[2].startswith(names[0].split(",")[0])
    assert names[2].endswith("muon_wd=0.1")


def test_pictures_say_what_they_need(tmp_path, monkeypatch, capsys):
    nothing = write_log(tmp_path, "run run_id:x\n", "nothing.log")
    assert plot_logs.main([nothing, "-o", str(tmp_path)]) == 2
    assert "nothing to draw" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write_log(tmp_path, complete_log(1))
    assert plot_logs.main([path, "-o", str(tmp_path)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ TensorBoard


def read_board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each name below `folder`, as TensorBoard reads them."""
    board = event_accumulator.EventAccumulator(str(folder)).Reload()
    names = board.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in board.Scalars(name)] for name in names}


def test_tensorboard_shows_what_the_log_says(tmp_path):
    """The short lines of now: a step, then what its passes did; logs of one name stay apart."""
    text = re.sub(TRACE, "", complete_log(1))
    detail = "passes step:15 jacobian_proxy:0.5 growth:1.5,1.25 update:1,0.5 residual_scale:0.75"
    line = next(line for line in text.splitlines() if line.startswith("step:15/"))
    logs = [tmp_path / "a" / "x.log", tmp_path / "b" / "x.log"]
    for log in logs:
        log.parent.mkdir()
        log.write_text(text.replace(line, f"{line}\n{detail}"))
    board = tmp_path / "board"
    assert inspect_logs.main([*map(str, logs), "--tensorboard", str(board)]) == 0
    assert inspect_logs.main([*map(str, logs), "--tensorboard", "a\udcff"]) == 2
    shown = read_board(board / "a" / "x")
    assert shown == read_board(board / "b" / "x")
    assert shown["train/loss"] == [(step, 2.5) for step in range(5, 41, 5)]
    assert shown["train/ms_a_step"][0] == (5, pytest.approx(10))
    assert shown["train/ms_a_step"][-1] == (40, pytest.approx(30, rel=0.25))
    assert shown["passes/growth_1"] == [(15, 1.5)]
    assert shown["passes/growth_2"] == [(15, 1.25)]
    assert shown["passes/residual_scale_2"] == [(15, 0.75)]
    assert shown["scores/ttt"] == [(40, pytest.approx(build(text).scores["ttt"].val_bpb))]


def test_a_live_run_is_followed_to_its_end(tmp_path, monkeypatch):
    lines = complete_log(1).splitlines(keepends=True)
    log, half = tmp_path / "run.txt", len(lines) // 2
    log.write_text("".join(lines[:half]))
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        log.write_text("".join(lines[: half + 12 * len(waits)]))

    monkeypatch.setattr(inspect_logs.time, "sleep", wait)
    argv = [str(log), "--tensorboard", str(tmp_path / "board"), "--follow"]
    assert inspect_logs.main(argv) == 0
    assert waits
    shown = read_board(tmp_path / "board" / tmp_path.name / "run")
    assert [step for step, _ in shown["train/loss"]] == list(range(5, 41, 5))
