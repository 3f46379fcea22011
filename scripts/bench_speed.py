"""Measures the trainer's speed on this machine: steps, kernels, compilation, evaluation, memory.

    python scripts/bench_speed.py                                  the recipe's step on one GPU
    python scripts/bench_speed.py --train-batch-tokens 98304 --steps 20
    python scripts/bench_speed.py --skip compile evaluation --format markdown

It measures the train_gpt.py of its own checkout; for a commit before and after, run the script of
each (`git worktree add ../before COMMIT`) on the same warm machine.

Every setting of train_gpt.py is a flag and a variable here too. A step is one GPU's, by default of
all 786,432 tokens of the recipe. Without a GPU the defaults are those of scripts/demo.env. The
tokens are random: no speed depends on the text.

A step is Trainer.take_step: a batch from the loader, forward and backward of every micro-batch, the
optimizer, the weight average. Its time is the median after untimed steps.

Model FLOPs are counted from the mathematics. A token takes, K passes deep,

    matrices    6 W         W: weights of the matrices that it meets, those of the core K times. A
                            weight multiplies and adds once forward and twice backward
    head        6 V D
    attention   6 D S       S: the tokens of a sequence, or of the layer's chunk, summed over the
                            layers that it meets, those of the core K times. q k' and p v take
                            2 D S each, the causal mask halves them, backward is twice forward

so recomputation, fake quantization and the optimizer's products count as time only. Utilization is
model FLOP/s over the device's dense bfloat16 peak.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the imports

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # the first of these: it says what to install
from train_gpt import Evaluator, Hyperparameters, Runtime, Trainer, graphs_compiled

# isort: split
import numpy as np
import torch
from inspect_logs import markdown_table, plain_table, run_command
from torch._inductor.utils import fresh_inductor_cache
from torch.profiler import ProfilerActivity, profile

DEMO_ENV = Path(__file__).with_name("demo.env")
RECIPE_TOKENS = 786_432  # of a step
RECIPE_PIECES = 1024  # of the tokenizer
# They also fill the banks that start at zero: products with zeros take less power.
UNTIMED_STEPS = 2
CHUNKS = 4  # of test-time training
# Dense bfloat16 TFLOP/s of the data sheets; the first name that the device's contains counts.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312}


class OneByteEach:
    """Stands for train_gpt.TokenBytes: no speed depends on the bytes of a token."""

    def of(self, previous: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(target)


def read_settings(env: Mapping[str, str], argv: Sequence[str], on_gpu: bool) -> Hyperparameters:
    """The settings with the defaults that the module's docstring names. Raises UserError."""
    several = env.get("WORLD_SIZE", "1") != "1"
    train_gpt.require(not several, "bench_speed.py measures one process: start it without torchrun")
    if not on_gpu:
        argv = ["--env", str(DEMO_ENV), *argv]
    hp, sources = train_gpt.read_configuration(env, argv)
    if sources["train_batch_tokens"] == "default":
        sequences = max(1, RECIPE_TOKENS // hp.train_seq_len)
        hp = replace(hp, train_batch_tokens=sequences * hp.train_seq_len)
    return replace(hp, vocab_size=hp.vocab_size or RECIPE_PIECES)


def build(hp: Hyperparameters, runtime: Runtime) -> tuple[Trainer, Evaluator]:
    """A trainer and an evaluator on random tokens."""
    rng, log = np.random.default_rng(hp.seed), train_gpt.Log(None)
    train_count = hp.train_batch_tokens + 2 * hp.train_seq_len
    val_count = max(CHUNKS * hp.ttt_chunk_tokens, hp.train_seq_len) + 1
    train_tokens, val_tokens = (
        rng.integers(hp.vocab_size, size=count, dtype=np.uint16)
        for count in (train_count, val_count)
    )
    loader = train_gpt.BatchLoader([train_tokens], hp, runtime)
    data = train_gpt.Data(loader, val_tokens, OneByteEach(), [])
    model = train_gpt.build_model(hp, runtime, log)
    trainer = Trainer(model, data, runtime, log, train_gpt.Interrupts())
    return trainer, Evaluator(hp, data, runtime, log)


def model_flops(hp: Hyperparameters, passes: int, cuts: int) -> dict[str, int]:
    """Model FLOPs of a step by part; the module's docstring says how they are counted."""
    ids = list(range(hp.num_layers)) + (passes - 1) * list(range(hp.core_start, hp.core_end))
    length = hp.train_seq_len // cuts
    seen = sum(min(length, hp.chunk_of(i) or length) for i in ids)
    layers, weights = len(ids), 0
    for name, parameter in train_gpt.parameter_table(hp).items():
        size = math.prod(parameter.shape)
        if parameter.group == "bank":
            weights += size // hp.num_layers * layers
        elif parameter.group == "projection":
            weights += size
        elif name in ("feedback_U", "feedback_V"):
            weights += size * (passes - 1)
    of_token = {
        "matrices": 6 * weights,
        "head": 6 * hp.vocab_size * hp.model_dim,
        "attention": 6 * hp.model_dim * seen,
    }
    return {part: flops * hp.train_batch_tokens for part, flops in of_token.items()}


# --------------------------------------------------------------------------------------------------
# Measuring


def lap_seconds(work: Callable[[], Any], count: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` calls: by a GPU's own clock, not that of the host feeding it."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            work()
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(events)]


def measure_step(
    trainer: Trainer, kind: tuple[int, int, bool], count: int, peak_tflops: float | None
) -> dict[str, Any]:
    """Time and memory of a kind of step (passes, cuts, QAT), and what follows from them."""
    passes, cuts, qat = kind
    # A step's plan follows from these. At a progress of 0 the learning rate's scale is 1.
    plan = {"num_passes": passes, "seq_len_schedule": f"0.0:{cuts}"}
    trainer.hp = replace(trainer.hp, **plan, late_qat_threshold=2.0 if qat else 0.0)
    on_gpu = trainer.runtime.device.type == "cuda"
    for _ in range(UNTIMED_STEPS):
        trainer.take_step(0.0)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = lap_seconds(lambda: trainer.take_step(0.0), count, trainer.runtime.device)
    tflops = sum(model_flops(trainer.model.hp, passes, cuts).values()) / 1e12
    return {
        "passes": trainer.plan.num_passes,
        "seq_len": trainer.hp.train_seq_len // trainer.plan.cuts,
        "qat": trainer.plan.qat,
        "ms": 1000 * median(seconds),
        "fastest_ms": 1000 * min(seconds),
        "slowest_ms": 1000 * max(seconds),
        "tflops": tflops,
        "tflops_per_second": tflops / median(seconds),
        "utilization": tflops / median(seconds) / peak_tflops if peak_tflops else None,
        "peak_memory_mib": torch.cuda.max_memory_allocated() >> 20 if on_gpu else None,
    }


def profile_step(trainer: Trainer) -> list[dict[str, Any]]:
    """Each kernel of one more step like the last: name, launches, ms; the longest first.

    On a CPU each operator, less those that it calls.
    """
    on_gpu = trainer.runtime.device.type == "cuda"
    trainer.runtime.barrier()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        trainer.take_step(0.0)
        trainer.runtime.barrier()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    kernels = []
    for event in found.key_averages():
        if event.device_type == kind and not event.is_user_annotation:
            spent_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            kernels.append({"name": event.key, "launches": event.count, "ms": spent_us / 1000})
    return sorted(kernels, key=lambda kernel: -kernel["ms"])


def measure_evaluation(trainer: Trainer, evaluator: Evaluator) -> dict[str, float]:
    """Seconds a chunk of sliding windows, and of the SGD that test-time training adds to them."""
    hp, device = evaluator.hp, trainer.runtime.device
    model, passes = trainer.model, hp.eval_passes or hp.schedule[-1][1]
    # The first call of each is not timed.
    score = partial(evaluator.run, "sliding", model, hp.eval_stride, passes)
    adapt = partial(evaluator.run_ttt, model, trainer.flat, passes, math.inf)
    _, scoring = lap_seconds(score, 2, device)
    _, both = lap_seconds(adapt, 2, device)
    chunks = math.ceil(evaluator.num_targets / hp.ttt_chunk_tokens)
    training = (both - scoring) / max(1, chunks - 1)  # the last chunk is not trained on
    return {"chunk_scoring_seconds": scoring / chunks, "chunk_training_seconds": training}


def describe(trainer: Trainer) -> dict[str, Any]:
    """What the figures depend on."""
    hp, runtime, model = trainer.hp, trainer.runtime, trainer.model
    device = "CPU, by default with the demo's sizes: no figure here is the recipe's"
    if runtime.device.type == "cuda":
        device = torch.cuda.get_device_name()
    code = Path(train_gpt.__file__).read_bytes()
    return {
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "train_gpt_sha256": hashlib.sha256(code).hexdigest(),
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "compiled": runtime.compiles,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_batch_tokens": hp.train_batch_tokens,
        "micro_batch_tokens": hp.micro_batch_tokens,
        "train_seq_len": hp.train_seq_len,
    }


def measure(args: argparse.Namespace, settings: Sequence[str]) -> dict[str, Any]:
    """All figures, as JSON has them. Raises UserError."""
    train_gpt.require(args.steps >= 1, f"--steps {args.steps}: time at least one step")
    hp = read_settings(os.environ, settings, torch.cuda.is_available())
    runtime = Runtime.start(hp)
    trainer, evaluator = build(hp, runtime)
    setup, peak = describe(trainer), args.peak_tflops
    if runtime.dtype == torch.bfloat16 and not peak:
        peak = next((t for name, t in PEAK_TFLOPS.items() if name in setup["device"]), None)
    report: dict[str, Any] = {"setup": setup, "steps": []}
    if "compile" not in args.skip:
        since = time.perf_counter()
        trainer.warm_up(evaluator)
        runtime.barrier()
        report["cold_start_seconds"] = time.perf_counter() - since
    report["graphs"] = graphs_compiled()
    for kind in train_gpt.step_kinds(hp):
        print(f"timing steps of (passes, cuts, QAT) {kind}", file=sys.stderr, flush=True)
        report["steps"].append(measure_step(trainer, kind, args.steps, peak))
    if "profile" not in args.skip:
        report["kernels"] = profile_step(trainer)
    if "evaluation" not in args.skip:
        report |= measure_evaluation(trainer, evaluator)
    report["late_graphs"] = graphs_compiled() - report["graphs"]
    return report


# --------------------------------------------------------------------------------------------------
# Reporting


def step_rows(steps: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A column for each kind of step."""
    labels = {
        "ms": ("step, ms", ".1f"),
        "fastest_ms": ("fastest, ms", ".1f"),
        "slowest_ms": ("slowest, ms", ".1f"),
        "tflops": ("model TFLOPs a step", ".4g"),
        "tflops_per_second": ("model TFLOP/s", ".4g"),
        "utilization": ("utilization", ".1%"),
        "peak_memory_mib": ("peak memory, MiB", ",d"),
    }
    head = "passes={passes}, T={seq_len}"
    rows = [["", *(head.format(**step) + " + QAT" * step["qat"] for step in steps)]]
    for key, (label, form) in labels.items():
        values = [step[key] for step in steps]
        rows.append([label, *("n/a" if v is None else format(v, form) for v in values)])
    return rows


def kernel_rows(kernels: Sequence[Mapping[str, Any]], count: int) -> list[list[str]]:
    """The `count` that take longest, then all."""
    busy_ms = sum(kernel["ms"] for kernel in kernels)
    total = {"name": "all", "launches": sum(kernel["launches"] for kernel in kernels)}
    rows = [["kernel of the last kind of step", "launches", "ms", "share"]]
    for kernel in [*kernels[:count], total | {"ms": busy_ms}]:
        name, ms = kernel["name"][:70].replace("|", "/"), kernel["ms"]
        rows.append([name, f"{kernel['launches']}", f"{ms:.2f}", f"{ms / busy_ms:.1%}"])
    return rows


def other_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Cold start and evaluation, as far as they were measured."""
    labels = {
        "cold_start_seconds": "cold start, caches empty: {graphs} graphs, {late_graphs} more later",
        "chunk_scoring_seconds": "TTT, scoring a chunk",
        "chunk_training_seconds": "TTT, training on a chunk",
    }
    found = [key for key in labels if key in report]
    rows = [[labels[key].format(**report), f"{report[key]:.3f}"] for key in found]
    return [["", "seconds"], *rows]


def report_text(report: Mapping[str, Any], form: str, kernels: int) -> str:
    if form == "json":
        return json.dumps(report, indent=2)
    tables = [step_rows(report["steps"]), other_rows(report)]
    if "kernels" in report:
        tables.append(kernel_rows(report["kernels"], kernels))
    setup = "\n".join(f"- {name}: {value}" for name, value in report["setup"].items())
    make = markdown_table if form == "markdown" else plain_table
    parts = [make(rows) for rows in tables if len(rows) > 1]
    return "\n\n".join([setup, *parts])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="bench_speed.py [options] [--SETTING VALUE ...]",
        epilog="all settings: python train_gpt.py --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    parts = ("compile", "profile", "evaluation")
    add("--format", choices=("plain", "markdown", "json"), default="plain")
    add("--steps", type=int, default=5, help="timed steps of each kind [5]")
    add("--skip", nargs="+", choices=parts, default=[], help="what is not measured")
    add("--kernels", type=int, default=12, help="rows of the table of kernels [12]")
    add("--peak-tflops", type=float, help="the device's peak, if this script does not know it")
    args, settings = parser.parse_known_args(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it reports each start and stop
    try:
        with nullcontext() if "compile" in args.skip else fresh_inductor_cache():
            report = measure(args, settings)
    except (train_gpt.UserError, FloatingPointError, torch.OutOfMemoryError) as error:
        remedy = ": lower MICRO_BATCH_TOKENS" if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"error: {error}{remedy}", file=sys.stderr)
        return 2
    print(report_text(report, args.format, args.kernels))
    return 0


if __name__ == "__main__":
    run_command(main)
