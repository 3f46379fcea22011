"""Refuses a record that is not what it says.

    python scripts/check_record.py records/TRACK/DATE_NAME
    python scripts/check_record.py --all                    every record, and submission.json
    python scripts/check_record.py DIR --rerun              and run its script on the demo data

A record stands if its files are there and nothing else, its logs and pictures are those that were
packaged (by sha256), its logs are complete runs of its train_gpt.py (by sha256) with one
configuration and different seeds that do not contradict themselves, its submission.json,
requirements.txt and README.md are what the logs give, no seed breaks a limit (16,000,000 bytes, its
wall clock, 600 s of evaluation), and its script starts inside its folder. Every reason against it
is printed, a line each; the exit code is then 1.

Not checked are the author's own words (name, blurb, and in README.md the notes at its end), the
figure of the base that a record is compared with (nor, without scipy, t and p), what the pictures
show, and whether the runs took place: one who writes logs that agree with themselves, and their
sums, passes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import record
from record import LOG_NAME, README, REQUIREMENTS, SCRIPT, SUBMISSION, RecordError
from run_log import LIMIT_BYTES, LogError, Run, read_runs
from trainer_runs import DEMO_ENV, ROOT, RunError, help_text, read_env_file, run_trainer

RECORDS = ROOT / "records"
MAX_JSON_BYTES = 1 << 20


def read_submission(path: Path) -> dict[str, Any]:
    """Raises RecordError unless the file holds a JSON object of a sensible size."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise RecordError(f"{path.name} has more than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path.name} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path.name} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise RecordError(f"{path.name} is no JSON object")
    return value


def file_errors(folder: Path) -> Iterator[str]:
    names = {path.name for path in folder.iterdir()}
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            yield f"{path.name} is no file"
    required = {README, SUBMISSION, SCRIPT, REQUIREMENTS}
    yield from (f"{name} is missing" for name in sorted(required - names))
    logs = {name for name in names if LOG_NAME.fullmatch(name)}
    if not logs:
        yield "there is no train_seed<N>.log"
    for name in sorted(names - required - logs):
        if not record.FIGURE_NAME.fullmatch(name):
            yield f"{name} does not belong to a record"


def read_logs(folder: Path) -> list[Run]:
    return read_runs(sorted(p for p in folder.iterdir() if LOG_NAME.fullmatch(p.name)))


def figures_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if record.FIGURE_NAME.fullmatch(path.name))


def sum_errors(folder: Path, runs: Sequence[Run]) -> Iterator[str]:
    """Which logs and pictures are not those that were packaged."""
    listed = read_submission(folder / SUBMISSION).get("files")
    if not isinstance(listed, dict):
        yield f"{SUBMISSION} has no files: the sha256 of each log and picture, by name"
        return
    found = record.file_sums([*(run.path for run in runs), *figures_in(folder)])
    for name in sorted(listed.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing: {SUBMISSION} lists it"
        elif name not in listed:
            yield f"{name} was not packaged: {SUBMISSION} does not list it"
        elif found[name] != listed[name]:
            yield f"{name} was changed: its sha256 is {found[name]}, packaged was {listed[name]}"


def script_errors(folder: Path, runs: Sequence[Run]) -> Iterator[str]:
    """Whether the script in the folder is the one that made the logs, and starts there."""
    script = folder / SCRIPT
    digest, size = record.file_sha256(script), script.stat().st_size
    for run in runs:
        code = run.last("code")
        if code.pairs.get("sha256") != digest:
            yield f"{run.path.name} was made by another script: its sha256 is not {SCRIPT}'s"
        elif code.integer("bytes") != size:
            yield f"{run.path.name} counts {code.integer('bytes')} bytes, {SCRIPT} has {size}"
        match = LOG_NAME.fullmatch(run.path.name)
        if match and int(match[1]) != run.seed:
            yield f"{run.path.name} is a run of seed {run.seed}"
    try:
        help_text(script)
    except RunError as error:
        yield f"{SCRIPT} does not start inside the record's folder: {error}"


def differences(found: Any, expected: Any, where: str = "") -> Iterator[str]:
    """Where two JSON values differ; numbers to nine digits, as t and p vary by library version."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for key in sorted(expected.keys() | found.keys()):
            name = f"{where}.{key}" if where else key
            if key not in found or key not in expected:
                yield f"{name} is {'missing' if key in expected else 'unknown'}"
            else:
                yield from differences(found[key], expected[key], name)
        return
    numeric = all(type(v) in (int, float) for v in (found, expected))
    same = math.isclose(found, expected, rel_tol=1e-9) if numeric else found == expected
    if not same:
        yield f"{where} is {found!r}, the logs give {expected!r}"


def first_difference(found: bytes, expected: bytes) -> str:
    """Where `found` does not begin as `expected` does: the first such line, from shortly before."""
    lines = zip_longest(found.split(b"\n"), expected.split(b"\n"))
    number, pair = next((i, pair) for i, pair in enumerate(lines, 1) if pair[0] != pair[1])
    have, want = ((line or b"").decode(errors="replace") for line in pair)
    unlike = (i for i in range(len(have) + 1) if have[: i + 1] != want[: i + 1])
    start = max(0, next(unlike, 0) - 20)
    part = slice(start, start + 60)
    return f"line {number} has {have[part]!r}, the logs give {want[part]!r}"


def content_errors(folder: Path, runs: Sequence[Run]) -> Iterator[str]:
    """What in submission.json, README.md and requirements.txt does not follow from the logs."""
    found = read_submission(folder / SUBMISSION)
    identity, base = record.read_identity(found), record.base_in(found)
    expected = json.loads(
        record.to_json(record.build_submission(runs, identity, str(found.get("track")), base))
    )
    if base and "scipy is not installed" in expected["comparison"]["test"]:
        # The test cannot be repeated; the difference still is.
        expected["comparison"] |= {
            k: found["comparison"].get(k) for k in ("test", "t", "p", "p_lower")
        }
    del expected["files"]  # sum_errors compares them
    stated = {key: value for key, value in found.items() if key != "files"}
    wrong = list(differences(stated, expected))
    yield from (f"{SUBMISSION}: {text}" for text in wrong)
    if (folder / SUBMISSION).read_bytes() != record.to_json(found).encode(errors="replace"):
        yield f"{SUBMISSION} is not laid out as package_record.py does, or has a key twice"
    place = f"{expected['track']}/{record.folder_name(expected)}"
    if f"{folder.parent.name}/{folder.name}" != place:
        yield f"the folder must be {place}, by its track, date and name"
    if wrong:
        return
    readme = (folder / README).read_bytes()
    figures = [path.name for path in figures_in(folder)]
    checked = record.checked_readme(found, runs, figures).encode(errors="replace")
    if not readme.startswith(checked):
        yield f"{README}: {first_difference(readme, checked)}"
    if (folder / REQUIREMENTS).read_bytes() != record.requirements(runs[0]).encode():
        yield f"{REQUIREMENTS} does not list the versions of the logs"


def check(folder: Path) -> list[str]:
    """Every reason why `folder` is not a record; none if it is one."""
    if not folder.is_dir():
        return [f"{folder} is no folder"]
    errors = list(file_errors(folder))
    if errors:
        return errors
    try:
        runs = read_logs(folder)
        errors += sum_errors(folder, runs)
        errors += script_errors(folder, runs)
        errors += content_errors(folder, runs)
    except (RecordError, LogError) as error:
        errors += str(error).splitlines()
    return errors


def rerun(folder: Path, env: Mapping[str, str]) -> tuple[list[str], str]:
    """Runs the record's script in its folder; returns the errors, and the score it reached."""
    data = Path(env.get("DATA_PATH", ""))
    if not list(data.glob("fineweb_val_*.bin")):
        return [f"DATA_PATH={data} has no validation shard: bash scripts/demo.sh makes one"], ""
    script = folder.resolve() / SCRIPT
    before = {path.name for path in folder.iterdir()}
    with tempfile.TemporaryDirectory() as output:
        try:
            run = run_trainer(script, env, Path(output), show=True)
        except RunError as error:
            return [str(error)], ""
    errors = [f"the rerun's log is missing {text}" for text in run.missing]
    if run.last("code").pairs.get("sha256") != record.file_sha256(script):
        errors.append("the rerun's log gives another sha256 than the script's")
    if run.bytes.get("total_bytes", 0) > LIMIT_BYTES:
        errors.append(f"the rerun needs {run.bytes['total_bytes']:,} bytes")
    litter = {path.name for path in folder.iterdir()} - before
    errors += [f"the rerun left {name} in the folder" for name in sorted(litter)]
    score = run.scores.get(str(run.final))
    return errors, f"rerun: val_bpb {score.val_bpb:.8f} on {data}" if score else ""


def all_records(records: Path) -> list[Path]:
    return sorted(path for path in records.glob("track_*/*") if path.is_dir())


def root_errors(records: Path) -> list[str]:
    """Whether the root's submission.json is the one of the best record."""
    path = records.parent / SUBMISSION
    best = best_record(records)
    if best is None:
        return [f"{SUBMISSION} exists, but no record does"] if path.exists() else []
    try:
        found = read_submission(path)
        return [f"{SUBMISSION}: {text}" for text in differences(found, root_submission(best))]
    except RecordError as error:
        return [f"{error}: scripts/package_record.py --update-root writes it"]


def best_record(records: Path) -> Path | None:
    """The record that speaks for the repository.

    FineWeb with 8 H100 goes before any other, a GPU before a CPU; then the records on the same
    validation text as the newest one compete by val_bpb. Across texts bpb cannot be compared.
    """
    found = {path: read_submission(path / SUBMISSION) for path in all_records(records)}
    for path, submission in found.items():
        needed = {"leaderboard_comparable", "hardware", "date", "recipe", "data", "val_bpb"}
        if not needed <= submission.keys():
            raise RecordError(f"{path} is no record: check_record.py says why")
    if not found:
        return None

    def rank(path: Path) -> tuple[bool, bool]:
        return found[path]["leaderboard_comparable"], not found[path]["hardware"].startswith("CPU")

    newest = max(found, key=lambda path: (rank(path), found[path]["date"], path.name))
    rivals = [
        path
        for path in found
        if rank(path) == rank(newest)
        and found[path]["recipe"] == found[newest]["recipe"]
        and validation(found[path]) == validation(found[newest])
    ]
    return min(rivals, key=lambda path: (found[path]["val_bpb"], path.name))


def validation(submission: Mapping[str, Any]) -> tuple[Any, ...]:
    data = submission["data"]
    return tuple(data.get(f"val_{key}") for key in ("fingerprint", "tokens_scored", "bytes_scored"))


def root_submission(folder: Path) -> dict[str, Any]:
    """A record's submission.json with the place of the record."""
    place = f"records/{folder.parent.name}/{folder.name}"
    return {"record": place, **read_submission(folder / SUBMISSION)}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="*", metavar="DIR")
    parser.add_argument("--all", action="store_true", help="every record of the repository")
    parser.add_argument("--rerun", action="store_true", help="also run the script on the demo data")
    parser.add_argument(
        "--env", type=Path, default=DEMO_ENV, help="KEY=value lines with the settings of --rerun"
    )
    args = parser.parse_args(argv)
    if bool(args.folders) == args.all:
        parser.error("name the folders of records, or --all")
    folders = all_records(RECORDS) if args.all else [path.resolve() for path in args.folders]
    errors = {folder: check(folder) for folder in folders}
    try:
        env = read_env_file(args.env) if args.rerun else {}
    except RunError as error:
        parser.error(str(error))
    for folder, found in errors.items():
        print(f"{folder.name}: {'refused' if found else 'stands'}", flush=True)
        if args.rerun and not found:
            print(f"  rerun with {args.env}:", flush=True)
            failed, text = rerun(folder, env)
            found += failed
            print(f"  {text or 'rerun: failed'}")
        for text in found:
            print("  refused: " + text.replace("\n", "\n    "))
    root = root_errors(RECORDS) if args.all and not any(errors.values()) else []
    for text in root:
        print(f"refused: {text}")
    return 1 if root or any(errors.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
