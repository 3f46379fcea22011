"""Draws the logs of one or more seeds as PNGs for a write-up.

    pip install matplotlib
    python scripts/plot_logs.py logs/seeds/train_seed*.log -o build/plots

loss.png        training loss and bpb, validation bpb, over steps and over seconds
step_time.png   milliseconds of a step over the run, and their mean by number of passes
recurrence.png  hidden growth ratio, residual scale and feedback norm of each pass
ttt.png         running bpb of the evaluation with test-time training
bytes.png       bytes of the code and of the model's parts against the limit; the parts are read
                from the artifact that run_seeds.sh keeps beside the log

Every seed is a line of its own; vertical lines mark where passes are added and where SWA and
quantization-aware training start, in the first seed. A picture is drawn if a log has its data.
"""

from __future__ import annotations

import argparse
import lzma
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from run_log import LIMIT_BYTES, LogError, Run, read_runs
from trainer_runs import ROOT

# Okabe and Ito's colours: told apart with any colour vision; styles help where colours repeat.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
STYLE = {
    "font.size": 15,
    "axes.titlesize": 16,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 2.2,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 100,
}


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def series(run: Run, key: str) -> tuple[list[int], list[float], list[float]]:
    """(steps, seconds, values) of the lines of steps that have a number at `key`."""
    found = [(s.step, s.seconds, s.event.number(key)) for s in run.steps_logged]
    rows = [(step, seconds, value) for step, seconds, value in found if value is not None]
    return [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]


def validations(run: Run) -> list[tuple[int, float]]:
    """(step, val_bpb) of the validations during training, and of the weights at the end of it."""
    found = [(e.step(), e.number("val_bpb")) for e in run.all("") if "val_bpb" in e.pairs]
    if run.steps is not None and "pre_quant" in run.scores:
        found.append((run.steps, run.scores["pre_quant"].val_bpb))
    return [(step, bpb) for step, bpb in found if step is not None and bpb is not None]


def seconds_at(run: Run, step: int) -> float | None:
    """The clock when `step` ended, as far as lines around it tell."""
    lines = run.steps_logged
    for before, after in pairwise(lines):
        if before.step <= step <= after.step and after.step > before.step:
            share = (step - before.step) / (after.step - before.step)
            return before.seconds + share * (after.seconds - before.seconds)
    return run.train_seconds if step == run.steps else None


def marks(run: Run) -> Iterator[tuple[int, str]]:
    """(step, label) of what changes during training."""
    for step, passes in run.growth[1:]:
        yield step, f"{passes} passes"
    for name, label in (("swa", "SWA"), ("late_qat", "QAT")):
        step = run.last(name).step()
        if step is not None:
            yield step, label


def draw_marks(axis: Any, run: Run, *, by_seconds: bool = False) -> None:
    """Vertical lines; those close together share the label at the first of them."""
    low, high = axis.get_xlim()
    groups: list[tuple[float, list[str]]] = []
    last = low
    for step, label in sorted(marks(run)):
        place = seconds_at(run, step) if by_seconds else step
        if place is None:
            continue
        axis.axvline(place, color="#555555", linewidth=1.2, linestyle=(0, (2, 2)))
        if groups and place - last < 0.05 * (high - low):
            groups[-1][1].append(label)
        else:
            groups.append((place, [label]))
        last = place
    for place, labels in groups:
        axis.annotate(
            ", ".join(labels),
            (place, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            rotation=90,
            fontsize=12,
            color="#333333",
            ha="right",
            va="top",
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
        )


def add_legend(figure: Any, **handles: Any) -> None:
    """One legend above all panels: its entries by name, `_` for a space."""
    labels = [name.replace("_", " ") for name in handles]
    columns = min(len(labels), 6)
    figure.legend(list(handles.values()), labels, loc="outside upper center", ncols=columns)


def seed_lines(plt: Any, runs: Sequence[Run]) -> dict[str, Any]:
    return {f"seed_{run.label}": plt.Line2D([], [], color=colour(i)) for i, run in enumerate(runs)}


def draw_loss(plt: Any, runs: Sequence[Run]) -> Any:
    rows = (("train_loss", "training loss, nats/token"), ("train_bpb", "bits per byte"))
    rows = tuple(row for row in rows if any(series(run, row[0])[0] for run in runs))
    if not rows:
        return None
    figure, axes = plt.subplots(
        len(rows), 2, figsize=(14, 5 * len(rows)), sharey="row", squeeze=False, layout="constrained"
    )
    for (key, label), pair in zip(rows, axes, strict=True):
        for i, run in enumerate(runs):
            steps, seconds, values = series(run, key)
            for axis, x in zip(pair, (steps, seconds), strict=True):
                axis.plot(x, values, color=colour(i), alpha=0.85)
            if key == "train_bpb":
                draw_validations(pair, run, i)
        zoom(pair[0], [v for run in runs for v in series(run, key)[2]])
        pair[0].set_ylabel(label)
        for axis, by_seconds, name in zip(pair, (False, True), ("step", "seconds"), strict=True):
            axis.set_xlabel(name)
            draw_marks(axis, runs[0], by_seconds=by_seconds)
    entries = seed_lines(plt, runs)
    if len(rows) > 1:
        entries["validation"] = plt.Line2D([], [], color="#555555", marker="o", linestyle="")
    add_legend(figure, **entries)
    return figure


def draw_validations(pair: Sequence[Any], run: Run, i: int) -> None:
    for step, bpb in validations(run):
        for axis, x in zip(pair, (step, seconds_at(run, step)), strict=True):
            if x is not None:
                axis.plot([x], [bpb], "o", color=colour(i), markeredgecolor="white", markersize=9)


def zoom(axis: Any, values: Sequence[float]) -> None:
    """Cuts off the steep first tenth of a falling curve, so that the rest can be read."""
    ordered = sorted(values)
    if len(ordered) >= 10:
        low, high = ordered[0], ordered[int(0.9 * (len(ordered) - 1))]
        if low == high:
            return
        axis.set_ylim(low - 0.08 * (high - low), high + 0.25 * (high - low))


def draw_step_time(plt: Any, runs: Sequence[Run]) -> Any:
    passes = sorted({p for run in runs for p in run.step_ms_by_passes()})
    if not passes:
        return None
    figure, (over_run, bars) = plt.subplots(1, 2, figsize=(14, 5.5), layout="constrained")
    for i, run in enumerate(runs):
        points = [
            (b.step, 1000 * (b.seconds - a.seconds) / (b.step - a.step)) for a, b in run.intervals()
        ]
        over_run.step(*zip(*points, strict=True), where="pre", color=colour(i))
        times = run.step_ms_by_passes()
        width = 0.8 / len(runs)
        for k, p in enumerate(passes):
            if p in times:
                x = k + (i - (len(runs) - 1) / 2) * width
                bars.bar(x, times[p], 0.92 * width, color=colour(i))
                bars.annotate(
                    f"{times[p]:.4g}", (x, times[p]), ha="center", va="bottom", fontsize=12
                )
    over_run.set(xlabel="step", ylabel="ms per step")
    over_run.set_ylim(0, 1.4 * over_run.get_ylim()[1])  # room for the labels of the marks
    draw_marks(over_run, runs[0])
    bars.set_xticks(range(len(passes)), [f"{p} pass{'es'[: 2 * (p > 1)]}" for p in passes])
    bars.set(ylabel="ms per step, mean")
    bars.grid(axis="x", visible=False)
    bars.margins(y=0.1)
    add_legend(figure, **seed_lines(plt, runs))
    return figure


def draw_recurrence(plt: Any, runs: Sequence[Run]) -> Any:
    # Title, and the pass of the first number in a line; pass 1 has no scale and no feedback.
    panels = {
        "growth": ("growth ratio of the hidden state", 1),
        "residual_scale": ("residual scale", 2),
        "feedback_norm": ("feedback norm", 1),
    }
    keys = [k for k in panels if any(s.event.numbers(k) for r in runs for s in r.steps_logged)]
    if not keys:
        return None
    figure, axes = plt.subplots(
        1, len(keys), figsize=(5.6 * len(keys), 5.8), squeeze=False, layout="constrained"
    )
    passes: set[int] = set()
    for axis, key in zip(axes[0], keys, strict=True):
        title, first = panels[key]
        for i, run in enumerate(runs):
            for number, points in pass_curves(run, key, first).items():
                if key == "growth" or number > 1:
                    passes.add(number)
                    style, dot = STYLES[i % len(STYLES)], "o" if len(points) == 1 else None
                    x, y = zip(*points, strict=True)
                    axis.plot(x, y, color=colour(number), linestyle=style, marker=dot)
        axis.set(title=title, xlabel="step", xlim=(0, 1.03 * max(run.steps or 1 for run in runs)))
        draw_marks(axis, runs[0])
    entries = {f"pass_{p}": plt.Line2D([], [], color=colour(p)) for p in sorted(passes)}
    for i, run in enumerate(runs):
        style = STYLES[i % len(STYLES)]
        entries[f"seed_{run.label}"] = plt.Line2D([], [], color="#555555", linestyle=style)
    add_legend(figure, **entries)
    return figure


def pass_curves(run: Run, key: str, first: int) -> dict[int, list[tuple[int, float]]]:
    """For each pass, the (step, number) of the lines whose sequence at `key` reaches it."""
    curves: dict[int, list[tuple[int, float]]] = {}
    for line in run.steps_logged:
        for number, value in enumerate(line.event.numbers(key), first):
            curves.setdefault(number, []).append((line.step, value))
    return curves


def draw_ttt(plt: Any, runs: Sequence[Run]) -> Any:
    if not any(run.all("ttt_chunk") for run in runs):
        return None
    figure, axis = plt.subplots(figsize=(10, 6), layout="constrained")
    for i, run in enumerate(runs):
        points = []
        for event in run.all("ttt_chunk"):
            chunk, bpb = event.pairs.get("chunk", "").split("/")[0], event.number("val_bpb")
            if chunk.isdigit() and bpb is not None:
                points.append((int(chunk), bpb))
        if points:
            axis.plot(*zip(*points, strict=True), color=colour(i))
        if "sliding" in run.scores:
            axis.axhline(run.scores["sliding"].val_bpb, color=colour(i), linestyle=":")
    axis.set(xlabel="chunks scored", ylabel="bpb of the text so far")
    dotted = plt.Line2D([], [], color="#555555", linestyle=":")
    add_legend(figure, **seed_lines(plt, runs), whole_text_without_TTT=dotted)
    return figure


def draw_bytes(plt: Any, runs: Sequence[Run]) -> Any:
    known = [run for run in runs if {"code_bytes", "model_bytes"} <= run.bytes.keys()]
    if not known:
        return None
    figure, axis = plt.subplots(figsize=(11, 2 + 1.2 * len(known)), layout="constrained")
    entries, parts = {}, {run.path: byte_parts(run) for run in known}
    for row, run in enumerate(reversed(known)):
        left = 0.0
        for name, size in parts[run.path].items():
            shade = colour(list(PART_NAMES).index(name))
            entries[name] = axis.barh(row, size, left=left, color=shade, height=0.5)
            left += size
        model, code = run.bytes["model_bytes"], run.bytes["code_bytes"]
        text = f"model {model:,} + code {code:,}: {LIMIT_BYTES - model - code:,} left"
        axis.annotate(text, (0, row + 0.27), xytext=(2, 2), textcoords="offset points")
    ordered = {name: entries[name] for name in PART_NAMES if name in entries}
    most, label = max(sum(sizes.values()) for sizes in parts.values()), "million bytes"
    if most > LIMIT_BYTES / 2:
        ordered["limit"] = axis.axvline(LIMIT_BYTES, color="#555555", linestyle=(0, (2, 2)))
        most = max(most, LIMIT_BYTES)
    else:
        label += f"; the limit, {LIMIT_BYTES / 1e6:g}, is far to the right"
    axis.set_yticks(range(len(known)), [f"seed {run.label}" for run in reversed(known)])
    axis.set(xlim=(0, 1.02 * most), ylim=(-0.4, len(known) - 0.3), xlabel=label)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}")
    axis.grid(axis="y", visible=False)
    add_legend(figure, **ordered)
    return figure


# The parts of an artifact by the names of its tensors, then what is drawn without an artifact.
PART_NAMES = {
    "q_and_o": ("qo_bank",),
    "k_and_v": ("kv_bank",),
    "MLP_up": ("mlp_up_bank",),
    "MLP_down": ("mlp_down_bank",),
    "embedding": ("tok_emb",),
    "all_else": (),
    "code": (),
    "model": (),
}


def byte_parts(run: Run) -> Mapping[str, float]:
    """Bytes of the code and of each part of the model; of the whole model without the artifact.

    The parts are compressed one by one and scaled to the bytes of the whole.
    """
    code, model = run.bytes["code_bytes"], run.bytes["model_bytes"]
    artifact, whole = run.path.with_suffix(".int6.xz"), {"model": model, "code": code}
    if not artifact.is_file() or artifact.stat().st_size != model:
        return whole
    try:
        sizes = compressed_parts(artifact)
    except (ImportError, ValueError):  # no torch here, or an artifact of another train_gpt.py
        return whole
    scale = model / sum(sizes.values())
    return {**{name: size * scale for name, size in sizes.items()}, "code": code}


def compressed_parts(artifact: Path) -> dict[str, int]:
    """Compressed bytes of each part of an artifact. Raises ValueError if it cannot be read."""
    sys.path.insert(0, str(ROOT))
    import train_gpt

    tensors = train_gpt.read_artifact(artifact)[1]
    sizes = {name: train_gpt.payload_bytes({name: w.shape}) for name, w in tensors.items()}
    payload = lzma.decompress(artifact.read_bytes())[-sum(sizes.values()) :]
    part_of = {tensor: part for part, names in PART_NAMES.items() for tensor in names}
    parts: dict[str, bytes] = {}
    for tensor, size in sizes.items():
        part = part_of.get(tensor.removesuffix(".weight"), "all_else")
        parts[part] = parts.get(part, b"") + payload[:size]
        payload = payload[size:]
    filters = train_gpt.XZ_FILTERS
    return {p: len(lzma.compress(b, lzma.FORMAT_RAW, filters=filters)) for p, b in parts.items()}


PICTURES: dict[str, Callable[[Any, Sequence[Run]], Any]] = {
    "loss": draw_loss,
    "step_time": draw_step_time,
    "recurrence": draw_recurrence,
    "ttt": draw_ttt,
    "bytes": draw_bytes,
}


def draw_all(runs: Sequence[Run], output: Path) -> tuple[list[Path], list[str]]:
    """Draws what the logs have data for; returns the files, and the names of the rest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    output.mkdir(parents=True, exist_ok=True)
    written, lacking = [], []
    with plt.rc_context(STYLE):
        for name, draw in PICTURES.items():
            figure = draw(plt, runs)
            if figure is None:
                lacking.append(name)
                continue
            path = output / f"{name}.png"
            temporary = path.with_suffix(".tmp")
            figure.savefig(temporary, format="png", metadata={"Software": None})
            temporary.replace(path)
            written.append(path)
        plt.close("all")
    return written, lacking


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.logs)
        written, lacking = draw_all(runs, args.output)
    except ImportError:
        print("error: plots need matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    except (LogError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    for name in lacking:
        print(f"{name}: not drawn, the logs have no data for it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
