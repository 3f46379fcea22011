"""Running a trainer script in a process of its own: environment files, the demo, a tiny run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
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
    script: Path,
    arguments: Sequence[str],
    *,
    env: Mapping[str, str],
    timeout: float = 3600,
    show: bool = False,
) -> str:
    """What `script` prints when run inside its own folder; `show` prints it as it comes.

    Raises RunError if it fails or takes longer than `timeout` seconds.
    """
    command = [sys.executable, "-B", script.name, *arguments]
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            cwd=script.parent,
            env=os.environ | dict(env),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
        )
        late = threading.Timer(timeout, process.kill)
        late.start()
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if show and not line.startswith("config "):
                print(f"    {line}", end="", flush=True)
        code, in_time = process.wait(), late.is_alive()
        late.cancel()
        errors.seek(0)
        output, problem = "".join(lines), errors.read()
    if not in_time:
        raise RunError(f"{script} was still running after {timeout:.0f} s")
    if code != 0:
        tail = "\n".join((output + problem).strip().splitlines()[-15:])
        raise RunError(f"{script} {' '.join(arguments)} ended with {code}:\n{tail}")
    return output


def help_text(script: Path) -> str:
    """The output of `script --help`, which needs neither data nor GPU."""
    return run_script(script, ["--help"], env={"COLUMNS": "100"}, timeout=300)


def run_trainer(
    script: Path, env: Mapping[str, str], output_dir: Path, *, show: bool = False
) -> Run:
    """Runs `script` to its end with the settings `env`; returns what its log says."""
    run_script(script, [], env={**env, "OUTPUT_DIR": str(output_dir), "RUN_ID": "run"}, show=show)
    return read_run(output_dir / "run.txt")
