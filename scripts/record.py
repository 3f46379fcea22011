"""What a record is: its files, and its submission.json and README.md, both computed from its logs.

`package_record.py` writes what these functions return; `check_record.py` computes it again from
the logs in the record and compares. Nothing that is a number comes from anywhere else.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inspect_logs import comparison_text, markdown_table, summarize, table_rows
from run_log import LIMIT_BYTES, SCORES, TRAINING, Run, parse_number
from seed_stats import Base, Comparison, Spread, StatsError, compare, final_scores, validation_text

TEN_MINUTE_TRACK, OPEN_TRACK = "track_10min_16mb", "track_non_record_16mb"
LIMIT_SECONDS = 600.0
MIN_SEEDS = 3  # of the 10-minute track
SCRIPT, SUBMISSION, README, REQUIREMENTS = (
    "train_gpt.py",
    "submission.json",
    "README.md",
    "requirements.txt",
)
LOG_NAME = re.compile(r"train_seed(\d+)\.log")
FIGURE_NAME = re.compile(r"[A-Za-z0-9_-]+\.png")
# Text of FineWeb's validation split (50,000 documents): 151.08 million bytes, by any lossless
# tokenizer; published losses and bpb imply 151,079,964.
FINEWEB_VAL_BYTES = range(151_070_000, 151_091_000)
# Settings in which the runs of one configuration may differ.
PER_RUN = ("run_id", "seed", "output_dir", "resume")
SCORE_TEXT = {
    "pre_quant": "before quantization",
    "quantized": "quantized, plain windows",
    "sliding": "quantized, sliding windows",
    "ttt": "quantized, sliding windows with score-first test-time training",
}


RESULT_KEYS = {
    *("steps", "step_avg_ms", "pre_quant_val_bpb", "quantized_val_bpb", "sliding_val_bpb"),
    *("ttt_val_bpb", "ttt_gain_bpb", "val_loss", "train_seconds", "eval_seconds"),
    *("bytes_model", "bytes_total"),
}
NOT_COMPARABLE = (
    "> **Not a leaderboard figure**: it was not measured on FineWeb's validation split with 8 H100."
)
NOT_CHECKED = "The author's words, not checked"
NOTES_HEADING = f"## What did not work: the author's notes\n\n*{NOT_CHECKED}.*"
# A loss or bpb in a log has 8 decimals: it is off by at most half of the last one, with a little
# for the order of a sum.
ROUNDING = 0.51e-8


class RecordError(ValueError):
    """Why something is no record; the text has one reason a line."""


@dataclass(frozen=True)
class Identity:
    """What the logs cannot know: who submits it, under which name."""

    name: str
    author: str
    github_id: str
    recipe: str
    blurb: str


def read_identity(submission: Mapping[str, Any]) -> Identity:
    """Raises RecordError unless every text is there, in one line: it cannot pose as a section."""
    keys = Identity.__dataclass_fields__
    wrong = [key for key in keys if not isinstance(submission.get(key), str) or not submission[key]]
    if wrong:
        raise RecordError(f"{SUBMISSION} has no text for {', '.join(wrong)}")
    wrong = [key for key in keys if len(submission[key].splitlines()) != 1]
    if wrong:
        raise RecordError(f"{SUBMISSION} has more than a line for {', '.join(wrong)}")
    return Identity(**{key: submission[key] for key in keys})


def on_gpu(run: Run) -> bool:
    return (run.last("stop").integer("peak_memory_mib") or 0) > 0


def hardware(run: Run) -> str:
    device = run.last("device").pairs
    name, processes = device.get("name", "?"), device.get("world_size", "?")
    return f"{processes}x {name}" if on_gpu(run) else f"CPU {name}, processes: {processes}"


def on_fineweb(run: Run) -> bool:
    return run.final is not None and run.scores[run.final].bytes in FINEWEB_VAL_BYTES


def on_8_h100(run: Run) -> bool:
    device = run.last("device").pairs
    return on_gpu(run) and "H100" in device.get("name", "") and device.get("world_size") == "8"


def leaderboard_comparable(runs: Sequence[Run]) -> bool:
    return all(on_fineweb(run) and on_8_h100(run) for run in runs)


def data_of(run: Run) -> dict[str, Any]:
    """The data as the log identifies them: by folder, counts and fingerprints."""
    facts: dict[str, Any] = {
        "folder": Path(run.config.get("data_path", "?")).name,
        "tokenizer": Path(run.config.get("tokenizer_path", "?")).name,
    }
    for event in run.all("data"):
        split = event.pairs.get("split")
        for key in ("shards", "tokens"):
            facts[f"{split}_{key}"] = event.integer(key)
        facts[f"{split}_fingerprint"] = event.pairs.get("fingerprint")
    if run.final:
        score = run.scores[run.final]
        facts |= {"val_tokens_scored": score.tokens, "val_bytes_scored": score.bytes}
    return facts


def settings(run: Run) -> dict[str, str]:
    return {key: value for key, value in run.config.items() if key not in PER_RUN}


def score_errors(run: Run) -> Iterator[str]:
    """Which scores do not follow from their own loss, tokens and bytes, or are of another text."""
    texts = set()
    for event in run.events:
        if event.name not in (*SCORES.values(), "validation"):
            continue
        loss, bpb = event.number("val_loss"), event.number("val_bpb")
        tokens, text_bytes = event.integer("tokens"), event.integer("bytes")
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
    for tokens in sorted({tokens for tokens, _ in texts}):
        if held is None or tokens != held - 1:
            yield f"its scores have tokens:{tokens}, not 1 less than data split:val, tokens:{held}"


def contradictions(run: Run) -> Iterator[str]:
    """What a log says of itself that cannot be true."""
    yield from score_errors(run)
    chunk, ttt = run.last("ttt_chunk"), run.scores.get("ttt")
    done, chunks = chunk.fraction("chunk") or (0, 1)
    if ttt is not None and done == chunks:  # after the last chunk the whole text is scored
        whole = {float(f"{ttt.val_bpb + off:.6g}") for off in (-ROUNDING, ROUNDING)}
        if chunk.number("val_bpb") not in whole:
            yield (
                f"its last ttt_chunk has val_bpb:{chunk.pairs.get('val_bpb')}, legal_ttt_exact "
                f"{ttt.val_bpb:.8f}"
            )
    final = run.last(SCORES["ttt"])
    trained, planned = final.fraction("epochs") or (1, 0)
    if "epochs" in final.pairs and trained > planned:
        yield f"legal_ttt_exact has epochs:{final.pairs['epochs']}, it should be done/planned"
    last = max((e.step() or 0 for e in run.events if e.name in TRAINING), default=0)
    if last > (run.steps or 0):
        yield f"a line is of step {last}, training stopped after step {run.steps}"
    clock = max((line.seconds for line in run.steps_logged), default=0.0)
    if clock > (run.train_seconds or 0.0):
        yield f"a step ended at {clock:.3f} s, training at {run.train_seconds:.3f} s"
    sizes = {event.pairs.get("parameters") for event in run.all("model")}
    if len(sizes) != 1:
        yield f"its model lines have parameters:{', '.join(sorted(map(str, sizes))) or 'none'}"


def consistency_errors(runs: Sequence[Run]) -> Iterator[str]:
    """Why these logs are not the seeds of one configuration of one script, run to the end, that
    do not contradict themselves.
    """
    for run in runs:
        if run.missing:
            yield f"{run.path.name} is missing {'; '.join(run.missing)}: the run did not finish"
        if run.last("stop").integer("interrupted"):
            yield f"{run.path.name}: a signal ended its training early"
        yield from (f"{run.path.name}: {text}" for text in (*run.problems, *contradictions(run)))
        parts = run.bytes.get("code_bytes", 0) + run.bytes.get("model_bytes", 0)
        if run.bytes.get("total_bytes", parts) != parts:
            yield f"{run.path.name}: code and model are not the {run.bytes['total_bytes']} in total"
        if run.bytes.get("code_bytes") != run.last("code").integer("bytes"):
            yield f"{run.path.name} counts other bytes of code than those of the script that ran"
    seeds = [run.seed for run in runs]
    for seed in sorted({s for s in seeds if s is not None and seeds.count(s) > 1}):
        yield f"seed {seed} is in more than one log"
    for run in runs[1:]:
        for what, of in (
            ("script", lambda r: r.last("code").pairs.get("sha256")),
            ("hardware", hardware),
            ("versions", lambda r: r.last("versions").pairs),
            ("data", data_of),
            ("model", lambda r: r.last("model").pairs),
        ):
            if of(run) != of(runs[0]):
                yield f"{run.path.name} and {runs[0].path.name} differ in {what}"
        ours, theirs = settings(run), settings(runs[0])
        names = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if names:
            yield f"{run.path.name} and {runs[0].path.name} differ in {', '.join(names)}"


def limit_errors(runs: Sequence[Run], track: str) -> Iterator[str]:
    """Which limits of the game these runs break."""
    for run in runs:
        total, name = run.bytes.get("total_bytes", 0), run.path.name
        if total > LIMIT_BYTES:
            yield f"{name}: {total:,} bytes of code and model exceed {LIMIT_BYTES:,}"
        text = run.config.get("max_wallclock_seconds", "None")
        cap = parse_number(text)
        if cap is None and text != "None":
            yield f"{name}: max_wallclock_seconds={text} is neither a number nor None"
        step = max(run.step_ms_by_passes().values(), default=run.step_avg_ms or 0.0) / 1000
        # The clock is looked at between steps, so the step in flight may end after it.
        if cap is not None and (run.train_seconds or 0.0) > cap + step:
            yield f"{name}: training took {run.train_seconds:.3f} s, its wall clock is {cap:g} s"
        if (run.eval_seconds or 0.0) > LIMIT_SECONDS:
            yield f"{name}: evaluation took {run.eval_seconds:.1f} s, more than {LIMIT_SECONDS:g} s"
        if track == TEN_MINUTE_TRACK and (cap is None or cap > LIMIT_SECONDS):
            yield f"{name}: {track} asks for max_wallclock_seconds of at most {LIMIT_SECONDS:g}"
    if track == TEN_MINUTE_TRACK:
        if len(runs) < MIN_SEEDS:
            yield f"{track} asks for {MIN_SEEDS} seeds, here are {len(runs)}"
        if not leaderboard_comparable(runs):
            yield f"{track} is for runs on FineWeb with 8 H100: use {OPEN_TRACK}"
    elif track != OPEN_TRACK:
        yield f"there is no track {track}: use {TEN_MINUTE_TRACK} or {OPEN_TRACK}"


def seed_result(run: Run) -> dict[str, Any]:
    score = run.scores[str(run.final)]
    return {
        "val_loss": score.val_loss,
        "val_bpb": score.val_bpb,
        **{f"{name}_val_bpb": run.scores[name].val_bpb for name in SCORES if name in run.scores},
        "steps": run.steps,
        "step_avg_ms": round(run.step_avg_ms or 0.0, 2),
        "step_ms_by_passes": {str(p): round(v, 2) for p, v in run.step_ms_by_passes().items()},
        "train_seconds": run.train_seconds,
        "eval_seconds": run.eval_seconds,
        "bytes_model": run.bytes["model_bytes"],
        "bytes_total": run.bytes["total_bytes"],
    }


def build_submission(
    runs: Sequence[Run],
    identity: Identity,
    track: str,
    base: Base | None,
    figures: Iterable[Path] = (),
) -> dict[str, Any]:
    """submission.json as a dictionary. Raises RecordError with every reason why there is none."""
    errors = [] if runs else ["there is no log"]
    errors += list(consistency_errors(runs))
    if not errors:
        errors += list(limit_errors(runs, track))
    if errors:
        raise RecordError("\n".join(errors))
    try:
        kind, scores = final_scores(runs)
        validation_text(scores)
        comparison = compare(runs, base) if base else None
    except StatsError as error:
        raise RecordError(str(error)) from None
    spreads = summarize(runs)
    bpb = spreads[f"{kind}_val_bpb"]
    return {
        **asdict(identity),
        "date": run_date(runs),
        "track": track,
        "leaderboard_comparable": leaderboard_comparable(runs),
        "score": SCORE_TEXT[kind],
        "val_loss": round(spreads["val_loss"].mean, 8),
        "val_loss_std": rounded(spreads["val_loss"].std),
        "val_bpb": round(bpb.mean, 8),
        "std": rounded(bpb.std),
        "seeds": [run.seed for run in runs],
        "seed_results": {run.label: seed_result(run) for run in runs},
        "bytes_total": max(run.bytes["total_bytes"] for run in runs),
        "bytes_code": runs[0].bytes["code_bytes"],
        "wallclock_seconds": max(run.train_seconds or 0.0 for run in runs),
        "hardware": hardware(runs[0]),
        "versions": runs[0].last("versions").pairs,
        "data": data_of(runs[0]),
        "code_sha256": runs[0].last("code").pairs["sha256"],
        "comparison": describe_comparison(comparison, base),
        "files": file_sums([*(run.path for run in runs), *figures]),
    }


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 8)


def run_date(runs: Sequence[Run]) -> str:
    """The day on which the last of the runs started."""
    stamps = [run.last("run").pairs.get("started", "") for run in runs]
    match = re.match(r"(\d{4})(\d\d)(\d\d)", max(stamps))
    if match is None:
        raise RecordError(f"the run line of {runs[0].path.name} has no date (started:YYYYMMDD_...)")
    return "-".join(match.groups())


def describe_comparison(comparison: Comparison | None, base: Base | None) -> dict[str, Any] | None:
    if comparison is None or base is None:
        return None
    return {
        "base": asdict(base) | {"bpb": base.bpb._asdict()},
        "val_bpb": rounded(comparison.bpb),
        "nats_per_token": rounded(comparison.nats),
        "test": comparison.test,
        "t": comparison.t,
        "p": comparison.p,
        "p_lower": comparison.p_lower,
        "note": comparison.note,
    }


def base_in(submission: Mapping[str, Any]) -> Base | None:
    """The base that a submission was compared with. Raises RecordError if it is malformed."""
    if submission.get("comparison") is None:
        return None
    try:
        base = submission["comparison"]["base"]
        return Base(**{**base, "bpb": Spread(**base["bpb"])})
    except (TypeError, KeyError):
        raise RecordError(f"{SUBMISSION}: comparison names no base") from None


def folder_name(submission: Mapping[str, Any]) -> str:
    slug = re.sub(r"[^A-Za-z0-9.]+", "_", submission["name"]).strip("_")
    return f"{submission['date']}_{slug}"


def requirements(run: Run) -> str:
    """The packages that the runs used, at their versions."""
    versions = run.last("versions").pairs
    names = [name for name in versions if name not in ("python", "cuda")]
    lines = [f"{name}=={versions[name].split('+')[0]}" for name in names]
    return "\n".join(lines) + "\n"


def run_command(run: Run, script: str) -> str:
    """The command that repeats a run: every setting that was not a default, then torchrun."""
    given = {k: v for k, v in run.config.items() if run.sources.get(k) in ("env", "flag")}
    chosen = {k: v for k, v in given.items() if k not in ("run_id", "output_dir", "resume")}
    words = [f"{name.upper()}={shlex.quote(value)}" for name, value in chosen.items()]
    processes = run.last("device").pairs.get("world_size", "1")
    return " \\\n    ".join(
        [*words, f"torchrun --standalone --nproc_per_node={processes} {script}"]
    )


def results_table(runs: Sequence[Run]) -> str:
    """A row for each seed, then mean and deviation."""
    rows = table_rows(runs, RESULT_KEYS)
    return markdown_table(list(zip(*rows, strict=True)))


def times_table(runs: Sequence[Run]) -> str:
    keys = {f"step_ms_{passes}_passes" for run in runs for _, passes in run.growth}
    keys |= {"warm_up_seconds", "export_seconds"}
    return markdown_table(list(zip(*table_rows(runs, keys), strict=True)))


def headline(submission: Mapping[str, Any]) -> str:
    """The result in one paragraph, with what it was measured on."""
    std = f" ± {submission['std']:.5f}" if submission["std"] is not None else ""
    n = len(submission["seeds"])
    seeds = f"{n} seed{'s'[: n > 1]} ({', '.join(map(str, submission['seeds']))})"
    data = submission["data"]
    text = (
        f"**val_bpb {submission['val_bpb']:.5f}{std}** over {seeds}, {submission['score']}; "
        f"{submission['bytes_total']:,} bytes of code and model at most; "
        f"{submission['hardware']}, {submission['wallclock_seconds']:.1f} s of training; "
        f"validation text of {data['val_tokens_scored']:,} tokens, "
        f"{data['val_bytes_scored']:,} bytes."
    )
    return text if submission["leaderboard_comparable"] else f"{text}\n\n{NOT_COMPARABLE}"


def comparison_section(submission: Mapping[str, Any]) -> str:
    base = base_in(submission)
    if base is None:
        return "No base was given to compare with."
    c = submission["comparison"]
    comparison = Comparison(
        base.name,
        base.bpb,
        c["val_bpb"],
        c["nats_per_token"],
        c["test"],
        c["t"],
        c["p"],
        c["p_lower"],
        c["note"],
    )
    return f"```\nn = {len(submission['seeds'])}, {comparison_text(comparison)}\n```"


def facts_list(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in facts.items())


def build_readme(
    submission: Mapping[str, Any], runs: Sequence[Run], figures: Sequence[str], notes: str
) -> str:
    """README.md; `figures` are file names, `notes` is the author's text on what did not work."""
    text = notes.strip() or "Nothing was noted down for this record."
    return f"{checked_readme(submission, runs, figures)}\n{text}\n"


def checked_readme(
    submission: Mapping[str, Any], runs: Sequence[Run], figures: Sequence[str]
) -> str:
    """All of README.md but the notes, which follow: the part that check_record.py compares."""
    script = f"records/{submission['track']}/{folder_name(submission)}/{SCRIPT}"
    pictures = "\n".join(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in figures)
    sections = [
        f"# {submission['name']}",
        headline(submission),
        f"*{NOT_CHECKED}:* {submission['blurb']}",
        f"## Results\n\n{results_table(runs)}\n\nStep times and seconds outside the clock:\n\n"
        f"{times_table(runs)}",
        pictures,
        f"## Against a base\n\n{comparison_section(submission)}",
        f"## Run\n\nFrom the repository's root, one seed:\n\n"
        f"```bash\n{run_command(runs[0], script)}\n```\n\n"
        f"The seeds: {', '.join(map(str, submission['seeds']))}. `{SCRIPT}` is the file that ran: "
        f"{submission['bytes_code']:,} bytes, sha256 `{submission['code_sha256']}`, the same in "
        "every log.",
        f"## Hardware and versions\n\n{submission['hardware']}\n\n"
        f"{facts_list(submission['versions'])}",
        f"## Data\n\n{facts_list(submission['data'])}",
        NOTES_HEADING,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def to_json(submission: Mapping[str, Any]) -> str:
    return json.dumps(submission, indent=2, ensure_ascii=False) + "\n"


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def file_sums(paths: Iterable[Path]) -> dict[str, str]:
    """The sha256 of each file, by its name."""
    return {path.name: file_sha256(path) for path in sorted(paths, key=lambda path: path.name)}
