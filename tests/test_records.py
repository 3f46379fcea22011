"""From seeds to a record: packaging, what is refused, and the scripts that run the seeds."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, time_limit
from test_logs import SCRIPT_SHA, SCRIPT_TEXT, build, complete_log, resumed

sys.path.insert(0, str(ROOT / "scripts"))

import inspect_logs
import plot_logs
import record

WORDS = ["--author", "An Author", "--github-id", "author", "--blurb", "What it is."]
STEP_LINE = "step:10/40 train_loss:2.5 "


@pytest.fixture
def source(tmp_path) -> Path:
    """What run_seeds.sh leaves behind, with three short logs and a script that only has --help."""
    folder = tmp_path / "seeds"
    folder.mkdir()
    (folder / "train_gpt.py").write_text(SCRIPT_TEXT)
    for seed in (1, 2, 3):
        (folder / f"train_seed{seed}.log").write_text(complete_log(seed))
    return folder


def package(source: Path, records: Path, *options: str, name: str = "A name: 2nd") -> Path | None:
    """The record's folder, or None if it was refused."""
    before = set(records.glob("track_*/*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "RECORDS", records)
        code = record.main(["package", str(source), "--name", name, *WORDS, *options])
    new = set(records.glob("track_*/*")) - before
    assert bool(new) == (code == 0)
    return new.pop() if new else None


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------- packaging


def test_packaging_is_deterministic_and_follows_from_the_logs(source, tmp_path, capsys):
    pytest.importorskip("scipy")
    one = package(source, tmp_path / "a", "--against-figure", "2.5,0.01,3")
    two = package(source, tmp_path / "b", "--against-figure", "2.5,0.01,3")
    assert contents(one.parents[1]) == contents(two.parents[1])
    assert two.relative_to(tmp_path) == Path("b/track_10min_16mb/2026-01-02_A_name_2nd")
    found = json.loads((one / "submission.json").read_text())
    assert (found["val_bpb"], found["std"]) == pytest.approx((2.02, 0.01))
    assert (found["seeds"], found["remarks"]) == ([1, 2, 3], [])
    seed = found["seed_results"]["2"]
    assert (seed["val_bpb"], seed["sliding_val_bpb"]) == pytest.approx((2.02, 2.025))
    assert (seed["passes_trained"], seed["passes_scored"]) == (3, 3)
    assert found["leaderboard_comparable"] is True
    assert found["hardware"] == "8x NVIDIA H100 80GB HBM3"
    assert found["comparison"]["val_bpb"] == pytest.approx(-0.48)
    files = [path for path in one.iterdir() if path.suffix in (".log", ".png")]
    assert found["files"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    assert record.check(one) == []
    assert package(source, tmp_path / "a") is None
    assert "exists: choose another --name" in capsys.readouterr().err


def test_pictures_are_drawn_of_the_packaged_logs(source, tmp_path, monkeypatch, capsys):
    """Two seeds are left: no picture of three can get in. Without matplotlib there are none."""
    pytest.importorskip("matplotlib")
    (source / "train_seed3.log").unlink()
    (source / "loss.png").write_text("drawn from three seeds")
    folder = package(source, tmp_path / "records")
    assert (folder / "loss.png").read_bytes()[1:4] == b"PNG"
    assert "![step time](step_time.png)" in (folder / "README.md").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bare = package(source, tmp_path / "bare")
    assert not list(bare.glob("*.png"))
    assert "packaged without pictures" in capsys.readouterr().out
    assert record.check(folder) == record.check(bare) == []


def test_what_is_to_be_said_is_said_and_not_refused(source, tmp_path, capsys):
    """A slow last step after the clock, a resumed run, more passes than trained, a warning."""
    path = source / "train_seed1.log"
    slow = complete_log(1, max_wallclock_seconds=0.7, eval_passes=3)
    slow = slow.replace("progressive_passes step:30 num_passes:3\n", "")
    slow = slow.replace("train_time:700ms step_avg:17", "train_time:760ms step_avg:17")
    path.write_text(slow.replace("phase name:export", "warning text:no%20room\nphase name:export"))
    for seed in (2, 3):
        (source / f"train_seed{seed}.log").unlink()
    folder = package(source, tmp_path / "records")
    assert folder.parent.name == record.OPEN_TRACK
    remarks = json.loads((folder / "submission.json").read_text())["remarks"]
    printed, readme = capsys.readouterr().out, (folder / "README.md").read_text()
    assert len(remarks) == 3
    for text in (
        "seed 1: training took 0.760 s, 0.060 s more than its wall clock of 0.7 s: its last steps "
        "were slow (a lower --max-wallclock-seconds leaves room)",
        "seed 1: trained with 2 passes at the end, scored with 3",
        "seed 1: its log warns: no room",
    ):
        assert text in remarks
        assert f"note: {text}\n" in printed
        assert f"\n- {text}\n" in readme
    assert inspect_logs.main([str(path)]) == 0
    assert f"{path} warns: no room\n" in capsys.readouterr().out
    path.rename(source / "train_seed3.log").write_text(resumed(20))
    again = package(source, tmp_path / "again")
    assert "seed 3: interrupted, and resumed after step 20" in (again / "README.md").read_text()


def test_settings_are_compared_and_repeated_exactly(source, tmp_path, capsys):
    """Past the sixth digit, and with spaces."""
    values = {1: 0.02512341, 2: 0.02512344}
    (source / "train_seed3.log").unlink()
    for seed, value in values.items():
        text = complete_log(seed, matrix_lr=value, data_path="my data")
        (source / f"train_seed{seed}.log").write_text(text)
    assert package(source, tmp_path / "records") is None
    assert "differ in matrix_lr (0.02512341, 0.02512344)" in capsys.readouterr().err
    (source / "train_seed2.log").unlink()
    readme = (package(source, tmp_path / "records") / "README.md").read_text()
    assert "    MATRIX_LR=0.02512341 \\\n" in readme
    assert "    DATA_PATH='my data' \\\n" in readme
    assert "--nproc_per_node=8 records/track_non_record_16mb/2026-01-02_A_name_2nd/" in readme


def test_a_folder_whose_name_is_no_utf8_can_be_packaged(source, tmp_path):
    for seed in (1, 2, 3):
        text = complete_log(seed).replace("/x source", "/%FF source")
        (source / f"train_seed{seed}.log").write_text(text)
    assert record.check(package(source, tmp_path / "records")) == []


def test_what_cannot_be_packaged_leaves_nothing(source, tmp_path, capsys):
    records = tmp_path / "records"

    def refusal(*options: str, name: str = "x") -> str:
        assert package(source, records, *options, name=name) is None
        return capsys.readouterr().err

    assert "has no letter or digit of ASCII" in refusal(name="模型")
    assert "has no letter or digit of ASCII" in refusal(name="../..")
    assert "there is no text for name" in refusal(name=" ")
    assert "has more than a line" in refusal(name="a\nb")
    assert "or is no UTF-8" in refusal(name="a \udce9")
    assert refusal("--notes", str(tmp_path / "x.md")).endswith("x.md: No such file or directory\n")
    (tmp_path / "x.md").write_bytes(b"\xe9")
    assert "is no text in UTF-8" in refusal("--notes", str(tmp_path / "x.md"))
    (source / "train_seed2.log").write_text(complete_log(2).replace("fingerprint:00ff", "x:1"))
    assert "differ in train data" in refusal()
    (source / "train_seed2.log").write_text(complete_log(2).replace("train_gpt.py b", "x.py b"))
    (source / "train_gpt.py").write_text(SCRIPT_TEXT + "#")
    assert "made by another script" in refusal()
    for path in source.glob("*.log"):
        path.unlink()
    assert "has no train_seed<N>.log" in refusal()
    (source / "train_gpt.py").unlink()
    assert "has no train_gpt.py" in refusal()
    assert not contents(records)


def test_a_record_that_is_replaced_keeps_its_notes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORDS", tmp_path / "records")
    notes = tmp_path / "notes.md"
    for options, text in (
        (["--notes", str(notes)], "- what failed"),
        (["--replace"], "- what failed"),
        (["--replace", "--notes", str(notes)], "- later"),
    ):
        notes.write_text(text)
        assert record.main(["package", str(source), "--name", "A name", *WORDS, *options]) == 0
        [readme] = record.RECORDS.glob("*/*/README.md")
        assert readme.read_text().endswith(f"\n{text}\n")
        notes.write_text("- not asked for")


def test_the_demo_is_never_taken_for_the_contest(source, tmp_path, capsys):
    edit("*.log", "NVIDIA%20H100%2080GB%20HBM3 world_size:8", "x86_64%20x2 world_size:1")(source)
    edit("*.log", "peak_memory_mib:21000", "peak_memory_mib:0")(source)
    assert package(source, tmp_path / "records", "--track", record.TEN_MINUTE_TRACK) is None
    assert "for runs on FineWeb with 8 H100" in capsys.readouterr().err
    folder = package(source, tmp_path / "records")
    found = json.loads((folder / "submission.json").read_text())
    assert (found["track"], found["leaderboard_comparable"]) == (record.OPEN_TRACK, False)
    assert found["hardware"] == "CPU x86_64 x2, processes: 1"
    assert record.NOT_COMPARABLE in (folder / "README.md").read_text()
    assert "note: not on the contest's track: track_10min_16mb is for" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- refusals

Change = Callable[[Path], object]


def edit(name: str, old: str, new: str) -> Change:
    """A change of one file of a record; the text to change must be there."""

    def change(folder: Path) -> None:
        for path in sorted(folder.glob(name)):
            text = path.read_text()
            assert old in text
            path.write_text(text.replace(old, new))

    return change


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def put(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text)


def break_script(folder: Path) -> None:
    """A script that fails, of the same size, whose sum the logs give correctly."""
    text = "1 / 0".ljust(len(SCRIPT_TEXT) - 1) + "\n"
    (folder / "train_gpt.py").write_text(text)
    edit("*.log", SCRIPT_SHA, hashlib.sha256(text.encode()).hexdigest())(folder)


SUBMISSION, SEED2 = "submission.json", "train_seed2.log"
REFUSALS = {
    "no README": (remove("README.md"), "README.md is missing"),
    "no submission": (remove(SUBMISSION), "submission.json is missing"),
    "stray file": (put("train_gpt_old.py", ""), "train_gpt_old.py does not belong"),
    "a folder": (lambda folder: (folder / "x.png").mkdir(), "x.png is no file"),
    "no JSON": (put(SUBMISSION, "{"), "submission.json is no JSON"),
    "no object": (put(SUBMISSION, "[]"), "submission.json is no JSON object"),
    "deep JSON": (put(SUBMISSION, "[" * 99999), "submission.json is no JSON"),
    "no author": (edit(SUBMISSION, '"An Author"', "3"), "no text for author"),
    "a text in two lines": (edit(SUBMISSION, "it is.", "it\\n## is"), "more than a line"),
    "no base": (edit(SUBMISSION, 'n": null', 'n": {"base": 1}'), "names no base"),
    "unknown key": (edit(SUBMISSION, '"score"', '"scorn"'), '"scorn"'),
    "a key twice": (edit(SUBMISSION, '{\n  "name"', '{\n  "std": 1,\n  "name"'), "'  \"std\": 1,'"),
    "other mean": (edit(SUBMISSION, '"val_bpb": 2.02,', '"val_bpb": 2.01,'), '"val_bpb": 2.01,'),
    "other seeds": (edit(SUBMISSION, "[\n    1,", "[\n    7,"), "'    7,'"),
    "other date": (edit(SUBMISSION, "2026-01-02", "2026-01-03"), '"date": "2026-01-03"'),
    "no sums": (edit(SUBMISSION, '"files"', '"sums"'), '"sums"'),
    "unknown track": (edit(SUBMISSION, "track_10min_16mb", "track_x"), "no track track_x"),
    "other script": (put("train_gpt.py", SCRIPT_TEXT + "#"), "made by another script"),
    "script fails": (break_script, "does not start inside the record's folder"),
    "renamed log": (
        lambda folder: (folder / SEED2).rename(folder / "train_seed9.log"),
        "train_seed9.log is a run of seed 2",
    ),
    "seed twice": (
        lambda folder: shutil.copy(folder / "train_seed1.log", folder / SEED2),
        "seed 1 is in more than one log",
    ),
    "unfinished run": (edit(SEED2, "legal_ttt_exact", "x"), "the run did not finish"),
    "cut log": (edit(SEED2, "seconds:300.5\n", "seconds:300.5"), "is cut off"),
    "other settings": (edit(SEED2, "data/t.model", "data/u.model"), "differ in tokenizer_path"),
    "other hardware": (edit(SEED2, "world_size:8", "world_size:4"), "differ in device"),
    "other versions": (edit(SEED2, "numpy:2.3.5", "numpy:2.3.4"), "differ in versions"),
    "other passes": (edit(SEED2, "num_passes:3", "num_passes:2"), "differ in the passes that"),
    "other data": (edit(SEED2, "fingerprint:ff00", "fingerprint:ff01"), "differ in val data"),
    "more data": (put(SEED2, resumed(20).replace("t:00ff", "t:0b", 1)), "resumed with another"),
    "over the limit": (
        edit("*.log", f"model_bytes:15900000 total_bytes:{15900000 + len(SCRIPT_TEXT)}",
             f"model_bytes:16000000 total_bytes:{16000000 + len(SCRIPT_TEXT)}"),
        "exceed 16,000,000",
    ),
    "over the clock": (
        edit("*.log", "stop step:40 train_time:700ms", "stop step:40 train_time:600700ms"),
        "asks for at most 600 s of training",
    ),
    "slow evaluation": (edit(SEED2, "seconds:300.5", "seconds:600.1"), "evaluation took 600.1 s"),
    "other text": (edit("*.log", "H100", "A100"), "for runs on FineWeb with 8 H100"),
    "two seeds": (remove(SEED2), "asks for 3 seeds, here are 2"),
    "versions listed": (edit("requirements.txt", "numpy==2.3.5", "numpy"), "'numpy'"),
    "log with CRLF": (edit(SEED2, "\n", "\r\n"), '"train_seed2.log": "'),
    "step deleted": (edit(SEED2, STEP_LINE, "step:10/40 train_loss:2.4 "), '"train_seed2.log": "'),
    "junk": (edit(SEED2, STEP_LINE, f"??\n{STEP_LINE}"), "is damaged"),
    "other picture": (put("loss.png", "other"), "loss.png is not the file that was packaged"),
    "no picture": (remove("loss.png"), "loss.png is missing: it was packaged"),
    "one more picture": (put("more.png", ""), "more.png was not packaged"),
    "headline": (edit("README.md", "**val_bpb 2.02", "**val_bpb 1.02"), "**val_bpb 1.02"),
    "command": (edit("README.md", "L=True", "L=False"), "SLIDING_EVAL=False"),
    "section": (edit("README.md", "## Run", "## Results\n\n## Run"), "## Results"),
    "not checked": (edit("README.md", "not checked.*", "checked.*"), "words, checked.*"),
    "line ends": (edit("README.md", "\n", "\r\n"), "A name: 2nd\\r"),
}  # fmt: skip
# What a log says of itself: (old, new) in the log of seed 1, and the reason.
CONTRADICTIONS = {
    "bpb": (" val_bpb:2.01000000 ", " val_bpb:2.01000002 ", "legal_ttt_exact has val_bpb:2.0"),
    "loss": ("pre_quant_exact val_loss:3", "pre_quant_exact val_loss:2", "quant_exact has val_bpb"),
    "tokens": ("tokens:62021846", "tokens:62021847", "tokens:62021845, not 1 less than data"),
    "no bytes": (" bytes:151080891 seconds:9.5 ep", " ep", "legal_ttt_exact lacks val_loss"),
    "two texts": ("80891 seconds:9.5 ep", "80892 seconds:9.5 ep", "scores are of different texts"),
    "chunk": ("20/20 val_bpb:2.01", "20/20 val_bpb:2.0101", "last ttt_chunk has val_bpb:2.0101"),
    "epochs": ("epochs:57/57", "epochs:58/57", "legal_ttt_exact has epochs:58/57"),
    "step": ("step:40/40", "step:41/40", "a line is of step 41, training stopped after step 40"),
    "phase": ("passes step:30", "passes step:50", "a line is of step 50"),
    "clock that goes back": ("train_time:550ms", "train_time:5ms", "its clock went back"),
    "clock": ("stop step:40 train_time:700ms", "stop step:40 train_time:699ms", "ended at 0.700 s"),
    "signal": ("stop step:40 ", "stop step:40 interrupted:1 ", "a signal ended its training early"),
    "steps after the clock": ("seconds value:600.0", "seconds value:0.3", "its wall clock of 0.3"),
    "no clock": ("seconds value:600.0", "seconds value:x", "neither a number nor None"),
    "parts of the evaluation": ("evaluation seconds:300.5", "evaluation seconds:28.4", "took 28.5"),
    "no number": ("train_loss:", "train_loss:nan", "which is no measurement"),
    "before it began": ("training seconds:0.7", "training seconds:-0.7", "seconds:-0.7, which is"),
    "sum": (" total_bytes:159", " total_bytes:158", "code and model are not the 158"),
    "code": (f" bytes:{len(SCRIPT_TEXT)} sha", " bytes:7 sha", "it counts other bytes of code"),
    "two models": (
        "phase name:export",
        "model parameters:1 attention:sdpa compile:on\nphase name:export",
        "its model lines have parameters:1, 26700800",
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def a_record(tmp_path_factory) -> Path:
    """A packaged record of the contest's track."""
    folder = tmp_path_factory.mktemp("packaged")
    (folder / "train_gpt.py").write_text(SCRIPT_TEXT)
    for seed in (1, 2, 3):
        (folder / f"train_seed{seed}.log").write_text(complete_log(seed))
    return package(folder, folder / "records")


@pytest.fixture
def copied(a_record, tmp_path) -> Path:
    return Path(shutil.copytree(a_record, tmp_path / a_record.parent.name / a_record.name))


@pytest.mark.parametrize("case", REFUSALS)
def test_a_record_is_refused(case, copied):
    change, reason = REFUSALS[case]
    change(copied)
    assert reason in "\n".join(record.check(copied))


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_log_that_contradicts_itself_is_refused(case):
    """By packaging and by the check, which both ask log_errors."""
    old, new, reason = CONTRADICTIONS[case]
    text = complete_log(1)
    assert old in text
    errors = list(record.log_errors([build(text.replace(old, new))]))
    assert reason in "\n".join(errors)


def test_the_notes_are_the_authors_and_the_root_is_a_records(copied, monkeypatch, capsys):
    edit("README.md", "Nothing was", "## Notes\n\nwere")(copied)
    monkeypatch.setattr(record, "RECORDS", copied.parents[1] / "records")
    copied.parent.rename(copied.parents[1] / "moved")
    shutil.copytree(copied.parents[1] / "moved", record.RECORDS / copied.parent.name)
    root = record.RECORDS.parent / "submission.json"
    shutil.copy(copied.parents[1] / "moved" / copied.name / "submission.json", root)
    assert record.main(["check", "--all"]) == 0
    root.write_text(root.read_text().replace("2.02", "2.01"))
    assert record.main(["check", "--all"]) == 1
    assert "is no record's" in capsys.readouterr().out


# --------------------------------------------------------------------------- real runs, and signals

TINY = {
    "MAX_WALLCLOCK_SECONDS": "none", "ITERATIONS": 6, "WARMUP_STEPS": 1, "TRAIN_LOG_EVERY": 1,
    "MODEL_DIM": 32, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "VE_DIM": 8, "BIGRAM_DIM": 8,
    "TRAIN_SEQ_LEN": 32, "ROPE_DIMS": 4, "TRAIN_BATCH_TOKENS": 256, "EVAL_STRIDE": 16,
    "TTT_CHUNK_TOKENS": 256, "TTT_EPOCHS": 1, "EVAL_BATCH_SEQS": 8, "OMP_NUM_THREADS": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def env_file(corpus, tmp_path_factory) -> Path:
    """A tiny run's settings, with the line ends of Windows."""
    data = {"DATA_PATH": corpus.data_path, "TOKENIZER_PATH": f'"{corpus.tokenizer_path}"'}
    settings = TINY | data | {"VOCAB_SIZE": corpus.vocab_size}
    path = tmp_path_factory.mktemp("env") / "tiny.env"
    text = "# tiny\n" + "".join(f"{key}={value}\n" for key, value in settings.items())
    path.write_bytes(text.replace("\n", "\r\n").encode())
    return path


def run_seeds(env_file: Path, output: Path, *options: str, **popen) -> subprocess.Popen:
    command = ["bash", str(ROOT / "scripts/run_seeds.sh"), "--env", str(env_file), "--nproc", "1"]
    return subprocess.Popen(
        [*command, "--output", str(output), *options],
        env=os.environ | {"PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **popen,
    )


def test_from_seeds_to_a_record(env_file, tmp_path, capsys):
    """Finished seeds stay; an interrupted one is kept aside; the record stands and reruns."""
    output = tmp_path / "seeds"
    (output / "running").mkdir(parents=True)
    shutil.copy(ROOT / "train_gpt.py", output)
    (output / "train_seed5.log").write_text("run run_id:five\n")
    (output / "running" / "train_seed1337.txt").write_text("half a log")
    options = ["--script", str(ROOT / "train_gpt.py"), "--seeds", "5 1337"]
    process = run_seeds(env_file, output, *options)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert "finished before" in printed
    assert (output / "train_seed5.log").read_text() == "run run_id:five\n"
    assert [p.read_text() for p in (output / "interrupted").iterdir()] == ["half a log"]
    (output / "train_seed5.log").unlink()
    [run] = record.read_logs(output)
    parts = plot_logs.byte_parts(run)
    assert {"q and o", "k and v", "MLP up", "MLP down", "embedding", "all else", "code"} == {*parts}
    assert sum(parts.values()) == pytest.approx(run.bytes["total_bytes"])
    folder = package(output, tmp_path / "records")
    found = json.loads((folder / "submission.json").read_text())
    assert not found["leaderboard_comparable"]
    assert record.main(["check", str(folder), "--rerun", "--env", str(env_file)]) == 0
    assert f"rerun: val_bpb {found['val_bpb']:.8f} on" in capsys.readouterr().out
    printed, _ = run_seeds(env_file, output, *options, "--", "--matrix-lr", "0.5").communicate()
    assert "has runs of other settings: <  > --matrix-lr 0.5" in printed
    (output / "train_seed1337.log").rename(output / "running" / "train_seed1337.txt")
    (output / "train_seed1337.int6.xz").rename(output / "running" / "train_seed1337.int6.xz")
    (output / "running" / "train_seed1337.checkpoints").mkdir()
    printed, _ = run_seeds(env_file, output, *options).communicate()
    assert "seed 1337: finished by itself" in printed
    assert not any((output / "running").iterdir())
    edit("train_seed1337.log", "seed1337", "seed1")(output)
    (output / "train_seed1337.log").rename(output / "gone")
    printed, _ = run_seeds(env_file, output, *options).communicate()
    assert "train_seed1337.int6.xz is there without its log" in printed


def test_an_interrupted_seed_goes_on_or_runs_again(env_file, tmp_path):
    """From its checkpoint; without one the half run, which was exported, is kept aside."""
    output, log = tmp_path / "seeds", tmp_path / "seeds" / "running" / "train_seed7.txt"
    flags = ["--on-signal", "checkpoint", "--iterations", "300", "--train-log-every", "10"]
    options = ["--script", str(ROOT / "train_gpt.py"), "--seeds", "7", "--", *flags]
    with time_limit(60):
        process = run_seeds(env_file, output, *options)
        while not (log.exists() and "\nstep:20/" in log.read_text()):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert "goes on at this seed, from its last checkpoint" in process.communicate()[0]
        assert process.returncode == 130
        printed, _ = run_seeds(env_file, output, *options).communicate()
    assert "\nresume step:" in printed
    done = output / "train_seed7.log"
    whole = done.read_text()
    assert "stop step:300 " in whole
    log.write_text(whole.replace("interrupted:0", "interrupted:1"))
    done.unlink()
    (output / "train_seed7.int6.xz").rename(log.with_name("train_seed7.int6.xz"))
    printed, _ = run_seeds(env_file, output, *options).communicate()
    assert "finished by itself" not in printed
    assert {path.suffix for path in (output / "interrupted").iterdir()} == {".txt", ".xz"}
    assert "\nresume step:" not in done.read_text()


def test_run_seeds_refuses_before_it_runs(env_file, tmp_path):
    for options, text in (
        (["--seeds", "1 x"], "'x' is no seed"),
        (["--seeds", "7 007"], "'007' is no seed"),
        (["--seeds", " "], "--seeds is empty"),
        (["--nproc", "0"], "no number of processes"),
        (["--what"], "unknown option --what"),
        (["--env", str(tmp_path / "none")], "is missing"),
        (["--script", __file__, "--self-extracting"], "one of --script and --self-extracting"),
        (["--", "--run-id", "x"], "run_id is set by run_seeds.sh"),
        (["--", "--resume"], "resume is set by run_seeds.sh"),
        (["--", "--matrix-lr", "x"], "matrix_lr=x (flag) is no float"),
    ):
        process = run_seeds(env_file, tmp_path, *options)
        assert text in process.communicate()[0]
        assert process.returncode == 2
    (tmp_path / "train_seed1.log").write_text("of another script")
    (tmp_path / "train_gpt.py").write_text("pass")
    printed, _ = run_seeds(env_file, tmp_path, "--seeds", "2", "--script", __file__).communicate()
    assert "runs of another train_gpt.py" in printed
    assert (tmp_path / "train_gpt.py").read_text() == "pass"
    with subprocess.Popen(["bash", "-c", "read -r # run_seeds.sh"], stdin=subprocess.PIPE) as other:
        (tmp_path / "running.pid").write_text(str(other.pid))
        assert "is in use by process" in run_seeds(env_file, tmp_path).communicate()[0]
        other.communicate(b"\n")


SLEEPER = """\
import os, pathlib, sys, time
if "--help" not in sys.argv:
    pathlib.Path({path!r}).write_text(str(os.getpid()))
    time.sleep(60)
"""


def wait_for(path: Path) -> int:
    """The process id that a sleeping script has written."""
    while not (path.exists() and path.read_text()):
        time.sleep(0.05)
    return int(path.read_text())


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGINT, 2), (signal.SIGHUP, 1)])
def test_a_terminals_signal_does_not_reach_the_run_twice(number, ranks, env_file, tmp_path):
    """Ctrl-C and a hangup go to a whole group; the run is not in it, and is told by the script."""
    script, started = tmp_path / "mine.py", tmp_path / "pid"
    script.write_text(SLEEPER.format(path=str(started)))
    options = ("--seeds", "1", "--script", str(script), "--nproc", str(ranks))
    with time_limit(40):
        process = run_seeds(env_file, tmp_path / "out", *options, start_new_session=True)
        pid = wait_for(started)
        assert os.getpgid(pid) != os.getpgid(process.pid)
        os.killpg(process.pid, number)
        process.communicate()
        assert ended(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_run_seeds_ends_its_run_and_nothing_else(number, env_file, tmp_path):
    script, started = tmp_path / "mine.py", tmp_path / "pid"
    script.write_text(SLEEPER.format(path=str(started)))
    with subprocess.Popen(["sleep", "60"]) as other, time_limit(40):
        process = run_seeds(env_file, tmp_path / "seeds", "--script", str(script))
        pid = wait_for(started)
        process.send_signal(number)
        process.communicate()
        assert process.returncode == 128 + number
        assert ended(pid)
        assert not (tmp_path / "seeds" / "running.pid").exists()
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_a_rerun_ends_its_trainer(number, source, env_file, tmp_path):
    started = tmp_path / "pid"
    text = SLEEPER.format(path=str(started))
    (source / "train_gpt.py").write_text(text)
    edit("*.log", SCRIPT_SHA, hashlib.sha256(text.encode()).hexdigest())(source)
    total, new = 15900000 + len(SCRIPT_TEXT), 15900000 + len(text)
    edit("*.log", f"total_bytes:{total}", f"total_bytes:{new}")(source)
    edit("*.log", f"bytes:{len(SCRIPT_TEXT)} ", f"bytes:{len(text)} ")(source)
    folder = package(source, tmp_path / "records")
    command = [sys.executable, str(ROOT / "scripts/record.py"), "check", str(folder), "--rerun"]
    with time_limit(40):
        process = subprocess.Popen([*command, "--env", str(env_file)], stdout=subprocess.PIPE)
        pid = wait_for(started)
        process.send_signal(number)
        process.communicate()
        assert process.returncode == 128 + number
        assert ended(pid)


def test_files_of_settings_are_read_alike_by_shell_and_python(env_file, corpus):
    """CRLF leaves no carriage return in a path, and a variable that is set wins (the shell's)."""
    program = f"source {ROOT}/scripts/environment.sh; ITERATIONS=9; read_env {env_file}; env -0"
    done = subprocess.run(
        ["bash", "-ec", f"export ITERATIONS; {program}"], capture_output=True, check=True
    )
    found = dict(pair.split("=", 1) for pair in done.stdout.decode().split("\0") if "=" in pair)
    assert found["DATA_PATH"] == str(corpus.data_path)
    assert found["TOKENIZER_PATH"] == str(corpus.tokenizer_path)
    assert (found["ITERATIONS"], found["MODEL_DIM"]) == ("9", "32")
    env = record.read_env(env_file)
    assert env["TOKENIZER_PATH"] == str(corpus.tokenizer_path)
    assert (env["ITERATIONS"], env["VOCAB_SIZE"]) == ("6", str(corpus.vocab_size))
    with pytest.raises(record.RecordError, match="cannot be read"):
        record.read_env(env_file.parent)
    foreign = env_file.with_name("foreign.env")
    foreign.write_bytes("\ufeff# a comment\nSEED 5\n".encode())
    with pytest.raises(record.RecordError, match="SEED 5"):
        record.read_env(foreign)
    program = program.replace(str(env_file), str(foreign))
    done = subprocess.run(["bash", "-ec", program], capture_output=True, text=True)
    assert (done.returncode, "SEED 5" in done.stderr) == (2, True)


def test_a_base_of_several_seeds_is_compared_alike_by_package_and_check(tmp_path):
    """Means of logs have more digits than submission.json keeps."""
    runs = [inspect_logs.build_run(Path("train_seed1.log"), complete_log(1))]
    identity = {"name": "x", "author": "a", "github_id": "b", "blurb": "c"}
    for best in (2.0001234567, 2.00098765432, 1.99999999):
        others = [
            inspect_logs.build_run(Path(f"train_seed{seed}.log"), complete_log(seed, best=best))
            for seed in (1, 2, 4)
        ]
        base = inspect_logs.base_of_runs("others", others)
        first = record.build_submission(runs, identity, None, base)
        again = record.build_submission(runs, identity, None, record.base_in(first))
        assert first == again
