"""Mean and deviation over seeds, and the comparison of a set of runs with a base."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from run_log import Run, Score


class StatsError(ValueError):
    """Runs that cannot be summarized or compared; the text says why and what to do."""


class Spread(NamedTuple):
    """The mean of n values and their sample standard deviation (n - 1); None for one value."""

    mean: float
    std: float | None
    n: int


def spread(values: Sequence[float]) -> Spread:
    return Spread(
        statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)
    )


@dataclass(frozen=True)
class Base:
    """What runs are compared with: bpb per seed, or only a figure that someone published."""

    name: str
    bpb: Spread
    tokens: int | None = None  # of its validation text; None if not known
    bytes: int | None = None


class Comparison(NamedTuple):
    """Runs minus base: negative differences are better. `t` and `p` are of `test`."""

    base: str
    base_bpb: Spread
    bpb: float
    nats: float | None  # per token of the runs' tokenizer
    test: str
    t: float | None
    p: float | None  # two-sided
    p_lower: float | None  # one-sided: the chance of so low a mean if nothing had improved
    note: str


def final_scores(runs: Sequence[Run]) -> tuple[str, list[Score]]:
    """The score of every run, and which evaluation it is. Raises StatsError if they differ."""
    if not runs:
        raise StatsError("no log was given: name at least one")
    unfinished = [str(run.path) for run in runs if run.final is None]
    if unfinished:
        raise StatsError(f"no final score in {', '.join(unfinished)}: finish or leave out the run")
    kinds = sorted({str(run.final) for run in runs})
    if len(kinds) > 1:
        raise StatsError(
            f"the logs end with different evaluations ({', '.join(kinds)}): compare runs of one "
            "configuration"
        )
    return kinds[0], [run.scores[kinds[0]] for run in runs]


def validation_text(scores: Sequence[Score]) -> tuple[int | None, int | None]:
    """(tokens, bytes) that all scores were taken on; None for what is not logged."""
    tokens, text_bytes = ({s.tokens for s in scores}, {s.bytes for s in scores})
    if len(tokens) > 1 or len(text_bytes) > 1:
        raise StatsError("the logs were evaluated on different validation texts: no mean exists")
    return tokens.pop(), text_bytes.pop()


def base_of_runs(name: str, runs: Sequence[Run]) -> Base:
    _, scores = final_scores(runs)
    return Base(name, spread([s.val_bpb for s in scores]), *validation_text(scores))


def compare(runs: Sequence[Run], base: Base) -> Comparison:
    """The runs' final bpb minus the base's, and the test that applies. Raises StatsError."""
    _, scores = final_scores(runs)
    tokens, text_bytes = validation_text(scores)
    ours = spread([s.val_bpb for s in scores])
    difference = ours.mean - base.bpb.mean
    nats = difference * math.log(2) * text_bytes / tokens if tokens and text_bytes else None
    if base.bytes is None:
        note = "the text that the base was measured on is not known to this script"
    elif (base.tokens, base.bytes) != (tokens, text_bytes):
        note = f"{base.name} was measured on another text: the difference means nothing"
    else:
        note = "same validation text"
    test, statistic = t_test([s.val_bpb for s in scores], base.bpb)
    return Comparison(base.name, base.bpb, difference, nats, test, *statistic, note)


def t_test(ours: Sequence[float], base: Spread) -> tuple[str, Sequence[float | None]]:
    """The test that applies, and its t, two-sided p and one-sided p (ours is lower)."""
    deviation, undefined = spread(ours).std, (None, None, None)
    if deviation is None:
        return "none: one seed has no deviation", undefined
    if not deviation and not base.std:
        return "none: no value deviates from its mean", undefined
    if base.std is None and base.n > 1:
        return "none: the base's deviation is not known", undefined
    try:
        from scipy import stats
    except ImportError:
        return "none: scipy is not installed (pip install scipy)", undefined
    if base.std is None:
        name = "one-sample t-test, the base taken as exact (its own deviation is not known)"
        results = [
            stats.ttest_1samp(ours, base.mean, alternative=side) for side in ("two-sided", "less")
        ]
    else:
        name, moments = "Welch's t-test", (*spread(ours), *base)
        results = [
            stats.ttest_ind_from_stats(*moments, equal_var=False, alternative=side)
            for side in ("two-sided", "less")
        ]
    both, lower = results
    return name, (float(both.statistic), float(both.pvalue), float(lower.pvalue))
