"""From a run to a record: the log's parser, minified code, seeds, statistics, records, refusals."""

import ast
import dataclasses
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import check_record
import inspect_logs
import minify
import package_record
import plot_logs
import record
import run_log
import seed_stats
import trainer_runs

import train_gpt

ROOT = Path(__file__).resolve().parents[1]

# ------------------------------------------------------------------------------------ the log


def written(tmp_path: Path, events: list[tuple[str, dict]]) -> str:
    """What the trainer's own writer makes of `events`."""
    path = tmp_path / f"{random.getrandbits(64):x}.txt"
    log = train_gpt.Log(path)
    log.open()
    for name, pairs in events:
        log.event(name, **pairs)
    return path.read_text(encoding="utf-8")


def random_text(rng: random.Random) -> str:
    alphabet = "ab:,=%/\\ \t\n\r\x00\x1f\x85\u2028é漢🙂'\"#[]{}" + "none"
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 12)))


def test_the_parser_is_the_inverse_of_the_writer(tmp_path, capsys):
    rng = random.Random(0)
    for _ in range(300):
        texts = {f"k{i}": random_text(rng) for i in range(rng.randint(1, 5))}
        numbers = [rng.uniform(-1, 1) * 10 ** rng.randint(-9, 9) for _ in range(3)]
        whole = rng.randint(-(10**12), 10**12)
        name = rng.choice(["", "event", "ttt_chunk"])
        text = written(tmp_path, [(name, texts | {"x": numbers[0], "xs": numbers, "n": whole})])
        lines = text.splitlines()
        event = run_log.parse_line(lines[0])
        assert len(lines) == 1, "a value must not break the line"
        assert event.name == name
        assert {key: event.pairs[key] for key in texts} == texts
        assert event.integer("n") == whole
        assert event.number("x") == pytest.approx(numbers[0], rel=1e-5)
        assert event.numbers("xs") == pytest.approx(numbers, rel=1e-5)
    capsys.readouterr()


SCRIPT_TEXT = 'import argparse\nargparse.ArgumentParser(description="a trainer").parse_args()\n'
SCRIPT_SHA = hashlib.sha256(SCRIPT_TEXT.encode()).hexdigest()


def complete_log(
    seed: int, *, best: float = 2.0, text_bytes: int = 151080891, **config: object
) -> str:
    """A log of 40 steps of 10, 20 and 30 ms with 1, 2 and 3 passes, as the trainer writes it.

    Its final bpb is `best` and 0.01 for each seed.
    """
    settings = {"seed": seed, "max_wallclock_seconds": 600.0, "data_path": "data/datasets/x"}
    settings |= {"tokenizer_path": "data/t.model", "sliding_eval": True, "ttt_enabled": True}
    bpb = best + seed % 7 / 100
    lines = [
        f"run run_id:train_seed{seed} started:20260102_030405",
        f"code name:train_gpt.py bytes:{len(SCRIPT_TEXT)} sha256:{SCRIPT_SHA}",
        "versions python:3.12.1 torch:2.9.1+cu128 cuda:12.8 numpy:2.3.5 sentencepiece:0.2.1",
        "device name:NVIDIA%20H100%2080GB%20HBM3 world_size:8 dtype:bfloat16",
        *(
            f"config name:{key} value:{train_gpt.log_text(value)} source:env"
            for key, value in (settings | config).items()
        ),
        "data split:train shards:80 tokens:8000000000 fingerprint:00ff",
        "data split:val shards:1 tokens:62021846 fingerprint:ff00",
        "model parameters:26700800 attention:sdpa compile:on",
        "phase name:warm_up seconds:30.5",
    ]
    clock = 0
    growth = {0: 1, 20: 2, 30: 3}
    for step in range(41):
        if step in growth:
            lines.append(
                f"progressive_passes step:{step} progress:{step / 40} num_passes:{growth[step]}"
            )
        if step and step % 5 == 0:
            lines.append(
                f"step:{step}/40 train_loss:2.5 train_bpb:1.5 train_time:{clock}ms step_avg:1ms"
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


def build(text: str, name: str = "train_seed1.log") -> run_log.Run:
    return run_log.build_run(Path(name), text)


def test_a_complete_log_in_numbers():
    run = build(complete_log(3))
    assert (run.missing, run.problems, run.final, run.seed, run.steps) == ([], [], "ttt", 3, 40)
    # 5 of the 40 steps lie between two lines of different phases and belong to neither.
    assert run.step_ms_by_passes() == pytest.approx({1: 10, 2: 20, 3: 30})
    assert run.step_avg_ms == pytest.approx(17.5)
    assert run.ttt_gain == pytest.approx(-0.005)
    assert run.scores["pre_quant"].val_bpb == pytest.approx(2.04)
    assert (run.train_seconds, run.eval_seconds) == (0.7, 300.5)
    summary = {key: spread.mean for key, spread in inspect_logs.summarize([run]).items()}
    assert summary["bytes_margin"] == 16_000_000 - 15_900_000 - len(SCRIPT_TEXT)


def test_the_older_format_is_read_as_far_as_it_goes():
    run = build(OLDER_LOG)
    assert (run.seed, run.steps, run.train_seconds) == (1337, 6328, 600.078)
    assert run.step_ms_by_passes() == pytest.approx({1: 83.51, 2: 111.9}, rel=1e-3)
    assert run.scores["pre_quant"].val_bpb == 1.1353
    assert run.scores["ttt"] == (1.88375543, 1.11566902, None, None, 565.6)
    assert run.bytes["total_bytes"] == 15939085
    assert run.all("ttt_chunk")[0].pairs == {
        "chunk": "11/1893",
        "val_bpb": "1.141819",
        "time": "3.5s",
    }
    assert not run.problems
    assert [text for text in run.missing if "score" in text] == [
        "the quantized score (final_int6_roundtrip_exact)",
        "the sliding score (final_int6_sliding_window_exact)",
    ]


@pytest.mark.parametrize("text", [complete_log(3), OLDER_LOG], ids=["ours", "older"])
def test_a_cut_log_never_gives_a_number_that_the_whole_one_does_not(text):
    whole = build(text)
    for end in range(0, len(text), 7):
        run = build(text[:end])
        assert run.scores.items() <= whole.scores.items()
        assert run.bytes.items() <= whole.bytes.items()
        assert run.missing
        assert run.config.items() <= whole.config.items()
        assert not end or text[end - 1] == "\n" or "cut off" in run.problems[-1]


def test_damaged_logs_are_read_without_a_crash_and_reported():
    rng = random.Random(1)
    whole = complete_log(3) + complete_log(4)
    for trial in range(150):
        lines = whole.splitlines(keepends=trial % 2 == 0)
        rng.shuffle(lines)
        text = list("".join(lines[: rng.randint(1, len(lines))]))
        for _ in range(rng.randint(0, 60)):
            text[rng.randrange(len(text))] = rng.choice("0:,%\n \x00é-e./")
        run = build("".join(text))
        assert run.missing or run.problems
        inspect_logs.plain_table(inspect_logs.table_rows([run, run]))
        json.dumps(inspect_logs.as_json([run], None))
        inspect_logs.gaps([run])
        with pytest.raises(record.RecordError):
            record.build_submission([run], IDENTITY, record.OPEN_TRACK, None)
    glued = complete_log(3).replace("\nstep:10/40", " step:10/40")
    assert "is damaged" in build(glued).problems[0]
    assert "2 runs wrote" in " ".join(build(whole).problems)


def killed_and_resumed(checkpoint: int | None, trained: str) -> str:
    """A run that was killed in `trained` lines of its training, then goes on from `checkpoint`."""
    text = complete_log(3, resume=True)
    header, training = text.split("progressive_passes step:0", 1)
    if checkpoint is None:
        return header + trained + "\n" + text
    lines = ("progressive_passes step:0" + training).splitlines(keepends=True)
    is_later = [
        line for line in lines
        if not (m := re.match(r"(?:step|progressive_passes step):(\d+)", line))
        or int(m[1]) > checkpoint - line.startswith("progressive")
    ]  # fmt: skip
    resumed = f"resume step:{checkpoint} train_time:1ms\n" + "".join(is_later)
    return header + trained + "\n" + header + resumed


KILLED = """\
progressive_passes step:0 progress:0 num_passes:1
step:5/40 train_loss:2.5 train_bpb:1.5 train_time:50ms step_avg:1ms
step:10/40 train_loss:2.5 train_bpb:1.5 train_time:100ms step_avg:1ms
step:15/40 train_loss:2.5 train_bpb:1.5 train_time:150ms step_avg:1ms
step:20/40 train_loss:2.5 train_bpb:1.5 train_time:200ms step_avg:1ms
checkpoint step:20 path:x bytes:9
progressive_passes step:20 progress:0.5 num_passes:2
step:25/40 train_loss:9.9 train_bpb:9.9 train_time:999ms step_avg:1ms
stop step:26 train_time:1000ms interrupted:1
final_int6_roundtrip_exact val_loss:9.9 val_bpb:9.9
"""


@pytest.mark.parametrize("checkpoint", [20, 10, None])
def test_what_a_resumed_run_did_again_counts_once(checkpoint):
    """From checkpoints after steps 20 and 10, and from the start, there being none."""
    expected, run = build(complete_log(3)), build(killed_and_resumed(checkpoint, KILLED))
    assert (run.problems, run.missing) == ([], [])
    assert run.steps_logged == expected.steps_logged
    assert (run.growth, run.scores, run.steps) == (expected.growth, expected.scores, 40)
    assert run.step_ms_by_passes() == expected.step_ms_by_passes()
    assert [e.step() for e in run.all("checkpoint")] == ([20] if checkpoint == 20 else [])
    ended_early = complete_log(3, resume=True).split("progressive_passes step:0")[0]
    again = build(killed_and_resumed(checkpoint, KILLED + "\n" + ended_early))
    assert again.steps_logged == expected.steps_logged
    mixture = killed_and_resumed(checkpoint, KILLED).replace("resume value:True", "x value:1")
    assert "2 runs wrote into this log" in "".join(build(mixture).problems)


def test_what_is_no_log_is_refused(tmp_path):
    with pytest.raises(run_log.LogError, match="cannot be read"):
        run_log.read_run(tmp_path / "none.log")
    with pytest.raises(run_log.LogError, match="cannot be read"):
        run_log.read_run(tmp_path)
    large = tmp_path / "large.log"
    with large.open("wb") as file:
        file.truncate(run_log.MAX_LOG_BYTES + 1)
    with pytest.raises(run_log.LogError, match="no log of a run"):
        run_log.read_run(large)


# --------------------------------------------------------------------------------- statistics


def runs_with(bpbs: list[float], first_seed: int = 1) -> list[run_log.Run]:
    runs = []
    for seed, bpb in enumerate(bpbs, first_seed):
        run = build(complete_log(seed))
        run.scores["ttt"] = run.scores["ttt"]._replace(val_bpb=bpb)
        runs.append(run)
    return runs


def test_comparisons_agree_with_scipy_on_the_raw_values():
    stats = pytest.importorskip("scipy.stats")
    ours, theirs = [1.10, 1.11, 1.09], [1.15, 1.13, 1.16, 1.14]
    base = seed_stats.base_of_runs("base", runs_with(theirs))
    found = seed_stats.compare(runs_with(ours), base)
    expected = stats.ttest_ind(ours, theirs, equal_var=False)
    assert (found.t, found.p) == pytest.approx((expected.statistic, expected.pvalue))
    assert found.p_lower == pytest.approx(expected.pvalue / 2)
    assert found.bpb == pytest.approx(-0.045)
    assert found.nats == pytest.approx(-0.045 * 0.693147 * 151080891 / 62021845, rel=1e-5)
    figure = seed_stats.Base("a figure", seed_stats.Spread(1.15, None, 1))
    single = seed_stats.compare(runs_with(ours), figure)
    assert single.p == pytest.approx(stats.ttest_1samp(ours, 1.15).pvalue)
    assert "the base taken as exact" in single.test
    assert "is not known to this script" in single.note


def test_comparisons_say_why_there_is_none(monkeypatch):
    base = seed_stats.Base("base", seed_stats.Spread(1.2, 0.1, 3), 10, 20)
    assert "one seed" in seed_stats.compare(runs_with([1.1]), base).test
    assert "no value deviates" in seed_stats.t_test([1.0, 1.0], seed_stats.Spread(1.0, 0.0, 2))[0]
    assert "another text" in seed_stats.compare(runs_with([1.1, 1.2]), base).note
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert "pip install scipy" in seed_stats.compare(runs_with([1.1, 1.2]), base).test
    other = build(complete_log(3, ttt_enabled=False))
    with pytest.raises(seed_stats.StatsError, match="different evaluations"):
        seed_stats.final_scores([*runs_with([1.1]), other])
    with pytest.raises(seed_stats.StatsError, match="different validation texts"):
        seed_stats.validation_text(
            [s.scores["ttt"] for s in runs_with([1.1])]
            + [runs_with([1.1])[0].scores["ttt"]._replace(bytes=5)]
        )


# ------------------------------------------------------------------- the whole way, with real runs


@pytest.fixture(scope="session")
def env_file(corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("env") / "tiny.env"
    data = {"DATA_PATH": corpus.data_path, "TOKENIZER_PATH": corpus.tokenizer_path}
    sizes = {"VOCAB_SIZE": corpus.vocab_size, "TTT_CHUNK_TOKENS": 256, "EVAL_BATCH_SEQS": 8}
    settings = trainer_runs.TINY_RUN | data | sizes
    path.write_text("# tiny\n" + "".join(f"{k}={v}\n" for k, v in settings.items()))
    return path


def run_seeds(env_file: Path, output: Path, *options: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts/run_seeds.sh"), "--env", str(env_file), "--nproc", "1"]
    return subprocess.run(
        [*command, "--output", str(output), *options],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )


def in_this_process(env: dict[str, str], *arguments: str) -> int:
    """The readable trainer, without the seconds that another interpreter needs to import torch."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, str(value))
        patch.setattr(sys, "argv", ["train_gpt.py", *arguments])
        return train_gpt.main()


def test_from_seeds_to_a_record(env_file, tmp_path, capsys):
    """The shipped form gives the same numbers; seeds resume; their record stands and reruns."""
    source, output = ROOT / "train_gpt.py", tmp_path / "seeds"
    code = minify.minify(source.read_text("utf-8"))
    shipped = output / "train_gpt.py"
    minify.write(shipped, minify.self_extracting(code))
    (output / "running").mkdir()
    (output / "train_seed5.log").write_text("a finished log")
    (output / "running" / "train_seed1337.txt").write_text("half a log")
    done = run_seeds(env_file, output, "--self-extracting", "--seeds", "5 1337")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished before" in done.stdout
    assert (output / "train_seed5.log").read_text() == "a finished log"
    assert [p.read_text() for p in (output / "interrupted").iterdir()] == ["half a log"]
    assert (output / "train_seed1337.int6.xz").is_file()
    (output / "train_seed5.log").unlink()

    env = trainer_runs.read_env_file(env_file)
    assert in_this_process(env | {"OUTPUT_DIR": tmp_path / "readable", "RUN_ID": "run"}) == 0
    expected = run_log.read_run(tmp_path / "readable" / "run.txt")
    run = run_log.read_run(output / "train_seed1337.log")
    assert run.scores["ttt"].val_bpb == expected.scores["ttt"].val_bpb

    parts = plot_logs.byte_parts(run)
    assert {"q_and_o", "k_and_v", "MLP_up", "MLP_down", "embedding", "all_else", "code"} == set(
        parts
    )
    assert sum(parts.values()) == pytest.approx(run.bytes["total_bytes"])

    folder = packaged(output, tmp_path / "records")
    score = run.scores["ttt"].val_bpb
    assert check_record.rerun(folder, env) == (
        [],
        f"rerun: val_bpb {score:.8f} on {env['DATA_PATH']}",
    )
    submission = json.loads((folder / "submission.json").read_text())
    assert (submission["val_bpb"], submission["std"]) == (score, None)
    assert not submission["leaderboard_comparable"]
    assert "Not a leaderboard figure" in (folder / "README.md").read_text()


def test_the_parser_knows_every_word_that_the_trainer_writes():
    calls = [
        n for n in ast.walk(ast.parse((ROOT / "train_gpt.py").read_text())) if type(n) is ast.Call
    ]
    calls = [n for n in calls if getattr(n.func, "attr", "") in ("event", "run", "report")]
    words = {n.args[0].value for n in calls if n.args and type(n.args[0]) is ast.Constant}
    assert {"attention_skipped", "legal_ttt_exact", "pre_quant_exact"} < words
    assert words <= run_log.KNOWN_EVENTS


def test_run_seeds_refuses_before_it_runs(env_file, tmp_path):
    for options, text in (
        (["--seeds", "1 x"], "'x' is no seed"),
        (["--seeds", ""], "--seeds is empty"),
        (["--nproc", "0"], "no number of processes"),
        (["--what"], "unknown option --what"),
        (["--env", str(tmp_path / "none")], "is missing"),
        (["--seeds", " "], "--seeds is empty"),
        (["--script", str(tmp_path)], "is no file"),
        (["--script", __file__, "--self-extracting"], "one of --script and --self-extracting"),
    ):
        done = run_seeds(env_file, tmp_path, *options)
        assert done.returncode == 2, options
        assert text in done.stderr
    (tmp_path / "train_seed1.log").write_text("of another script")
    (tmp_path / "train_gpt.py").write_text("pass")
    done = run_seeds(env_file, tmp_path, "--seeds", "2")
    assert "logs of another train_gpt.py" in done.stderr
    assert (tmp_path / "train_gpt.py").read_text() == "pass"
    with subprocess.Popen(["bash", "-c", "read -r # run_seeds.sh"], stdin=subprocess.PIPE) as other:
        (tmp_path / "running.pid").write_text(str(other.pid))
        assert "is in use by process" in run_seeds(env_file, tmp_path).stderr
        other.communicate(b"\n")


def test_run_seeds_runs_a_script_that_it_is_given(tmp_path):
    script, output = tmp_path / "mine.py", tmp_path / "seeds"
    script.write_text("raise SystemExit('it ran')")
    done = run_seeds(tmp_path / "mine.py", output, "--script", str(script))
    assert "it ran" in done.stderr
    assert "seed 1337: the run failed" in done.stderr
    assert (output / "train_gpt.py").read_text() == script.read_text()


def detached(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/detached.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_detached_command_is_followed_in_pieces(tmp_path):
    job, go = tmp_path / "a job", tmp_path / "go"
    program = f"echo one; until [ -e {go} ]; do sleep 0.1; done; printf two; exit 7"
    assert detached("start", job, "bash", "-c", program).returncode == 0
    time.sleep(0.5)
    first = detached("wait", job, 0.5)
    assert (first.stdout, first.returncode) == ("one\n", 75)
    assert "choose another folder" in detached("start", job, "true").stderr
    go.touch()
    rest = detached("wait", job)
    assert (rest.stdout, rest.returncode) == ("two", 7)


def test_a_detached_command_gets_the_signal_and_its_code_is_kept(tmp_path):
    job = tmp_path / "job"
    program = "trap 'exit 4' TERM; echo ready; while :; do sleep 0.1; done"
    detached("start", job, "bash", "-c", program)
    while (job / "output.txt").read_text() != "ready\n":
        time.sleep(0.05)
    assert detached("stop", job).returncode == 0
    assert detached("wait", job).returncode == 4
    assert "had ended" in detached("stop", job).stdout


def test_a_detached_command_that_vanished_is_not_mistaken_for_another(tmp_path):
    job = tmp_path / "job"
    detached("start", job, "sleep", 2)
    os.kill(int((job / "pid").read_text()), signal.SIGKILL)
    (job / "pid").write_text(f"{os.getpid()}\n")  # as if its number were in use again
    done = detached("wait", job, 60)
    assert (done.returncode, "without a trace" in done.stderr) == (1, True)
    assert detached("stop", job).returncode == 0


def test_detached_says_what_is_wrong(tmp_path):
    for arguments, text in (
        (("start", tmp_path / "a"), "no command"),
        (("start", tmp_path / "b", "no-such-command"), "no command no-such-command"),
        (("wait", tmp_path / "none"), "nothing was started"),
        (("wait", tmp_path / "none", "soon"), "no number of seconds"),
    ):
        done = detached(*arguments)
        assert (done.returncode, text in done.stderr) == (2, True)


# ------------------------------------------------------------------------------------- records

IDENTITY = record.Identity("A name: 2nd", "An Author", "author", "a recipe", "What it is.")


def packaged(source: Path, records: Path, **changes: object) -> Path:
    settings = {
        "identity": IDENTITY,
        "track": None,
        "base": None,
        "figures": [],
        "notes": "Nothing.",
    }
    return package_record.package(source, records=records, **(settings | changes))


@pytest.fixture
def source(tmp_path) -> Path:
    """What run_seeds.sh leaves behind, with three short logs and a script that only has --help."""
    folder = tmp_path / "seeds"
    folder.mkdir()
    (folder / "train_gpt.py").write_text(SCRIPT_TEXT)
    for seed in (1, 2, 3):
        (folder / f"train_seed{seed}.log").write_text(complete_log(seed))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_packaging_is_deterministic_and_follows_from_the_logs(source, tmp_path):
    base = seed_stats.Base("published", seed_stats.Spread(2.5, 0.01, 3))
    one = packaged(source, tmp_path / "a" / "records", base=base)
    for path in source.iterdir():
        os.utime(path, (1, 1))
    two = packaged(source, tmp_path / "b" / "records", base=base)
    assert contents(one.parents[1]) == contents(two.parents[1])
    assert two.relative_to(tmp_path) == Path("b/records/track_10min_16mb/2026-01-02_A_name_2nd")
    found = json.loads((one / "submission.json").read_text())
    assert found["val_bpb"] == pytest.approx(2.02)
    assert found["std"] == pytest.approx(0.01)
    assert found["seeds"] == [1, 2, 3]
    assert found["seed_results"]["2"]["sliding_val_bpb"] == pytest.approx(2.025)
    assert found["leaderboard_comparable"] is True
    assert found["hardware"] == "8x NVIDIA H100 80GB HBM3"
    assert found["comparison"]["val_bpb"] == pytest.approx(-0.48)
    logs = [f"train_seed{seed}.log" for seed in (1, 2, 3)]
    assert found["files"] == {
        name: hashlib.sha256((source / name).read_bytes()).hexdigest() for name in logs
    }
    assert check_record.check(one) == []
    with pytest.raises(record.RecordError, match="exists"):
        packaged(source, tmp_path / "a" / "records", base=base)
    assert packaged(source, tmp_path / "a" / "records", notes="New.", replace=True) == one
    assert "New." in (one / "README.md").read_text()
    assert [p.name for p in (tmp_path / "a" / "records").iterdir()] == ["track_10min_16mb"]


def edit(name: str, old: str, new: str):
    """A change of one file of a record; the text to change must be there."""

    def change(folder: Path) -> None:
        for path in sorted(folder.glob(name)):
            text = path.read_text()
            assert old in text
            path.write_text(text.replace(old, new))

    return change


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def put(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def rewrite(**options: object):
    """Other logs, complete and in agreement with themselves."""

    def change(folder: Path) -> None:
        for seed in (1, 2, 3):
            (folder / f"train_seed{seed}.log").write_text(complete_log(seed, **options))

    return change


def remove_logs(folder: Path) -> None:
    for path in folder.glob("*.log"):
        path.unlink()


def break_script(folder: Path) -> None:
    """A script that fails, of the same size, whose sum the logs give correctly."""
    text = "1 / 0".ljust(len(SCRIPT_TEXT) - 1) + "\n"
    (folder / "train_gpt.py").write_text(text)
    edit("*.log", SCRIPT_SHA, hashlib.sha256(text.encode()).hexdigest())(folder)


def duplicate_seed(folder: Path) -> None:
    shutil.copy(folder / "train_seed1.log", folder / "train_seed2.log")


REFUSALS = {
    "no README": (remove("README.md"), "README.md is missing"),
    "no submission": (remove("submission.json"), "submission.json is missing"),
    "no script": (remove("train_gpt.py"), "train_gpt.py is missing"),
    "no requirements": (remove("requirements.txt"), "requirements.txt is missing"),
    "no log": (remove_logs, "there is no train_seed<N>.log"),
    "stray file": (put("train_gpt_old.py", ""), "train_gpt_old.py does not belong"),
    "no JSON": (put("submission.json", "{"), "submission.json is no JSON"),
    "no object": (put("submission.json", "[]"), "submission.json is no JSON object"),
    "no author": (edit("submission.json", '"An Author"', "3"), "no text for author"),
    "unknown key": (edit("submission.json", '"score"', '"scorn"'), "scorn is unknown"),
    "missing key": (edit("submission.json", '"score"', '"scorn"'), "score is missing"),
    "other mean": (
        edit("submission.json", '"val_bpb": 2.02,', '"val_bpb": 2.01,'),
        "val_bpb is 2.01",
    ),
    "other deviation": (edit("submission.json", '"std": 0.01', '"std": 0.001'), "std is 0.001"),
    "other bytes": (
        edit("submission.json", '"bytes_total": 159', '"bytes_total": 158'),
        "bytes_total",
    ),
    "other date": (edit("submission.json", "2026-01-02", "2026-01-03"), "date is '2026-01-03'"),
    "other seeds": (
        edit("submission.json", '"seeds": [\n    1,', '"seeds": [\n    7,'),
        "seeds is [7, 2, 3], the logs give [1, 2, 3]",
    ),
    "other script": (put("train_gpt.py", SCRIPT_TEXT + "#"), "made by another script"),
    "bytes of code": (
        edit("train_seed1.log", f" bytes:{len(SCRIPT_TEXT)} ", " bytes:7 "),
        f"counts 7 bytes, train_gpt.py has {len(SCRIPT_TEXT)}",
    ),
    "script fails": (break_script, "does not start inside the record's folder"),
    "renamed log": (
        lambda folder: (folder / "train_seed1.log").rename(folder / "train_seed9.log"),
        "train_seed9.log is a run of seed 1",
    ),
    "seed twice": (duplicate_seed, "seed 1 is in more than one log"),
    "unfinished run": (edit("train_seed2.log", "legal_ttt_exact", "x"), "the run did not finish"),
    "cut log": (edit("train_seed2.log", "seconds:300.5\n", "seconds:300.5"), "is cut off"),
    "other settings": (
        edit("train_seed2.log", "value:data/t.model", "value:data/u.model"),
        "tokenizer_path",
    ),
    "other hardware": (
        edit("train_seed2.log", "world_size:8", "world_size:4"),
        "differ in hardware",
    ),
    "other versions": (edit("train_seed2.log", "numpy:2.3.5", "numpy:2.3.4"), "differ in versions"),
    "other data": (
        edit("train_seed2.log", "fingerprint:ff00", "fingerprint:ff01"),
        "differ in data",
    ),
    "wrong sum": (edit("train_seed1.log", " total_bytes:159", " total_bytes:158"), "are not the"),
    "over the limit": (
        edit(
            "train_seed3.log",
            f"model_bytes:15900000 total_bytes:{15900000 + len(SCRIPT_TEXT)}",
            f"model_bytes:16000000 total_bytes:{16000000 + len(SCRIPT_TEXT)}",
        ),
        "exceed 16,000,000",
    ),
    "over the clock": (
        edit(
            "train_seed1.log", "stop step:40 train_time:700ms", "stop step:40 train_time:600700ms"
        ),
        "its wall clock is 600 s",
    ),
    "ended by a signal": (
        edit("train_seed1.log", "stop step:40 ", "stop step:40 interrupted:1 "),
        "a signal ended its training early",
    ),
    "slow evaluation": (
        edit("train_seed1.log", "evaluation seconds:300.5", "evaluation seconds:600.1"),
        "evaluation took 600.1 s",
    ),
    "longer clock": (
        edit("*.log", "max_wallclock_seconds value:600", "max_wallclock_seconds value:700"),
        "at most 600",
    ),
    "no number": (
        edit("*.log", "max_wallclock_seconds value:600", "max_wallclock_seconds value:x"),
        "neither a number",
    ),
    "other hardware in all": (edit("*.log", "H100", "A100"), "for runs on FineWeb with 8 H100"),
    "other text in all": (rewrite(text_bytes=151_000_000), "for runs on FineWeb with 8 H100"),
    "unknown track": (
        edit("submission.json", "track_10min_16mb", "track_x"),
        "there is no track track_x",
    ),
    "two seeds": (remove("train_seed3.log"), "asks for 3 seeds, here are 2"),
    "no base": (
        edit("submission.json", '"comparison": null', '"comparison": {"base": 1}'),
        "names no base",
    ),
    "versions listed": (
        edit("requirements.txt", "numpy==2.3.5", "numpy"),
        "requirements.txt does not list",
    ),
    "a text in two lines": (
        edit("submission.json", '"What it is."', '"What it is.\\n\\n## Results"'),
        "more than a line for blurb",
    ),
    "a key twice": (
        edit("submission.json", '{\n  "name"', '{\n  "std": 0.001,\n  "name"'),
        "has a key twice",
    ),
    "no character": (edit("submission.json", "A name", "A \\ud800"), "is not laid out"),
    "no sums": (edit("submission.json", '"files"', '"sums"'), "submission.json has no files"),
    "a folder": (lambda folder: (folder / "x.png").mkdir(), "x.png is no file"),
}
STEP_LINE = "step:10/40 train_loss:2.5 train_bpb:1.5 train_time:100ms step_avg:1ms"
# What only the sums of logs and pictures tell.
CHANGED = {
    "log with CRLF": (edit("train_seed1.log", "\n", "\r\n"), "train_seed1.log was changed"),
    "step deleted": (edit("train_seed1.log", f"{STEP_LINE}\n", ""), "train_seed1.log was changed"),
    "other train_loss": (edit("train_seed2.log", "loss:2.5", "loss:2.4"), "seed2.log was changed"),
    "junk": (edit("train_seed3.log", "seconds:300.5\n", "seconds:300.5\n??\n"), "was changed"),
    "other picture": (put("loss.png", "other"), "loss.png was changed: its sha256 is"),
    "swapped pictures": (
        lambda folder: shutil.copy(folder / "loss.png", folder / "bytes.png"),
        "bytes.png was changed",
    ),
    "no picture": (remove("loss.png"), "loss.png is missing: submission.json lists it"),
    "one more picture": (put("more.png", ""), "more.png was not packaged"),
}
# What a log says of itself: (old, new) in the log of seed 1, and the reason.
CONTRADICTIONS = {
    "bpb": (" val_bpb:2.01000000 ", " val_bpb:2.01000002 ", "legal_ttt_exact has val_bpb:2.0"),
    "loss": ("pre_quant_exact val_loss:3", "pre_quant_exact val_loss:2", "quant_exact has val_bpb"),
    "tokens": ("tokens:62021846", "tokens:62021847", "tokens:62021845, not 1 less than data"),
    "no val": ("data split:val", "data split:x", "not 1 less than data split:val, tokens:None"),
    "no bytes": (" bytes:151080891 seconds:9.5 ep", " ep", "legal_ttt_exact lacks val_loss"),
    "two texts": ("80891 seconds:9.5 ep", "80892 seconds:9.5 ep", "scores are of different texts"),
    "chunk": ("20/20 val_bpb:2.01", "20/20 val_bpb:2.01001", "last ttt_chunk has val_bpb:2.01001"),
    "epochs": ("epochs:57/57", "epochs:58/57", "legal_ttt_exact has epochs:58/57"),
    "no epochs": ("epochs:57/57", "epochs:57", "legal_ttt_exact has epochs:57"),
    "step": ("step:40/40", "step:41/40", "a line is of step 41, training stopped after step 40"),
    "phase": ("passes step:30", "passes step:50", "a line is of step 50"),
    "clock": ("stop step:40 train_time:700ms", "stop step:40 train_time:699ms", "ended at 0.700 s"),
    "model": ("parameters:26700800", "parameters:26700801", "differ in model"),
    "two models": (
        "phase name:export",
        "model parameters:1 attention:sdpa compile:on\nphase name:export",
        "its model lines have parameters:1, 26700800",
    ),
}  # fmt: skip
# (old, new) in README.md, and what is said of the first line that differs.
README_CHANGES = {
    "title": ("# A name: 2nd", "# A name: 3rd", "line 1 has '# A name: 3rd', the logs give"),
    "headline": ("**val_bpb 2.02000", "**val_bpb 1.02000", "line 3 has '**val_bpb 1.02000"),
    "blurb": ("What it is.", "What it was.", "What it was.'"),
    "results": ("| 2.01000 |", "| 1.01000 |", "| 1.01000 |"),
    "times": ("| 10.00 | 20.00 |", "| 10.00 | 19.00 |", "| 10.00 | 19.00 |"),
    "row": ("| std |", "| deviation |", "line "),
    "command": ("SLIDING_EVAL=True", "SLIDING_EVAL=False", "SLIDING_EVAL=False"),
    "pictures": ("![loss](loss.png)\n", "", "the logs give '![loss](loss.png)'"),
    "other picture": ("](loss.png)", "](bytes.png)", "has '![loss](bytes.png)'"),
    "versions": ("- numpy: 2.3.5", "- numpy: 2.3.4", "has '- numpy: 2.3.4'"),
    "sha256": (SCRIPT_SHA, "0" * 64, "sha256 `000"),
    "section": ("## Data", "## Results\n\nval_bpb 1.0\n\n## Data", "has '## Results'"),
    "not checked": ("not checked.*", "checked.*", "words, checked.*"),
    "line ends": ("\n", "\r\n", "line 1 has '# A name: 2nd\\r'"),
    "cut": ("\n\nNothing.\n", "", "has '', the logs give ''"),
}  # fmt: skip


@pytest.fixture(scope="session")
def a_record(tmp_path_factory) -> Path:
    """A packaged record of the contest's track, with two pictures."""
    folder = tmp_path_factory.mktemp("packaged")
    figures = [folder / "loss.png", folder / "bytes.png"]
    for path in figures:
        path.write_text(path.name)
    (folder / "train_gpt.py").write_text(SCRIPT_TEXT)
    rewrite()(folder)
    return packaged(folder, folder / "records", figures=figures)


@pytest.fixture
def copied(a_record, tmp_path) -> Path:
    return Path(shutil.copytree(a_record, tmp_path / a_record.parent.name / a_record.name))


def test_a_record_stands(copied):
    assert check_record.check(copied) == []
    edit("README.md", "Nothing.", "## Notes\n\nare the author's own.")(copied)
    assert check_record.check(copied) == []


def test_a_test_that_cannot_be_repeated_is_believed(source, tmp_path, monkeypatch):
    """Without scipy only: t of one seed is none, whatever its submission.json says."""
    base = seed_stats.Base("published", seed_stats.Spread(2.5, 0.01, 3))
    folder = packaged(source, tmp_path / "three", base=base)
    for seed in (1, 2):
        (source / f"train_seed{seed}.log").unlink()
    single = packaged(source, tmp_path / "one", base=base)
    edit("submission.json", '"t": null', '"t": -9.0')(single)
    assert check_record.check(single) == [
        "submission.json: comparison.t is -9.0, the logs give None"
    ]
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert check_record.check(folder) == []


@pytest.mark.parametrize("case", REFUSALS)
def test_a_record_is_refused(case, copied):
    change, reason = REFUSALS[case]
    change(copied)
    assert reason in "\n".join(check_record.check(copied))


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_file_is_refused(case, copied):
    change, reason = CHANGED[case]
    change(copied)
    assert reason in check_record.check(copied)[0]


@pytest.mark.parametrize("case", README_CHANGES)
def test_a_changed_readme_is_refused(case, copied):
    old, new, reason = README_CHANGES[case]
    edit("README.md", old, new)(copied)
    [error] = check_record.check(copied)
    assert error.startswith("README.md: line ")
    assert reason in error


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_log_that_contradicts_itself_is_refused(case):
    """By packaging and by the check, which both ask build_submission."""
    old, new, reason = CONTRADICTIONS[case]
    text = complete_log(1)
    assert old in text
    runs = [build(text.replace(old, new)), build(complete_log(2), "train_seed2.log")]
    errors = list(record.consistency_errors(runs))
    assert reason in "\n".join(errors)
    assert all("train_seed1.log" in error for error in errors)


def test_what_cannot_be_packaged_leaves_nothing(source, tmp_path):
    records = tmp_path / "records"

    def refusal(**changes) -> str:
        with pytest.raises(record.RecordError) as error:
            packaged(source, records, **changes)
        return str(error.value)

    assert "figures are .png" in refusal(figures=[tmp_path / "x.png"])
    assert "figures are .png" in refusal(figures=[source / "train_gpt.py"])
    figures = [tmp_path / "x.png", source / "x.png"]
    for path in figures:
        path.touch()
    assert "two figures have one name" in refusal(figures=figures)
    (source / "train_gpt.py").write_text(SCRIPT_TEXT + "#")
    assert "made by another script" in refusal()
    (source / "train_gpt.py").write_text(SCRIPT_TEXT)
    edit("train_seed2.log", "final_int6_sliding_window_exact", "x")(source)
    assert "the sliding score" in refusal()
    for path in source.glob("*.log"):
        path.unlink()
    assert "has no train_seed<N>.log" in refusal()
    (source / "train_gpt.py").unlink()
    assert "has no train_gpt.py" in refusal()
    assert not contents(records)


def test_the_root_speaks_for_the_best_record(source, tmp_path, monkeypatch, capsys):
    """8 H100 on FineWeb before a CPU; on the same text the lower bpb; and the check sees drift."""
    records = tmp_path / "records"
    monkeypatch.setattr(check_record, "RECORDS", records)
    assert package_record.update_root(records) is None

    def add(name: str, *changes) -> Path:
        for change in changes:
            change(source)
        return packaged(source, records, identity=dataclasses.replace(IDENTITY, name=name))

    official = add("official")
    better = add("better", rewrite(best=1.0))
    on_cpu = add("on a CPU", rewrite(best=0.5), edit("*.log", "peak_memory_mib:21000", "x:1"))
    assert official.parent.name == better.parent.name == record.TEN_MINUTE_TRACK
    assert on_cpu.parent.name == record.OPEN_TRACK
    assert package_record.update_root(records) == better
    assert check_record.main(["--all"]) == 0
    root = json.loads((tmp_path / "submission.json").read_text())
    assert root["record"] == f"records/{record.TEN_MINUTE_TRACK}/{better.name}"
    assert "H100" in root["hardware"]
    edit("submission.json", '"val_bpb": 1.02', '"val_bpb": 1.01')(tmp_path)
    assert check_record.main(["--all"]) == 1
    assert "val_bpb is 1.01" in capsys.readouterr().out
    edit("submission.json", '"val_bpb": 1.02', '"val_bpb": 1.01')(better)
    assert check_record.main([str(better)]) == 1
    assert "refused" in capsys.readouterr().out


def test_the_demo_is_never_taken_for_the_contest(source, tmp_path):
    edit("*.log", "NVIDIA%20H100%2080GB%20HBM3 world_size:8", "x86_64%20x2 world_size:1")(source)
    edit("*.log", "peak_memory_mib:21000", "peak_memory_mib:0")(source)
    with pytest.raises(record.RecordError, match="for runs on FineWeb with 8 H100"):
        packaged(source, tmp_path / "records", track=record.TEN_MINUTE_TRACK)
    folder = packaged(source, tmp_path / "records")
    found = json.loads((folder / "submission.json").read_text())
    assert (found["track"], found["leaderboard_comparable"]) == (record.OPEN_TRACK, False)
    assert found["hardware"] == "CPU x86_64 x2, processes: 1"
    assert record.NOT_COMPARABLE in (folder / "README.md").read_text()


def test_the_run_command_repeats_the_settings():
    run = build(complete_log(3, feedback_mode="none", data_path="my data"))
    command = record.run_command(run, "train_gpt.py")
    assert "FEEDBACK_MODE=none" in command
    assert "DATA_PATH='my data'" in command
    assert command.endswith("torchrun --standalone --nproc_per_node=8 train_gpt.py")


# --------------------------------------------------------------------------------- commands


def test_inspect_prints_what_is_asked(source, capsys):
    logs = [str(path) for path in sorted(source.glob("*.log"))]
    assert inspect_logs.main([*logs, "--require-complete", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["ttt_val_bpb"] for run in found["runs"]] == [2.01, 2.02, 2.03]
    assert found["spread"]["ttt_val_bpb"] == pytest.approx({"mean": 2.02, "std": 0.01, "n": 3})
    assert inspect_logs.main([*logs, "--format", "markdown", "--against-figure", "2.5,0.01,3"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\| bpb quantized, TTT \| 2.01000 .* 2.02000 \| 0.01000 \|", text)
    assert "-0.48000 bpb" in text
    edit("train_seed1.log", "legal_ttt_exact", "x")(source)
    assert inspect_logs.main([*logs, "--require-complete"]) == 1
    assert "is missing: the ttt score" in capsys.readouterr().out
    assert inspect_logs.main([*logs, "--against", logs[0]]) == 2
    assert "no final score in" in capsys.readouterr().err


@pytest.mark.parametrize("figure", ["x", "1.1,2", "-1", "1.1,0.1,0", "1.1,-1,3", "1,1,1,1", "nan"])
def test_what_is_no_figure_is_refused(figure, source, capsys):
    with pytest.raises(SystemExit):
        inspect_logs.main([str(source / "train_seed1.log"), f"--against-figure={figure}"])
    assert "is no figure" in capsys.readouterr().err


def test_plots_are_drawn_from_what_a_log_has(source, tmp_path):
    pytest.importorskip("matplotlib")
    step = " growth:1.5,1.2 feedback_norm:0,0.1 residual_scale:0.5,0.4 train_time"
    edit("*.log", " train_time", step)(source)
    runs = run_log.read_runs(sorted(source.glob("*.log")))
    written, lacking = plot_logs.draw_all(runs, tmp_path / "one")
    assert {path.stem for path in written} == set(plot_logs.PICTURES)
    assert not lacking
    again, _ = plot_logs.draw_all(runs, tmp_path / "two")
    assert [p.read_bytes() for p in written] == [p.read_bytes() for p in again]
    text = complete_log(3)
    plot_logs.draw_all([build(text[: len(text) // 2])], tmp_path / "cut")
    assert plot_logs.draw_all([build("")], tmp_path / "cut")[0] == []


def test_plots_say_what_they_need(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot_logs.main([str(source / "train_seed1.log"), "-o", str(tmp_path)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_environment_files(tmp_path):
    path = tmp_path / "x.env"
    path.write_text("# comment\n\nITERATIONS=6\nDATA_PATH=data/x\nRUN='a b'\n")
    found = trainer_runs.read_env_file(path)
    assert found == {"ITERATIONS": "6", "DATA_PATH": str(ROOT / "data/x"), "RUN": "a b"}
    path.write_text("iterations 6\n")
    with pytest.raises(trainer_runs.RunError, match=r"x.env:1: 'iterations 6' is not KEY=value"):
        trainer_runs.read_env_file(path)


def test_a_script_that_hangs_or_fails_is_ended_with_its_last_words(tmp_path):
    script = tmp_path / "x.py"
    script.write_text(
        "import sys, time\nprint('out')\nif sys.argv[1:]: time.sleep(60)\nsys.exit('why')"
    )
    with pytest.raises(trainer_runs.RunError, match=r"ended with 1:\nout\nwhy"):
        trainer_runs.run_script(script, [], env={})
    with pytest.raises(trainer_runs.RunError, match="still running after"):
        trainer_runs.run_script(script, ["wait"], env={}, timeout=0.3)
