"""Makes a record of finished runs, and refuses a record that is not what it says.

    python scripts/record.py package logs/seeds --name "Stable Growing Recurrence" \\
        --author "Your Name" --github-id you --notes what_failed.md
    python scripts/record.py check records/TRACK/DATE_NAME
    python scripts/record.py check --all             every record, and the root's submission.json
    python scripts/record.py check DIR --rerun       and run its script on the demo's data

`package` reads a folder as run_seeds.sh leaves it and writes records/TRACK/DATE_NAME/: README.md,
submission.json, train_gpt.py, logs, requirements.txt, pictures. Every number comes from the logs.
What `check` would refuse is not written. The root's submission.json is a copy of the record's that
speaks for the repository.

`check` computes all of it again. It refuses a record with a file too many or too few, logs or
pictures other than those that were packaged (by sha256), logs that are unfinished or contradict
themselves or each other, a script that is not the one in the logs or does not start, a README.md,
submission.json or requirements.txt that differ from what the logs give, or a broken limit
(16,000,000 bytes; 600 s of evaluation; the rules of its track). Every reason is printed.

Not checked are the author's words (name, blurb, and the notes at the end of README.md), the figure
of a base, what the pictures show, and whether the runs took place.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import inspect_logs as logs
from inspect_logs import Base, LogError, Run

ROOT = Path(__file__).resolve().parents[1]
RECORDS, DEMO_ENV = ROOT / "records", ROOT / "scripts" / "demo.env"
TEN_MINUTE_TRACK, OPEN_TRACK = "track_10min_16mb", "track_non_record_16mb"
LIMIT_SECONDS = 600
MIN_SEEDS = 3  # of the 10-minute track
SCRIPT, SUBMISSION, README = "train_gpt.py", "submission.json", "README.md"
REQUIREMENTS = "requirements.txt"
REQUIRED = {SCRIPT, SUBMISSION, README, REQUIREMENTS}
LOG_NAME = re.compile(r"train_seed(\d+)\.log")
PICTURE_NAME = re.compile(r"[a-z_]+\.png")
DATA_PATHS = ("DATA_PATH", "TOKENIZER_PATH")
MAX_JSON_BYTES = 1 << 20
# Text of FineWeb's validation split (50,000 documents): 151.08 million bytes, by any lossless
# tokenizer; published losses and bpb imply 151,079,964.
FINEWEB_VAL_BYTES = range(151_070_000, 151_091_000)
# What the logs cannot know: who submits it, and what it is.
IDENTITY = ("name", "author", "github_id", "blurb")
BLURB = (
    "A GPT of stem, shared core and tail whose core is applied more often as training proceeds; "
    "its settings are in the logs."
)
SCORE_TEXT = {
    "pre_quant": "before quantization",
    "quantized": "quantized, plain windows",
    "sliding": "quantized, sliding windows",
    "ttt": "quantized, sliding windows with score-first test-time training",
}
NOT_COMPARABLE = (
    "> **Not a leaderboard figure**: it was not measured on FineWeb's validation split with 8 H100."
)
NOT_CHECKED = "The author's words, not checked"
NOTES_HEADING = "What did not work: the author's notes"
# A loss or bpb in a log has 8 decimals: it is off by at most half of the last one, with a little
# for the order of a sum.
ROUNDING = 0.51e-8


class RecordError(ValueError):
    """Why something is no record; the text has one reason a line."""


# ----------------------------------------------------------------------- what the logs say of a run


def hardware(run: Run) -> str:
    device = run.last("device").pairs
    name, processes = device.get("name", "?"), device.get("world_size", "?")
    on_gpu = (run.last("stop").number("peak_memory_mib") or 0) > 0
    return f"{processes}x {name}" if on_gpu else f"CPU {name}, processes: {processes}"


def leaderboard_comparable(runs: Sequence[Run]) -> bool:
    """Whether all were scored on FineWeb's validation split, by 8 H100."""
    scores = logs.final_scores(runs)
    on_h100 = all(re.match("8x .*H100", hardware(run)) for run in runs)
    return on_h100 and all(score.bytes in FINEWEB_VAL_BYTES for score in scores)


def data_of(run: Run) -> dict[str, str]:
    """The data as the log identifies them: by folder, counts and fingerprints."""
    paths = {"folder": "data_path", "tokenizer": "tokenizer_path"}
    facts = {key: Path(run.config.get(name, "?")).name for key, name in paths.items()}
    for pairs in (event.pairs for event in run.all("data")):
        facts |= {f"{pairs.get('split')}_{k}": v for k, v in pairs.items() if k != "split"}
    return facts


def wallclock(run: Run) -> float | None:
    return logs.parse_number(run.config.get("max_wallclock_seconds", ""))


def remarks(run: Run) -> Iterator[str]:
    """What a reader of a run's numbers must know besides."""
    seconds, cap = run.train_seconds or 0.0, wallclock(run)
    trained, scored = run.passes_in(run.steps), run.passes_scored()
    if cap is not None and seconds > cap:
        yield (
            f"training took {seconds:.3f} s, {seconds - cap:.3f} s more than its wall clock of "
            f"{cap:g} s: its last steps were slow (a lower --max-wallclock-seconds leaves room)"
        )
    if trained != scored:
        yield f"trained with {trained} passes at the end, scored with {scored}"
    for event in run.all("resume"):
        yield f"interrupted, and resumed after step {event.step}"
    for event in run.all("warning"):
        yield f"its log warns: {event.pairs.get('text')}"


# --------------------------------------------------------------------- why logs are no record


def score_errors(run: Run) -> Iterator[str]:
    """Which scores do not follow from their own loss, tokens and bytes, or are of another text."""
    texts = set()
    for event in run.events:
        if event.name not in (*logs.SCORES.values(), "validation"):
            continue
        loss, bpb, tokens, text_bytes = map(
            event.number, ("val_loss", "val_bpb", "tokens", "bytes")
        )
        if loss is None or bpb is None or not tokens or not text_bytes:
            yield f"{event.name} lacks val_loss, val_bpb, tokens or bytes"
            continue
        texts.add((tokens, text_bytes))
        bits = tokens / text_bytes / math.log(2)  # bpb of a nat per token
        if not abs(bpb - loss * bits) <= ROUNDING * (1 + abs(bits)):
            yield (
                f"{event.name} has val_bpb:{bpb:.8f}, its val_loss * tokens / (ln 2 * bytes) is "
                f"{loss * bits:.8f}"
            )
    if len(texts) > 1:
        yield f"its scores are of different texts: (tokens, bytes) are {sorted(texts)}"
    held = data_of(run).get("val_tokens")
    for tokens, _ in texts:
        if str(tokens + 1) != held:
            yield f"its scores have tokens:{tokens}, not 1 less than data split:val, tokens:{held}"


def training_errors(run: Run) -> Iterator[str]:
    """What a log says of its training that cannot be true."""
    steps, seconds, cap = run.steps or 0, run.train_seconds or 0.0, wallclock(run)
    told = [e.step or 0 for e in run.events if e.name in ("", "validation", "progressive_passes")]
    if max(told, default=0) > steps:
        yield f"a line is of step {max(told)}, training stopped after step {steps}"
    for before, after in pairwise(run.step_lines):
        if after.seconds < before.seconds:
            yield f"its clock went back from {before.seconds:.3f} s at step {before.step}"
    clock = max((line.seconds for line in run.step_lines), default=0.0)
    if clock > seconds:
        yield f"a step ended at {clock:.3f} s, training at {seconds:.3f} s"
    # The clock is read between steps while two may be in flight: no other starts after the cap.
    for line in run.step_lines:
        if cap is not None and line.seconds > cap and line.step < steps - 2:
            yield f"step {line.step} ended after its wall clock of {cap:g} s, {steps} were made"
            break
    finals = [run.last(word) for name, word in logs.SCORES.items() if name != "pre_quant"]
    parts, whole = sum(e.number("seconds") or 0 for e in finals), run.phases.get("evaluation", 0)
    if parts > whole + 0.01:
        yield f"its scores took {parts:.3f} s, the whole evaluation {whole:.3f} s"
    if run.last("stop").number("interrupted"):
        yield "a signal ended its training early"
    if cap is None and run.config.get("max_wallclock_seconds", "None") != "None":
        text = run.config["max_wallclock_seconds"]
        yield f"max_wallclock_seconds={text} is neither a number nor None"


def ttt_errors(run: Run) -> Iterator[str]:
    """What a log says of test-time training that cannot be true."""
    chunk, final = run.last("ttt_chunk"), run.last(logs.SCORES["ttt"])
    done, _, chunks = chunk.pairs.get("chunk", "").partition("/")
    so_far, whole = chunk.number("val_bpb"), final.number("val_bpb")
    # After the last chunk the whole text is scored; older logs have six digits of it.
    if done and done == chunks and whole and not abs((so_far or 0.0) - whole) <= 1e-5 * whole:
        yield f"its last ttt_chunk has val_bpb:{so_far}, legal_ttt_exact {whole:.8f}"
    trained, _, planned = final.pairs.get("epochs", "0/0").partition("/")
    if not (trained.isdecimal() and planned.isdecimal() and int(trained) <= int(planned)):
        yield f"legal_ttt_exact has epochs:{final.pairs['epochs']}, it should be done/planned"


def artifact_errors(run: Run) -> Iterator[str]:
    code, model, total = (run.bytes.get(key) for key in logs.SIZES)
    if None in (code, model, total) or code + model != total:
        yield f"code and model are not the {total} bytes in total"
    if code != run.last("code").number("bytes"):
        yield "it counts other bytes of code than those of the script that ran"
    sizes = {event.pairs.get("parameters") for event in run.all("model")}
    if len(sizes) != 1:
        yield f"its model lines have parameters:{', '.join(sorted(map(str, sizes))) or 'none'}"


def log_errors(runs: Sequence[Run]) -> Iterator[str]:
    """Why these logs are not the seeds of one configuration of one script, run to the end, that
    contradict neither themselves nor each other.
    """
    for run in runs:
        name = run.path.name
        if run.missing:
            yield f"{name} is missing {'; '.join(run.missing)}: the run did not finish"
        yield from (f"{name}: {text}" for text in run.problems)
        for errors in (score_errors, training_errors, ttt_errors, artifact_errors):
            yield from (f"{name}: {text}" for text in errors(run))
        for text in logs.run_differences(runs[0], run):
            yield f"{runs[0].path.name} and {name} differ in {text}"
    seeds = [run.seed for run in runs]
    for seed in sorted({seed for seed in seeds if seed is not None and seeds.count(seed) > 1}):
        yield f"seed {seed} is in more than one log"


def limit_errors(runs: Sequence[Run], track: str) -> Iterator[str]:
    """Which limits of the game these runs break."""
    if track not in (TEN_MINUTE_TRACK, OPEN_TRACK):
        yield f"there is no track {track}: use {TEN_MINUTE_TRACK} or {OPEN_TRACK}"
    for run in runs:
        total, seconds = run.bytes.get("total_bytes", 0), run.phases.get("evaluation", 0.0)
        if total > logs.LIMIT_BYTES:
            yield f"{run.path.name}: {total:,} bytes of code and model exceed {logs.LIMIT_BYTES:,}"
        if seconds > LIMIT_SECONDS:
            yield (
                f"{run.path.name}: evaluation took {seconds:.1f} s, more than {LIMIT_SECONDS} s: "
                "run this seed with a lower --eval-wallclock-seconds"
            )
    if track == TEN_MINUTE_TRACK:
        yield from contest_errors(runs)


def contest_errors(runs: Sequence[Run]) -> Iterator[str]:
    """Which rules of the 10-minute track these runs break."""
    for run in runs:
        cap, step = wallclock(run), max(run.step_ms().values(), default=0.0) / 1000
        if cap is None or cap > LIMIT_SECONDS or (run.train_seconds or 0.0) > LIMIT_SECONDS + step:
            text = f"{TEN_MINUTE_TRACK} asks for at most {LIMIT_SECONDS} s of training"
            yield f"{run.path.name}: {text}"
    if len(runs) < MIN_SEEDS:
        yield f"{TEN_MINUTE_TRACK} asks for {MIN_SEEDS} seeds, here are {len(runs)}"
    if not leaderboard_comparable(runs):
        yield f"{TEN_MINUTE_TRACK} is for runs on FineWeb with 8 H100: use {OPEN_TRACK}"


# ------------------------------------------------------------------- what is computed from the logs


def build_submission(
    runs: Sequence[Run], identity: Mapping[str, str], track: str | None, base: Base | None
) -> dict[str, Any]:
    """submission.json without the sums of its files. track: None for the first that the runs fit.

    Raises RecordError with every reason why there is none.
    """
    errors = list(log_errors(runs)) if runs else ["there is no log"]
    if not errors and track is None:
        track = OPEN_TRACK if list(limit_errors(runs, TEN_MINUTE_TRACK)) else TEN_MINUTE_TRACK
    errors = errors or list(limit_errors(runs, str(track)))
    if errors:
        raise RecordError("\n".join(errors))
    scores = logs.final_scores(runs)
    if base:  # as it is stored, so that `check` computes the same differences
        base = base._replace(bpb=logs.Spread(*map(rounded, base.bpb)))
    spreads, first = logs.summarize(runs), runs[0]
    bpb, loss = spreads[f"{first.final}_val_bpb"], spreads["val_loss"]
    return {
        **{key: identity[key] for key in IDENTITY},
        "date": run_date(runs),
        "track": track,
        "leaderboard_comparable": leaderboard_comparable(runs),
        "score": SCORE_TEXT[str(first.final)],
        "val_loss": rounded(loss.mean),
        "val_loss_std": rounded(loss.std),
        "val_bpb": rounded(bpb.mean),
        "std": rounded(bpb.std),
        "val_tokens": scores[0].tokens,
        "val_bytes": scores[0].bytes,
        "seeds": [run.seed for run in runs],
        "seed_results": {
            run.label: {"val_bpb": score.val_bpb, **rounded(logs.figures(run))}
            for run, score in zip(runs, scores, strict=True)
        },
        "remarks": [f"seed {run.label}: {text}" for run in runs for text in remarks(run)],
        "bytes_total": max(run.bytes["total_bytes"] for run in runs),
        "bytes_code": first.bytes["code_bytes"],
        "wallclock_seconds": max(run.train_seconds or 0.0 for run in runs),
        "hardware": hardware(first),
        "versions": first.last("versions").pairs,
        "data": data_of(first),
        "code_sha256": first.last("code").pairs["sha256"],
        "comparison": rounded(logs.compare(runs, base)) if base else None,
    }


def rounded(value: Any) -> Any:
    """Numbers to nine digits, so that they do not vary with a library's version."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.9g}") if isinstance(value, float) else value


def run_date(runs: Sequence[Run]) -> str:
    """The day on which the last of the runs started."""
    stamps = [run.last("run").pairs.get("started", "") for run in runs]
    try:
        return datetime.strptime(max(stamps)[:8], "%Y%m%d").strftime("%Y-%m-%d")
    except ValueError:
        text = "has no date (started:YYYYMMDD_...)"
        raise RecordError(f"the run line of {runs[0].path.name} {text}") from None


def folder_name(submission: Mapping[str, Any]) -> str:
    """Raises RecordError if the name gives no folder."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "_", submission["name"]).strip("_")
    if not re.search("[A-Za-z0-9]", slug):
        text = "has no letter or digit of ASCII for the folder's name: add one"
        raise RecordError(f"--name {submission['name']!r} {text}, such as a translation")
    return f"{submission['date']}_{slug}"


def requirements(run: Run) -> str:
    """The packages that the runs used, at their versions."""
    versions = run.last("versions").pairs
    names = [name for name in ("torch", "numpy", "sentencepiece") if name in versions]
    return "".join(f"{name}=={versions[name].split('+')[0]}\n" for name in names)


def command(run: Run, script: str) -> str:
    """The command that repeats a run: every setting that was not a default, as it was logged."""
    words = []
    for pairs in (event.pairs for event in run.all("config")):
        if pairs.get("name") not in ("run_id", "output_dir", "resume", None):
            value, given = pairs.get("value", ""), pairs.get("source") != "default"
            words += [f"{pairs['name'].upper()}={shlex.quote(value)}"] * given
    processes = run.last("device").pairs.get("world_size", "1")
    words.append(f"torchrun --standalone --nproc_per_node={processes} {script}")
    return " \\\n    ".join(words)


def headline(submission: Mapping[str, Any]) -> str:
    """The result in one paragraph, what it was measured on, and what is to be said besides."""
    std = f" ± {submission['std']:.5f}" if submission["std"] is not None else ""
    seeds = submission["seeds"]
    lines = [
        f"**val_bpb {submission['val_bpb']:.5f}{std}** over {len(seeds)} "
        f"seed{'s' * (len(seeds) > 1)} ({', '.join(map(str, seeds))}), {submission['score']}; "
        f"{submission['bytes_total']:,} bytes of code and model at most; "
        f"{submission['hardware']}, {submission['wallclock_seconds']:.1f} s of training; "
        f"validation text of {submission['val_tokens']:,} tokens, "
        f"{submission['val_bytes']:,} bytes."
    ]
    lines += [] if submission["leaderboard_comparable"] else [NOT_COMPARABLE]
    lines += ["\n".join(f"- {text}" for text in submission["remarks"])]
    return "\n\n".join(filter(None, lines))


def facts_list(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in facts.items())


def checked_readme(
    submission: Mapping[str, Any], runs: Sequence[Run], pictures: Sequence[str]
) -> str:
    """README.md without the author's notes, which follow at its end."""
    script = f"records/{submission['track']}/{folder_name(submission)}/{SCRIPT}"
    comparison = submission["comparison"]
    against = f"```\n{logs.comparison_text(comparison)}\n```" if comparison else "None was given."
    images = [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in pictures]
    sections = [
        f"# {submission['name']}",
        headline(submission),
        f"*{NOT_CHECKED}:* {submission['blurb']}",
        f"## Results by seed\n\n{logs.markdown_table(logs.table_rows(runs))}",
        "\n".join(images),
        f"## Against a base\n\n{against}",
        f"## Run\n\nFrom the repository's root, one seed:\n\n"
        f"```bash\n{command(runs[0], script)}\n```\n\n"
        f"The seeds: {', '.join(map(str, submission['seeds']))}. `{SCRIPT}` is the file that ran: "
        f"{submission['bytes_code']:,} bytes, sha256 `{submission['code_sha256']}`, the same in "
        "every log.",
        f"## Hardware, versions, data\n\n- {submission['hardware']}\n"
        f"{facts_list(submission['versions'] | submission['data'])}",
        f"## {NOTES_HEADING}\n\n*{NOT_CHECKED}.*",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def to_json(submission: Mapping[str, Any]) -> str:
    return json.dumps(submission, indent=2, ensure_ascii=False) + "\n"


def file_sums(paths: Sequence[Path]) -> dict[str, str]:
    """The sha256 of each file, by its name."""
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return dict(sorted(found.items()))


# --------------------------------------------------------------------------------------- package


def package(args: argparse.Namespace) -> Path:
    """Writes the record of the runs in `args.runs`; returns its folder.

    Raises RecordError with every reason why these runs are no record, and writes nothing then.
    """
    source, identity = args.runs, vars(args)
    check_identity(identity)
    if not (source / SCRIPT).is_file():
        raise RecordError(f"{source} has no {SCRIPT}: name the folder that run_seeds.sh wrote")
    runs = read_logs(source)
    if not runs:
        raise RecordError(f"{source} has no train_seed<N>.log: scripts/run_seeds.sh makes them")
    submission = build_submission(runs, identity, args.track, logs.read_base(args))
    target = RECORDS / submission["track"] / folder_name(submission)
    if target.exists() and not args.replace:
        raise RecordError(f"{target} exists: choose another --name, or --replace it")
    old = read_submission(target / SUBMISSION) if target.exists() else {"name": args.name}
    if old.get("name") != args.name:
        raise RecordError(f"{target} is a record of another name: choose another --name")
    if args.blurb == BLURB:
        submission["blurb"] = old.get("blurb", BLURB)
    notes = read_notes(args.notes) if args.notes else notes_of(target)
    RECORDS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=RECORDS) as scratch:
        folder = Path(scratch, submission["track"], target.name)
        folder.mkdir(parents=True)
        for path in (source / SCRIPT, *(run.path for run in runs)):
            shutil.copyfile(path, folder / path.name)
        pictures = draw_pictures(runs, folder)
        submission["files"] = file_sums([*(run.path for run in runs), *pictures])
        readme = checked_readme(submission, runs, [path.name for path in pictures])
        texts = {SUBMISSION: to_json(submission), README: f"{readme}\n{notes}\n"}
        for name, text in (texts | {REQUIREMENTS: requirements(runs[0])}).items():
            (folder / name).write_text(text, encoding="utf-8", errors="replace")
        errors = check(folder)
        if errors:
            raise RecordError("\n".join(errors))
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.replace(Path(scratch, "old"))
        folder.replace(target)
    return target


def read_notes(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeError:
        raise RecordError(f"--notes: {path} is no text in UTF-8: convert it") from None
    if re.search(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]", text):
        raise RecordError(f"--notes: {path} has control characters: remove them")
    return text


def notes_of(folder: Path) -> str:
    """The author's notes of the record that is replaced, if there is one."""
    text = ""
    if (folder / README).is_file():
        heading = f"## {NOTES_HEADING}\n\n*{NOT_CHECKED}.*\n"
        text = (folder / README).read_text("utf-8", "replace").partition(heading)[2]
    return text.strip() or "Nothing was noted down for this record."


def draw_pictures(runs: Sequence[Run], folder: Path) -> list[Path]:
    """The pictures of these very logs; none, with a note, where matplotlib is missing."""
    try:
        from plot_logs import draw_all

        return sorted(draw_all(runs, folder)[0])
    except ImportError:
        print("note: packaged without pictures: they need matplotlib (pip install matplotlib)")
        return []


def print_notes(folder: Path) -> None:
    """What the author should know before the record is published."""
    submission, runs = read_submission(folder / SUBMISSION), read_logs(folder)
    for text in submission["remarks"]:
        print(f"note: {text}")
    for text in limit_errors(runs, TEN_MINUTE_TRACK):
        print(f"note: not on the contest's track: {text}")
    values = {value for run in runs for value in run.config.values()}
    for path in sorted(value for value in values if Path(value).is_absolute()):
        print(f"note: the logs name {path}, which publishing them shows")


# ----------------------------------------------------------------------------------------- check


def read_logs(folder: Path) -> list[Run]:
    return logs.read_runs(
        sorted(p for p in folder.iterdir() if LOG_NAME.fullmatch(p.name) and p.is_file())
    )


def pictures_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if PICTURE_NAME.fullmatch(path.name))


def read_submission(path: Path) -> dict[str, Any]:
    """Raises RecordError unless the file is a JSON object whose identity can be printed."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise RecordError(f"{path.name} has more than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path.name} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path.name} is no JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise RecordError(f"{path.name} is no JSON object")
    return value


def check_identity(identity: Mapping[str, Any]) -> None:
    """Raises RecordError unless each text is one line: it could pose as a section otherwise."""
    for key in IDENTITY:
        text = identity.get(key)
        if not isinstance(text, str) or not text.strip():
            raise RecordError(f"there is no text for {key}")
        if len(text.splitlines()) > 1 or text != text.encode(errors="ignore").decode():
            raise RecordError(f"the text for {key} has more than a line, or is no UTF-8")


def base_in(submission: Mapping[str, Any]) -> Base | None:
    """The base that a submission was compared with. Raises RecordError if it is malformed."""
    if submission.get("comparison") is None:
        return None
    try:
        base = Base(**submission["comparison"]["base"])
        std, n = base.bpb["std"], int(base.bpb["n"])
        spread = logs.Spread(float(base.bpb["mean"]), None if std is None else float(std), n)
        if len(base.name.splitlines()) != 1:
            raise ValueError
    except (AttributeError, TypeError, KeyError, ValueError, OverflowError):
        raise RecordError(f"{SUBMISSION}: comparison names no base") from None
    return base._replace(bpb=spread)


def file_errors(folder: Path) -> Iterator[str]:
    """Which files are missing, are too many, or are no files."""
    names = {path.name for path in folder.iterdir()}
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            yield f"{path.name} is no file"
    yield from (f"{name} is missing" for name in sorted(REQUIRED - names))
    if not any(map(LOG_NAME.fullmatch, names)):
        yield "there is no train_seed<N>.log"
    for name in sorted(names - REQUIRED):
        if not LOG_NAME.fullmatch(name) and not PICTURE_NAME.fullmatch(name):
            yield f"{name} does not belong to a record"


def script_errors(folder: Path, runs: Sequence[Run]) -> Iterator[str]:
    """Whether the script in the folder is the one that made the logs, and starts there."""
    data = (folder / SCRIPT).read_bytes()
    for run in runs:
        code = run.last("code")
        if code.pairs.get("sha256") != hashlib.sha256(data).hexdigest():
            yield f"{run.path.name} was made by another script: its sha256 is not {SCRIPT}'s"
        elif code.number("bytes") != len(data):
            yield f"{run.path.name} counts {code.number('bytes')} bytes, {SCRIPT} has {len(data)}"
        if run.path.name != f"train_seed{run.seed}.log":
            yield f"{run.path.name} is a run of seed {run.seed}"
    try:
        help_text = [sys.executable, "-B", SCRIPT, "--help"]
        subprocess.run(help_text, cwd=folder, capture_output=True, timeout=300, check=True)
    except subprocess.SubprocessError as error:
        words = (error.stderr or b"").decode(errors="replace").strip().splitlines()[-3:]
        yield f"{SCRIPT} does not start inside the record's folder: {' / '.join([*words] or ['?'])}"


def content_errors(folder: Path, runs: Sequence[Run]) -> Iterator[str]:
    """What in submission.json, README.md and requirements.txt does not follow from the logs."""
    found, pictures = read_submission(folder / SUBMISSION), pictures_in(folder)
    check_identity(found)
    sums = file_sums([*(run.path for run in runs), *pictures])
    yield from sum_errors(found.get("files"), sums)
    expected = build_submission(runs, found, str(found.get("track")), base_in(found))
    expected["files"] = sums
    readme = checked_readme(expected, runs, [path.name for path in pictures])
    texts = {SUBMISSION: to_json(expected), REQUIREMENTS: requirements(runs[0]), README: readme}
    for name, text in texts.items():
        data, wanted = (folder / name).read_bytes(), text.encode(errors="replace")
        checked = data[: len(wanted)] if name == README else data  # the notes follow
        if checked != wanted:
            yield f"{name} is not what the logs and pictures give:\n{difference(checked, text)}"
    place = f"{expected['track']}/{folder_name(expected)}"
    if f"{folder.parent.name}/{folder.name}" != place:
        yield f"the folder must be {place}, by its track, date and name"


def sum_errors(named: Any, there: Mapping[str, str]) -> Iterator[str]:
    """Which logs and pictures are not those that were packaged; named: name to sha256."""
    named = named if isinstance(named, dict) else {}
    for name in sorted(named.keys() | there.keys()):
        if name not in there:
            yield f"{name} is missing: it was packaged"
        elif name not in named:
            yield f"{name} was not packaged"
        elif named[name] != there[name]:
            yield f"{name} is not the file that was packaged"


def difference(found: bytes, expected: str) -> str:
    """The first lines that differ: - is what is there, + what should be."""
    lines = found.decode(errors="replace").split("\n"), expected.split("\n")
    changes = islice(difflib.unified_diff(*lines, n=0, lineterm=""), 3, 9)
    return "\n".join(f"{line[0]} {line[1:121]!r}" for line in changes)


def check(folder: Path) -> list[str]:
    """Every reason why `folder` is not a record; none if it is one."""
    if not folder.is_dir():
        return [f"{folder} is no folder"]
    errors = list(file_errors(folder))
    if errors:
        return errors
    try:
        runs = read_logs(folder)
        errors += script_errors(folder, runs)
        errors += content_errors(folder, runs)
    except (RecordError, LogError) as error:
        errors += str(error).splitlines()
    return errors


def read_env(path: Path) -> dict[str, str]:
    """The KEY=value lines of `path`, whatever its line ends. Raises RecordError.

    Relative paths in it are taken from the repository's root.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise RecordError(f"--env: {path} cannot be read ({error})") from None
    env = {}
    for line in (line for line in lines if line.strip() and not line.startswith("#")):
        match = re.fullmatch(r"(?:export )?([A-Z][A-Z0-9_]*)=(.*?)\s*", line)
        if not match:
            raise RecordError(f"--env: {path} has a line that is no NAME=VALUE: {line[:40]!r}")
        env[match[1]] = match[2].strip("\"'")
    return env | {name: str(ROOT / env[name]) for name in DATA_PATHS if name in env}


def rerun(folder: Path, env_file: Path) -> list[str]:
    """Runs the record's script in its folder, and prints its score; returns what failed."""
    env = read_env(env_file) | os.environ
    if not list(Path(env.get("DATA_PATH", "")).glob("fineweb_val_*.bin")):
        text = "has no validation shard: bash scripts/demo.sh makes the demo's"
        return [f"DATA_PATH={env.get('DATA_PATH')} {text}"]
    beside = Path(env["DATA_PATH"], "tokenizer.model")
    if beside.is_file():  # older scripts do not look there
        env.setdefault("TOKENIZER_PATH", str(beside))
    env |= {name: str(Path(env[name]).resolve()) for name in DATA_PATHS if name in env}
    before = set(folder.iterdir())
    with tempfile.TemporaryDirectory() as output:
        env |= {"OUTPUT_DIR": output, "RUN_ID": "rerun"}
        code = subprocess.run([sys.executable, "-B", SCRIPT], cwd=folder, env=env).returncode
        if code != 0:
            return [f"the rerun ended with exit code {code}"]
        run = logs.read_run(Path(output, "rerun.txt"))
    errors = [f"the rerun's log is missing {text}" for text in run.missing]
    errors += artifact_errors(run)
    errors += [f"the rerun left {path.name}" for path in sorted(set(folder.iterdir()) - before)]
    if run.final:
        print(f"rerun: val_bpb {run.scores[run.final].val_bpb:.8f} on {env['DATA_PATH']}")
    return errors


# --------------------------------------------------------------------------------------- command


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="action", required=True, metavar="package|check")
    add = commands.add_parser("package", help="make a record")
    add.add_argument("runs", type=Path, metavar="RUN_DIR", help="the script and its logs")
    add.add_argument("--name", required=True, help="of the submission, and of its folder")
    add.add_argument("--author", required=True, help="as it shall be credited")
    add.add_argument("--github-id", required=True, help="of the author")
    add.add_argument("--blurb", default=BLURB, help="what it is, in a sentence or two")
    add.add_argument(
        "--track",
        choices=(TEN_MINUTE_TRACK, OPEN_TRACK),
        help="if not given, the first whose rules the runs keep",
    )
    add.add_argument("--notes", type=Path, help="Markdown: what was tried and did not work")
    add.add_argument("--replace", action="store_true", help="a record of this date and name")
    logs.add_base_arguments(add)
    look = commands.add_parser("check", help="refuse a record that is not what it says")
    look.add_argument("folders", type=Path, nargs="*", metavar="DIR")
    look.add_argument("--all", action="store_true", help="every record of the repository")
    look.add_argument(
        "--rerun", action="store_true", help="also run the script, on the demo's data"
    )
    look.add_argument("--env", type=Path, default=DEMO_ENV, help="settings of --rerun, KEY=value")
    args = parser.parse_args(argv)
    if args.action == "check" and bool(args.folders) == args.all:
        parser.error("name the folders of records, or --all")
    return args


def check_command(args: argparse.Namespace) -> int:
    records = sorted(path for path in RECORDS.glob("track_*/*") if path.is_dir())
    failed = False
    for folder in records if args.all else [path.resolve() for path in args.folders]:
        errors = check(folder)
        print(f"{folder.name}: {'refused' if errors else 'stands'}", flush=True)
        if args.rerun and not errors:
            errors = rerun(folder, args.env)
        for text in errors:
            print("  refused: " + text.replace("\n", "\n    "))
        failed |= bool(errors)
    root = RECORDS.parent / SUBMISSION
    copies = [path.read_bytes() for path in (r / SUBMISSION for r in records) if path.is_file()]
    if args.all and copies and not (root.is_file() and root.read_bytes() in copies):
        print(f"refused: {root} is no record's: copy that of the record which speaks for all")
        failed = True
    return int(failed)


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    try:
        if args.action == "check":
            return check_command(args)
        folder = package(args)
        print(f"packaged and checked: {folder}")
        print_notes(folder)
    except BrokenPipeError:
        raise  # run_command's
    except (RecordError, LogError, OSError) as error:
        text = logs.in_words(error) if isinstance(error, OSError) else str(error)
        print("error: " + text.replace("\n", "\nerror: "), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    logs.run_command(main)
