"""Any number of ranks gives the same run, and no failure loses it: kills, signals, full disks."""

import contextlib
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import METRICS, ROOT, Finished, Job, Lines, steps

sys.path.insert(0, str(ROOT / "scripts"))

import inspect_logs

import train_gpt
from train_gpt import Interrupts, Trainer, read_checkpoint

# Neither 2, 3 nor 8 ranks divide the banks' 5 and 10 rows, the batch's 7 sequences, the validation
# windows or the sequences of a chunk (7, in batches of 4).
SIZES = {
    "TRAIN_BATCH_TOKENS": "224", "MICRO_BATCH_TOKENS": "64", "TTT_CHUNK_TOKENS": "224",
    "ITERATIONS": "14", "LATE_QAT_THRESHOLD": "0.5", "TRAIN_LOG_EVERY": "1", "WARMUP_STEPS": "0",
    "EVAL_STRIDE": "16", "TTT_EPOCHS": "2", "SEED": "7",
}  # fmt: skip
TURNS = ("progressive_passes", "seq_len", "swa", "late_qat", "stop")


@pytest.fixture(scope="module")
def base(variables) -> dict[str, str]:
    return variables | SIZES


# ------------------------------------------------------- what a test changes in the program's ranks


def record_losses(path: str) -> None:
    """Every step's loss, unrounded, into a file."""
    log_step = Trainer.log_step

    def recorded(self, sums, *rest) -> None:
        nats = self.runtime.sum_(sums.clone())[0].item()
        if self.runtime.is_main:
            with Path(path).open("a") as file:
                file.write(f"{nats / self.hp.train_batch_tokens!r}\n")
        log_step(self, sums, *rest)

    Trainer.log_step = recorded


def signal_at(step: int, number: int, rank: int = 0) -> None:
    """One rank sends itself a signal as a step begins."""
    take_step = Trainer.take_step

    def signalled(self, progress):
        if self.step == step and self.runtime.rank == rank:
            os.kill(os.getpid(), number)
        return take_step(self, progress)

    Trainer.take_step = signalled


def signal_in(function: str, *numbers: int) -> None:
    """Signals while `export`, Trainer's `warm_up` or Evaluator's `run_ttt` runs."""
    owners = (train_gpt, Trainer, train_gpt.Evaluator)
    owner = next(owner for owner in owners if function in vars(owner))
    inner = getattr(owner, function)

    def signalled(*args):
        for number in numbers:
            os.kill(os.getpid(), number)
        return inner(*args)

    setattr(owner, function, signalled)


def die_while_writing(checkpoint: str) -> None:
    """SIGKILL in the middle of its bytes."""
    write_bytes = Path.write_bytes

    def cut(path: Path, data: bytes) -> int:
        if path.name.startswith(checkpoint):
            write_bytes(path, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write_bytes(path, data)

    Path.write_bytes = cut


def short_patience(step: int, rank: int) -> None:
    """One rank stops for ever, and the others wait but 2 s for it."""
    train_gpt.COLLECTIVE_TIMEOUT = timedelta(seconds=2)
    signal_at(step, signal.SIGSTOP, rank)


# --------------------------------------------------------------------------------- any world size


# Ranks sum in another order, and cautious weight decay turns last digits into a decision.
OTHER_RANKS = 1e-4


@pytest.fixture(scope="module")
def run_of(start, base, tmp_path_factory):
    """run_of(ranks) -> the undisturbed run on so many ranks and its unrounded losses, made once."""
    known = {}

    def get(ranks: int) -> tuple[Finished, list[float]]:
        if ranks not in known:
            path = tmp_path_factory.mktemp("losses") / "losses"
            prepare = (record_losses, str(path))
            done = start(base=base, ranks=ranks, prepare=prepare, RUN_ID="run").finish()
            assert done.code == 0, done.printed
            known[ranks] = done, [float(line) for line in path.read_text().split()]
        return known[ranks]

    return get


def turns(log: str) -> list[tuple[str, ...]]:
    """The steps at which a run changed: passes, SWA, QAT, stop."""
    return re.findall(rf"^({'|'.join(TURNS)}) step:(\d+)", log, re.MULTILINE)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_every_world_size_trains_and_scores_alike(run_of, ranks):
    (alone, expected), (shared, losses) = run_of(1), run_of(ranks)
    assert len(expected) == 14
    assert losses == pytest.approx(expected, rel=OTHER_RANKS)
    assert turns(shared.log("run")) == turns(alone.log("run"))
    assert {name for name, _ in turns(alone.log("run"))} == set(TURNS)
    for name, (_, bpb) in alone.metrics("run").items():
        assert float(shared.metrics("run")[name][1]) == pytest.approx(float(bpb), abs=1e-4), name
    assert shared.log("run").count("\nlegal_ttt_exact ") == 1, "one writer"


# ------------------------------------------------------------------------- kills and checkpoints


def log_of(folder: Path) -> str:
    return (folder / "run.txt").read_text()


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run.checkpoints").iterdir())


def same_run(done: Finished, expected: Finished) -> None:
    """Bit-identical weights, the same scores to the last digit, the same lines of steps."""
    assert done.code == 0, done.printed
    artifacts = [f.folder / "run.int6.xz" for f in (done, expected)]
    assert artifacts[0].read_bytes() == artifacts[1].read_bytes()
    assert done.metrics("run") == expected.metrics("run")
    # What a killed run had done after its checkpoint is done, and logged, again.
    rows = [{row["step"]: row for row in steps(f.log("run"))} for f in (done, expected)]
    assert rows[0] == rows[1]


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(start, base, run_of, tmp_path):
    """SIGKILL in the first step, later, while a checkpoint is written, and after training."""
    often = base | {"CHECKPOINT_SECONDS": "0.001", "RESUME": "1", "RUN_ID": "run"}

    def killed(prepare: tuple) -> None:
        assert start(base=often, folder=tmp_path, prepare=prepare).wait() == [-signal.SIGKILL]

    killed((signal_at, 0, signal.SIGKILL))
    assert not (tmp_path / "run.checkpoints").exists()
    killed((signal_at, 7, signal.SIGKILL))
    assert checkpoints(tmp_path) == ["step_00000006.pt", "step_00000007.pt"]
    killed((die_while_writing, "step_00000010"))
    assert checkpoints(tmp_path)[1:] == ["step_00000009.pt", "step_00000010.pt.tmp"]
    killed((signal_in, "export", signal.SIGKILL))
    done = start(base=often, folder=tmp_path).finish()
    assert re.findall(r"^resume step:(\d+)", done.log("run"), re.MULTILINE) == ["7", "9", "13"]
    assert checkpoints(tmp_path)[-2:] == ["step_00000012.pt", "step_00000013.pt"]
    same_run(done, run_of(1)[0])


@pytest.fixture(scope="module")
def half(start, base, tmp_path_factory) -> Path:
    """The folder of a run on one rank that SIGTERM stopped in step 7 of 14, with a checkpoint."""
    folder = tmp_path_factory.mktemp("half")
    stop = (signal_at, 6, signal.SIGTERM)
    done = start("--on-signal", "checkpoint", base=base, folder=folder, prepare=stop, RUN_ID="run",
                 CHECKPOINT_SECONDS="0.001").finish()  # fmt: skip
    assert done.code == 4, done.printed
    return folder


@pytest.fixture
def interrupted(half, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(half, tmp_path / "half"))


def stopped_at(log: str) -> int:
    """The step: a signal that came in step 7 ends it, or the one in which all ranks are told."""
    [step] = re.findall(r"^stop step:(\d+) .* interrupted:1\b", log, re.MULTILINE)
    assert step in ("7", "8")
    return int(step)


def test_a_signal_stops_at_the_next_step_with_a_checkpoint(half):
    step = stopped_at(log_of(half))
    assert checkpoints(half) == [f"step_{n:08d}.pt" for n in (step - 1, step)]
    assert not list(half.glob("*.xz"))


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_goes_on_on_any_number_of_ranks(interrupted, start, base, run_of, ranks):
    """Bit-identical on as many as before, within tolerance on others."""
    expected = run_of(1)[0]
    done = start("--resume", base=base, folder=interrupted, ranks=ranks, RUN_ID="run").finish()
    if ranks == 1:
        same_run(done, expected)
    assert done.code == 0, done.printed
    assert turns(done.log("run"))[-1] == ("stop", "14")
    for name, (_, bpb) in expected.metrics("run").items():
        assert float(done.metrics("run")[name][1]) == pytest.approx(float(bpb), abs=1e-4), name


def test_a_damaged_checkpoint_falls_back_to_the_one_before(interrupted, start, base, run_of):
    before, newest = sorted((interrupted / "run.checkpoints").iterdir())
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    done = start("--resume", base=base, folder=interrupted, RUN_ID="run").finish()
    assert f"\ncheckpoint_damaged path:{newest}\n" in done.log("run")
    assert f"\nresume step:{int(before.stem[5:])} " in done.log("run")
    same_run(done, run_of(1)[0])


def test_what_is_no_checkpoint_is_neither_used_nor_executed(interrupted, runtime, tmp_path):
    folder, log = interrupted / "run.checkpoints", Lines()
    newest = max(folder.iterdir())
    whole = newest.read_bytes()
    for step, data in enumerate((b"", whole[:31], whole[:-1], whole + b"x"), 9):
        (folder / f"step_{step:08d}.pt").write_bytes(data)
    (folder / "step_00000099.pt.tmp").write_bytes(whole)
    assert read_checkpoint(folder, runtime, log)["step"] == int(newest.stem[5:])
    assert [name for name, _ in log.events] == 4 * ["checkpoint_damaged"]
    evil, ran = io.BytesIO(), tmp_path / "ran"
    torch.save({"step": Execute(ran)}, evil)
    forged = hashlib.sha256(evil.getvalue()).digest() + evil.getvalue()
    (folder / "step_00000099.pt").write_bytes(forged)
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        read_checkpoint(folder, runtime, log)
    assert not ran.exists()
    assert read_checkpoint(tmp_path / "none", runtime, log) is None


class Execute:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("change", ["seed", "train data", "val data"])
def test_a_run_does_not_go_on_with_another_seed_or_other_data(
    interrupted, start, base, corpus, tmp_path, change
):
    """And the refusal costs nothing: with its own settings it still goes on."""
    changes = {"SEED": "8"}
    if change != "seed":
        shutil.copytree(corpus.data_path, tmp_path / "other")
        first, second = sorted((tmp_path / "other").glob(f"fineweb_{change.split()[0]}_*"))
        second.replace(first)
        changes = {"DATA_PATH": str(tmp_path / "other")}
    before = checkpoints(interrupted)
    done = start("--resume", base=base, folder=interrupted, RUN_ID="run", **changes).finish()
    assert done.code == 2
    text = r"error: resume: the checkpoint is of another run: ([\w ]+)=(\w+) \(was (\w+)\)"
    name, new, old = re.search(text, done.printed).groups()
    assert name == change
    assert new != old
    assert checkpoints(interrupted) == before
    assert steps(log_of(interrupted))


def test_what_training_does_not_depend_on_may_change(interrupted, start, base, run_of):
    done = start("--resume", "--eval-passes", "2", base=base, folder=interrupted, RUN_ID="run")
    done = done.finish()
    assert done.code == 0, done.printed
    assert {row["step"]: row for row in steps(done.log("run"))} == {
        row["step"]: row for row in steps(run_of(1)[0].log("run"))
    }
    assert " passes:2" in done.log("run").split("\nlegal_ttt_exact ")[1].splitlines()[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_that_is_there_is_overwritten(interrupted, start, base, run_of, tmp_path):
    """A finished run, with --resume or without; one with a checkpoint, or nothing but that."""
    finished = Path(shutil.copytree(run_of(1)[0].folder, tmp_path / "finished"))
    shutil.copytree(interrupted / "run.checkpoints", finished / "run.checkpoints")
    alone = Path(shutil.copytree(interrupted, tmp_path / "alone"))
    (alone / "run.txt").unlink()
    for folder, flags, advice in (
        (finished, ["--resume"], "--evaluate"),
        (finished, [], "choose another run_id"),
        (interrupted, [], "--resume"),
        (alone, [], "choose another run_id"),
    ):
        before = contents(folder)
        done = start(*flags, base=base, folder=folder, RUN_ID="run").finish()
        assert done.code == 2, done.printed
        assert advice in done.printed
        assert folder != finished or "--resume" not in done.printed, "no harmful advice"
        assert contents(folder) == before


def test_a_finished_run_whose_artifact_lies_elsewhere_is_not_resumed(start, base, run_of, tmp_path):
    """As after a full disk: the log tells that it is finished."""
    folder = Path(shutil.copytree(run_of(1)[0].folder, tmp_path / "finished"))
    [artifact] = folder.glob("*.int6.xz")
    run_id = artifact.name.removesuffix(".int6.xz")
    artifact.unlink()
    before = (folder / f"{run_id}.txt").read_bytes()
    done = start("--resume", base=base, folder=folder, RUN_ID=run_id).finish()
    assert done.code == 2
    assert "finished run, which is not resumed" in done.printed
    assert (folder / f"{run_id}.txt").read_bytes() == before


def test_a_run_that_a_signal_ended_goes_on_if_it_has_a_checkpoint(start, base, run_of, tmp_path):
    """Its artifact, of half the steps, stays until that of the whole run takes its place."""
    stop = (signal_at, 6, signal.SIGINT)
    often = base | {"CHECKPOINT_SECONDS": "0.001", "RUN_ID": "run"}
    assert start(base=often, folder=tmp_path, prepare=stop).finish().code == 5
    half = (tmp_path / "run.int6.xz").read_bytes()
    late = (signal_at, 9, signal.SIGKILL)
    start("--resume", base=often, folder=tmp_path, prepare=late).wait()
    assert (tmp_path / "run.int6.xz").read_bytes() == half
    same_run(start("--resume", base=often, folder=tmp_path).finish(), run_of(1)[0])
    assert start("--resume", base=often, folder=tmp_path).finish().code == 2, "it is finished"


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_that_ended_while_it_was_scored_is_scored_and_not_trained(start, base, run_of, ranks):
    stop = (signal_in, "run_ttt", signal.SIGTERM)
    job = start(base=base, ranks=ranks, prepare=stop, RUN_ID="run").finish()
    assert "--evaluate" in job.printed
    before, artifact = job.log("run"), (job.folder / "run.int6.xz").read_bytes()
    assert "legal_ttt_exact" not in before
    (job.folder / "run.txt").write_text(before.replace("fingerprint:", "fingerprint:0"))
    again = partial(start, "--resume", base=base, ranks=ranks, folder=job.folder, RUN_ID="run")
    other = again(SEED="8", XSA_LAST_N="0").finish()
    assert other.code == 2
    for text in ("seed=8 is not", "the model is not", "has other validation data"):
        assert text in other.printed
    (job.folder / "run.txt").write_text(before)
    done = again().finish()
    assert inspect_logs.build_run(Path("run.txt"), done.log("run")).problems == []
    assert (job.folder / "run.int6.xz").read_bytes() == artifact
    assert steps(done.log("run")) == steps(before)
    same_run(done, run_of(ranks)[0])


def test_a_run_that_a_signal_ended_without_a_checkpoint_stays(start, base, tmp_path):
    stop = (signal_at, 6, signal.SIGINT)
    assert start(base=base, folder=tmp_path, prepare=stop, RUN_ID="run").finish().code == 5
    before = contents(tmp_path)
    done = start("--resume", base=base, folder=tmp_path, RUN_ID="run").finish()
    assert (done.code, contents(tmp_path)) == (2, before)


def test_a_resumed_run_without_a_checkpoint_says_that_it_begins_anew(start, base, run_of, tmp_path):
    done = start("--resume", base=base, folder=tmp_path, RUN_ID="run").finish()
    assert "no%20whole%20checkpoint" in done.log("run")
    same_run(done, run_of(1)[0])


def test_a_second_process_cannot_join_a_run(start, base, run_of, tmp_path):
    """Nor does it disturb the first."""
    stop = (signal_at, 6, signal.SIGSTOP)
    job = start(base=base, folder=tmp_path, prepare=stop, RUN_ID="run")
    try:
        job.until("\nstep:6/")
        before = log_of(tmp_path)
        second = start("--resume", base=base, folder=tmp_path, RUN_ID="run").finish()
        assert second.code == 2
        assert "run.txt: wait for its end" in second.printed
        assert log_of(tmp_path) == before
        os.kill(job.ranks[0].pid, signal.SIGCONT)
        same_run(job.finish(), run_of(1)[0])
    finally:
        job.kill()


# ---------------------------------------------------------------------------- signals and deaths


@pytest.mark.parametrize(("number", "then"), [("SIGHUP", "export"), ("SIGTERM", "checkpoint")])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    start, base, run_of, tmp_path, number, then
):
    """What two ranks leave in a checkpoint, their momenta too, one rank takes over."""
    stop = (signal_at, 6, getattr(signal, number), 1)
    job = start("--on-signal", then, base=base, ranks=2, folder=tmp_path, prepare=stop,
                RUN_ID="run")  # fmt: skip
    done = job.finish()
    assert done.code == {"export": 5, "checkpoint": 4}[then], done.printed
    step = stopped_at(done.log("run"))
    assert set(done.metrics("run")) == (set(METRICS) if then == "export" else set())
    assert (tmp_path / "run.checkpoints").exists() == (then == "checkpoint")
    assert (tmp_path / "run.int6.xz").exists() == (then == "export")
    if then == "checkpoint":
        path = tmp_path / "losses"
        prepare = (record_losses, str(path))
        start("--resume", base=base, folder=tmp_path, prepare=prepare, RUN_ID="run").finish()
        losses = [float(line) for line in path.read_text().split()]
        assert losses == pytest.approx(run_of(1)[1][step:], rel=OTHER_RANKS)


def test_a_signal_in_the_warm_up_leaves_the_run_id_usable(start, base, tmp_path):
    stop = (signal_in, "warm_up", signal.SIGINT)
    done = start(base=base, folder=tmp_path, prepare=stop, RUN_ID="run").finish()
    assert done.code != 0
    assert "stopped by SIGINT" in done.printed
    assert "Traceback" not in done.printed
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_while_it_exports_ends_the_run_with_a_sentence(start, base, tmp_path):
    """The first one says what a second would do."""
    stop = (signal_in, "export", signal.SIGINT, signal.SIGINT)
    done = start(base=base, folder=tmp_path, prepare=stop, RUN_ID="run").finish()
    assert done.code not in (0, 4, 5)
    assert "\nSIGINT: the run exports and scores what it has; a second signal ends" in done.printed
    assert "stopped by SIGINT" in done.printed
    assert "Traceback" not in done.printed
    assert [path.name for path in tmp_path.iterdir()] == ["run.txt"], "the log of what it did"


def test_a_hangup_that_nohup_ignores_stays_ignored():
    """The other signals are taken."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        Interrupts().install()
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(SystemExit, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_a_background_job_that_ignores_ctrl_c_goes_on_ignoring_it():
    """As bash starts the jobs of a script."""
    program = """if True:
        import runpy, signal, sys
        sys.argv = ["train_gpt.py", "--help"]
        try:
            runpy.run_path("train_gpt.py", run_name="__main__")
        finally:
            print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)
    """
    ignoring = ["bash", "-c", "trap '' INT; exec \"$@\"", "bash", sys.executable, "-c", program]
    done = subprocess.run(ignoring, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("True\n"), done.stderr


def children(torchrun: int) -> dict[int, int]:
    """rank -> process of a torchrun on this machine."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError, StopIteration):
            status = path.with_name("status").read_text().splitlines()
            parent = next(line.split()[1] for line in status if line.startswith("PPid:"))
            variables = dict(v.split("=", 1) for v in path.read_text().split("\0") if "=" in v)
            if int(parent) == torchrun and "RANK" in variables:
                found[int(variables["RANK"])] = int(path.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_a_rank_that_dies_ends_the_job_with_its_reason(variables, tmp_path):
    endless = {"ITERATIONS": "none", "MAX_WALLCLOCK_SECONDS": "300", "RUN_ID": "run"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with (tmp_path / "printed").open("w") as printed:
        torchrun = subprocess.Popen(
            [*command, "train_gpt.py"], cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT,
            env=os.environ | variables | endless | {"OUTPUT_DIR": str(tmp_path)},
        )  # fmt: skip
    try:
        Job([], [], tmp_path, "run").until("\nstep:4 ")
        os.kill(children(torchrun.pid)[1], signal.SIGKILL)
        since = time.monotonic()
        assert torchrun.wait(60) != 0
        assert time.monotonic() - since < 30
    finally:
        torchrun.terminate()
    printed = (tmp_path / "printed").read_text()
    assert "rank      : 1" in printed
    assert "Signal 9 (SIGKILL)" in printed
    assert "\nfailed text:" in log_of(tmp_path)


def test_a_rank_that_hangs_does_not_keep_the_others(start, base, tmp_path):
    """Where no torchrun watches it: after the collectives' time limit, here 2 s."""
    stuck = (short_patience, 4, 1)
    job = start(base=base, ranks=2, folder=tmp_path, prepare=stuck, RUN_ID="run")
    job.ranks[0].join(30)
    code = job.ranks[0].exitcode
    job.kill()
    assert code == 1, job.outputs[0].read_text()
    assert re.search(r"^failed text:.*(Timed|timeout)", log_of(tmp_path), re.MULTILINE | re.I)


# ---------------------------------------------------------------------------------- full disks


def fill_disk(folder: str, fallback: str) -> None:
    """Whatever the run opens in `folder`, and its standard output, is on a full disk."""
    tempfile.tempdir = fallback
    open_path = Path.open

    def full(self, mode="r", *rest, **named):
        if str(self).startswith(folder) and "r" not in mode:
            self, mode = Path("/dev/full"), mode.replace("x", "w")
        return open_path(self, mode, *rest, **named)

    Path.open = full
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_loses_neither_the_run_nor_the_artifact(start, base, run_of, tmp_path):
    """Neither the log nor standard output nor a checkpoint nor the artifact can be written."""
    folder, fallback, losses = (tmp_path / name for name in ("logs", "fallback", "losses.npy"))
    fallback.mkdir()
    full = {"folder": folder, "prepare": (fill_disk, str(tmp_path / "lo"), str(fallback))}
    done = start("--token-losses", str(losses), base=base, RUN_ID="run",
                 CHECKPOINT_SECONDS="0.001", **full).finish()  # fmt: skip
    assert done.code == 0, done.printed
    assert "Traceback" not in done.printed
    [artifact] = fallback.glob("*/run.int6.xz")
    assert artifact.read_bytes() == (run_of(1)[0].folder / "run.int6.xz").read_bytes()
    assert list(fallback.glob("*/losses.npy"))
    assert not [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]


def test_the_place_of_a_rescued_file_is_told_on_standard_error(tmp_path, capfd, monkeypatch):
    """For the log and what standard output goes to may lie on the same full disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = train_gpt.write_or_rescue(tmp_path / "none" / "a.xz", b"kept", Lines())
    assert path.read_bytes() == b"kept"
    assert str(path) in capfd.readouterr().err


def test_weights_that_no_checkpoint_can_take_are_exported(start, base, tmp_path):
    """A signal asks for a checkpoint, and a file lies in the place of its folder."""
    (tmp_path / "run.checkpoints").write_text("kept")
    stop = (signal_at, 6, signal.SIGTERM, 1)
    done = start("--on-signal", "checkpoint", "--resume", base=base, ranks=2, folder=tmp_path,
                 prepare=stop, RUN_ID="run").finish()  # fmt: skip
    assert done.code == 5, done.printed
    assert "\ncheckpoint_failed path:" in done.log("run")
    assert set(done.metrics("run")) == set(METRICS)
    assert (tmp_path / "run.int6.xz").exists()


def test_a_disk_that_will_be_full_is_refused_at_the_start(start, base):
    done = start(base=base, ARTIFACT_LIMIT_BYTES=str(10**18), RUN_ID="run").finish()
    assert done.code == 2
    assert re.search(r"error: output_dir=\S+: .*10{18} bytes .*free", done.printed)
    assert not done.folder.exists()
