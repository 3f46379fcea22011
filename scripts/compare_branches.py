"""Compares settings in pairs: runs that share a trunk, and differ only after it.

    python scripts/compare_branches.py --output logs/branches \\
        --branch num_passes=1 --branch feedback_mode=none --branch "matrix_lr=0.02 muon_wd=0.02"

One run is trained up to --at of its progress. From its weights, moments, averages and place in the
data every branch goes on for the rest of the time: first the run as it is, then each --branch with
the settings that it names. So the trunk is paid once and its luck is shared: differences are
clearer than between whole runs. `--branch ""` repeats the run itself, which shows what is noise.
With `--at 0` there is no trunk: whole runs, one after the other, which share a process and its
graphs, and may differ in all but dtype and compile. All other arguments are the trainer's settings.

A parameter that the trunk has not moved (the residual scales and the feedback, while there is one
pass) begins as the branch's settings say; so does one that the trunk does not have. Graphs are
compiled before a branch's time begins. Scores are of the averaged weights, with windows side by
side; int6 is the export's quantization at the size that the entropy of the integers suggests,
without lzma.

DIR gets the log of the trunk and of each branch, and the table. A branch that diverges is a row of
nan. A signal ends the comparison, and the table then has the branches that were done.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the imports

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt  # the first of these: it says what to install
from train_gpt import Evaluator, Hyperparameters, Trainer, UserError, require

# isort: split
import torch
from inspect_logs import markdown_table, plain_table, run_command
from torch import Tensor

PROCESS = ("dtype", "compile")  # one choice for all branches
# What the trunk has used up, or what the trunk's weights depend on.
SHARED = ("seed", "data_path", "tokenizer_path", "vocab_size", "train_batch_tokens")
SHARED += ("train_seq_len", "iterations", "max_wallclock_seconds")
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


class Row(NamedTuple):
    """What came of a branch."""

    settings: str
    steps: int
    val_bpb: float
    int6_bpb: float


def read_run(argv: Sequence[str]) -> Hyperparameters:
    """The settings of the trunk. Raises UserError."""
    hp, _ = train_gpt.read_configuration(os.environ, argv)
    # Warm-up runs every graph once. Nothing but plain windows is scored, nothing else is written.
    unused = {"sliding_eval": False, "ttt_enabled": False, "evaluate": None, "resume": False}
    return replace(hp, warmup_steps=1, checkpoint_seconds=None, **unused)


def read_branch(text: str, hp: Hyperparameters, fixed: Sequence[str]) -> Hyperparameters:
    """The run's settings with those of a text such as `num_passes=1 muon_wd=0.02`.

    fixed: the settings that a branch cannot change. Raises UserError.
    """
    settings = {f.name: str(getattr(hp, f.name)) for f in fields(hp)}
    for word in text.split():
        name, _, value = word.partition("=")
        require(name in settings, f"--branch {text!r}: there is no setting {name}: see --help")
        require(
            name not in fixed,
            f"--branch {text!r}: {name} is shared by all: set it without --branch",
        )
        settings[name] = value
    try:
        variables = {name.upper(): value for name, value in settings.items()}
        return train_gpt.read_configuration(variables, [])[0]
    except UserError as error:
        raise UserError(f"--branch {text!r}: {error}") from None


def flat_state(trainer: Trainer) -> dict[str, Tensor]:
    """What training carries from step to step, each in the layout of flat.data.

    AdamW's moments are copies; they are zeros before its first step.
    """
    flat, adam, state = trainer.flat, trainer.optimizer.adam, train_gpt.run_state(trainer)[1]
    for kind in MOMENTS:
        state[kind] = torch.zeros_like(flat.data)
        for group, settings in zip(train_gpt.ADAM_GROUPS, adam.param_groups, strict=True):
            found = adam.state[settings["params"][0]]
            if found:
                state[kind][flat.spans[group]] = found[kind]
    return state


def continue_from(trunk: Trainer, moved: set[str], trainer: Trainer) -> None:
    """Brings `trainer`, which has not begun, to where the trunk ended.

    moved: the parameters that the trunk has moved. The others begin as `trainer` has them.
    """
    old, new, flat = flat_state(trunk), flat_state(trainer), trainer.flat
    start = flat.named(flat.data)
    for kind, tensor in new.items():
        # An average that the trunk did not have begins with the weights of now.
        source = trunk.flat.named(old.get(kind, old["data"]))
        for name, view in flat.named(tensor).items():
            if name in moved and source[name].shape == view.shape:
                view.copy_(source[name])
            elif kind == "swa":
                view.copy_(start[name])
    adam = trainer.optimizer.adam
    for group, settings in zip(train_gpt.ADAM_GROUPS, adam.param_groups, strict=True):
        moments = {kind: new[kind][flat.spans[group]].clone() for kind in MOMENTS}
        step = torch.tensor(float(trunk.step), device=flat.data.device)
        adam.state[settings["params"][0]] = {"step": step} | moments
    for name in ("step", "elapsed", "plan", "phase_start", "floor_index"):
        setattr(trainer, name, getattr(trunk, name))
    trainer.average.last_progress = trunk.average.last_progress
    if "swa" in old and "swa" in new:
        trainer.average.samples = trunk.average.samples
        trainer.average.last_sample = trunk.average.last_sample


def score(trainer: Trainer, evaluator: Evaluator) -> tuple[float, float]:
    """Bits per byte of the averaged weights, and of what the export would store of them."""
    hp, model, flat = trainer.hp, trainer.model, trainer.flat
    passes = trainer.average_weights()
    losses = evaluator.run("pre_quant_exact", model, hp.train_seq_len, passes)
    weights = flat.named(flat.data)
    squares, limit = trainer.squares, train_gpt.model_limit(hp)
    index = train_gpt.estimate_floor_index(weights, squares, limit)
    payload = train_gpt.pack(weights, train_gpt.step_floors(index, squares))
    for name, stored in train_gpt.unpack(payload, flat.shapes).items():
        weights[name].copy_(stored)
    int6_losses = evaluator.run("quantized_estimate", model, hp.train_seq_len, passes)
    return evaluator.bits_per_byte(losses), evaluator.bits_per_byte(int6_losses)


def prepare(
    hp: Hyperparameters, data: train_gpt.Data, runtime: train_gpt.Runtime, path: Path
) -> tuple[Trainer, Evaluator]:
    """A trainer that has not begun, its graphs compiled and its log opened at `path`."""
    log = train_gpt.Log(path)
    log.event("run", run_id=path.stem)
    for f in fields(hp):
        log.event("config", name=f.name, value=str(getattr(hp, f.name)), source="branch")
    model = train_gpt.build_model(hp, runtime, log)
    trainer = Trainer(model, data, runtime, log, train_gpt.Interrupts())
    evaluator = Evaluator(hp, data, runtime, log)
    trainer.warm_up(evaluator)
    return trainer, evaluator


def finish(settings: str, trainer: Trainer, evaluator: Evaluator, folder: Path) -> Row:
    """Trains a branch to its end and scores it."""
    begin = trainer.step
    try:
        trainer.train(evaluator, folder)
    except FloatingPointError as error:
        trainer.log.event("failed", text=str(error))
        return Row(settings, trainer.step, math.nan, math.nan)
    require(trainer.step > begin, "--at: no step of the run is left for the branches: lower it")
    return Row(settings, trainer.step, *score(trainer, evaluator))


def compare(
    hp: Hyperparameters, branches: Sequence[tuple[str, Hyperparameters]], at: float, folder: Path
) -> Iterator[Row]:
    """Trains the trunk, if there is one, then yields what comes of each branch.

    Raises UserError.
    """
    runtime = train_gpt.Runtime.start(hp)
    # Of all branches, so that a mistake in the last one is told before the first one trains.
    for _, branch in branches:
        train_gpt.check_paths(branch)
    opened = [train_gpt.open_data(branch, runtime) for _, branch in branches]
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}: name a folder to make") from None
    trunk, moved = None, set()
    if at > 0:
        trunk, evaluator = prepare(*opened[0], runtime, folder / "trunk.txt")
        weights = trunk.flat.named(trunk.flat.data)
        start = {name: w.clone() for name, w in weights.items()}
        trunk.train(evaluator, folder, until=at)
        moved = {name for name, w in weights.items() if not w.equal(start[name])}
    for number, (text, _) in enumerate(branches):
        settings = " ".join(text.split()) or "run"
        name = re.sub(r"[^-.,=0-9A-Za-z_]+", "_", settings)[:80]
        path = folder / f"{number}_{name}.txt"
        trainer, evaluator = prepare(*opened[number], runtime, path)
        if trunk is not None:
            continue_from(trunk, moved, trainer)
        yield finish(settings, trainer, evaluator, folder)
        del trainer, evaluator  # their memory is free before the next ones are built


def table(rows: Sequence[Row], markdown: bool) -> str:
    """Scores, and their differences from the first row's."""
    cells = [["", "steps", "val_bpb", "difference", "int6", "difference"]]
    for row in rows:
        line = [row.settings, str(row.steps)]
        for bpb, first in ((row.val_bpb, rows[0].val_bpb), (row.int6_bpb, rows[0].int6_bpb)):
            line += [f"{bpb:.5f}", f"{bpb - first:+.5f}"]
        cells.append(line)
    return (markdown_table if markdown else plain_table)(cells)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="compare_branches.py --output DIR [options] [--SETTING VALUE ...]",
        epilog="all settings: python train_gpt.py --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--branch", action="append", default=[], metavar="SETTINGS", help="name=value ...")
    add("--at", type=float, default=0.6, help="progress at which branches begin [0.6]")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make, for the logs")
    add("--format", choices=("plain", "markdown"), default="plain")
    args, settings = parser.parse_known_args(argv)
    rows: list[Row] = []
    try:
        require(os.environ.get("WORLD_SIZE", "1") == "1", "start one process, without torchrun")
        require(0 <= args.at < 1, f"--at {args.at}: must be at least 0 and below 1")
        hp = read_run(settings)
        fixed = (*PROCESS, *SHARED) if args.at else PROCESS
        branches = [(text, read_branch(text, hp, fixed)) for text in ("", *args.branch)]
        for row in compare(hp, branches, args.at, args.output):
            rows.append(row)
    except (UserError, FloatingPointError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    finally:  # a signal comes as SystemExit
        if rows:
            train_gpt.write_aside(args.output / "table.md", table(rows, markdown=True).encode())
            print(table(rows, args.format == "markdown"))
    return 0


if __name__ == "__main__":
    run_command(main)
