"""Runs a command that outlives its shell, such as a long run on a machine whose line may drop.

    python scripts/detached.py start logs/job bash scripts/run_seeds.sh --output logs/seeds
    python scripts/detached.py wait logs/job 300     prints what is new, for at most 300 s
    python scripts/detached.py stop logs/job         SIGTERM to the command

`start` makes the folder and returns at once. `wait`, without seconds, follows the command to its
end, goes on where the `wait` before it ended, and returns the command's exit code (128 + the number
of a signal that ended it), 75 while it still runs, and 1 if the machine or somebody ended it
without a trace. output.txt has all that it printed, exit_code its end.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

STILL_RUNNING, LOST = 75, 1


class JobError(ValueError):
    """A mistake in what was asked; the text names the value and the remedy."""


def start(job: Path, command: list[str]) -> None:
    """Raises JobError if the folder exists or the command does not."""
    if not command:
        raise JobError("start: no command is given")
    if shutil.which(command[0]) is None:
        raise JobError(f"start: there is no command {command[0]}")
    try:
        job.mkdir(parents=True)
    except OSError as error:
        raise JobError(f"{job}: {error.strerror}: choose another folder") from None
    with (job / "output.txt").open("wb") as output, (job / "pid").open("w") as pid:
        # The keeper inherits the lock, and with it alone the lock ends, whatever else may get its
        # number afterwards.
        fcntl.flock(pid, fcntl.LOCK_EX)
        keeper = subprocess.Popen(
            [sys.executable, __file__, "keep", str(job), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[pid.fileno()],
        )
        pid.write(f"{keeper.pid}\n")
    print(f"started, process {keeper.pid}, output in {job / 'output.txt'}")


def keep(job: Path, command: list[str]) -> None:
    """Runs the command, passes signals on to it, and writes down how it ended."""
    child = subprocess.Popen(command)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: child.send_signal(number))
    code = child.wait()
    aside = job / "exit_code.tmp"
    aside.write_text(f"{code if code >= 0 else 128 - code}\n")
    aside.replace(job / "exit_code")


def running(job: Path) -> bool:
    """Raises JobError if nothing was started in the folder."""
    try:
        with (job / "pid").open() as pid:
            fcntl.flock(pid, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        raise JobError(f"{job}: nothing was started there") from None
    return False


def show_new(job: Path) -> None:
    """Prints what the command wrote since the last time."""
    shown = job / "shown"
    with (job / "output.txt").open("rb") as output:
        output.seek(int(shown.read_text()) if shown.exists() else 0)
        sys.stdout.buffer.write(output.read())
        sys.stdout.flush()
        shown.write_text(str(output.tell()))


def wait(job: Path, seconds: float) -> int:
    """Returns the exit code of this program; see the head of the file."""
    end = time.monotonic() + seconds
    while True:
        alive = running(job)  # asked first: what it wrote until it ended is shown below
        show_new(job)
        if not alive:
            break
        if time.monotonic() >= end:
            return STILL_RUNNING
        time.sleep(min(1.0, max(0.0, end - time.monotonic())))
    if not (job / "exit_code").exists():
        print("error: it ended without a trace, killed or with its machine", file=sys.stderr)
        return LOST
    return int((job / "exit_code").read_text())


def stop(job: Path) -> None:
    if running(job):
        os.kill(int((job / "pid").read_text()), signal.SIGTERM)
    else:
        print("it had ended before")


def limit(words: list[str]) -> float:
    """The seconds to wait. Raises JobError."""
    try:
        [seconds] = map(float, words or ["inf"])
    except ValueError:
        raise JobError(f"wait: {' '.join(words)!r} is no number of seconds") from None
    return seconds


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("start", "wait", "stop", "keep"), help="keep: start's")
    parser.add_argument("job", type=Path, help="folder of the command's output")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="the command, or the seconds")
    args = parser.parse_args(argv)
    try:
        if args.action == "wait":
            return wait(args.job, limit(args.rest))
        if args.action == "stop":
            stop(args.job)
        else:
            (start if args.action == "start" else keep)(args.job, args.rest)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
