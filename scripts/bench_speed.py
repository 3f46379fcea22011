"""Measures the trainer's speed on this machine: steps, kernels, compilation, evaluation, memory.

    python scripts/bench_speed.py                                  the recipe's step on one GPU
    python scripts/bench_speed.py --train-batch-tokens 196608 --steps 20
    python scripts/bench_speed.py --skip compile,ttt --format markdown

Every setting of train_gpt.py is a flag and a variable here too, with the recipe's defaults; a step
is one GPU's, by default of all 786,432 tokens. Without a GPU the sizes are tiny and the table says
so. Tokens come from DATA_PATH if it holds shards, and are random otherwise.

Times are medians after untimed repetitions: of device events on a GPU, of the host's clock on a
CPU. A step is what the training loop does between two logs: a batch from the loader, forward and
backward of every micro-batch, then, "outside" them, norm, clip, optimizer, EMA and zeroing.

Model FLOPs are counted from the mathematics, not from kernels. A token takes, K passes deep,

    matrices    6 W         W: weights of the matrices it meets, those of the core K times: a
                            weight multiplies and adds once forward and twice backward
    head        6 V D
    attention   6 T D A     A: layers it meets, those of the core K times: q k' and p v take 2 T D
                            each forward, the causal mask halves them, and backward is twice that

    utilization = FLOPs a token * tokens of a step / (seconds of a step * peak FLOP/s)

so that recomputation, fake quantization and the optimizer's own products count as time only.

Shares are of the time of all kernels in a profiled step, told apart by their names; what runs after
backward is the optimizer's whatever its name. Idle is a step's median less that time. On a CPU the
shares are of operators, and idle is unknown: the profiler's own time can't be told from Python's.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
import torch
from inspect_logs import markdown_table, number, plain_table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from trainer_runs import ROOT, TINY_RUN

sys.path.insert(0, str(ROOT))

from train_gpt import (
    BANKS,
    GPT,
    PROJECTIONS,
    BatchLoader,
    Evaluator,
    FlatParameters,
    Hyperparameters,
    Log,
    Optimizer,
    Runtime,
    TokenBytes,
    Trainer,
    UserError,
    WeightAverage,
    build_model,
    check_token_ids,
    choose_attention,
    compiled,
    find_data_shards,
    fuses_mlp,
    graphs_compiled,
    open_data_shard,
    read_configuration,
    require,
    run_graphs,
    scoring_windows,
)

PARTS = ("compile", "profile", "ttt")
RECIPE_TOKENS = 786_432  # of a step
# Untimed, steps also fill the matrices that start at zero: products with zeros take less power.
UNTIMED_STEPS = 2
TTT_CHUNKS = 4  # the first, whose opening window has another shape, is not timed
SLIDING_TOKENS, SLIDING_RUNS = 32_768, 3
CPU_SETTINGS = TINY_RUN | {"TTT_CHUNK_TOKENS": "1024"}
# Dense bfloat16 TFLOP/s of the data sheets; the first name that the device's contains.
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362,
}  # fmt: skip

# The first pattern that a name contains, in lower case, decides; what none knows is `other`.
SHARES = ("attention", "linear", "elementwise", "optimizer", "other")
KERNELS = (
    # Inductor names a kernel by what it fused, such as the copies around attention.
    ("elementwise", r"^triton_(?!tem|mm)"),
    ("attention", r"cudnn|flash|fmha|sdpa|attention"),
    ("linear", r"nvjet|gem[mv]|cutlass|splitk|cublas|fused_product|^triton_"),
    ("other", r"^mem(cpy|set)|copy|radix|sort|topk"),
    ("elementwise", r"elementwise|reduce|softmax|norm|embedding|index|gather|scatter"),
)
OPERATORS = (
    ("attention", r"attention"),
    ("linear", r"^aten::(add|badd)?b?mm$"),
    ("other", r"^(?!aten::)|copy|clone|cat$|stack$|empty|view|slice|select|split|expand|stride"),
    ("elementwise", r""),
)

FOOTNOTES = (
    "model FLOPs a token: 6 x (weights of the matrices that it meets, the core's once a pass, and "
    "of the head) + 6 x T x D for each layer that it meets (causal attention). Recomputation, fake "
    "quantization and the optimizer's products are not counted.",
    "utilization: FLOPs a token x tokens of a step / (seconds of a step x peak FLOP/s).",
    "outside forward and backward: norm, clip, optimizer, EMA, zeroing. Times are medians.",
)


class Case(NamedTuple):
    """A kind of step."""

    passes: int
    qat: bool

    def __str__(self) -> str:
        return f"{self.passes} pass{'es'[: 2 * (self.passes > 1)]}{' + QAT' * self.qat}"


@dataclass(frozen=True)
class StepFigures:
    """What was measured of one kind of step; shares are None without a profile."""

    passes: int
    qat: bool
    step_ms: float
    outside_ms: float
    flops: dict[str, int]  # of a step, by part of the model
    tflops_per_second: float
    utilization: float | None
    shares: dict[str, float] | None  # of the device's time, summing to 1
    idle_share: float | None  # of the step
    peak_memory_mib: int | None
    kernels: list[tuple[str, int, float]] | None  # name, launches, ms; the longest first


# ------------------------------------------------------------------------------------ what is run


class OneByteTokenizer:
    """What TokenBytes asks of a tokenizer: no speed depends on the answers."""

    def __init__(self, size: int) -> None:
        self.size = size

    def vocab_size(self) -> int:
        return self.size

    def IdToPiece(self, i: int) -> str:
        return "x"

    def IsControl(self, i: int) -> bool:
        return False

    IsUnknown = IsUnused = IsByte = IsControl


def read_settings(
    env: Mapping[str, str], argv: Sequence[str], on_gpu: bool
) -> tuple[Hyperparameters, dict[str, str]]:
    """As the trainer reads them, but for the defaults that the module's docstring names.

    Raises UserError.
    """
    text = f"WORLD_SIZE={env.get('WORLD_SIZE')}: start one process, without torchrun"
    require(env.get("WORLD_SIZE", "1") == "1", text)
    hp, sources = read_configuration(env if on_gpu else {**CPU_SETTINGS, **env}, argv)
    if sources["train_batch_tokens"] == "default":
        whole = max(1, RECIPE_TOKENS // hp.train_seq_len) * hp.train_seq_len
        hp = replace(hp, train_batch_tokens=whole)
    return hp, sources


def read_tokens(hp: Hyperparameters, given: bool) -> tuple[np.ndarray, str]:
    """The first training shard, or random tokens, and what they are. Raises UserError.

    given: whether the folder was named, so that it must hold shards.
    """
    folder = Path(hp.data_path)
    if given or any(folder.glob("fineweb_train_*.bin")):
        path = find_data_shards(folder, "train")[0]
        check_token_ids([path], hp.vocab_size)
        return open_data_shard(path), f"of {path.name}"
    count = (hp.batch_seqs + 2) * hp.train_seq_len
    rng = np.random.default_rng(hp.seed)
    return rng.integers(hp.vocab_size, size=count, dtype=np.uint16), "random"


def build_trainer(hp: Hyperparameters, runtime: Runtime, tokens: np.ndarray) -> Trainer:
    """A trainer on `tokens`, with an evaluator on as many of them as are scored."""
    log = Log(None)
    table = TokenBytes(OneByteTokenizer(hp.vocab_size), runtime.device)
    count = max(TTT_CHUNKS * hp.ttt_chunk_tokens, hp.train_seq_len) + 1
    text = np.resize(tokens[:count], count)
    evaluator = Evaluator(text, table, hp, runtime, log)
    loader = BatchLoader([tokens], hp, runtime)
    return Trainer(build_model(hp, runtime, log), loader, evaluator)


def cases(hp: Hyperparameters) -> list[Case]:
    """Each number of passes without QAT; the last of them with QAT, if the run has it."""
    graphs = run_graphs(hp)
    plain = [Case(passes, False) for passes in sorted({passes for passes, _ in graphs})]
    return plain + [Case(hp.growth[-1][1], True)] * any(qat for _, qat in graphs)


def step_flops(model: GPT, passes: int) -> dict[str, int]:
    """Model FLOPs of a step by part; see the module's docstring."""
    hp = model.hp
    applied = hp.num_layers + (passes - 1) * (hp.core_end - hp.core_start)
    weights = applied * sum(getattr(model, bank).numel() for bank in BANKS) // hp.num_layers
    named = dict(model.named_parameters())
    weights += sum(w.numel() for name, w in named.items() if name in PROJECTIONS)
    feedback = (w.numel() for name, w in named.items() if name in ("recurrence.U", "recurrence.V"))
    weights += (passes - 1) * sum(feedback)
    a_token = {
        "matrices": 6 * weights,
        "head": 6 * hp.vocab_size * hp.model_dim,
        "attention": 6 * hp.train_seq_len * hp.model_dim * applied,
    }
    return {part: hp.train_batch_tokens * flops for part, flops in a_token.items()}


class Steps:
    """Steps as Trainer.train takes them, without its schedules, log and checkpoints."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.done = trainer, 0
        hp, flat, runtime = trainer.hp, trainer.flat, trainer.runtime
        self.optimizer = Optimizer(flat, hp, runtime)
        self.average = WeightAverage(hp, flat.data)
        # Fine enough that QAT doesn't round the matrices to zero.
        self.floor = torch.tensor(2.0**-8, device=runtime.device)

    def forward_backward(self, case: Case) -> None:
        batch = self.trainer.loader.batch(self.done)
        self.trainer.accumulate(batch, case.passes, self.floor if case.qat else None)

    def outside(self) -> None:
        norm = self.optimizer.reduce()
        self.optimizer.step(norm, 1.0, self.trainer.hp.muon_momentum)
        self.trainer.flat.grad.zero_()
        self.done += 1
        self.average.update(self.done / (self.done + 1000), swa=False)
        self.trainer.watch(self.done, norm)  # as in training, the host is two steps ahead at most


# ------------------------------------------------------------------------------------- measuring


class Stopwatch:
    """Seconds between marks in the device's own time: a GPU's, not that of the host feeding it."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        if self.on_gpu:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in pairwise(self.marks)]
        return [b - a for a, b in pairwise(self.marks)]


@contextmanager
def empty_caches() -> Iterator[None]:
    """Compiles as if for the first time on this machine, and leaves nothing behind."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ |= {name: str(Path(folder, name.lower())) for name in names}
        try:
            yield
        finally:
            for name in names:
                os.environ.pop(name, None)
            os.environ |= kept


def measure_compilation(trainer: Trainer) -> dict[str, float]:
    """Seconds until every graph of the run has run, and how many there are."""
    graphs, since = graphs_compiled(), time.perf_counter()
    trainer.warm_up()
    trainer.runtime.barrier()
    seconds = time.perf_counter() - since
    return {"seconds": seconds, "graphs": graphs_compiled() - graphs}


def measure_step(steps: Steps, case: Case, count: int) -> tuple[float, float]:
    """Median seconds of a step and of its part outside forward and backward."""
    for _ in range(UNTIMED_STEPS):
        steps.forward_backward(case)
        steps.outside()
    watch = Stopwatch(steps.trainer.runtime.device)
    watch.mark()
    for _ in range(count):
        steps.forward_backward(case)
        watch.mark()
        steps.outside()
        watch.mark()
    laps = watch.laps()
    return median(a + b for a, b in zip(laps[::2], laps[1::2], strict=True)), median(laps[1::2])


def category(name: str, patterns: Sequence[tuple[str, str]]) -> str:
    return next((c for c, pattern in patterns if re.search(pattern, name.lower())), "other")


def profiled(work: Callable[[], None], device: torch.device) -> list[tuple[str, float]]:
    """Name and seconds of each kernel that `work` runs; on a CPU of each operator, less those
    that it calls."""
    if device.type != "cuda":
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            work()
        return [(event.name, event.self_cpu_time_total / 1e6) for event in recorded.events()]
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    return [
        (event.name, event.time_range.elapsed_us() / 1e6)
        for event in recorded.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]


def profiled_step(steps: Steps, case: Case) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """The seconds of each category in one step, and those of each kernel launched in it."""
    device = steps.trainer.runtime.device
    patterns = KERNELS if device.type == "cuda" else OPERATORS
    seconds = dict.fromkeys(SHARES, 0.0)
    launches = profiled(lambda: steps.forward_backward(case), device)
    for name, spent in launches:
        seconds[category(name, patterns)] += spent
    outside = profiled(steps.outside, device)
    seconds["optimizer"] = sum(spent for _, spent in outside)
    return seconds, launches + outside


def by_kernel(launches: Sequence[tuple[str, float]]) -> list[tuple[str, int, float]]:
    """Name, launches and milliseconds of each kernel, the longest first."""
    spent: dict[str, list[float]] = {}
    for name, seconds in launches:
        spent.setdefault(name, []).append(1000 * seconds)
    rows = [(name, len(times), sum(times)) for name, times in spent.items()]
    return sorted(rows, key=lambda row: -row[2])


def measure_case(
    steps: Steps, case: Case, count: int, profiles: bool, peak_tflops: float | None
) -> StepFigures:
    on_gpu = steps.trainer.runtime.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    step, outside = measure_step(steps, case, count)
    memory = torch.cuda.max_memory_allocated() >> 20 if on_gpu else None
    flops = step_flops(steps.trainer.model, case.passes)
    rate = sum(flops.values()) / step / 1e12
    shares = idle = kernels = None
    if profiles:
        seconds, launches = profiled_step(steps, case)
        kernels = by_kernel(launches)
        busy = sum(seconds.values())
        shares = {name: spent / busy for name, spent in seconds.items()}
        idle = max(0.0, 1 - busy / step) if on_gpu else None
    utilization = rate / peak_tflops if peak_tflops else None
    times = (1000 * step, 1000 * outside)
    return StepFigures(*case, *times, flops, rate, utilization, shares, idle, memory, kernels)


def measure_evaluation(trainer: Trainer) -> dict[str, float]:
    """Median seconds of test-time training and of sliding windows, on a copy of the model."""
    hp, evaluator, model = trainer.hp, trainer.evaluator, copy.deepcopy(trainer.model)
    device, passes = trainer.runtime.device, hp.passes_in_evaluation
    flat = FlatParameters(model)
    sgd = torch.optim.SGD([flat.whole(slice(None))], hp.ttt_lr, hp.ttt_momentum)
    chunks = []
    for first in range(0, TTT_CHUNKS * hp.ttt_chunk_tokens, hp.ttt_chunk_tokens):
        chunk = range(first, first + hp.ttt_chunk_tokens)
        ends = (chunk.start, chunk.stop)
        windows = scoring_windows(*ends, hp.train_seq_len, hp.eval_stride)
        watch = Stopwatch(device)
        watch.mark()
        evaluator.score(model, windows, passes, hp.eval_stride)
        watch.mark()
        evaluator.train_on(model, flat, sgd, chunk, passes, hp.ttt_epochs)
        watch.mark()
        chunks.append(watch.laps())
    scoring, training = (median(laps) for laps in zip(*chunks[1:], strict=True))
    watch = Stopwatch(device)
    watch.mark()
    for _ in range(SLIDING_RUNS):
        evaluator.run("sliding", model, hp.eval_stride, passes)
        watch.mark()
    sliding = median(watch.laps()) * SLIDING_TOKENS / evaluator.num_targets
    seconds = {"ttt_scoring_seconds": scoring, "ttt_training_seconds": training}
    return seconds | {"sliding_seconds": sliding}


# ------------------------------------------------------------------------------------- reporting


def peak_tflops(given: float | None, runtime: Runtime) -> float | None:
    if given is not None or runtime.device.type != "cuda" or runtime.dtype != torch.bfloat16:
        return given
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def describe(
    hp: Hyperparameters, runtime: Runtime, trainer: Trainer, text: str, peak: float | None
) -> dict[str, Any]:
    """What the figures depend on."""
    on_gpu = runtime.device.type == "cuda"
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    code = (ROOT / "train_gpt.py").read_bytes()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if on_gpu else cpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "train_gpt_sha256": hashlib.sha256(code).hexdigest(),
        "attention": choose_attention(hp, runtime, trainer.log),
        "fused_mlp": fuses_mlp(runtime.device, runtime.dtype, trainer.model.mlp_up_bank.shape[1:]),
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "compiled": trainer.model.region is compiled,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "train_batch_tokens": hp.train_batch_tokens,
        "micro_batch_tokens": hp.micro_batch_tokens,
        "train_seq_len": hp.train_seq_len,
        "ttt_chunk_tokens": hp.ttt_chunk_tokens,
        "ttt_epochs": hp.ttt_epochs,
        "eval_stride": hp.eval_stride,
        "eval_passes": hp.passes_in_evaluation,
        "text": text,
        "tiny": not on_gpu,
        "peak_tflops": peak,
    }


def header(setup: Mapping[str, Any]) -> list[str]:
    lines = [
        "{device}, torch {torch}, Python {python}, {dtype}, attention {attention}, "
        "fused MLP: {fused_mlp}, compiled: {compiled}; {date}, train_gpt.py {train_gpt_sha256:.12}",
        "{parameters:,} parameters; {train_batch_tokens:,} tokens a step in micro-batches of at "
        "most {micro_batch_tokens:,}, windows of {train_seq_len:,}, tokens {text}",
    ]
    if setup["tiny"]:
        lines.append("no GPU: a tiny configuration, to try this command; no figure of the recipe")
    return [line.format(**setup) for line in lines]


def percent(share: float | None) -> str:
    return number(None if share is None else 100 * share, 1)


def step_rows(figures: Sequence[StepFigures], peak: float | None) -> list[list[str]]:
    """A column for each kind of step."""

    def row(label: str, of: Callable[[StepFigures], str]) -> list[str]:
        return [label, *(of(f) for f in figures)]

    def share(name: str) -> list[str]:
        label = f"{'copies, other' if name == 'other' else name}, % of device time"
        return row(label, lambda f: percent(f.shares and f.shares[name]))

    against = f"of {peak:g} TFLOP/s" if peak else "n/a: no peak is known, see --peak-tflops"
    return [
        ["", *(str(Case(f.passes, f.qat)) for f in figures)],
        row("step, ms", lambda f: number(f.step_ms, 1)),
        row("outside forward and backward, ms", lambda f: number(f.outside_ms, 2)),
        row("outside forward and backward, %", lambda f: percent(f.outside_ms / f.step_ms)),
        row("model TFLOPs a step", lambda f: number(sum(f.flops.values()) / 1e12, 3)),
        row("model TFLOP/s", lambda f: number(f.tflops_per_second, 3)),
        row(f"utilization, % ({against})", lambda f: percent(f.utilization)),
        *(share(name) for name in SHARES),
        row("idle, % of the step", lambda f: percent(f.idle_share)),
        row("peak memory, MiB", lambda f: number(f.peak_memory_mib, 0)),
    ]


def other_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Compilation and evaluation, as far as they were measured."""
    setup, rows = report["setup"], [["", "s"]]
    if report["compilation"]:
        label = "cold start, caches empty: {graphs} graphs; {late_graphs} more later"
        rows.append([label.format(**report["compilation"]), report["compilation"]["seconds"]])
    if report["evaluation"]:
        chunk = "TTT, a chunk of {ttt_chunk_tokens:,} tokens: "
        scoring = "scoring, stride {eval_stride}, {eval_passes} passes"
        labels = (chunk + scoring, chunk + "training, TTT_EPOCHS={ttt_epochs}")
        labels += (f"sliding windows, {SLIDING_TOKENS:,} tokens: {scoring}",)
        filled = (label.format(**setup) for label in labels)
        rows += map(list, zip(filled, report["evaluation"].values(), strict=True))
    return [rows[0], *([label, number(seconds, 3)] for label, seconds in rows[1:])]


def kernel_rows(figures: Sequence[StepFigures], count: int) -> list[list[str]]:
    """The `count` kernels that take longest in a step of the first kind."""
    first = figures[0]
    kernels = (first.kernels or [])[:count]
    rows = [["kernel", "launches", "ms"]] if kernels else []
    return rows + [[name[:88], str(times), number(ms, 2)] for name, times, ms in kernels]


def print_report(
    report: Mapping[str, Any], figures: Sequence[StepFigures], form: str, kernels: int
) -> None:
    if form == "json":
        steps = [asdict(f) for f in figures]
        print(json.dumps(report | {"steps": steps, "notes": FOOTNOTES}, indent=2))
        return
    table = plain_table if form == "table" else markdown_table
    tables = [step_rows(figures, report["setup"]["peak_tflops"]), other_rows(report)]
    tables.append(kernel_rows(figures, kernels))
    parts = ["\n".join(header(report["setup"]))]
    parts += [table(rows) for rows in tables if len(rows) > 1]
    print("\n\n".join([*parts, *(fill(note, 100) for note in FOOTNOTES)]))


# --------------------------------------------------------------------------------------- command


def parts_to_skip(text: str) -> set[str]:
    parts = set(text.split(","))
    if not parts <= set(PARTS):
        raise argparse.ArgumentTypeError(f"{text!r}: name parts of {','.join(PARTS)}")
    return parts


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse's message has it
    return parse


def measure(args: argparse.Namespace, settings: Sequence[str]) -> None:
    hp, sources = read_settings(os.environ, settings, torch.cuda.is_available())
    tokens, text = read_tokens(hp, sources["data_path"] != "default")
    runtime = Runtime.start(hp)
    trainer = build_trainer(hp, runtime, tokens)
    peak = peak_tflops(args.peak_tflops, runtime)
    report: dict[str, Any] = {"setup": describe(hp, runtime, trainer, text, peak)}
    report |= {"compilation": None, "evaluation": None}
    if "compile" not in args.skip:
        report["compilation"] = measure_compilation(trainer)
    graphs, steps = graphs_compiled(), Steps(trainer)
    profiles = "profile" not in args.skip
    figures = [measure_case(steps, case, args.steps, profiles, peak) for case in cases(hp)]
    if "ttt" not in args.skip:
        report["evaluation"] = measure_evaluation(trainer)
    if report["compilation"]:
        report["compilation"]["late_graphs"] = graphs_compiled() - graphs
    print_report(report, figures, args.format, args.kernels)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="bench_speed.py [options] [--SETTING VALUE ...]",
        epilog="all settings: python train_gpt.py --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--format", choices=("table", "markdown", "json"), default="table")
    add("--steps", type=positive(int), default=5, help="timed steps of each kind [5]")
    add("--skip", type=parts_to_skip, default=set(), help=f"of {','.join(PARTS)}, commas between")
    add("--kernels", type=int, default=0, help="name so many kernels that take longest [0]")
    add("--peak-tflops", type=positive(float), help="the device's peak, if the table lacks it")
    args, settings = parser.parse_known_args(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it reports each start and stop
    try:
        with nullcontext() if "compile" in args.skip else empty_caches():
            measure(args, settings)
    except (UserError, FloatingPointError, torch.OutOfMemoryError) as error:
        remedy = ": lower MICRO_BATCH_TOKENS" if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"error: {error}{remedy}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
