"""Draws the logs of one or more runs as PNGs for a write-up.

    pip install matplotlib
    python scripts/plot_logs.py logs/seeds/train_seed*.log -o build/plots

loss.png        training loss and validation in bits per byte, the whole run and its end enlarged
step_time.png   milliseconds of a step over the run, and their mean by number of passes
recurrence.png  growth of the hidden state, residual scale and feedback norm of each pass
ttt.png         bits per byte of the text so far, during test-time training
bytes.png       bytes of the code and of the model's parts against the limit; the parts are read
                from the artifact that run_seeds.sh keeps beside the log
comparison.png  a colour for each configuration, all its seeds together: the end of training over
                time, and the scores; drawn if there are several configurations

Noisy curves are smoothed, with what was logged behind them, faint. Dotted lines in a run's colour
say where sequences grow, passes are added and QAT begins. What a log lacks is said and left out.
"""

from __future__ import annotations

import argparse
import lzma
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from inspect_logs import LIMIT_BYTES, PER_RUN, LogError, Run, read_runs, run_command

# Okabe and Ito's colours: told apart with any colour vision; styles help where colours repeat.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
GREY = "#555555"
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
STAGES = {
    "pre_quant": "averaged\nweights",
    "quantized": "int6",
    "sliding": "int6,\nsliding",
    "ttt": "int6, sliding,\nTTT",
}
Curve = list[tuple[float, float]]  # points (x, y)


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def draw_curve(axis: Any, points: Curve, **style: Any) -> None:
    if points:
        marker = "o" if len(points) == 1 else None
        axis.plot(*zip(*points, strict=True), marker=marker, **style)


def smooth(points: Curve, reach: int = 3) -> Curve:
    """Means of each point with the `reach` before and after it, with down to half as many near an
    end."""
    curve, reach = [], min(reach, len(points) // 4)
    for i in range(reach // 2, len(points) - reach // 2):
        near = min(reach, i, len(points) - 1 - i)
        window = [y for _, y in points[i - near : i + near + 1]]
        curve.append((points[i][0], sum(window) / len(window)))
    return curve


def series(run: Run, key: str) -> Curve:
    """(step, value) of the lines of steps that have a number at `key`."""
    found = [(line.step, line.event.number(key)) for line in run.step_lines]
    return [(step, value) for step, value in found if value is not None]


def validations(run: Run) -> Curve:
    """(step, val_bpb) during training, and of the averaged weights at its end."""
    events = [event for event in run.events if event.name in ("", "validation")]
    found = [(event.step, event.number("val_bpb")) for event in events]
    if "pre_quant" in run.scores:
        found.append((run.steps, run.scores["pre_quant"].val_bpb))
    return [(step, bpb) for step, bpb in found if step is not None and bpb is not None]


def seconds_at(run: Run, step: float) -> float | None:
    """The clock when `step` ended, as far as lines around it tell."""
    for before, after in pairwise(run.step_lines):
        if before.step <= step <= after.step and after.step > before.step:
            share = (step - before.step) / (after.step - before.step)
            return before.seconds + share * (after.seconds - before.seconds)
    return run.train_seconds if step == run.steps else None


def by_time(run: Run, points: Curve) -> Curve:
    """Points by the seconds of training in place of the step."""
    timed = [(seconds_at(run, step), value) for step, value in points]
    return [(seconds, value) for seconds, value in timed if seconds is not None]


def draw_marks(axis: Any, runs: Sequence[Run], timed: bool = False) -> None:
    """Where each run's sequences grow, passes are added and QAT begins; the first run's marks have
    labels."""
    for i, run in enumerate(runs):
        found = [(e.step, f"{e.pairs.get('tokens')} tokens") for e in run.all("seq_len")[1:]]
        found += [(step, f"{passes} passes") for step, passes in run.growth[1:]]
        found += [
            (run.last(name).step, text) for name, text in (("swa", "SWA"), ("late_qat", "QAT"))
        ]
        labels: dict[int | None, list[str]] = {}
        for step, text in found:
            labels.setdefault(step, []).append(text)
        for step, texts in labels.items():
            if step is not None and timed:
                step = seconds_at(run, step)
            if step is None:
                continue
            axis.axvline(step, color=colour(i), linewidth=1.2, linestyle=":", zorder=0)
            if i == 0:
                box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5}
                axis.annotate(
                    ", ".join(texts), (step, 0.98), xycoords=("data", "axes fraction"),
                    rotation=90, xytext=(-4, 0), textcoords="offset points", fontsize=12,
                    color=GREY, ha="right", va="top", bbox=box, annotation_clip=True,
                )  # fmt: skip


def run_names(runs: Sequence[Run]) -> list[str]:
    """The runs' seeds if they differ, or else their files."""
    seeds = [f"seed {run.label}" for run in runs]
    paths = [f"{run.path.parent.name[-20:]}/{run.path.stem[-20:]}" for run in runs]
    return seeds if len(set(seeds)) == len(seeds) else paths


def add_legend(plt: Any, figure: Any, runs: Sequence[Run], **more: Mapping[str, Any]) -> None:
    """One legend above all panels: the runs by colour, then `more`, with `_` for a space."""
    names = run_names(runs)
    styles = {name: {"color": colour(i)} for i, name in enumerate(names)}
    styles |= {name.replace("_", " "): style for name, style in more.items()}
    handles = [plt.Line2D([], [], **style) for style in styles.values()]
    columns = min(len(styles), 3 if "/" in names[0] else 6)
    figure.legend(handles, list(styles), loc="outside upper center", ncols=columns)


def draw_loss(plt: Any, runs: Sequence[Run]) -> Any:
    in_bytes = any(series(run, "train_bpb") for run in runs)
    key, label = ("train_bpb", "bits per byte") if in_bytes else ("train_loss", "nats per token")
    found = [series(run, key) for run in runs]
    if not any(found):
        return None
    curves = [smooth(points) for points in found]
    timed = [by_time(run, points) for run, points in zip(runs, found, strict=True)]
    ends = [point for points in timed for point in points[len(points) // 2 :]]
    figure, (whole, end) = plt.subplots(1, 2, figsize=(15, 6), layout="constrained")
    for i, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        scores = validations(run) if in_bytes else []
        by_step = (found[i], curve, scores)
        for axis, shown in ((whole, by_step), (end, [by_time(run, c) for c in by_step])):
            draw_curve(axis, shown[0], color=colour(i), alpha=0.2, linewidth=1.2)
            draw_curve(axis, shown[1], color=colour(i))
            for point in shown[2]:
                axis.plot(*point, "o", color=colour(i), markeredgecolor="white", markersize=9)
    values = sorted(y for curve in curves for _, y in curve)
    top = values[int(0.9 * (len(values) - 1))]  # cuts off the first steep tenth
    whole.set(
        xlabel="step", ylabel=f"training, {label}", ylim=(None, top + 0.5 * (top - values[0]))
    )
    (left, right), (low, high) = ((min(v), max(v)) for v in zip(*ends, strict=True))
    room = 0.1 * (high - low) or 0.1
    end.set(
        xlabel="seconds of training", xlim=(left, 1.02 * right), ylim=(low - room, high + 3 * room)
    )
    end.set_title("the second half, enlarged, over time")
    draw_marks(whole, runs[:1])
    draw_marks(end, runs, timed=True)
    dots = {"color": GREY, "marker": "o", "linestyle": ""}
    add_legend(plt, figure, runs, **({"validation": dots} if in_bytes else {}))
    return figure


def draw_step_time(plt: Any, runs: Sequence[Run]) -> Any:
    passes = sorted({p for run in runs for p in run.step_ms()})
    if not passes:
        return None
    figure, (over_run, bars) = plt.subplots(1, 2, figsize=(15, 6), layout="constrained")
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        points = [
            (b.step, 1000 * (b.seconds - a.seconds) / (b.step - a.step)) for a, b in run.intervals()
        ]
        draw_curve(over_run, points, color=colour(i), drawstyle="steps-pre")
        for p, ms in run.step_ms().items():
            x = passes.index(p) + (i - (len(runs) - 1) / 2) * width
            bars.bar(x, ms, 0.92 * width, color=colour(i))
            bars.annotate(f"{ms:.4g}", (x, ms), ha="center", va="bottom", fontsize=12)
    over_run.set(xlabel="step", ylabel="ms per step")
    over_run.set_ylim(0, 1.3 * over_run.get_ylim()[1])  # room for the labels of the marks
    draw_marks(over_run, runs)
    bars.set_xticks(range(len(passes)), [f"{p} pass{'es'[: 2 * (p > 1)]}" for p in passes])
    bars.set(ylabel="ms per step, mean", xlim=(-0.5, len(passes) - 0.5))
    bars.grid(axis="x", visible=False)
    add_legend(plt, figure, runs)
    return figure


def pass_curves(run: Run, key: str) -> dict[int, Curve]:
    """The number that each pass, from 1 on, has at `key`, in the steps in which it is used."""
    curves: dict[int, Curve] = {}
    for line in run.step_lines:
        used = run.passes_in(line.step) or 0
        first = 2 if key == "residual_scale" else 1  # pass 1 has no scale
        for number, value in enumerate(line.event.numbers(key)[: used - first + 1], first):
            curves.setdefault(number, []).append((line.step, value))
    if key == "feedback_norm":
        curves.pop(1, None)  # pass 1 has no feedback
    return curves


def draw_recurrence(plt: Any, runs: Sequence[Run]) -> Any:
    titles = {
        "growth": "growth of the hidden state, ratio",
        "residual_scale": "residual scale",
        "feedback_norm": "feedback norm",
    }
    curves = {key: [c for run in runs for c in pass_curves(run, key).values()] for key in titles}
    # Without feedback its norm is 0 throughout: no panel.
    keys = [key for key in titles if any(value for curve in curves[key] for _, value in curve)]
    if not keys:
        return None
    size = (5.6 * len(keys), 6)
    figure, axes = plt.subplots(1, len(keys), figsize=size, squeeze=False, layout="constrained")
    seen: set[int] = set()
    for axis, key in zip(axes[0], keys, strict=True):
        for i, run in enumerate(runs):
            for number, points in pass_curves(run, key).items():
                seen.add(number)
                style = {"color": colour(i), "linestyle": STYLES[(number - 1) % len(STYLES)]}
                draw_curve(axis, points, **style)
        axis.set(title=titles[key], xlabel="step")
        draw_marks(axis, runs)
    styles = {f"pass_{p}": {"color": GREY, "linestyle": STYLES[(p - 1) % 4]} for p in sorted(seen)}
    add_legend(plt, figure, runs, **styles)
    return figure


def draw_ttt(plt: Any, runs: Sequence[Run]) -> Any:
    curves = []
    for run in runs:
        found = [(e.pairs.get("chunk", "").split("/")[0], e) for e in run.all("ttt_chunk")]
        points = [(int(n), e.number("val_bpb")) for n, e in found if n.isdecimal() and len(n) < 10]
        curves.append([(n, bpb) for n, bpb in points if bpb is not None])
    if not any(curves):
        return None
    figure, axis = plt.subplots(figsize=(10, 6), layout="constrained")
    for i, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        draw_curve(axis, curve, color=colour(i))
        if "sliding" in run.scores:
            axis.axhline(run.scores["sliding"].val_bpb, color=colour(i), linestyle=":")
    axis.set(xlabel="chunks scored", ylabel="bits per byte of the text so far")
    add_legend(plt, figure, runs, whole_text_without_it={"color": GREY, "linestyle": ":"})
    return figure


def draw_comparison(plt: Any, runs: Sequence[Run]) -> Any:
    """Not drawn where all runs have one configuration."""
    names = configurations(runs)
    kinds = list(dict.fromkeys(names))
    if len(kinds) < 2:
        return None
    figure, (loss, scores) = plt.subplots(1, 2, figsize=(15, 6), layout="constrained")
    means, stages = [], list(STAGES)
    validated = all(len(validations(run)) > 1 for run in runs)
    for i, kind in enumerate(kinds):
        mine = [run for run, name in zip(runs, names, strict=True) if name == kind]
        # The seeds' points in one line by time, so that its running mean is over seeds, too.
        found = [validations(run) if validated else series(run, "train_bpb") for run in mine]
        points = sorted(p for run, c in zip(mine, found, strict=True) for p in by_time(run, c))
        curve = smooth(points, reach=len(mine) if validated else max(3, len(points) // 30))
        means += curve[len(curve) // 3 :]
        draw_curve(loss, curve, color=colour(i))
        for run in mine:
            has = [(j, run.scores[s].val_bpb) for j, s in enumerate(stages) if s in run.scores]
            for j, bpb in has:
                place = j + 0.3 * (i / (len(kinds) - 1) - 0.5)
                scores.plot(place, bpb, "o", color=colour(i), alpha=0.8, markersize=9)
    low, high = min((y for _, y in means), default=0), max((y for _, y in means), default=1)
    room = (high - low) or 0.1
    text = "validation" if validated else "training"
    loss.set(xlabel="seconds of training", ylabel=f"{text}, bits per byte, mean of the seeds")
    loss.set_ylim(low - 0.1 * room, high + 0.3 * room)
    loss.set_xlim(left=min((x for x, _ in means), default=0))
    scores.set(ylabel="validation, bits per byte, a dot for each seed")
    scores.set_xticks(range(len(stages)), [STAGES[stage] for stage in stages])
    scores.grid(axis="x", visible=False)
    first = [names.index(kind) for kind in kinds]
    draw_marks(loss, [runs[i] for i in first], timed=True)
    handles = [plt.Line2D([], [], color=colour(i), marker="o") for i in range(len(kinds))]
    figure.legend(handles, kinds, loc="outside upper center", ncols=2)
    return figure


def configurations(runs: Sequence[Run]) -> list[str]:
    """For each run its passes, and the settings in which the runs differ besides."""
    passes = [" → ".join(str(p) for _, p in run.growth) or "?" for run in runs]
    keys = sorted({key for run in runs for key in run.config} - PER_RUN)
    keys = [key for key in keys if len({run.config.get(key) for run in runs}) > 1]
    keys = [key for key in keys if "passes" not in key]
    rest = [", ".join(f"{key}={run.config.get(key)}" for key in keys) for run in runs]
    return [
        f"passes {p}" + (f", {text}" if text else "") for p, text in zip(passes, rest, strict=True)
    ]


def draw_bytes(plt: Any, runs: Sequence[Run]) -> Any:
    known = [run for run in runs if {"code_bytes", "model_bytes"} <= run.bytes.keys()]
    if not known:
        return None
    figure, axis = plt.subplots(figsize=(11, 2 + 1.2 * len(known)), layout="constrained")
    entries, most = {}, 0.0
    for row, run in enumerate(reversed(known)):
        left = 0.0
        for name, size in byte_parts(run).items():
            shade = colour(list(PART_NAMES).index(name))
            entries[name] = axis.barh(row, size, left=left, color=shade, height=0.5)
            left += size
        most = max(most, left)
        model, code = run.bytes["model_bytes"], run.bytes["code_bytes"]
        text = f"model {model:,} + code {code:,}: {LIMIT_BYTES - model - code:,} left"
        axis.annotate(text, (0, row + 0.27), xytext=(2, 2), textcoords="offset points")
    ordered = {name: entries[name] for name in PART_NAMES if name in entries}
    label = "million bytes"
    if most > LIMIT_BYTES / 2:
        ordered["limit"] = axis.axvline(LIMIT_BYTES, color=GREY, linestyle="--")
        most = max(most, LIMIT_BYTES)
    else:
        label += f"; the limit, {LIMIT_BYTES / 1e6:g}, is far to the right"
    axis.set_yticks(range(len(known)), run_names(known)[::-1])
    axis.set(xlim=(0, 1.02 * most), ylim=(-0.4, len(known) - 0.3), xlabel=label)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}")
    axis.grid(axis="y", visible=False)
    figure.legend(list(ordered.values()), list(ordered), loc="outside upper center", ncols=6)
    return figure


# The parts of an artifact by the names of its tensors, then what is drawn without an artifact.
PART_NAMES = {
    "q and o": ("qo_bank",),
    "k and v": ("kv_bank",),
    "MLP up": ("mlp_up_bank",),
    "MLP down": ("mlp_down_bank",),
    "embedding": ("tok_emb", "tok_emb.weight"),
    "all else": (),
    "code": (),
    "model": (),
}


def byte_parts(run: Run) -> dict[str, float]:
    """Bytes of the code and of each part of the model; of the whole model without the artifact.

    The parts are compressed one by one and scaled to the bytes of the whole.
    """
    code, model = run.bytes["code_bytes"], run.bytes["model_bytes"]
    artifact, whole = run.path.with_suffix(".int6.xz"), {"model": model, "code": code}
    if not artifact.is_file() or artifact.stat().st_size != model:
        return whole
    try:
        sizes = compressed_parts(artifact)
    except (ImportError, AttributeError, ValueError):  # no torch, or another train_gpt.py's
        return whole
    scale = model / sum(sizes.values())
    return {**{name: size * scale for name, size in sizes.items()}, "code": code}


def compressed_parts(artifact: Path) -> dict[str, int]:
    """Compressed bytes of each part of an artifact. Raises ValueError if it cannot be read."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import train_gpt

    tensors = train_gpt.read_artifact(artifact)[1]
    sizes = {name: train_gpt.payload_bytes({name: w.shape}) for name, w in tensors.items()}
    content = lzma.decompress(artifact.read_bytes())
    payload = zlib.decompress(content[8 + int.from_bytes(content[4:8], "little") :], -15)
    part_of = {tensor: part for part, names in PART_NAMES.items() for tensor in names}
    parts: dict[str, bytes] = {}
    for tensor, size in sizes.items():
        part = part_of.get(tensor, "all else")
        parts[part] = parts.get(part, b"") + payload[:size]
        payload = payload[size:]
    return {part: len(train_gpt.huffman(data)) for part, data in parts.items()}


PICTURES: dict[str, Callable[[Any, Sequence[Run]], Any]] = {
    "loss": draw_loss,
    "step_time": draw_step_time,
    "recurrence": draw_recurrence,
    "ttt": draw_ttt,
    "bytes": draw_bytes,
    "comparison": draw_comparison,
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
    except LogError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    if not written:
        print("error: nothing to draw: name logs of train_gpt.py", file=sys.stderr)
        return 2
    for name in lacking:
        print(f"{name}.png is not drawn: the logs have no data for it")
    for run in runs:
        if run.missing:
            print(f"{run.path} is missing: {'; '.join(run.missing)}")
    return 0


if __name__ == "__main__":
    run_command(main)
