"""Prints what the logs of one or more seeds say: steps, times, scores, bytes, mean and deviation.

    python scripts/inspect_logs.py logs/seeds/train_seed*.log
    python scripts/inspect_logs.py NEW/*.log --against OLD/*.log
    python scripts/inspect_logs.py NEW/*.log --against-figure 1.1163,0.0013,3

Differences are ours minus the base: lower is better. Reads logs of train_gpt.py and, as far as
they go, logs in the field's older format; a cut or damaged log is read up to there, and what is
missing is said.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from run_log import LIMIT_BYTES, LogError, Run, read_runs
from seed_stats import Base, Comparison, Spread, StatsError, base_of_runs, compare, spread


class Quantity(NamedTuple):
    """A row of the table: `key` in JSON, `label` in print, what to read and how to print it."""

    key: str
    label: str
    of: Callable[[Run], float | None]
    decimals: int


def quantities(runs: Sequence[Run]) -> list[Quantity]:
    """All rows for these runs; one of step time for each number of passes that any run has."""

    def bpb(name: str) -> Callable[[Run], float | None]:
        return lambda run: run.scores[name].val_bpb if name in run.scores else None

    def step_ms(passes: int) -> Callable[[Run], float | None]:
        return lambda run: run.step_ms_by_passes().get(passes)

    def phase(name: str) -> Callable[[Run], float | None]:
        return lambda run: run.phase_seconds.get(name)

    def size(name: str) -> Callable[[Run], float | None]:
        return lambda run: run.bytes.get(name)

    def margin(run: Run) -> float | None:
        return LIMIT_BYTES - run.bytes["total_bytes"] if "total_bytes" in run.bytes else None

    def loss(run: Run) -> float | None:
        return run.scores[run.final].val_loss if run.final else None

    passes = sorted({p for run in runs for _, p in run.growth})
    return [
        Quantity("steps", "steps", lambda run: run.steps, 0),
        Quantity("step_avg_ms", "step_avg, ms", lambda run: run.step_avg_ms, 2),
        *(
            Quantity(
                f"step_ms_{p}_passes", f"step with {p} pass{'es'[: 2 * (p > 1)]}, ms", step_ms(p), 2
            )
            for p in passes
        ),
        Quantity("pre_quant_val_bpb", "bpb before quantization", bpb("pre_quant"), 5),
        Quantity("quantized_val_bpb", "bpb quantized, plain", bpb("quantized"), 5),
        Quantity("sliding_val_bpb", "bpb quantized, sliding", bpb("sliding"), 5),
        Quantity("ttt_val_bpb", "bpb quantized, TTT", bpb("ttt"), 5),
        Quantity("ttt_gain_bpb", "TTT minus sliding, bpb", lambda run: run.ttt_gain, 5),
        Quantity("val_loss", "final val_loss, nats/token", loss, 5),
        Quantity("warm_up_seconds", "warm-up, s", phase("warm_up"), 1),
        Quantity("train_seconds", "training, s", lambda run: run.train_seconds, 1),
        Quantity("export_seconds", "export, s", phase("export"), 1),
        Quantity("eval_seconds", "evaluation, s", lambda run: run.eval_seconds, 1),
        Quantity("bytes_code", "code, bytes", size("code_bytes"), 0),
        Quantity("bytes_model", "model, bytes", size("model_bytes"), 0),
        Quantity("bytes_total", "total, bytes", size("total_bytes"), 0),
        Quantity("bytes_margin", f"left of {LIMIT_BYTES:,}", margin, 0),
    ]


def number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:,.{decimals}f}"


def summarize(runs: Sequence[Run]) -> dict[str, Spread]:
    """The spread of each quantity that every run has."""
    columns = {q.key: [q.of(run) for run in runs] for q in quantities(runs)}
    return {
        key: spread([v for v in values if v is not None])
        for key, values in columns.items()
        if values and None not in values
    }


def table_rows(runs: Sequence[Run], keys: Container[str] | None = None) -> list[list[str]]:
    """A row for each quantity (in `keys`, if given): label, value of each run, mean, deviation."""
    spreads = summarize(runs)
    rows = [["seed", *(run.label for run in runs), "mean", "std"]]
    for q in quantities(runs):
        if keys is None or q.key in keys:
            mean, std, _ = spreads.get(q.key, (None, None, 0))
            values = [number(q.of(run), q.decimals) for run in runs]
            of_all = [number(mean, q.decimals or 1), number(std, q.decimals or 1)]
            rows.append([q.label, *values, *of_all])
    return rows


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([row[0].ljust(len(first)), *rest]))
    return "\n".join(lines)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([header, "|--" + "|--:" * (len(rows[0]) - 1) + "|", *body])


def comparison_text(c: Comparison) -> str:
    base = f"{c.base_bpb.mean:.5f}" + (f" ± {c.base_bpb.std:.5f}" if c.base_bpb.std else "")
    nats = f"{c.nats:+.5f} nats per token" if c.nats is not None else "nats unknown"
    lines = [f"against {c.base} ({base} bpb, n={c.base_bpb.n}): {c.bpb:+.5f} bpb, {nats}"]
    if c.t is None or c.p is None or c.p_lower is None:
        lines.append(f"  test: {c.test}")
    else:
        lines.append(
            f"  {c.test}: t = {c.t:.3f}, p = {c.p:.3g} (two-sided), "
            f"p = {c.p_lower:.3g} (one-sided, lower)"
        )
    return "\n".join([*lines, f"  {c.note}"])


def as_json(runs: Sequence[Run], comparison: Comparison | None) -> dict[str, Any]:
    def of(run: Run) -> dict[str, Any]:
        values = {q.key: q.of(run) for q in quantities(runs)}
        state = {"missing": run.missing, "problems": run.problems}
        return {"log": str(run.path), "seed": run.seed, "final": run.final, **values, **state}

    spreads = {key: value._asdict() for key, value in summarize(runs).items()}
    result: dict[str, Any] = {"runs": [of(run) for run in runs], "spread": spreads}
    if comparison:
        result["comparison"] = comparison._asdict() | {"base_bpb": comparison.base_bpb._asdict()}
    return result


def gaps(runs: Sequence[Run]) -> list[str]:
    lines = []
    seeds = [run.seed for run in runs if run.seed is not None]
    for seed in sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        lines.append(f"seed {seed} is in several logs: the deviation is not one over seeds")
    for run in runs:
        if run.missing:
            lines.append(f"{run.path} is missing: {'; '.join(run.missing)}")
        lines += [f"{run.path}: {problem}" for problem in run.problems]
    return lines


def parse_figure(text: str) -> Spread:
    """`1.1163` or `1.1163,0.0013,3` (mean bpb, its deviation over seeds, seeds)."""
    try:
        mean, *rest = (float(part) for part in text.split(","))
        std, n = rest if rest else (None, 1)
        if not 0 < mean < 100 or n < 1 or n != int(n) or (std is not None and std < 0):
            raise ValueError
        return Spread(mean, std, int(n))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no figure: write the mean bpb, or mean,std,n such as 1.1163,0.0013,3"
        ) from None


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
    add_base_arguments(parser)
    args = parser.parse_args(argv)
    try:
        runs, base = read_runs(args.logs), read_base(args)
        comparison = compare(runs, base) if base else None
    except (LogError, StatsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_report(runs, comparison, args.format)
    return 1 if args.require_complete and any(run.missing for run in runs) else 0


def print_report(runs: Sequence[Run], comparison: Comparison | None, form: str) -> None:
    if form == "json":
        print(json.dumps(as_json(runs, comparison), indent=2))
        return
    rows = table_rows(runs)
    print(plain_table(rows) if form == "table" else markdown_table(rows))
    notes = [comparison_text(comparison)] if comparison else []
    for note in notes + gaps(runs):
        print(f"\n{note}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
