"""Makes a record from a folder with a script and its logs, as run_seeds.sh leaves it.

    python scripts/package_record.py logs/seeds --name "Stable Growing Recurrence" \\
        --author "Your Name" --github-id you --figures build/plots/*.png --notes what_failed.md

Writes records/TRACK/DATE_NAME/ (README.md, submission.json, train_gpt.py, logs, requirements.txt,
figures), all of it from the logs, and the repository's submission.json from the best record. A
record that check_record.py would refuse is not written. The same logs give the same bytes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import record
from check_record import RECORDS, best_record, check, read_logs, root_submission
from inspect_logs import add_base_arguments, read_base
from record import README, REQUIREMENTS, SCRIPT, SUBMISSION, Identity, RecordError
from run_log import LogError, Run
from seed_stats import Base, StatsError

RECIPE = "Stable Growing Recurrence"
BLURB = (
    "A GPT whose core layers are applied once, then twice, then three times as training proceeds, "
    "with residual scales, error feedback and a Jacobian proxy term in the loss; Parallel Muon, "
    "late quantization-aware training, int6 and lzma, score-first test-time training."
)


def write_record(
    folder: Path,
    source: Path,
    runs: Sequence[Run],
    submission: dict,
    figures: Sequence[Path],
    notes: str,
) -> None:
    """All files of the record into the new folder `folder`."""
    folder.mkdir(parents=True)
    names = sorted(path.name for path in figures)
    texts = {
        SUBMISSION: record.to_json(submission),
        README: record.build_readme(submission, runs, names, notes),
        REQUIREMENTS: record.requirements(runs[0]),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for path in (source / SCRIPT, *(run.path for run in runs), *figures):
        shutil.copyfile(path, folder / path.name)


def package(
    source: Path,
    identity: Identity,
    track: str | None,
    base: Base | None,
    figures: Sequence[Path],
    notes: str,
    records: Path = RECORDS,
    replace: bool = False,
) -> Path:
    """Writes the record of the runs in `source`; returns its folder.

    Raises RecordError with every reason why these runs are no record, and writes nothing then.
    """
    runs = inputs(source, figures)
    if track is None:
        track = record.TEN_MINUTE_TRACK if fits_ten_minutes(runs) else record.OPEN_TRACK
    submission = record.build_submission(runs, identity, track, base, figures)
    target = records / track / record.folder_name(submission)
    if target.exists() and not replace:
        raise RecordError(f"{target} exists: choose another --name, or --replace it")
    records.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=records) as scratch:
        folder = Path(scratch, track, target.name)
        write_record(folder, source, runs, submission, figures, notes)
        errors = check(folder)
        if errors:
            raise RecordError("\n".join(errors))
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.replace(Path(scratch, "old"))
        folder.replace(target)
    return target


def inputs(source: Path, figures: Sequence[Path]) -> list[Run]:
    if not (source / SCRIPT).is_file():
        raise RecordError(f"{source} has no {SCRIPT}: name the folder that run_seeds.sh wrote")
    wrong = [str(p) for p in figures if not p.is_file() or not record.FIGURE_NAME.fullmatch(p.name)]
    if wrong:
        raise RecordError(f"{', '.join(wrong)}: figures are .png files named by letters and digits")
    if len({path.name for path in figures}) < len(figures):
        raise RecordError("two figures have one name: rename one")
    runs = read_logs(source)
    if not runs:
        raise RecordError(f"{source} has no train_seed<N>.log: scripts/run_seeds.sh makes them")
    return runs


def fits_ten_minutes(runs: Sequence[Run]) -> bool:
    return not list(record.limit_errors(runs, record.TEN_MINUTE_TRACK))


def absolute_paths(runs: Sequence[Run]) -> list[str]:
    """Absolute paths of this machine in the logs' settings, which would be published with them."""
    values = {value for run in runs for value in run.config.values()}
    return sorted(value for value in values if Path(value).is_absolute())


def update_root(records: Path = RECORDS) -> Path | None:
    """Writes the root's submission.json from the best record; returns that record."""
    best = best_record(records)
    if best is not None:
        path = records.parent / SUBMISSION
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(record.to_json(root_submission(best)), encoding="utf-8")
        temporary.replace(path)
    return best


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="?", metavar="RUN_DIR", help="script and logs")
    parser.add_argument("--name", default=RECIPE, help="of the submission, and of its folder")
    parser.add_argument("--author", help="as it shall be credited")
    parser.add_argument("--github-id", help="of the author")
    parser.add_argument("--blurb", default=BLURB, help="what it is, in a sentence or two")
    parser.add_argument(
        "--recipe", default=RECIPE, help="records of one recipe compete for the root"
    )
    parser.add_argument(
        "--track",
        choices=(record.TEN_MINUTE_TRACK, record.OPEN_TRACK),
        help="if not given, the first whose rules the runs keep",
    )
    parser.add_argument("--figures", type=Path, nargs="+", default=[], metavar="PNG")
    parser.add_argument("--notes", type=Path, help="Markdown: what was tried and did not work")
    parser.add_argument("--replace", action="store_true", help="a record of this date and name")
    parser.add_argument("--update-root", action="store_true", help="write submission.json only")
    add_base_arguments(parser)
    args = parser.parse_args(argv)
    needed = {"RUN_DIR": args.runs, "--author": args.author, "--github-id": args.github_id}
    lacking = [name for name, value in needed.items() if not value]
    if lacking and not args.update_root:
        parser.error(f"{', '.join(lacking)} must be given")
    return args


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    try:
        if not args.update_root:
            identity = Identity(args.name, args.author, args.github_id, args.recipe, args.blurb)
            notes = args.notes.read_text(encoding="utf-8") if args.notes else ""
            folder = package(
                args.runs,
                identity,
                args.track,
                read_base(args),
                args.figures,
                notes,
                replace=args.replace,
            )
            print(f"packaged and checked: {folder}")
            for path in absolute_paths(read_logs(folder)):
                print(f"note: the logs name {path}, which publishing them shows")
        print(f"submission.json: {update_root() or 'no record yet'}")
    except (RecordError, LogError, StatsError, OSError) as error:
        print("error: " + str(error).replace("\n", "\nerror: "), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
