"""What the three commands share: how they end, what they show, how they read JSON."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from train_gpt import UserError, require

MAX_JSON_BYTES = 1 << 24
TERMINAL_SECONDS, LOG_SECONDS = 0.2, 10.0  # between two updates of a progress bar


def run_command(work: Callable[[], None], kept: str) -> int:
    """Does `work`; returns the exit code, 2 after an error, of which one line on stderr tells.

    `kept` says in that line what a failure has left behind.
    """
    if (
        signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    ):  # the script's choice for the time of its imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal may lack the characters of the data
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; the interpreter's last flush must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {kept}", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        what = f"{error.filename or 'output'}: {error.strerror or error}"
        print(f"error: {what}; {kept}", file=sys.stderr)
        return 2
    return 0


def bounded(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`."""

    def parse(text: str) -> float:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:,} to {high:,}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse names the type by it
    return parse


def progress(what: str, total: int | None, unit: str = "B") -> tqdm:
    """A bar on a terminal, a line now and then in a log."""
    terminal = sys.stderr.isatty()
    return tqdm(
        desc=what,
        total=total,
        unit=unit,
        unit_scale=True,
        mininterval=TERMINAL_SECONDS if terminal else LOG_SECONDS,
        ascii=True,
        dynamic_ncols=terminal,
    )


def note(text: str) -> None:
    """Prints a line on stderr, above the bar if one is there."""
    tqdm.write(text, file=sys.stderr)


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text. Raises UserError for anything that is none.

    Huge integers are read as floats: Python refuses to convert those of more than 4,300 digits.
    """
    try:
        return json.loads(text, parse_int=lambda n: int(n) if len(n) < 19 else float(n))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error})") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError and OSError."""
    require(path.stat().st_size < MAX_JSON_BYTES, f"{path} is too large for what it should be")
    return parse_json(path.read_bytes(), str(path))
