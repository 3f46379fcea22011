"""Prints what the logs of train_gpt.py say: a table over seeds, and a comparison with a base.

    python scripts/inspect_logs.py logs/seeds/train_seed*.log
    python scripts/inspect_logs.py NEW/*.log --against OLD/*.log
    python scripts/inspect_logs.py NEW/*.log --against-figure 1.1163,0.0013,3
    python scripts/inspect_logs.py logs/RUN.txt --baselines
    python scripts/inspect_logs.py logs/RUN.txt --tensorboard logs/board --follow

--tensorboard writes what TensorBoard shows (pip install tensorboard): loss, bits per byte, learning
rate, milliseconds a step, what each pass does, and the scores. --follow goes on while the runs do,
until all of them are scored.

Differences are ours minus the base's, so lower is better. --baselines adds what lzma and a unigram
model make of the same validation text; it reads the data that the log names.

A line of a log is an optional event word and then key:value pairs, with one space between. Values
are percent-encoded, so they hold no white space. val_loss is in nats per token, val_bpb in bits
per byte; train_time is the clock of training, without warm-up and validation.

    run, code, versions, device     what ran, when and on what
    config name: value: source:     one setting that was given; its source is file, env or flag
    defaults NAME:VALUE ...         all others
    data split: tokens: fingerprint:   the shards of one split
    model                           the number of parameters, and the kernels
    phase name: seconds:            the time since the phase before it ended
    progressive_passes step: num_passes:   how often the core is applied in the steps after `step`
    seq_len step: tokens:           how long sequences are in the steps after `step`
    step:N/M train_loss: train_bpb: train_time: ...   a training step; it has no event word
    passes step: growth: update: residual_scale: ...  of the step before it, a number for each pass
    swa, late_qat                   the step after which weight averaging, or QAT, begins
    validation step:                a score during training
    checkpoint, resume              the step at which a run was saved, or went on
    stop step: train_time:          the end of training; interrupted:1 if a signal ended it
    pre_quant_exact                 the score of the averaged weights
    artifact code_bytes: model_bytes: total_bytes:   what counts against 16,000,000
    final_int6_roundtrip_exact      the score of the reloaded artifact, windows side by side
    final_int6_sliding_window_exact the same with sliding windows
    ttt_chunk, legal_ttt_exact      the same with test-time training: on the way, and at the end
    warning text:, failed text:     what the run said in words

Logs in the field's older format are read as far as they go. A log may be cut or damaged: what is
missing, and what was not used, follows the table. What a killed run had done after its checkpoint
was done again by the run that resumed it, and counts once.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

LIMIT_BYTES = 16_000_000  # of code and compressed model together; decimal
MAX_LOG_BYTES = 256 << 20

# The evaluations in the order in which a run makes them; the last one is the run's score.
SCORES = {
    "pre_quant": "pre_quant_exact",
    "quantized": "final_int6_roundtrip_exact",
    "sliding": "final_int6_sliding_window_exact",
    "ttt": "legal_ttt_exact",
}
SIZES = ("code_bytes", "model_bytes", "total_bytes")
# Settings in which the runs of one configuration may differ.
PER_RUN = {"run_id", "seed", "output_dir", "resume", "checkpoint_seconds", "on_signal"}

# Lines of the field's older format, and the same in today's grammar.
REWRITES = tuple(
    (re.compile(pattern), line)
    for pattern, line in (
        (r"^progressive_passes: ", "progressive_passes "),
        (r"^swa:start ", "swa "),
        (r"^late_qat:enabled ", "late_qat "),
        (r"^stopping_early: \w+ ", "stop "),
        (r"^DIAGNOSTIC post_ema ", "pre_quant_exact "),
        (r"^legal_ttt (?=.*eval_time:(\d+)ms)", r"phase name:evaluation milliseconds:\1 "),
        (r"^seed:(\d+)$", r"config name:seed value:\1 source:log"),
        (r"^world_size:(\d+) grad_accum_steps:\d+$", r"device world_size:\1"),
        (r"^\s*ttt_chunk \[(\S+)\] bpb=(\S+) time=", r"ttt_chunk chunk:\1 val_bpb:\2 time:"),
        (r"^Code size: (\d+) bytes$", r"artifact code_bytes:\1"),
        (r"^Serialized model int\S+: (\d+) bytes$", r"artifact model_bytes:\1"),
        (r"^Total submission size int\S+: (\d+) bytes$", r"artifact total_bytes:\1"),
    )
)
PAIR = re.compile(r"([A-Za-z_][A-Za-z0-9_]*):(\S+)")
# Lines that only today's format has.
TODAY = ("run ", "code ", "defaults ", "phase ", "passes ")
# What is measured or counted: a number, and not below 0.
MEASURED = {"train_loss", "train_time", "val_loss", "val_bpb", "seconds", *SIZES}
NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(ms|s)?")


class LogError(ValueError):
    """A log that cannot be read or compared; the text names it and the remedy."""


class Event(NamedTuple):
    """A line: its event word (empty for training steps) and its decoded pairs."""

    name: str
    pairs: dict[str, str]

    def number(self, key: str) -> Any:
        """The finite number at `key` without its unit, int or float; None without one."""
        return parse_number(self.pairs.get(key, ""))

    def numbers(self, key: str) -> list[float]:
        """The numbers of a comma-separated sequence; empty unless all can be read."""
        values = [parse_number(part) for part in self.pairs.get(key, "").split(",")]
        return [] if None in values else values

    @property
    def step(self) -> int | None:
        """The step of `step:10/40` or `step:10`."""
        head = self.pairs.get("step", "").split("/")[0]
        return int(head) if re.fullmatch(r"[0-9]{1,18}", head) else None


def parse_number(text: str) -> Any:
    """The number of a text such as 12, 1e-05 or 40ms; None if it is none, or beyond all sense."""
    match = NUMBER.fullmatch(text) if len(text) < 40 else None
    value = float(match[1]) if match else math.inf
    if match is None or abs(value) >= 1e18:
        return None
    return int(match[1]) if re.fullmatch("-?[0-9]+", match[1]) else value


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
    pairs = {match[1]: unquote(match[2], errors="surrogateescape") for match in matches if match}
    return Event(name, pairs) if len(pairs) == len(words) else None


# ---------------------------------------------------------------------------------------- a run


class Score(NamedTuple):
    """An evaluation of the validation text. What a log does not say is None."""

    val_loss: float  # nats per token
    val_bpb: float
    tokens: int | None
    bytes: int | None


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
    older_format: bool
    problems: list[str]  # what cannot be trusted, in words
    missing: list[str] = field(default_factory=list)
    config: dict[str, str] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)  # seconds
    # (step, passes): in the steps after `step` the core is applied `passes` times.
    growth: list[tuple[int, int]] = field(default_factory=list)
    step_lines: list[StepLine] = field(default_factory=list, repr=False)
    seed: int | None = None
    steps: int | None = None
    train_seconds: float | None = None

    @property
    def label(self) -> str:
        return str(self.seed) if self.seed is not None else self.path.stem

    def all(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]

    def last(self, name: str) -> Event:
        """The last event of this name; one without pairs if there is none."""
        return next((e for e in reversed(self.events) if e.name == name), Event(name, {}))

    def expected_scores(self) -> list[str]:
        """The evaluations of a run with these settings, in order."""
        skipped = {"sliding": "sliding_eval", "ttt": "ttt_enabled"}
        return [name for name in SCORES if self.config.get(skipped.get(name, "")) != "False"]

    @property
    def final(self) -> str | None:
        """The key in `scores` of the run's score: its last evaluation, if that is logged."""
        last = self.expected_scores()[-1]
        return last if last in self.scores else None

    def passes_in(self, step: int | None) -> int | None:
        """How often the core was applied in step `step`, counted from 1."""
        before = [passes for start, passes in self.growth if step is not None and start < step]
        return before[-1] if before else None

    def passes_scored(self) -> int | None:
        """Passes of the last evaluation, by its line or else by the settings; None without one."""
        if not self.scores:
            return None
        logged = self.last(SCORES[list(self.scores)[-1]]).pairs.get("passes")
        planned = self.config.get("passes_schedule", "").rpartition(":")[2]
        found = (logged, self.config.get("eval_passes"), self.config.get("num_passes"), planned)
        return next((int(t) for t in found if t and re.fullmatch("[0-9]{1,9}", t)), None)

    def intervals(self) -> Iterator[tuple[StepLine, StepLine]]:
        """Neighbouring lines of steps between which both step and clock advance."""
        lines = [line for line in self.step_lines if "train_loss" in line.event.pairs]
        for before, after in pairwise(lines):
            if after.step > before.step and after.seconds > before.seconds:
                yield before, after

    def step_ms(self) -> dict[int, float]:
        """Mean milliseconds of a step with 1, 2, ... passes.

        It is taken from pairs of lines between which no pass is added. The logged step_avg is the
        mean since the start, which mixes the passes.
        """
        sums: dict[int, tuple[float, int]] = {}
        for before, after in self.intervals():
            passes = self.passes_in(after.step)
            if passes is not None and passes == self.passes_in(before.step + 1):
                seconds, steps = sums.get(passes, (0.0, 0))
                steps += after.step - before.step
                sums[passes] = seconds + after.seconds - before.seconds, steps
        return {passes: 1000 * seconds / steps for passes, (seconds, steps) in sorted(sums.items())}


def read_run(path: Path) -> Run:
    """The run whose log is at `path`. Raises LogError if there is no file to read."""
    try:
        if path.stat().st_size > MAX_LOG_BYTES:
            raise LogError(f"{path} has more than {MAX_LOG_BYTES} bytes: it is no log of a run")
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise LogError(f"{path} cannot be read ({error.strerror}): check the name") from None
    run = build_run(path, text)
    if not run.events:
        raise LogError(f"{path} has no line of a run's log: name logs of train_gpt.py")
    return run


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of several logs, by seed."""
    runs = [read_run(path) for path in paths]
    return sorted(runs, key=lambda run: (run.seed is None, run.seed or 0, str(run.path)))


def build_run(path: Path, text: str) -> Run:
    """Never fails on the content: what could not be used is in `Run.problems`."""
    *lines, cut = text.split("\n")
    parsed = [parse_line(line.rstrip("\r")) for line in lines]
    events = list(expand(parsed))
    older, problems = not any(line.startswith(TODAY) for line in lines), []
    for number, (line, event) in enumerate(zip(lines, parsed, strict=True), 1):
        # An older log has its source and free text between the lines, and the last line of a
        # killed run, which the run line of another follows, may be cut.
        killed = number < len(parsed) and parsed[number] and parsed[number].name == "run"
        if event is None and line.strip() and not older and not killed:
            problems.append(f"line {number} is damaged and was not used: {line[:60]!r}")
    if cut:
        problems.append(f"line {len(lines) + 1} is cut off and was not used: {cut[:60]!r}")
    events = join_resumed(events, problems)
    for event in events:
        for key in sorted(MEASURED & event.pairs.keys()):
            value = event.number(key)
            if value is None or value < 0:
                text = f"{key}:{event.pairs[key]}, which is no measurement"
                problems.append(f"a line of {event.name or f'step {event.step}'} has {text}")
    if sum(event.name == "run" for event in events) > 1:
        problems.append("several runs wrote into this log: its numbers mix them")
    run = Run(path, events, older, problems)
    collect(run)
    run.missing = list(find_missing(run))
    return run


def expand(events: Sequence[Event | None]) -> Iterator[Event]:
    """The events as older logs have them: a config line for each default, one line a step."""
    step: Event | None = None
    for event in filter(None, events):
        if event.name == "defaults":
            for name, value in event.pairs.items():
                yield Event("config", {"name": name, "value": value, "source": "default"})
        elif event.name == "passes" and step and event.step == step.step:
            step.pairs.update(event.pairs, step=step.pairs["step"])
        else:
            step = event if event.name == "" else step
            yield event


def collect(run: Run) -> None:
    """Fills the fields of `run` from its events."""
    for event in run.events:
        pairs, step, seconds = event.pairs, event.step, event.number("seconds")
        if event.name == "config" and {"name", "value"} <= pairs.keys():
            run.config[pairs["name"]] = pairs["value"]
        elif event.name == "phase" and seconds is not None:
            run.phases[pairs.get("name", "")] = seconds
        elif event.name == "phase" and event.number("milliseconds") is not None:
            run.phases[pairs.get("name", "")] = event.number("milliseconds") / 1000
        elif event.name == "artifact":
            found = {key: event.number(key) for key in SIZES}
            run.bytes |= {key: size for key, size in found.items() if size is not None}
        elif event.name == "progressive_passes" and None not in (step, event.number("num_passes")):
            run.growth.append((step, event.number("num_passes")))
        elif event.name == "" and None not in (step, event.number("train_time")):
            run.step_lines.append(StepLine(step, event.number("train_time") / 1000, event))
    for name, word in SCORES.items():
        event = run.last(word)
        score = Score(*(event.number(key) for key in ("val_loss", "val_bpb", "tokens", "bytes")))
        if None not in score[:2]:
            run.scores[name] = score
    if any(after.step < before.step for before, after in pairwise(run.step_lines)):
        run.problems.append("its steps are not in order")
    run.step_lines.sort(key=lambda line: line[:2])
    run.growth.sort()
    seed, stop = run.config.get("seed", ""), run.last("stop")
    run.seed = int(seed) if re.fullmatch("[0-9]{1,18}", seed) else None
    run.steps = max((line.step for line in run.step_lines), default=None)
    run.train_seconds = max((line.seconds for line in run.step_lines), default=None)
    if stop.step is not None and stop.number("train_time") is not None:
        run.steps, run.train_seconds = stop.step, stop.number("train_time") / 1000


def find_missing(run: Run) -> Iterator[str]:
    """What a complete log has and this one does not, in the log's order."""
    for name in () if run.older_format else ("run", "code", "versions", "device", "config"):
        if not run.all(name):
            yield f"the {name} line"
    if run.seed is None:
        yield "the seed"
    if not run.growth:
        yield "the number of passes (progressive_passes)"
    if not any("train_loss" in line.event.pairs for line in run.step_lines):
        yield "lines of training steps"
    stop = run.last("stop")
    if stop.step is None:
        yield "the end of training (stop)"
    if stop.pairs.get("interrupted") == "1":
        yield f"the rest of training, which a signal ended at step {stop.step}"
    yield from (
        f"the {s} score ({SCORES[s]})" for s in run.expected_scores() if s not in run.scores
    )
    yield from (f"{name} (artifact)" for name in SIZES if name not in run.bytes)
    for name in () if run.older_format else ("training", "export", "evaluation"):
        if name not in run.phases:
            yield f"the seconds of {name} (phase)"


# ------------------------------------------------------------------------------- resumed runs

# They tell of the steps after theirs.
BEGINNINGS = ("progressive_passes", "seq_len", "swa", "late_qat")
TRAINING = ("", "validation", "checkpoint", "resume", *BEGINNINGS)


def configuration(events: Sequence[Event]) -> dict[str, str]:
    """What the runs of one configuration share, by a name to call it: script, data, settings."""
    found = {}
    for name, pairs in events:
        text = " ".join(f"{key}:{value}" for key, value in pairs.items() if key != "split")
        if name == "code":
            found["script"] = pairs.get("sha256", "?")
        elif name == "data":
            found[f"{pairs.get('split')} data"] = text
        elif name in ("versions", "device", "model"):
            found[name] = text
        elif name == "config" and pairs.get("name") not in PER_RUN:
            found[pairs.get("name", "?")] = pairs.get("value", "?")
    return found


def differences(one: Sequence[Event], two: Sequence[Event]) -> list[str]:
    """In what two runs are not of one configuration, with both values."""
    a, b = configuration(one), configuration(two)
    names = (name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    names = sorted(names, key=lambda name: (not name.endswith(" data"), name))  # the text first
    return [f"{name} ({a.get(name)}, {b.get(name)})" for name in names]


def join_resumed(events: list[Event], problems: list[str]) -> list[Event]:
    """The events without what resumed runs did again; what they did not share is a problem.

    Of what was there before, a resumed run takes over what belongs to the steps up to its
    checkpoint. All else (its settings, the end of training, scores) it writes itself. Where it only
    scored an artifact, it takes over all that it does not write.
    """
    starts = [i for i, event in enumerate(events) if event.name == "run"][1:]
    kept: list[Event] = []
    for start, end in pairwise([0, *starts, len(events)]):
        part = events[start:end]
        settings = [event.pairs for event in part if event.name == "config"]
        resumes = any((s.get("name"), s.get("value")) == ("resume", "True") for s in settings)
        if start and resumes:
            names = {event.name for event in part}
            if not names & {*TRAINING, *SCORES.values()}:
                continue  # it ended before it had trained or scored
            problems += [f"it was resumed with another {t}" for t in differences(kept, part)]
            checkpoint = next((event.step or 0 for event in part if event.name == "resume"), 0)
            again = names - {"phase", "warning"} | {"failed"}
            if names & {*TRAINING}:
                kept = [event for event in kept if was_kept(event, checkpoint)]
            else:
                kept = [event for event in kept if event.name not in again]
        kept += part
    return kept


def was_kept(event: Event, checkpoint: int) -> bool:
    """Whether `event` tells of what was done before the checkpoint after so many steps."""
    if event.name == "warning":
        return True
    if event.step is None or event.name not in TRAINING:
        return False
    begins = event.name in BEGINNINGS
    return event.step < checkpoint or (event.step == checkpoint and not begins)


# -------------------------------------------------------------------------- the table over seeds


def figures(run: Run) -> dict[str, float]:
    """The numbers of a run, the table's rows in their order, as far as the log has them."""
    sizes = {key.removesuffix("_bytes"): size for key, size in run.bytes.items()}
    found: dict[str, float | None] = {
        "steps": run.steps,
        "step_avg_ms": 1000 * run.train_seconds / run.steps if run.steps else None,
        **{f"step_ms_{passes}_passes": ms for passes, ms in run.step_ms().items()},
        "passes_trained": run.passes_in(run.steps),
        "passes_scored": run.passes_scored(),
        **{f"{name}_val_bpb": score.val_bpb for name, score in run.scores.items()},
        "ttt_gain_bpb": ttt_gain(run),
        "val_loss": run.scores[run.final].val_loss if run.final else None,
        "warm_up_seconds": run.phases.get("warm_up"),
        "train_seconds": run.train_seconds,
        "export_seconds": run.phases.get("export"),
        "eval_seconds": run.phases.get("evaluation"),
        **{f"bytes_{name}": size for name, size in sizes.items()},
        "bytes_left": LIMIT_BYTES - sizes["total"] if "total" in sizes else None,
    }
    return {key: value for key, value in found.items() if value is not None}


def ttt_gain(run: Run) -> float | None:
    """bpb with test-time training minus bpb of the same sliding windows without it."""
    both = {"ttt", "sliding"} <= run.scores.keys()
    return run.scores["ttt"].val_bpb - run.scores["sliding"].val_bpb if both else None


def decimals(key: str) -> int:
    """How many decimals of the number called `key` are printed."""
    places = {"bpb": 5, "loss": 5, "ms": 2, "seconds": 1}
    return next((places[word] for word in key.split("_") if word in places), 0)


class Spread(NamedTuple):
    """The mean of n values and their sample standard deviation (n - 1); None for one value."""

    mean: float
    std: float | None
    n: int


def spread(values: Sequence[float]) -> Spread:
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), std, len(values))


def summarize(runs: Sequence[Run]) -> dict[str, Spread]:
    """The spread of each number that every run has; none of runs that are not alike."""
    found = [figures(run) for run in runs] if not list(unlike(runs)) else [{}]
    shared = [key for key in found[0] if all(key in values for values in found)]
    return {key: spread([values[key] for values in found]) for key in shared}


def table_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The seeds, then a row for each number; of several runs that are alike mean and deviation."""
    found, spreads = [figures(run) for run in runs], summarize(runs)
    several = len(runs) > 1 and bool(spreads)
    labels = [run.label for run in runs]
    title, names = "seed", labels
    if len(set(labels)) < len(labels):
        title, names = "run", [run.path.stem for run in runs]
    rows = [[title, *names, *["mean", "std"] * several]]
    for key in dict.fromkeys(k for values in sorted(found, key=len)[::-1] for k in values):
        mean, std, _ = spreads.get(key, (None, None, 0))
        row = [number(values.get(key), decimals(key)) for values in found]
        row += [number(value, decimals(key) or 1) for value in (mean, std) if several]
        rows.append([key.replace("_", " "), *row])
    return rows


def number(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:,.{places}f}"


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ([row[0].ljust(first), *map(str.rjust, row[1:], widths)] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([header, "|--" + "|--:" * (len(rows[0]) - 1) + "|", *body])


# ------------------------------------------------------------------------ comparison with a base


class Base(NamedTuple):
    """What runs are compared with: the bpb of logs, or only a figure that someone published."""

    name: str
    bpb: Spread
    tokens: int | None = None  # of its validation text; None if not known
    bytes: int | None = None


def final_scores(runs: Sequence[Run]) -> list[Score]:
    """Every run's score, of one kind and on one text. Raises LogError if they are not."""
    unfinished = [str(run.path) for run in runs if run.final is None]
    if unfinished:
        raise LogError(f"no final score in {', '.join(unfinished)}: finish or leave out the run")
    kinds = sorted({str(run.final) for run in runs})
    if len(kinds) > 1:
        raise LogError(f"the logs end with different evaluations ({', '.join(kinds)}): no mean")
    scores = [run.scores[kinds[0]] for run in runs]
    if len({(score.tokens, score.bytes) for score in scores}) > 1:
        raise LogError("the logs were scored on different validation texts: no mean")
    return scores


def base_of_runs(name: str, runs: Sequence[Run]) -> Base:
    scores = final_scores(runs)
    return Base(name, spread([s.val_bpb for s in scores]), scores[0].tokens, scores[0].bytes)


def compare(runs: Sequence[Run], base: Base) -> dict[str, Any]:
    """The runs' final score minus the base's, and the test that applies. Raises LogError."""
    scores = final_scores(runs)
    tokens, text_bytes = scores[0].tokens, scores[0].bytes
    bpb = [score.val_bpb for score in scores]
    difference = statistics.fmean(bpb) - base.bpb.mean
    nats = difference * math.log(2) * text_bytes / tokens if tokens and text_bytes else None
    if base.bytes is None:
        note = "the text that the base was measured on is not known to this script"
    elif (base.tokens, base.bytes) != (tokens, text_bytes):
        note = f"{base.name} was measured on another text: the difference means nothing"
    else:
        note = "same validation text"
    test, t, p, p_lower = t_test(bpb, base.bpb)
    result = {"base": base._asdict() | {"bpb": base.bpb._asdict()}, "val_bpb": difference}
    result |= {"nats_per_token": nats, "test": test, "t": t, "p": p, "p_lower": p_lower}
    return result | {"note": note}


def t_test(ours: Sequence[float], base: Spread) -> tuple[str, Any, Any, Any]:
    """The test that applies, its t, its two-sided p, and its p that ours is lower."""
    if len(ours) < 2:
        return "none: one seed has no deviation", None, None, None
    if base.std is None and base.n > 1:
        return "none: the base's deviation is not known", None, None, None
    if not spread(ours).std and not base.std:
        return "none: no value deviates from its mean", None, None, None
    try:
        from scipy import stats
    except ImportError:
        raise LogError("a comparison needs scipy: pip install scipy") from None
    if base.std is None:
        name = "one-sample t-test, the base taken as exact (its own deviation is not known)"
        both = stats.ttest_1samp(ours, base.mean)
        lower = stats.ttest_1samp(ours, base.mean, alternative="less")
    else:
        name, moments = "Welch's t-test", (*spread(ours), *base)
        both = stats.ttest_ind_from_stats(*moments, equal_var=False)
        lower = stats.ttest_ind_from_stats(*moments, equal_var=False, alternative="less")
    return name, float(both.statistic), float(both.pvalue), float(lower.pvalue)


def comparison_text(c: Mapping[str, Any]) -> str:
    """What `compare` found, in three lines."""
    base, nats, test = c["base"]["bpb"], "nats unknown", c["test"]
    std = f" ± {base['std']:.5f}" if base["std"] else ""
    if c["nats_per_token"] is not None:
        nats = f"{c['nats_per_token']:+.5f} nats per token"
    if c["t"] is not None:
        test += f": t = {c['t']:.3f}, p = {c['p']:.3g} (two-sided), {c['p_lower']:.3g} (lower)"
    return (
        f"against {c['base']['name']} ({base['mean']:.5f}{std} bpb, n={base['n']}): "
        f"{c['val_bpb']:+.5f} bpb, {nats}\n  {test}\n  {c['note']}"
    )


# ----------------------------------------------------------------------------------- baselines


def baselines(run: Run) -> dict[str, float]:
    """Bits per byte of the run's validation text by lzma, and by a unigram model of its tokens.

    The unigram model has the training tokens' frequencies, each count plus one. Raises LogError
    if the data that the log names cannot be read.
    """
    try:
        import numpy as np
        import sentencepiece

        tokenizer = sentencepiece.SentencePieceProcessor()
        tokenizer.LoadFromSerializedProto(Path(run.config["tokenizer_path"]).read_bytes())
        train, val = (read_tokens(Path(run.config["data_path"]), s) for s in ("train", "val"))
        logged = [e.number("tokens") for e in run.all("data")]
        if logged and logged != [len(train), len(val)]:
            raise ValueError("they are not those of the run any more")
        counts = np.bincount(train, minlength=tokenizer.vocab_size()) + 1.0
        bits = float(-np.log2(counts / counts.sum())[val[1:]].sum())
        text = tokenizer.Decode([i for i in val.tolist() if not tokenizer.IsControl(i)]).encode()
    except ImportError as error:
        raise LogError(f"--baselines needs {error.name}: pip install {error.name}") from None
    except (KeyError, OSError, ValueError, IndexError, RuntimeError) as error:
        raise LogError(f"--baselines: cannot read the data of {run.path} ({error})") from None
    scored = next((score.bytes for score in run.scores.values() if score.bytes), len(text))
    return {"lzma": 8 * len(lzma.compress(text, preset=9)) / len(text), "unigrams": bits / scored}


def read_tokens(folder: Path, split: str) -> Any:
    """All tokens of a split: a shard is a header of 1,024 bytes, then little-endian uint16."""
    import numpy as np

    paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    return np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in paths])


# ------------------------------------------------------------------------------------- command


def as_json(runs: Sequence[Run], comparison: Mapping[str, Any] | None) -> dict[str, Any]:
    described = []
    for run in runs:
        facts = {"log": str(run.path), "seed": run.seed, "final": run.final, **figures(run)}
        described.append(facts | {"missing": run.missing, "problems": run.problems})
    spreads = {key: value._asdict() for key, value in summarize(runs).items()}
    return {"runs": described, "spread": spreads, "comparison": comparison}


def gaps(runs: Sequence[Run]) -> list[str]:
    """What the reader of the table must know besides."""
    seeds = [run.seed for run in runs if run.seed is not None]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    lines = [f"seed {s} is in several logs: the deviation is not one over seeds" for s in twice]
    lines += unlike(runs)
    for run in runs:
        if run.missing:
            lines.append(f"{run.path} is missing: {'; '.join(run.missing)}")
        lines += [f"{run.path}: {problem}" for problem in run.problems]
        warnings = [event.pairs.get("text") for event in run.all("warning")]
        lines += [f"{run.path} warns: {text}" for text in warnings]
    return lines


def gaps_of_base(runs: Sequence[Run], base: Sequence[Run]) -> list[str]:
    """What the reader of a comparison must know of the base: steps, their time, settings."""

    def pace(of: Sequence[Run]) -> str:
        milliseconds = [ms for run in of for ms in list(run.step_ms().values())[:1]]
        counts = ", ".join(str(run.steps) for run in of)
        return f"{counts} steps, of {statistics.fmean(milliseconds or [0]):.1f} ms at first"

    same = f"{pace(runs)}; the base {pace(base)}"
    return [same, *unlike([runs[0], base[0]]), *gaps(base)]


def run_differences(first: Run, run: Run) -> list[str]:
    """In what two runs are not seeds of one configuration that went as far."""
    one, two = ([passes for _, passes in r.growth] for r in (first, run))
    reached = [f"the passes that they reached ({one}, {two})"] if one != two else []
    return differences(first.events, run.events) + reached


def unlike(runs: Sequence[Run]) -> Iterator[str]:
    """Which runs are no seeds of one configuration, so that they have no mean."""
    first = runs[0]
    for run in runs[1:]:
        found = run_differences(first, run)
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        if found:
            yield f"{first.path} and {run.path} differ in {', '.join(found[:3])}{more}"


def scalars(run: Run) -> Iterator[tuple[str, int, float, float]]:
    """What TensorBoard shows of a run: names, steps, values and seconds of training, in order."""
    names = {"train_loss": "train/loss", "train_bpb": "train/bpb", "lr_scale": "train/lr_scale"}
    names |= {"grad_norm": "train/grad_norm", "passes": "passes/number"}
    before = StepLine(0, 0.0, Event("", {}))
    for line in run.step_lines:
        found = {name: line.event.number(key) for key, name in names.items()}
        found["passes/jacobian_proxy"] = line.event.number("jacobian_proxy")
        for key in ("growth", "update", "feedback_norm", "residual_scale"):
            first = 2 if key == "residual_scale" else 1  # pass 1 has no scale
            values = line.event.numbers(key)
            found |= {f"passes/{key}_{k}": value for k, value in enumerate(values, first)}
        if line.step > before.step:
            spent = 1000 * (line.seconds - before.seconds)
            found["train/ms_a_step"] = spent / (line.step - before.step)
        before = line
        yield from (
            (name, line.step, v, line.seconds) for name, v in found.items() if v is not None
        )
    for event in run.all("validation"):
        if None not in (event.step, event.number("val_bpb")):
            yield "scores/validation", event.step, event.number("val_bpb"), before.seconds
    for name, score in run.scores.items():
        yield f"scores/{name}", run.steps or 0, score.val_bpb, before.seconds


def write_tensorboard(paths: Sequence[Path], folder: Path, follow: bool) -> None:
    """A folder for each log below `folder`; with `follow`, until every run is scored.

    Raises LogError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise LogError("--tensorboard needs a package: pip install tensorboard") from None
    if str(folder) != str(folder).encode(errors="replace").decode():
        raise LogError(f"--tensorboard {folder}: its name is no UTF-8: choose another folder")
    written: set[tuple[str, str, int]] = set()
    writers = {}
    print(f"show them: tensorboard --logdir {folder}", flush=True)
    while True:
        there = [path for path in paths if path.is_file() or not follow]  # or they come yet
        runs = read_runs(there)
        for run in runs:
            if run.path not in writers:
                board = folder / run.path.parent.name / run.path.stem
                for old in board.glob("events.out.tfevents.*"):  # the same values once more
                    old.unlink()
                writers[run.path] = SummaryWriter(str(board))
        for run in runs:
            for name, step, value, seconds in scalars(run):
                if (str(run.path), name, step) not in written:
                    written.add((str(run.path), name, step))
                    # So TensorBoard's relative time is the time of training.
                    writers[run.path].add_scalar(name, value, step, walltime=seconds)
            writers[run.path].flush()
        going = [run for run in runs if run.missing and not run.all("failed")]
        if not follow or not (going or len(there) < len(paths)):
            break
        time.sleep(2)
    print(f"{folder}: {len(written):,} values")


def parse_figure(text: str) -> Spread:
    """`1.1163` or `1.1163,0.0013,3`: mean bpb, its deviation over seeds, how many seeds."""
    match = re.fullmatch(r"(\d+\.?\d*)(?:,(\d*\.?\d+),([2-9]|[1-9]\d{1,8}))?", text)
    if not match or not 0 < float(match[1]) < 100:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no figure: write the mean bpb, or mean,std,n such as 1.1163,0.0013,3"
        )
    mean, std, n = match.groups()
    return Spread(float(mean), float(std) if std else None, int(n or 1))


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--against", type=Path, nargs="+", metavar="LOG", help="logs of a base")
    group.add_argument(
        "--against-figure", type=parse_figure, metavar="BPB[,STD,N]", help="a published figure"
    )
    parser.add_argument("--against-name", default="the base", help="what to call the base")


def read_base(args: argparse.Namespace) -> Base | None:
    if args.against:
        return base_of_runs(args.against_name, read_runs(args.against))
    return Base(args.against_name, args.against_figure) if args.against_figure else None


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG")
    parser.add_argument("--format", choices=("table", "markdown", "json"), default="table")
    parser.add_argument(
        "--require-complete", action="store_true", help="exit code 1 if a log is missing anything"
    )
    parser.add_argument("--baselines", action="store_true", help="lzma and unigrams on its text")
    add = parser.add_argument
    add("--tensorboard", type=Path, metavar="DIR", help="write these logs for TensorBoard")
    add("--follow", action="store_true", help="with --tensorboard: go on while the runs do")
    add_base_arguments(parser)
    args = parser.parse_args(argv)
    try:
        if args.tensorboard:
            write_tensorboard(args.logs, args.tensorboard, args.follow)
            return 0
        runs, base = read_runs(args.logs), read_base(args)
        comparison = compare(runs, base) if base else None
        of_base = gaps_of_base(runs, read_runs(args.against)) if args.against else []
        others = baselines(runs[0]) if args.baselines else {}
    except LogError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.format == "json":
        print(json.dumps(as_json(runs, comparison) | {"baselines": others}, indent=2))
    else:
        print((plain_table if args.format == "table" else markdown_table)(table_rows(runs)))
        notes = [f"{name} on the same text: {bpb:.5f} bpb" for name, bpb in others.items()]
        notes += [comparison_text(comparison)] if comparison else []
        print("".join(f"\n{note}\n" for note in notes + gaps(runs) + of_base), end="")
    return 1 if args.require_complete and any(run.missing for run in runs) else 0


def leave(number: int, _: object) -> None:
    """Ends by an exception, so that children are ended and temporary files go."""
    sys.exit(128 + number)


def in_words(error: OSError) -> str:
    """The file and what is wrong with it."""
    return f"{error.filename or 'output'}: {error.strerror or error}"


def run_command(main: Callable[[Sequence[str]], int]) -> None:
    """Runs a script's `main` and exits with its code, on any terminal and into any pipe."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup's choice stays
            signal.signal(number, leave)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # a script's choice for its imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # what a terminal cannot show becomes a `?`
    code = 1
    try:
        try:
            code = main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk
        print(f"error: {in_words(error)}", file=sys.stderr)
        code = 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    run_command(main)
