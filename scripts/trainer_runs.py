"""Running a trainer script in a process of its own: environment files, the demo, a tiny run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from run_log import Run, read_run

ROOT = Path(__file__).resolve().parent.parent
DEMO_ENV = ROOT / "scripts" / "demo.env"
PATH_VARIABLES = ("DATA_PATH", "TOKENIZER_PATH", "OUTPUT_DIR")

# Every mechanism of the recipe on a model so small that a CPU is done with it in seconds.
TINY_RUN = {
    "MAX_WALLCLOCK_SECONDS": "none",
    "ITERATIONS": "6",
    "WARMUP_STEPS": "1",
    "TRAIN_LOG_EVERY": "1",
    "MODEL_DIM": "64",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "VE_DIM": "16",
    "BIGRAM_DIM": "16",
    "TRAIN_SEQ_LEN": "64",
    "TRAIN_BATCH_TOKENS": "512",
    "LATE_QAT_THRESHOLD": "0.5",
    "EVAL_STRIDE": "32",
    "TTT_CHUNK_TOKENS": "4096",
    "TTT_EPOCHS": "1",
    "OMP_NUM_THREADS": "1",  # reproducible, and the quickest at this size
}


class RunError(RuntimeError):
    """A script that did not run as it must; the text has the end of what it printed."""


def read_env_file(path: Path) -> dict[str, str]:
    """The KEY=value lines of `path`; relative paths in it are taken from the repository's root.

    Raises RunError if the file is missing or a line is not of this form.
    """
    if not path.is_file():
        raise RunError(f"{path} is missing: name a file of KEY=value lines")
    values = {}
    for number, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"(?:export\s+)?([A-Z][A-Z0-9_]*)=(.*)", line)
        if match is None:
            raise RunError(f"{path}:{number}: {line!r} is not KEY=value")
        values[match[1]] = match[2].strip("\"'")
    for name in PATH_VARIABLES:
        if name in values:
            values[name] = str(ROOT / values[name])
    return values


def run_script(
    script: Path, arguments: Sequence[str], *, env: Mapping[str, str], timeout: float = 3600
) -> str:
    """What `script` prints when run inside its own folder. Raises RunError if it fails."""
    command = [sys.executable, "-B", script.name, *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=script.parent,
            env=os.environ | dict(env),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"{script} was still running after {timeout:.0f} s") from None
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise RunError(f"{script} {' '.join(arguments)} ended with {done.returncode}:\n{tail}")
    return done.stdout


def help_text(script: Path) -> str:
    """The output of `script --help`, which needs neither data nor GPU."""
    return run_script(script, ["--help"], env={"COLUMNS": "100"}, timeout=300)


def run_trainer(script: Path, env: Mapping[str, str], output_dir: Path) -> Run:
    """Runs `script` to its end with the settings `env`; returns what its log says."""
    run_script(script, [], env={**env, "OUTPUT_DIR": str(output_dir), "RUN_ID": "run"})
    return read_run(output_dir / "run.txt")
