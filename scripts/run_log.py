"""Reads the log of a run: the one parser of `train_gpt.py`'s log, and what a log says in numbers.

A line is an optional event word, then `key:value` pairs with single spaces between; a value is
percent-encoded, so it holds no white space. A line that does not follow this is skipped, and
reported if it began like one of ours. Logs in the field's older format are understood too: each
of their lines is rewritten to this grammar first (`REWRITES`).

A log is untrusted and may be cut or interleaved: reading never fails on its content. What could
not be read is in `Run.problems`, what a complete log would have besides in `Run.missing`.

A resumed run goes on in the log of the one that was killed. What that one did after the checkpoint
was done again, so it is not among the events: they are those of one run without an interruption.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

LIMIT_BYTES = 16_000_000  # decimal: code + compressed model
MAX_LOG_BYTES = 256 << 20

# The evaluations in the order in which a run makes them; the last that a run makes is its score.
SCORES = {
    "pre_quant": "pre_quant_exact",
    "quantized": "final_int6_roundtrip_exact",
    "sliding": "final_int6_sliding_window_exact",
    "ttt": "legal_ttt_exact",
}

# The field's older format, line by line, as the grammar above.
REWRITES = tuple(
    (re.compile(pattern), line)
    for pattern, line in (
        (r"^progressive_passes: ", "progressive_passes "),
        (r"^swa:start ", "swa "),
        (r"^late_qat:enabled ", "late_qat "),
        (r"^stopping_early: \w+ ", "stop "),
        (r"^DIAGNOSTIC post_ema ", "pre_quant_exact "),
        (r"^seed:(\d+)$", r"config name:seed value:\1 source:log"),
        (r"^world_size:(\d+) grad_accum_steps:\d+$", r"device world_size:\1"),
        (r"^\s*ttt_chunk \[(\S+)\] bpb=(\S+) time=", r"ttt_chunk chunk:\1 val_bpb:\2 time:"),
        (r"^Code size: (\d+) bytes$", r"artifact code_bytes:\1"),
        (r"^Serialized model int\S+: (\d+) bytes$", r"artifact model_bytes:\1"),
        (r"^Total submission size int\S+: (\d+) bytes$", r"artifact total_bytes:\1"),
    )
)

KNOWN_EVENTS = {
    *("run", "code", "versions", "device", "data", "config", "model", "phase", "stop", "artifact"),
    *("progressive_passes", "swa", "late_qat", "weight_average", "export_probe", "ttt_chunk"),
    *("validation", "evaluated", "resume", "checkpoint", "checkpoint_failed", "checkpoint_damaged"),
    *("warning", "failed", "attention_skipped"),
    *SCORES.values(),
}
# Events of training: those that tell of the steps up to theirs, those with which one begins.
TURNS = {"progressive_passes", "swa", "late_qat"}
TRAINING = {"", "validation", "checkpoint", "resume", *TURNS}
PAIR = re.compile(r"([A-Za-z_][A-Za-z0-9_]*):(\S+)")
NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(ms|s)?")


class LogError(ValueError):
    """A log that cannot be read at all; the text names the file and the remedy."""


class Event(NamedTuple):
    """A line: its event word (empty for lines of steps) and its pairs, values decoded."""

    name: str
    pairs: dict[str, str]

    def number(self, key: str) -> float | None:
        """The finite number at `key`, times in their own unit; None without one."""
        return parse_number(self.pairs.get(key, ""))

    def integer(self, key: str) -> int | None:
        text = self.pairs.get(key, "")
        return int(text) if re.fullmatch(r"-?\d{1,18}", text) else None

    def numbers(self, key: str) -> list[float]:
        """The numbers of a comma-separated sequence; empty unless all can be read."""
        values = [parse_number(part) for part in self.pairs.get(key, "").split(",")]
        return [v for v in values if v is not None] if None not in values else []

    def step(self) -> int | None:
        """The step of `step:10/40` or `step:10`."""
        head = self.pairs.get("step", "").split("/")[0]
        return int(head) if re.fullmatch(r"\d{1,18}", head) else None

    def fraction(self, key: str) -> tuple[int, int] | None:
        """The counts of `chunk:10/40`."""
        match = re.fullmatch(r"(\d{1,18})/(\d{1,18})", self.pairs.get(key, ""))
        return (int(match[1]), int(match[2])) if match else None


def parse_number(text: str) -> float | None:
    match = NUMBER.fullmatch(text)
    value = float(match[1]) if match else math.nan
    return value if math.isfinite(value) else None


def parse_line(line: str) -> Event | None:
    """The event of a line without its line break, or None if it does not follow the grammar."""
    for pattern, replacement in REWRITES:
        line, count = pattern.subn(replacement, line, count=1)
        if count:
            break
    words = line.split(" ")
    name = words.pop(0) if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", words[0]) else ""
    matches = [PAIR.fullmatch(word) for word in words]
    if not matches or None in matches:
        return None
    pairs = {match[1]: unquote(match[2]) for match in matches if match}
    return Event(name, pairs) if len(pairs) == len(words) else None


def looks_like_ours(line: str) -> bool:
    return re.split(r"[ :]", line, maxsplit=1)[0] in (KNOWN_EVENTS | {"step"})


class Score(NamedTuple):
    """An evaluation of the validation text."""

    val_loss: float  # nats per token
    val_bpb: float
    tokens: int | None
    bytes: int | None
    seconds: float | None


class StepLine(NamedTuple):
    """A line of a training step; `seconds` is the clock of training after it."""

    step: int
    seconds: float
    event: Event


@dataclass
class Run:
    """What a log says. A quantity is None, or its key is absent, if the log does not have it."""

    path: Path
    events: list[Event] = field(repr=False)
    problems: list[str]
    older_format: bool
    config: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    steps_logged: list[StepLine] = field(default_factory=list, repr=False)
    scores: dict[str, Score] = field(default_factory=dict)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def all(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]

    def last(self, name: str) -> Event:
        """The last event of this name; one without pairs if there is none."""
        return next((e for e in reversed(self.events) if e.name == name), Event(name, {}))

    @property
    def seed(self) -> int | None:
        text = self.config.get("seed", "")
        return int(text) if re.fullmatch(r"\d{1,18}", text) else None

    @property
    def label(self) -> str:
        return str(self.seed) if self.seed is not None else self.path.stem

    @property
    def steps(self) -> int | None:
        stop = self.last("stop").step()
        return stop if stop is not None else max((s.step for s in self.steps_logged), default=None)

    @property
    def train_seconds(self) -> float | None:
        stop = self.last("stop").number("train_time")
        if stop is not None:
            return stop / 1000
        return max((s.seconds for s in self.steps_logged), default=None)

    @property
    def step_avg_ms(self) -> float | None:
        if not self.steps or self.train_seconds is None:
            return None
        return 1000 * self.train_seconds / self.steps

    @property
    def growth(self) -> list[tuple[int, int]]:
        """(step, passes): from the step after `step` on, the core is applied `passes` times."""
        found = [(e.step(), e.integer("num_passes")) for e in self.all("progressive_passes")]
        return sorted((s, p) for s, p in found if s is not None and p is not None)

    @property
    def bytes(self) -> dict[str, int]:
        """The artifact's `code_bytes`, `model_bytes` and `total_bytes`, as far as logged."""
        keys = ("code_bytes", "model_bytes", "total_bytes")
        found = [(key, e.integer(key)) for e in self.all("artifact") for key in keys]
        return {key: value for key, value in found if value is not None}

    @property
    def eval_seconds(self) -> float | None:
        """From loading the artifact to the last score; of an older log, its last score alone."""
        if "evaluation" in self.phase_seconds or not self.older_format:
            return self.phase_seconds.get("evaluation")
        ttt = self.last("legal_ttt").number("eval_time")
        return ttt / 1000 if ttt is not None else None

    @property
    def final(self) -> str | None:
        """The key in `SCORES` of the run's score: its last evaluation, if that is logged."""
        expected = expected_scores(self.config)
        return expected[-1] if expected[-1] in self.scores else None

    @property
    def ttt_gain(self) -> float | None:
        """bpb with test-time training minus bpb of the same sliding windows without it."""
        if "ttt" not in self.scores or "sliding" not in self.scores:
            return None
        return self.scores["ttt"].val_bpb - self.scores["sliding"].val_bpb

    def step_ms_by_passes(self) -> dict[int, float]:
        """Mean milliseconds of a step with 1, 2, ... passes.

        From differences of the clock between lines inside a phase: averages since the start of
        the run, as `step_avg`, would mix the phases.
        """
        milliseconds: dict[int, float] = {}
        steps: dict[int, int] = {}
        for before, after in self.intervals():
            passes = self.passes_of(after.step)
            grows = any(before.step < start < after.step for start, _ in self.growth)
            if passes is not None and not grows:
                elapsed = 1000 * (after.seconds - before.seconds)
                milliseconds[passes] = milliseconds.get(passes, 0.0) + elapsed
                steps[passes] = steps.get(passes, 0) + after.step - before.step
        return {passes: milliseconds[passes] / steps[passes] for passes in sorted(steps)}

    def intervals(self) -> Iterator[tuple[StepLine, StepLine]]:
        """Neighbouring lines of steps between which both step and clock advance."""
        lines = [line for line in self.steps_logged if "train_loss" in line.event.pairs]
        for before, after in pairwise(lines):
            if after.step > before.step and after.seconds > before.seconds:
                yield before, after

    def passes_of(self, step: int) -> int | None:
        """Passes in step `step`, counted from 1."""
        before = [passes for start, passes in self.growth if start < step]
        return before[-1] if before else None


def expected_scores(config: dict[str, str]) -> list[str]:
    """The evaluations of a run with this configuration, in order."""
    skipped = {"sliding": config.get("sliding_eval"), "ttt": config.get("ttt_enabled")}
    return [name for name in SCORES if skipped.get(name) != "False"]


def read_run(path: Path) -> Run:
    """The run whose log is at `path`. Raises LogError if there is no file to read."""
    try:
        size = path.stat().st_size
        if size > MAX_LOG_BYTES:
            raise LogError(f"{path}: {size} bytes are no log of a run (at most {MAX_LOG_BYTES})")
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise LogError(f"{path}: cannot be read ({error.strerror}): check the name") from None
    return build_run(path, text)


def build_run(path: Path, text: str) -> Run:
    lines = text.split("\n")
    problems = []
    cut = lines.pop()
    if cut:
        problems.append(f"line {len(lines) + 1} is cut off and was not used: {shorten(cut)}")
    events, older = [], False
    for number, raw in enumerate(lines, 1):
        line = raw.rstrip("\r")
        event = parse_line(line)
        if event is not None:
            events.append(event)
            older |= any(pattern.search(line) for pattern, _ in REWRITES)
        elif looks_like_ours(line):
            problems.append(f"line {number} is damaged and was not used: {shorten(line)}")
    run = Run(
        path, without_repeats(events), problems, older and not any(e.name == "run" for e in events)
    )
    collect(run)
    run.missing = list(find_missing(run))
    return run


def without_repeats(events: Sequence[Event]) -> list[Event]:
    """The events of a log in which resumed runs went on, without those that were done again.

    Of what was there before, a resumed run takes over what belongs to the steps up to its
    checkpoint; all else (its settings, the end of training, scores) it writes itself.
    """
    starts = [i for i, event in enumerate(events) if event.name == "run"][1:]
    kept: list[Event] = []
    for start, end in pairwise([0, *starts, len(events)]):
        part = list(events[start:end])
        if start and is_resumed(part):
            if not any(event.name in TRAINING for event in part):
                continue  # it ended before it had trained
            resumes = [event.step() or 0 for event in part if event.name == "resume"]
            kept = [event for event in kept if precedes(event, resumes[0] if resumes else 0)]
        kept += part
    return kept


def is_resumed(part: Sequence[Event]) -> bool:
    settings = {event.pairs.get("name"): event.pairs for event in part if event.name == "config"}
    return settings.get("resume", {}).get("value") == "True"


def precedes(event: Event, checkpoint: int) -> bool:
    """Whether it tells of what was done before the checkpoint after so many steps."""
    step = event.step()
    if step is None or event.name not in TRAINING:
        return False
    return step < checkpoint or (step == checkpoint and event.name not in TURNS)


def shorten(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:57] + "...")


def collect(run: Run) -> None:
    """Fills the fields of `run` from its events, and notes what contradicts itself."""
    for event in run.all("config"):
        if {"name", "value"} <= event.pairs.keys():
            run.config[event.pairs["name"]] = event.pairs["value"]
            run.sources[event.pairs["name"]] = event.pairs.get("source", "")
    for event in run.all("phase"):
        seconds = event.number("seconds")
        if seconds is not None and "name" in event.pairs:
            run.phase_seconds[event.pairs["name"]] = seconds
    for name, word in SCORES.items():
        score = read_score(run, word)
        if score is not None:
            run.scores[name] = score
    if len(run.all("run")) > 1:
        run.problems.append(
            f"{len(run.all('run'))} runs wrote into this log: its numbers are a mixture"
        )
    collect_steps(run)


def collect_steps(run: Run) -> None:
    previous = -1
    for event in run.all(""):
        step, milliseconds = event.step(), event.number("train_time")
        if step is None or milliseconds is None:
            continue
        if step < previous:
            run.problems.append(f"step {step} is logged after step {previous}")
        previous = step
        run.steps_logged.append(StepLine(step, milliseconds / 1000, event))
    run.steps_logged.sort(key=lambda line: (line.step, line.seconds))


def read_score(run: Run, word: str) -> Score | None:
    event = run.last(word)
    loss, bpb = event.number("val_loss"), event.number("val_bpb")
    if loss is None or bpb is None:
        return None
    seconds = event.number("seconds")
    if seconds is None:  # the older format has it in milliseconds, on the line before
        rounded = run.last(word.removesuffix("_exact")).number("eval_time")
        rounded = event.number("eval_time") if rounded is None else rounded
        seconds = None if rounded is None else rounded / 1000
    return Score(loss, bpb, event.integer("tokens"), event.integer("bytes"), seconds)


def find_missing(run: Run) -> Iterator[str]:
    """What a complete log has and this one does not, in the log's order."""
    header = () if run.older_format else ("run", "code", "versions", "device", "config")
    for name in header:
        if not run.all(name):
            yield f"the {name} line"
    if run.seed is None:
        yield "the seed"
    if not run.growth:
        yield "the number of passes (progressive_passes)"
    if not any("train_loss" in line.event.pairs for line in run.steps_logged):
        yield "lines of training steps"
    if run.last("stop").step() is None:
        yield "the end of training (stop)"
    for name in expected_scores(run.config):
        if name not in run.scores:
            yield f"the {name} score ({SCORES[name]})"
    for name in ("code_bytes", "model_bytes", "total_bytes"):
        if name not in run.bytes:
            yield f"{name} (artifact)"
    for name in () if run.older_format else ("training", "export", "evaluation"):
        if name not in run.phase_seconds:
            yield f"the seconds of {name} (phase)"


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of several logs, by seed."""
    runs = [read_run(path) for path in paths]
    return sorted(runs, key=lambda run: (run.seed is None, run.seed or 0, str(run.path)))
