"""Compares settings in pairs: runs that share a trunk, and differ only after it.

    python scripts/compare_branches.py --output logs/branches \\
        --branch num_passes=1 --branch feedback_mode=none --branch "matrix_lr=0.02 muon_wd=0.02"

One run is trained up to --at of its progress. From its weights, moments, averages and data every
branch goes on for the rest of the time: first the run as it is, then each --branch with the
settings that it names. So the trunk is paid once and its luck is shared: differences are clearer
than between whole runs. `--branch ""` repeats the run itself, which shows what is noise. All other
arguments are the trainer's settings.

A parameter that the trunk has not moved (the residual scales and the feedback, while there is one
pass) begins as the branch's settings say; so does one that the trunk does not have. Graphs are
compiled before a branch's time begins. Scores are of the averaged weights, with windows side by
side; int6 is the export's quantization at the size that the entropy of the integers suggests,
without lzma.

DIR gets the log of the trunk and of each branch. One process; with a wall-clock cap the seconds of
a branch follow from --at.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from inspect_logs import markdown_table, number, plain_table
from torch import Tensor
from trainer_runs import ROOT

sys.path.insert(0, str(ROOT))

from train_gpt import (
    BatchLoader,
    Evaluator,
    Hyperparameters,
    Log,
    Optimizer,
    Runtime,
    StepPlan,
    Trainer,
    UserError,
    WeightAverage,
    build_model,
    code_bytes,
    estimate_floor_index,
    floor_value,
    log_header,
    open_data,
    pack,
    parse_value,
    plan_step,
    read_configuration,
    require,
    unpack,
)

# What the trunk has used up, or what the trunk's weights depend on.
SHARED = (
    *("seed", "data_path", "tokenizer_path", "train_batch_tokens", "train_seq_len", "shuffle"),
    *("iterations", "max_wallclock_seconds", "reserve_seconds", "dtype", "compile"),
)
SCORES = ("pre_quant_exact", "quantized_estimate")


class Reached(Exception):
    """The trunk is as long as it should be."""


class Notes(Log):
    """A log that remembers what it wrote."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.last: dict[str, dict[str, Any]] = {}
        self.open()

    def event(self, name: str = "", /, **pairs: Any) -> None:
        self.last[name] = pairs
        super().event(name, **pairs)


@dataclass(frozen=True)
class Snapshot:
    """Where the trunk ended. `tensors` are by kind (as in Trainer.run_state), then by name."""

    hp: Hyperparameters
    step: int
    progress: float
    tensors: dict[str, dict[str, Tensor]]
    untouched: set[str]  # parameters that are still as they were initialized
    samples: tuple[int, float, float]  # of the average
    floor_index: int | None

    @property
    def elapsed(self) -> float:
        return self.progress * (self.hp.max_wallclock_seconds or 0.0)


class BranchTrainer(Trainer):
    """Trains up to a place, or on from a snapshot."""

    def __init__(self, *parts: Any, until: float = 2.0, start: Snapshot | None = None) -> None:
        super().__init__(*parts)
        self.until, self.start = until, start
        self.initial = {n: w.clone() for n, w in self.flat.named(self.flat.data).items()}

    def resume(
        self, optimizer: Optimizer, average: WeightAverage
    ) -> tuple[int, StepPlan | None, float]:
        self.optimizer, self.average = optimizer, average
        start = self.start
        if start is None:
            return 0, None, 0.0
        alike = start.hp.weight_average == self.hp.weight_average
        for kind, tensor in self.run_state(optimizer, average).items():
            known = kind not in ("ema", "swa") or alike
            for name, view in self.flat.named(tensor).items():
                source = start.tensors[kind if known else "data"].get(name)
                if self.takes(name, source):
                    view.copy_(source)
        for moments in optimizer.adam.state.values():
            moments["step"].fill_(start.step)
        samples, average.last_progress, last_sample = start.samples
        if alike:
            average.samples, average.last_sample = samples, last_sample
        self.floor_index = start.floor_index
        return start.step, plan_step(start.hp, start.step - 1, average.last_progress), start.elapsed

    def takes(self, name: str, source: Tensor | None) -> bool:
        """Whether the branch goes on with the trunk's values of a parameter."""
        fresh = source is None or source.shape != self.flat.shapes[name]
        return not fresh and name not in self.start.untouched

    def announce(
        self, step: int, progress: float, before: StepPlan | None, plan: StepPlan
    ) -> Tensor | None:
        if progress >= self.until:
            self.reached = step, progress
            raise Reached
        return super().announce(step, progress, before, plan)

    def train_whole(self) -> None:
        """Trains to the end. A signal ends the program: half a branch compares with nothing."""
        code = self.train()
        if code:
            sys.exit(code)

    def snapshot(self) -> Snapshot:
        average, named = self.average, self.flat.named
        tensors = {
            kind: {n: w.clone() for n, w in named(tensor).items()}
            for kind, tensor in self.run_state(self.optimizer, average).items()
        }
        untouched = {n for n, w in self.initial.items() if w.equal(tensors["data"][n])}
        samples = (average.samples, average.last_progress, average.last_sample)
        step, progress = self.reached
        return Snapshot(self.hp, step, progress, tensors, untouched, samples, self.floor_index)


def branch_settings(text: str, hp: Hyperparameters) -> Hyperparameters:
    """The settings of a branch such as `num_passes=1 muon_wd=0.02`. Raises UserError."""
    kinds, changes = {f.name: str(f.type) for f in fields(hp)}, {}
    for word in text.split():
        name, _, value = word.partition("=")
        require(name in kinds, f"--branch {text!r}: there is no setting {name}")
        require(name not in SHARED, f"--branch {text!r}: {name} belongs to the trunk as well")
        try:
            changes[name] = parse_value(kinds[name], value)
        except (ValueError, KeyError):
            raise UserError(f"--branch {text!r}: {value!r} is no {kinds[name]}") from None
    return replace(hp, **changes)


def labels(branches: Iterable[str]) -> list[str]:
    """A name for each branch, no two alike: `run` for the run itself, else its settings."""
    names: list[str] = []
    for text in branches:
        name = " ".join(text.split()) or "run"
        names.append(name if name not in names else f"{name} ({len(names)})")
    return names


class Comparison:
    """A trunk and its branches on one process."""

    def __init__(self, hp: Hyperparameters, sources: Mapping[str, str], folder: Path) -> None:
        self.hp, self.sources, self.folder, self.log = (
            hp,
            sources,
            folder,
            Notes(folder / "trunk.txt"),
        )
        self.runtime = Runtime.start(hp)
        loader, self.evaluator = open_data(hp, self.runtime, self.log)
        self.loader: BatchLoader = loader

    def trainer(self, hp: Hyperparameters, log: Log, **where: Any) -> BranchTrainer:
        """A trainer whose graphs are compiled."""
        log_header(hp, self.sources, self.runtime, log)
        evaluator: Evaluator = copy.copy(self.evaluator)
        evaluator.hp, evaluator.log = hp, log
        trainer = BranchTrainer(build_model(hp, self.runtime, log), self.loader, evaluator, **where)
        trainer.warm_up()
        return trainer

    def trunk(self, at: float) -> Snapshot:
        trainer = self.trainer(self.hp, self.log, until=at)
        try:
            trainer.train_whole()
        except Reached:
            return trainer.snapshot()
        raise UserError(f"--at {at}: training had ended before, use a smaller one")

    def branch(self, label: str, hp: Hyperparameters, start: Snapshot) -> dict[str, Any]:
        """Trains and scores a branch; its row of the table."""
        name = re.sub(r"[^\w=.,:()-]", "_", label)
        log = Notes(self.folder / f"{name}.txt")
        trainer = self.trainer(hp, log, start=start)
        trainer.train_whole()
        flat, model, score = trainer.flat, trainer.model, trainer.evaluator.run
        row = {"branch": label, "steps": log.last["stop"]["step"]}
        score("pre_quant_exact", model, hp.train_seq_len, hp.passes_in_evaluation)
        named = flat.named(flat.data)
        index = estimate_floor_index(named, hp.artifact_limit_bytes - code_bytes())
        for key, tensor in unpack(pack(named, floor_value(index)), flat.shapes).items():
            named[key].copy_(tensor)
        score("quantized_estimate", model, hp.train_seq_len, hp.passes_in_evaluation)
        return row | {kind: float(log.last[kind]["val_bpb"]) for kind in SCORES}


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows: scores, and differences from the first."""
    first, text = rows[0], [["", "steps", "val_bpb", "difference", "int6", "difference"]]
    for row in rows:
        cells = [row["branch"], number(row["steps"], 0)]
        for kind in SCORES:
            cells += [number(row[kind], 5), f"{row[kind] - first[kind]:+.5f}"]
        text.append(cells)
    return text


def compare(args: argparse.Namespace, settings: Sequence[str]) -> list[dict[str, Any]]:
    """Trains and scores everything. Raises UserError before anything is trained."""
    require(os.environ.get("WORLD_SIZE", "1") == "1", "start one process, without torchrun")
    hp, sources = read_configuration(os.environ, settings)
    require(0 < args.at < 1, f"--at {args.at}: must be between 0 and 1")
    # Every graph once before its time begins; nothing but plain windows is scored.
    hp = replace(hp, warmup_steps=1, sliding_eval=False, ttt_enabled=False)
    texts = ["", *args.branch]
    branches = [branch_settings(text, hp) for text in texts]
    try:
        args.output.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output {args.output}: {error.strerror}: choose another") from None
    comparison = Comparison(hp, sources, args.output)
    start = comparison.trunk(args.at)
    return [
        comparison.branch(label, branch, start)
        for label, branch in zip(labels(texts), branches, strict=True)
    ]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="compare_branches.py [options] [--SETTING VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--branch",
        action="append",
        default=[],
        metavar="SETTINGS",
        help="name=value, spaces between",
    )
    add("--at", type=float, default=0.626, help="progress at which branches begin [0.626]")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make, for the logs")
    add("--format", choices=("table", "markdown", "json"), default="table")
    args, settings = parser.parse_known_args(argv)
    try:
        rows = compare(args, settings)
    except (UserError, FloatingPointError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    forms = {"table": plain_table, "markdown": markdown_table}
    print(json.dumps(rows, indent=2) if args.format == "json" else forms[args.format](table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
