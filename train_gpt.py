"""Stable Growing Recurrence: a GPT that grows by re-applying its core while it trains.

    stem -> core, core, ... -> tail      1 pass, then 2, then 3 as the run proceeds

One run trains for a fixed wall clock, averages and quantizes the weights to int6, compresses them
so that code + model fit 16,000,000 bytes, reloads the file, and scores the validation text in bits
per byte: plain, with sliding windows, and with score-first test-time training.

    torchrun --standalone --nproc_per_node=8 train_gpt.py        one node of 8 GPUs, 600 s
    python train_gpt.py                                          one process, GPU or CPU
    python train_gpt.py --evaluate logs/RUN.int6.xz              score an artifact again
    python train_gpt.py --run-id RUN --resume                    go on from RUN's last checkpoint

Every setting is a flag (--residual-scale-init) and an environment variable (RESIDUAL_SCALE_INIT);
the flag wins. Exit codes: 0 done, 2 a mistake in what was given, 3 diverged, 4 stopped by a signal
with a checkpoint, 5 stopped by a signal but exported and scored.
"""

# Contents (grep -n '^# [0-9]*\. ' train_gpt.py):
#   1. Constants   2. Configuration  3. Runtime and log   4. Data         5. Layers    6. Recurrence
#   7. Model       8. Optimization   9. Compression      10. Evaluation  11. Training  12. Main
#
# Shapes: B batch, T time, D model, H query heads, G kv heads, E head dim, F mlp, V vocabulary,
# L unique layers, K passes, N bank rows, R ranks.

from __future__ import annotations

import argparse
import bisect
import copy
import hashlib
import io
import json
import lzma
import math
import os
import platform
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, library, nn

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a torch that is made for CPUs brings none
    triton = None

# --------------------------------------------------------------------------------------------------
# 1. Constants

# The field's shard format: 256 little-endian int32 header words, then uint16 tokens.
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_WORDS = 20240520, 1, 256

# Quintic iteration whose slope at 0 is as steep as it can be while singular values stay within
# about [0.7, 1.2] (Jordan et al., Muon, 2024). Fast convergence matters here, exactness does not.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

# A momentum of 0.99 averages 100 steps, which is much of a short run: bits per byte after 50 s of
# one H100 (543 steps) 1.4285 with 0.99, 1.3848 with 0.95; with level rows 1.4082, 1.3657, and
# 1.3635 with 0.90. So it averages a fraction of the run, and never less than this does.
LEAST_MOMENTUM = 0.85

# Clip candidates of GPTQ-lite, as quantiles of a row's |w|; 1.0 (no clipping) is always among them.
CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
INT6_LEVELS, INT8_LEVELS = 31, 127
# The export's size knob is an integer n: no row's quantization step is finer than 2^(-n/512).
FLOOR_STEPS_PER_OCTAVE, FINEST_FLOOR_INDEX = 512, 512 * 14
# Quantized weights hold nothing to match but their entropy. A dictionary as small as lzma allows
# and no context bits code it best: 4.788 bits a weight where the entropy is 4.740, against 4.863
# for preset 6, in a quarter of its time (6 M Gaussian weights with rows of log-normal scale).
XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 4096, "lc": 0, "lp": 0, "pb": 0}]
ARTIFACT_MAGIC = b"SGR1"
MAX_MODEL_BYTES = 1 << 30  # an artifact that claims more is refused before anything is allocated
SMALL_TENSOR = 65_536  # elements; up to here a tensor is stored as float16, not quantized

BANKS = ("mlp_up_bank", "mlp_down_bank", "qo_bank", "kv_bank")  # Muon's; the largest first
TABLES = ("tok_emb", "bigram_table", "ve_table")
PROJECTIONS = ("bigram_proj", "ve_proj")
RMS_EPS = 1e-6
# After this a rank gives up waiting for another that hangs: longer than rank 0's export takes. (One
# that has died ends the job at once.)
COLLECTIVE_TIMEOUT = timedelta(seconds=300)
EXIT_MISTAKE, EXIT_DIVERGED, EXIT_CHECKPOINTED, EXIT_EXPORTED = 2, 3, 4, 5


class UserError(ValueError):
    """A mistake in what the program was given; the text names the value, the rule, the remedy."""


def require(rule_holds: bool, text: str) -> None:
    if not rule_holds:
        raise UserError(text)


# --------------------------------------------------------------------------------------------------
# 2. Configuration: every setting once, with its type, default, rule and help


def opt(default: Any, rule: str, text: str, group: str = "") -> Any:
    """A setting. rule: `a|b|c`, `low..high`, `>=low`, `>low`, or empty; group: opens one."""
    return field(default=default, metadata={"rule": rule, "text": text, "group": group})


@dataclass(frozen=True)
class Hyperparameters:
    """The configuration of a run. Fractions (`_frac`) are of the run's progress from 0 to 1."""

    run_id: str | None = opt(None, "", "name of the log and artifact; none: time and seed", "run")
    seed: int = opt(1337, ">=0", "seed of the weights and of the data order")
    output_dir: str = opt("logs", "", "folder of the log, the artifact and the checkpoints")
    iterations: int | None = opt(None, ">=0", "steps after which training ends; none: no limit")
    max_wallclock_seconds: float | None = opt(600.0, ">0", "seconds of training; none: no limit")
    reserve_seconds: float = opt(0.0, ">=0", "seconds of them kept for what follows training")
    warmup_steps: int = opt(20, ">=0", "steps before the clock starts, undone before it does")
    train_log_every: int = opt(50, ">=1", "steps between lines of the log")
    val_loss_every: int | None = opt(None, ">=1", "steps between validations; none: at the end")
    checkpoint_seconds: float | None = opt(None, ">0", "seconds between checkpoints; none: off")
    resume: bool = opt(False, "", "go on from the newest checkpoint of run_id, if there is one")
    on_signal: str = opt("export", "export|checkpoint", "after SIGTERM or SIGINT; then the end")
    dtype: str = opt("auto", "auto|bfloat16|float32", "arithmetic; auto: bfloat16 on a GPU only")
    compile: str = opt("auto", "auto|on|off", "torch.compile; auto: on a GPU only")

    data_path: str = opt("./data/datasets/fineweb10B_sp1024", "", "folder of the shards", "data")
    tokenizer_path: str = opt("./data/tokenizers/fineweb_1024_bpe.model", "", "SentencePiece model")
    train_batch_tokens: int = opt(786_432, ">=1", "tokens of a step; default: 98,304 a process")
    micro_batch_tokens: int = opt(98_304, ">=1", "most tokens that a rank takes at once")
    shuffle: bool = opt(True, "", "read the windows of all shards in a seeded random order")

    vocab_size: int = opt(1024, "8..65536", "pieces of the tokenizer", "model")
    train_seq_len: int = opt(2048, "8..1048576", "tokens of a window, in training and evaluation")
    num_layers: int = opt(11, "1..256", "unique layers")
    model_dim: int = opt(512, "8..16384", "width of the residual stream")
    num_heads: int = opt(8, "1..256", "query heads")
    num_kv_heads: int = opt(4, "1..256", "key and value heads")
    mlp_mult: float = opt(3.0, "0.01..64", "MLP width over model width")
    rope_base: float = opt(10_000.0, ">1", "RoPE base at a length of 1,024 tokens")
    rope_dims: int = opt(16, ">=0", "dims of each head that RoPE turns")
    qk_gain_init: float = opt(1.5, "", "start of the gain of each query head")
    xsa_last_n: int = opt(4, ">=0", "last layers with XSA (never the core's)")
    bigram_vocab_size: int = opt(512, "0..1048576", "rows of BigramHash; 0: off")
    bigram_dim: int = opt(32, "1..16384", "width of BigramHash's rows")
    ve_dim: int = opt(128, "1..16384", "width of the value embedding table")
    ve_layers: str = opt("9,10", "", "layers with value embeddings; none: off")
    logit_softcap: float = opt(30.0, ">0", "bound of the logits")
    tied_embed_init_std: float = opt(0.005, ">0", "std of the embedding at the start")

    core_start: int = opt(4, ">=0", "first layer of the core", "recurrence")
    core_end: int = opt(7, ">=1", "layer after the core's last")
    passes_schedule: str = opt(
        "0.0:1,0.626:2,0.813:3", "", "start:passes,...; starts are fractions (a point) or steps"
    )
    num_passes: int | None = opt(None, "1..64", "fixed passes in training; none: the schedule's")
    eval_passes: int | None = opt(None, "1..64", "passes in evaluation; none: the schedule's last")
    residual_scale_init: float = opt(0.5, "", "start of the scale of each pass after the first")
    feedback_mode: str = opt("diagonal", "none|identity|diagonal", "off, U(V'h), or d * U(V'h)")
    feedback_rank: int = opt(2, "1..1024", "columns of U and V")
    per_pass_feedback: bool = opt(False, "", "a d of its own for each pass")
    jacobian_proxy_weight: float = opt(0.01, ">=0", "weight of the proxy in the loss")
    interpass_rmsnorm: bool = opt(False, "", "rms_norm of h before each pass after the first")

    matrix_lr: float = opt(0.025, ">=0", "Muon's learning rate", "optimization")
    tied_embed_lr: float = opt(0.035, ">=0", "AdamW's learning rate of the tables")
    scalar_lr: float = opt(0.025, ">=0", "AdamW's learning rate of all else")
    muon_momentum: float = opt(0.99, "0..1", "Muon's momentum")
    muon_momentum_warmup_start: float = opt(0.92, "0..1", "Muon's first momentum")
    muon_momentum_warmup_frac: float = opt(0.237, "0..1", "its rise (1,500 of 6,330 steps)")
    muon_momentum_frac: float = opt(0.0158, ">0", "its longest average (0.99 in 6,330 steps)")
    muon_row_norm: bool = opt(True, "", "level the rows of Muon's gradient first (MuonEq-R)")
    muon_backend_steps: int = opt(5, "1..20", "Newton-Schulz iterations")
    muon_wd: float = opt(0.04, ">=0", "decoupled weight decay of the banks")
    adam_wd: float = opt(0.04, ">=0", "decoupled weight decay of tables and projections")
    beta1: float = opt(0.9, "0..0.9999", "AdamW's first decay")
    beta2: float = opt(0.95, "0..0.9999", "AdamW's second decay")
    adam_eps: float = opt(1e-8, ">0", "AdamW's epsilon")
    grad_clip_norm: float = opt(0.3, ">0", "bound of the global gradient's norm")
    warmdown_frac: float = opt(0.55, "0..1", "last fraction, in which the lr falls to 0")

    weight_average: str = opt("ema", "none|ema|swa|ema_swa", "weights to export", "averaging, QAT")
    ema_frac: float = opt(0.0526, "1e-6..1", "EMA's horizon (decay 0.997 in 6,330 steps)")
    swa_frac: float = opt(0.0079, "0..1", "fraction between SWA's samples (50 of 6,330 steps)")
    swa_lr_scale: float = opt(0.2, "0..1", "SWA starts below this lr scale")
    late_qat_threshold: float = opt(0.15, "0..1", "QAT starts below this lr scale; 0: never")
    qat_scope: str = opt("core", "core|all", "layers under QAT")

    evaluate: str | None = opt(None, "", "score this artifact instead of training", "evaluation")
    artifact_limit_bytes: int = opt(16_000_000, ">=1", "most bytes of code and model together")
    eval_wallclock_seconds: float | None = opt(600.0, ">0", "TTT epochs drop to end within this")
    eval_stride: int = opt(64, ">=1", "tokens that a sliding window scores")
    eval_batch_seqs: int = opt(64, ">=1", "windows that a rank scores at once")
    sliding_eval: bool = opt(True, "", "score with sliding windows")
    ttt_enabled: bool = opt(True, "", "score with score-first test-time training")
    ttt_lr: float = opt(0.002, ">=0", "SGD's learning rate for the first chunk")
    ttt_momentum: float = opt(0.9, "0..1", "SGD's momentum")
    ttt_epochs: int = opt(3, ">=0", "epochs over each chunk once it is scored")
    ttt_chunk_tokens: int = opt(32_768, ">=1", "tokens of a chunk")
    ttt_batch_seqs: int = opt(32, ">=1", "most sequences of an SGD step, all ranks together")
    ttt_grad_clip: float = opt(1.0, ">0", "bound of the gradient's norm")
    token_losses: str | None = opt(None, "", "write the last evaluation's losses here (.npy, nats)")

    def __post_init__(self) -> None:
        """Raises UserError with every rule that is broken."""
        values = [(f.name, getattr(self, f.name), f.metadata["rule"]) for f in fields(self)]
        errors = [f"{n}={v} must be {rule}" for n, v, rule in values if not obeys(v, rule)]
        infinite = [n for n, v, _ in values if isinstance(v, float) and not math.isfinite(v)]
        errors += [f"{name} must be finite" for name in infinite]
        errors = errors or [
            ", ".join(f"{name}={getattr(self, name)}" for name in names.split()) + f": {text}"
            for holds, names, text in self.rules()
            if not holds
        ]
        require(not errors, "\n".join(errors))

    def rules(self) -> Iterator[tuple[bool, str, str]]:
        """What no single field can check: whether it holds, of which settings, what to say."""
        n, T, E = self.num_layers, self.train_seq_len, self.model_dim // self.num_heads
        cap, layers, fitting = self.max_wallclock_seconds, self.ve_layer_ids, self.batch_seqs * T
        limited = (self.iterations, cap) != (None, None)
        yield limited, "iterations max_wallclock_seconds", "training would never end, set one"
        room = cap is None or cap > self.reserve_seconds
        yield room, "reserve_seconds max_wallclock_seconds", "no time is left, lower the first"
        yield bool(self.run_id) or not self.resume, "resume run_id", "name the run that is to go on"
        multiple = f"no multiple of the window of {T} tokens: use {max(fitting, T)}"
        yield 0 < fitting == self.train_batch_tokens, "train_batch_tokens", multiple
        yield self.micro_batch_tokens >= T, "micro_batch_tokens", f"raise it to a window of {T}"
        inside = self.core_start < self.core_end <= n
        yield inside, "core_start core_end", f"the core must be a part of the {n} layers"
        yield self.mlp_dim >= 1, "mlp_mult model_dim", "no MLP is left, raise mlp_mult"
        divides = self.model_dim % self.num_heads == 0 == self.num_heads % self.num_kv_heads
        yield divides, "model_dim num_heads num_kv_heads", "each must divide the one before"
        even = self.rope_dims % 2 == 0 and self.rope_dims <= E
        yield even, "rope_dims", f"must be even and at most the head dim {E}"
        yield self.bigram_vocab_size != 1, "bigram_vocab_size", "use 0 (off) or at least 2"
        yield self.eval_stride <= T, "eval_stride", f"would skip tokens, use at most {T}"
        differ = len(set(layers)) == len(layers) and all(0 <= i < n for i in layers)
        yield differ, "ve_layers", f"write different layers of 0..{n - 1} such as 9,10, or none"
        most = 0
        try:
            most = self.max_passes
        except ValueError:
            text = "starts from 0 that rise, all steps or all fractions below 1, and 1..64 passes"
            yield False, "passes_schedule", f"write {text}, such as 0.0:1,0.626:2 or 0:1,4500:2"
        yield most != 1 or self.eval_passes in (None, 1), "eval_passes", "training has one pass"

    @property
    def batch_seqs(self) -> int:
        return self.train_batch_tokens // self.train_seq_len

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def ve_layer_ids(self) -> tuple[int, ...]:
        """The layers with value embeddings; -1 for a word that is no number."""
        words = [] if self.ve_layers in ("", "none") else self.ve_layers.split(",")
        return tuple(int(w) if w.strip().isdecimal() else -1 for w in words)

    @property
    def growth(self) -> tuple[tuple[int | float, int], ...]:
        """The schedule as (start, passes): an int start is a step, a float a fraction."""
        return parse_growth(f"0:{self.num_passes}" if self.num_passes else self.passes_schedule)

    @property
    def max_passes(self) -> int:
        return max(passes for _, passes in self.growth)

    @property
    def passes_in_evaluation(self) -> int:
        return self.eval_passes or self.growth[-1][1]

    def architecture(self) -> dict[str, Any]:
        """The model's and the recurrence's settings: without them an artifact means nothing."""
        names = [f.name for f in fields(self)]
        kept = names[names.index("vocab_size") : names.index("matrix_lr")]
        return {name: getattr(self, name) for name in kept}


def obeys(value: Any, rule: str) -> bool:
    """Whether a setting's value keeps to its rule; see `opt`."""
    if "|" in rule:
        return value in rule.split("|")
    low, _, high = rule.lstrip(">=").partition("..")
    if value is None or not low:
        return True
    strictly = rule[0] == ">" and rule[1] != "="
    reaches = value > float(low) if strictly else value >= float(low)
    return reaches and value <= float(high or "inf")


@cache
def parse_growth(text: str) -> tuple[tuple[int | float, int], ...]:
    """(start, passes), ... of a text such as 0.0:1,0.626:2 or 0:1,4500:2. Raises ValueError."""
    words = [item.split(":") for item in text.split(",")]
    growth = tuple((float(s) if "." in s else int(s), int(passes)) for s, passes in words)
    starts = [start for start, _ in growth]
    rise = starts[0] == 0 and all(a < b for a, b in pairwise(starts))
    alike = {type(s) for s in starts[1:]} in ({int}, {float}, set())
    below = isinstance(starts[-1], int) or starts[-1] < 1
    if not (rise and alike and below and all(1 <= passes <= 64 for _, passes in growth)):
        raise ValueError(text)
    return growth


def parse_value(kind: str, text: str) -> Any:
    """The text of a flag or variable as the annotated type. Raises ValueError or KeyError."""
    base, word = kind.removesuffix(" | None"), text.strip().lower()
    if base != kind and word in ("", "none"):
        return None
    if base == "bool":
        return {"0": False, "false": False, "1": True, "true": True}[word]
    return {"int": int, "float": float, "str": str}[base](text)


def build_parser() -> argparse.ArgumentParser:
    """Every flag takes text, so that all mistakes are found and told together."""
    title, _, rest = __doc__.partition("\n\n")
    usage = "train_gpt.py [--SETTING VALUE ...]"
    parser = argparse.ArgumentParser("train_gpt.py", usage, title, rest, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    for f in fields(Hyperparameters):
        text, rule, group = (f.metadata[key] for key in ("text", "rule", "group"))
        add = parser.add_argument_group(group).add_argument if group else add
        kind = str(f.type).removesuffix(" | None")
        style = {"metavar": kind.upper()}
        style = {"action": argparse.BooleanOptionalAction} if kind == "bool" else style
        text = f"{text} [{f.name.upper()}={f.default}] {rule}"
        add("--" + f.name.replace("_", "-"), help=text, default=argparse.SUPPRESS, **style)
    return parser


def read_configuration(
    env: Mapping[str, str], argv: Sequence[str]
) -> tuple[Hyperparameters, dict[str, str]]:
    """Settings from defaults, then `env`, then `argv`; and the source of each.

    Raises UserError with every mistake at once.
    """
    known, unknown = build_parser().parse_known_args(argv)
    flags, values, sources = known.__dict__, {}, {}
    errors = [f"unknown argument {a}: see --help" for a in unknown]
    for f in fields(Hyperparameters):
        name, variable = f.name, f.name.upper()
        sources[name] = "flag" if name in flags else "env" if variable in env else "default"
        raw = flags.get(name, env.get(variable))
        try:
            if sources[name] != "default":
                values[name] = raw if isinstance(raw, bool) else parse_value(str(f.type), raw)
        except (ValueError, KeyError):
            kind = "bool (0, 1, false, true)" if f.type == "bool" else f.type
            errors.append(f"{name}={raw} ({sources[name]}) is no {kind}")
    if sources["train_batch_tokens"] == "default":
        T = values.get("train_seq_len", 2048)
        tokens = 98_304 * int(env.get("WORLD_SIZE", 1))  # the recipe's 786,432 on 8 GPUs
        values["train_batch_tokens"] = max(1, tokens // max(1, T)) * T
    try:
        hp = Hyperparameters(**values)
    except UserError as error:
        errors.append(str(error))
    require(not errors, "\n".join(errors))
    return hp, sources


# --------------------------------------------------------------------------------------------------
# 3. Runtime and log: which process this is, what it computes on, and the one writer of the log


@dataclass(frozen=True)
class Runtime:
    """One process of the job. Collectives do nothing when it is alone."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def start(cls, hp: Hyperparameters) -> Runtime:
        """Joins the process group that torchrun describes; alone without torchrun."""
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device, backend, dtype = torch.device("cpu"), "gloo", torch.float32
        if torch.cuda.is_available():
            local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            text = f"nproc_per_node: process {local} has no GPU of its own, {gpus} are visible"
            require(local < gpus, f"{text}: start at most {gpus} processes a node")
            device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(device)
            dtype = torch.bfloat16
        if world_size > 1:
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        dtype = dtype if hp.dtype == "auto" else getattr(torch, hp.dtype)
        return cls(rank, world_size, device, dtype)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, x: Tensor) -> Tensor:
        """Sums `x` over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def barrier(self) -> None:
        """Returns once every rank's device has done all that it was given before."""
        self.sum_(torch.zeros(1, device=self.device)).item()

    def from_main(self, value: Any) -> Any:
        """Rank 0's value (anything small), on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def share(self, count: int) -> slice:
        """This rank's contiguous part of `count` things; parts differ by at most one."""
        return slice(*(rank * count // self.world_size for rank in (self.rank, self.rank + 1)))


def log_text(value: Any) -> str:
    """A value as the log's grammar allows: no white space, sequences joined by commas."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(log_text, value)) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return quote(str(value), safe="!\"#$&'()*+,-./:;<=>?@[]^_`{|}~") or "none"


class Log:
    """Writes lines `event key:value key:value`; what is no plain character is percent-encoded."""

    def __init__(self, path: Path | None, resume: bool = False) -> None:
        """path: None for a process that does not write. Raises UserError."""
        self.path, self.resume, self.bar, self.since = path, resume, False, time.perf_counter()
        self.outputs, self.early = [sys.stdout], io.StringIO()  # early: what it wrote so far
        for existing in (path, path.with_suffix(".checkpoints")) if path else ():
            text = f"run_id: {existing} exists and is never overwritten: choose another run_id"
            require(resume or not existing.exists(), f"{text}, or --resume")

    def open(self) -> None:
        """Creates the file, once it is known that there will be a run. Raises UserError."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a" if self.resume else "x", encoding="utf-8")
            file.write("\n" * (file.tell() > 0) + self.early.getvalue())  # it may end within a line
        except OSError as error:
            text = f"output_dir: cannot write {self.path} ({error.strerror})"
            raise UserError(f"{text}: choose another folder") from None
        self.outputs.append(file)

    def event(self, name: str = "", /, **pairs: Any) -> None:
        """One line; `name` is empty for the lines of single steps, as is the field's custom."""
        if self.path is None:
            return
        line = " ".join(filter(None, [name, *(f"{k}:{log_text(v)}" for k, v in pairs.items())]))
        self.early.write(line + "\n")
        for output in list(self.outputs):
            start = "\r\033[K" * (self.bar and output is sys.stdout)
            try:
                print(start + line, file=output, flush=True)
            except OSError as error:  # a full disk must not end a run that is worth its GPUs
                self.outputs.remove(output)
                self.outputs = self.outputs or [sys.stderr]
                with suppress(OSError):
                    text = f"warning: {output.name} ends here ({error.strerror})"
                    print(text, file=sys.stderr, flush=True)
        self.bar = False

    def progress(self, fraction: float, what: str) -> None:
        """A bar on a terminal; nothing elsewhere, where the log's lines show the progress."""
        if self.path is not None and sys.stdout.isatty():
            bar = "#" * round(30 * fraction)
            with suppress(OSError):
                print(f"\r[{bar:.<30}] {fraction:4.0%} {what}\033[K", end="", flush=True)
            self.bar = True

    def phase(self, name: str) -> None:
        """Logs the seconds since the last phase ended."""
        now = time.perf_counter()
        self.event("phase", name=name, seconds=f"{now - self.since:.3f}")
        self.since = now


# --------------------------------------------------------------------------------------------------
# 4. Data: shards on disk -> the same global batches for every world size


def find_data_shards(data_path: Path, split: str) -> list[Path]:
    """The shards of split `train` or `val`, in order. Raises UserError if there are none."""
    paths = sorted(data_path.glob(f"fineweb_{split}_*.bin"))
    remedy = "run data/download_fineweb.py or data/prepare_text.py, or set DATA_PATH"
    require(bool(paths), f"data_path={data_path} holds no fineweb_{split}_*.bin: {remedy}")
    return paths


def open_data_shard(path: Path) -> np.ndarray:
    """The tokens of a shard as a read-only memory map of uint16. Raises UserError."""

    def check(holds: bool, text: str) -> None:
        require(holds, f"data shard {path} {text}: download or prepare it again")

    check(path.is_file(), "is missing")
    size, header_bytes = path.stat().st_size, 4 * SHARD_HEADER_WORDS
    check(size >= header_bytes, f"has {size} bytes, less than its header")
    *found, count = np.fromfile(path, dtype="<i4", count=3).tolist()
    expected = [SHARD_MAGIC, SHARD_VERSION]
    check(found == expected, f"starts with {found}, not with magic and version {expected}")
    held = (size - header_bytes) / 2
    check(count == held, f"counts {count} tokens in its header and holds {held:g}")
    check(count > 0, "holds no tokens")
    return np.memmap(path, dtype="<u2", mode="r", offset=header_bytes, shape=(count,))


def data_fingerprint(paths: Sequence[Path]) -> str:
    """A hash of every shard's name, length and 4,096 tokens at each end: 16 hex digits."""
    digest = hashlib.sha256()
    for path in paths:
        tokens = open_data_shard(path)
        digest.update(f"{path.name}:{len(tokens)}:".encode())
        digest.update(tokens[:4096].tobytes() + tokens[-4096:].tobytes())
    return digest.hexdigest()[:16]


def check_token_ids(paths: Sequence[Path], vocab_size: int) -> None:
    """Raises UserError if a shard holds a token that is no piece of the vocabulary."""
    for path in paths:
        largest = int(open_data_shard(path).max())
        text = f"data shard {path} holds token {largest}, outside vocab_size={vocab_size}"
        require(largest < vocab_size, f"{text}: use the tokenizer that it was made with")


def load_tokenizer(path: Path, vocab_size: int) -> spm.SentencePieceProcessor:
    """The SentencePiece model at `path`. Raises UserError unless it has `vocab_size` pieces."""
    name = f"tokenizer_path={path}"
    require(path.is_file(), f"{name} is missing: set TOKENIZER_PATH to the model of the shards")
    tokenizer = spm.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError):
        raise UserError(f"{name} is no SentencePiece model: set TOKENIZER_PATH") from None
    pieces = tokenizer.vocab_size()
    text = f"{name} has {pieces} pieces, the model vocab_size={vocab_size}: use another tokenizer"
    require(pieces == vocab_size, f"{text}, or train a model with VOCAB_SIZE={pieces}")
    has_space = not tokenizer.IsUnknown(tokenizer.PieceToId("▁"))
    require(has_space, f"{name} has no piece for the space, so that bytes would be miscounted")
    return tokenizer


class TokenBytes:
    """The bytes of text that each target token stands for: what val_bpb divides by.

    A byte-fallback piece is 1 byte; another piece its UTF-8 length without a leading `▁`, plus 1
    for that `▁` unless the token before it is a boundary (control, unknown or unused); a
    boundary token is 0 bytes.
    """

    def __init__(self, tokenizer: spm.SentencePieceProcessor, device: torch.device) -> None:
        rows = []
        for i in range(tokenizer.vocab_size()):
            piece = tokenizer.IdToPiece(i)
            inner = not (tokenizer.IsControl(i) or tokenizer.IsUnknown(i) or tokenizer.IsUnused(i))
            length = 1 if tokenizer.IsByte(i) else len(piece.removeprefix("▁").encode())
            rows.append([length * inner, piece.startswith("▁") * inner, inner])
        table = torch.tensor(rows, dtype=torch.int32, device=device)
        self.length, self.space, self.inner = table.T.contiguous().unbind()

    def of(self, previous: Tensor, target: Tensor) -> Tensor:
        """Bytes of each `target` that follows `previous` (any equal shapes), int32."""
        return self.length[target] + self.space[target] * self.inner[previous]


def check_token_bytes(tokenizer: Any, table: TokenBytes, tokens: np.ndarray) -> None:
    """Raises UserError unless the table's sum is the length of the text of a prefix of `tokens`.

    Decoding is the independent reference: it knows nothing of the table. The space that opens a
    document (its first `▁`) is not counted, as in the table.
    """
    prefix = tokens[:200_000].astype(np.int64)
    while len(prefix) > 1 and tokenizer.IsByte(int(prefix[-1])):
        prefix = prefix[:-1]  # a character cut in two would decode to U+FFFD
    boundaries = np.flatnonzero(table.inner.cpu().numpy()[prefix] == 0).tolist()
    decoded = 0
    for start, end in pairwise([-1, *boundaries, len(prefix)]):
        text = tokenizer.Decode(prefix[start + 1 : end].tolist())
        decoded += len(text.removeprefix(" " if start >= 0 else "").encode())
    ids = torch.from_numpy(prefix).to(table.length.device)
    counted = len(tokenizer.Decode(prefix[:1].tolist()).encode())
    counted += int(table.of(ids[:-1], ids[1:]).sum())
    text = f"tokenizer_path: its pieces count {counted} bytes for a text of {decoded} bytes"
    require(counted == decoded, f"{text}: use the tokenizer of the shards, with byte fallback")


class BatchLoader:
    """Windows of T+1 tokens in a global order that depends on the seed and nothing else.

    The order of an epoch is a permutation of the windows of all shards; each epoch cuts the
    shards at another phase, so that a repeated text is at least cut elsewhere. Step s takes the
    next `batch_seqs` windows of the order and a rank its share of them, so every world size
    trains on the same global batches, and no window repeats before all were used.
    """

    def __init__(self, shards: Sequence[np.ndarray], hp: Hyperparameters, runtime: Runtime) -> None:
        self.shards, self.hp, self.runtime = shards, hp, runtime
        T, self.share = hp.train_seq_len, runtime.share(hp.batch_seqs)
        self.shape = (self.share.stop - self.share.start, T + 1)
        windows = [max(0, len(tokens) // T - 1) for tokens in shards]  # one to spare for the phase
        self.first_window = np.cumsum([0, *windows])
        self.epoch_windows, self.epoch = int(self.first_window[-1]), -1
        text = f"data_path: no training shard holds two windows of train_seq_len={T} tokens"
        require(self.epoch_windows > 0, f"{text}: prepare more text or lower train_seq_len")
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.pending: dict[int, Future[Tensor]] = {}

    def start_epoch(self, epoch: int) -> None:
        rng = np.random.default_rng([self.hp.seed, epoch])
        self.epoch, self.phase, self.order = epoch, 0, np.arange(self.epoch_windows)
        if self.hp.shuffle:
            self.phase = int(rng.integers(self.hp.train_seq_len))
            rng.shuffle(self.order)

    def window(self, index: int) -> np.ndarray:
        """The T+1 tokens of the window at `index` of the endless global order."""
        epoch, place = divmod(index, self.epoch_windows)
        if epoch != self.epoch:
            self.start_epoch(epoch)
        number, T = int(self.order[place]), self.hp.train_seq_len
        shard = bisect.bisect_right(self.first_window, number) - 1
        start = self.phase + (number - int(self.first_window[shard])) * T
        return self.shards[shard][start : start + T + 1]

    def gather(self, step: int) -> Tensor:
        on_gpu = self.runtime.device.type == "cuda"
        batch = torch.empty(self.shape, dtype=torch.int32, pin_memory=on_gpu)
        for row, i in zip(batch.numpy(), range(self.share.start, self.share.stop), strict=True):
            row[:] = self.window(step * self.hp.batch_seqs + i)
        return batch

    def batch(self, step: int) -> Tensor:
        """This rank's windows of `step`, (B, T+1) int32, copied to the device asynchronously."""
        for ahead in (step, step + 1, step + 2):
            if ahead not in self.pending:
                self.pending[ahead] = self.pool.submit(self.gather, ahead)
        return self.pending.pop(step).result().to(self.runtime.device, non_blocking=True)


# --------------------------------------------------------------------------------------------------
# 5. Layers: pure functions of tensors

Rope = tuple[Tensor, Tensor, int]  # cos and signed sin (T, E), rope_dims / 2


class Layer(NamedTuple):
    """One unique layer: weights in the compute dtype with all scales folded in, and what it adds.

    What multiplies a matrix costs nothing; what multiplies its (B, T, D) output costs three
    passes over it. On an H100 folding took 2% off the step.
    """

    qkv: Tensor  # (D + 2 G*E, D), times 1/sqrt(i+1)
    out: Tensor  # (D, D), times attn_scale
    mlp_up: Tensor  # (F, D), times 1/sqrt(i+1)
    mlp_down: Tensor  # (D, F), times mlp_scale
    resid_mix: Tensor  # (2, D)
    q_gain: Tensor  # (H,)
    xsa: bool
    value: tuple[Tensor, Tensor] | None = None  # value embeddings (B, T, G*E), their scale ()
    skip: tuple[Tensor, Tensor] | None = None  # a stem output (B, T, D) and its weight (D,)


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


def rotary_table(hp: Hyperparameters) -> tuple[Tensor, Tensor]:
    """cos and signed sin (T, E) of every position's angles; the base is NTK-scaled beyond 1,024.

    sin is negated in the first half of the dims that turn; those that don't have cos 1, sin 0.
    """
    length, dims = hp.train_seq_len, hp.rope_dims
    stretch = max(1.0, length / 1024) ** (dims / max(1, dims - 2))
    frequency = (hp.rope_base * stretch) ** -(torch.arange(0, dims, 2).float() / max(1, dims))
    angles = torch.outer(torch.arange(length).float(), frequency)
    still = torch.zeros(length, hp.model_dim // hp.num_heads - dims)
    unsigned, signed = (torch.cat([sign * angles, angles, still], 1) for sign in (1, -1))
    return unsigned.cos(), signed.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    """Turns the first 2*half dims of each head of x (B, T, H, E), i with i+half, by its position.

    By exchanged halves times a signed sine, so that norm, turn and gain of q and k are one kernel:
    0.11 ms for 98,304 tokens on an H100. With each half turned by itself they were four, 0.20 ms.
    """
    a, b, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    cos, sin = (t[:, None].to(x.dtype) for t in (cos, sin))
    return x * cos + torch.cat([b, a, rest], dim=-1) * sin


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """XSA: removes from each head's output y (B, T, H, E) its part along its own v (B, T, G, E)."""
    y = y.unflatten(2, (v.size(2), -1))  # (B, T, G, H/G, E)
    v = F.normalize(v, dim=-1).unsqueeze(3)
    return (y - (y * v).sum(-1, keepdim=True) * v).flatten(2, 3)


class Heads(torch.autograd.Function):
    """q = gain rot(n(x_q)), k = rot(n(x_k)), v = x_v of x (B, T, H+2G, E); n: rms_norm of a head.

    Written out for its backward: with u = rot^T dq the gradients of the norm and of the gain need
    one and the same sum, u^T n. Autograd's own backward moves more memory.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, half: int
    ) -> tuple[Tensor, ...]:
        H, G = len(gain), (x.size(2) - len(gain)) // 2
        gain = F.pad(gain, (0, G), value=1.0)[:, None]
        ctx.save_for_backward(x, gain, cos, sin)
        ctx.half = half
        qk, v = x.split([H + G, G], dim=2)
        q, k = (gain * rotate(rms_norm(qk), cos, sin, half)).split([H, G], dim=2)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, cos, sin = ctx.saved_tensors
        exact = torch.promote_types(x.dtype, torch.float32)
        x, u = x[:, :, : len(gain)].to(exact), torch.cat([dq, dk], dim=2)
        u = rotate(u, cos, -sin, ctx.half).to(exact)
        scale = (x.square().mean(-1, keepdim=True) + RMS_EPS).rsqrt()
        n = scale * x
        along = (u * n).sum(-1, keepdim=True)
        dx = gain * scale * (u - n * along / x.size(-1))
        dgain = along.sum((0, 1, 3))[: dq.size(2)].to(gain.dtype)
        return torch.cat([dx.to(dv.dtype), dv], dim=2), dgain, None, None, None


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(E)) v of the past: q (B, T, H, E), k and v (B, T, G, E) -> q's shape."""
    if q.device.type == "cpu":  # its kernel is faster with copied heads than with grouped ones
        k, v = (t.repeat_interleave(q.size(2) // t.size(2), dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, E)
    grouped = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return y.transpose(1, 2)


def attention(x: Tensor, layer: Layer, rope: Rope) -> Tensor:
    """Causal grouped-query attention, (B, T, D) -> (B, T, D)."""
    x = F.linear(x, layer.qkv).unflatten(-1, (-1, layer.out.size(0) // layer.q_gain.numel()))
    q, k, v = Heads.apply(x, layer.q_gain, *rope)
    v = v if layer.value is None else v + layer.value[1] * layer.value[0].view_as(v)
    y = attend(q, k, v)  # (B, T, H, E)
    y = exclude_self(y, v) if layer.xsa else y
    return F.linear(y.flatten(2), layer.out)


if triton is not None:

    @triton.jit
    def fused_product_kernel(
        a: tl.tensor_descriptor, b: tl.tensor_descriptor, s: tl.tensor_descriptor,
        out: tl.tensor_descriptor, N: tl.constexpr, K: tl.constexpr, BACKWARD: tl.constexpr,
    ) -> None:  # fmt: skip
        """See fused_product. A block makes many tiles of 128x128, each in two halves of columns."""
        columns: tl.constexpr = N // 128
        tiles = tl.cdiv(out.shape[0], 128) * columns
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=not BACKWARD):
            m, n = tile // columns * 128, tile % columns * 128
            product = tl.zeros((128, 128), tl.float32)
            for k in range(0, K, 64):
                product = tl.dot(a.load([m, k]), b.load([n, k]).T, product)
            left, right = product.reshape(128, 2, 64).permute(0, 2, 1).split()
            for i in tl.static_range(2):
                part = left if i == 0 else right
                if BACKWARD:
                    known = s.load([m, n + 64 * i])
                    negative = (known.to(tl.int16, bitcast=True) & 1) == 1
                    result = part * tl.where(negative, -1, 2) * tl.sqrt(known.to(tl.float32))
                else:
                    leaky = tl.where(part < 0, 0.5 * part, part)
                    # A bfloat16 is the upper half of a float32: its last bit is 0x10000. CUDA's NaN
                    # has all bits set, and would not stay one.
                    bits = tl.minimum((leaky * leaky).to(tl.int32, bitcast=True), 0x7FC00000)
                    even, odd = (bits + 0x10000) & -0x20000, bits & -0x20000 | 0x10000
                    result = tl.where(part < 0, odd, even).to(tl.float32, bitcast=True)
                out.store([m, n + 64 * i], result.to(out.dtype))

    @library.custom_op("train_gpt::fused_product", mutates_args=())
    def fused_product(a: Tensor, b: Tensor, s: Tensor | None) -> Tensor:
        """leaky(u)^2 of u = a b', u's sign in its last bit; given that as s, a b' times the slope.

        a (M, K), b (N, K), s and the result (M, N): bfloat16; K in multiples of 64, N of 128.
        """
        out = a.new_empty(a.size(0), b.size(0))
        blocks = 2 * torch.cuda.get_device_properties(a.device).multi_processor_count
        tensors = [t.contiguous() for t in (a, b, out if s is None else s, out)]
        tiles = [TensorDescriptor.from_tensor(t, [128, 64]) for t in tensors]
        fused_product_kernel[(blocks,)](*tiles, *b.shape, s is not None)
        return out

    fused_product.register_fake(lambda a, b, s: a.new_empty(a.size(0), b.size(0)))


class FusedMLP(torch.autograd.Function):
    """leaky(x up')^2 down' of x (M, D), squared inside the product: on an H100 a step of 786,432
    tokens takes 574 ms, not 601, and 3.1 of 17.0 GiB less.

    u = x up' is never written: backward needs |u|, the root of its square s, and u's sign, which is
    s's last bit: s is rounded to an even bfloat16, or an odd one if u < 0. That errs by 2^-7 at
    most, as rounding u before the square would.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        s = fused_product(x, up, None)
        ctx.save_for_backward(x, up, down, s)
        return F.linear(s, down)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, up, down, s = ctx.saved_tensors
        du = fused_product(dy, down.T, s)
        return du @ up, du.T @ x, dy.T @ s


def fuses_mlp(device: torch.device, dtype: torch.dtype, up_shape: Sequence[int]) -> bool:
    """Whether FusedMLP is used: in bfloat16 on Hopper, for whose copies and products it is made."""
    fits = dtype == torch.bfloat16 and up_shape[0] % 128 == 0 == up_shape[1] % 64
    nvidia = device.type == "cuda" and torch.version.hip is None and triton is not None
    return fits and nvidia and torch.cuda.get_device_capability(device)[0] == 9


def mlp(x: Tensor, layer: Layer) -> Tensor:
    """leaky(x up')^2 down', (B, T, D) -> (B, T, D)."""
    if fuses_mlp(x.device, x.dtype, layer.mlp_up.shape):
        return FusedMLP.apply(x.flatten(0, 1), layer.mlp_up, layer.mlp_down).view_as(x)
    return F.linear(F.leaky_relu(F.linear(x, layer.mlp_up), 0.5).square(), layer.mlp_down)


def block(x: Tensor, layer: Layer, x0: Tensor, rope: Rope) -> Tensor:
    """One layer of the stream x (B, T, D) that started from x0."""
    x = x if layer.skip is None else x + layer.skip[1] * layer.skip[0]
    x = layer.resid_mix[0] * x + layer.resid_mix[1] * x0
    x = x + attention(rms_norm(x), layer, rope)
    return x + mlp(rms_norm(x), layer)


def stack(
    x: Tensor, layers: list[Layer], *inputs: Any, keep: int, block: Callable = block
) -> list[Tensor]:
    """The last `keep` outputs of consecutive layers; compiled as one, for its kernels join across
    layers. (An output that nothing uses would cost a gradient of zeros.)"""
    return [x := block(x, layer, *inputs) for layer in layers][len(layers) - keep :]


def bigram_rows(ids: Tensor, num_rows: int) -> Tensor:
    """BigramHash's row of each position of ids (B, T) int32; the last row is for position 0."""
    rows = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % (num_rows - 1)
    return F.pad(rows, (1, 0), value=num_rows - 1)


def embed(
    ids: Tensor, table: Tensor, bigram: tuple[Tensor, ...], gate: Tensor, dtype: torch.dtype
) -> Tensor:
    """ids (B, T) int32 -> x0 (B, T, D): token and bigram embeddings, normed, then smeared."""
    x = F.embedding(ids, table.to(dtype))
    if bigram:
        rows, projection, scale = (t.to(dtype) for t in bigram)
        x = x + scale * F.linear(F.embedding(bigram_rows(ids, len(rows)), rows), projection)
    x, g = rms_norm(x), gate.sigmoid().to(dtype)
    return (1 - g) * x + g * F.pad(x, (0, 0, 1, 0))[:, :-1]


def token_losses(x: Tensor, targets: Tensor, table: Tensor, softcap: float) -> Tensor:
    """Cross-entropy in nats of each target: x (B*T, D), targets (B*T,) -> (B*T,) float32."""
    logits = F.linear(rms_norm(x), table.to(x.dtype)).float()
    logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets.long(), reduction="none")


def choose_attention(hp: Hyperparameters, runtime: Runtime, log: Log) -> str:
    """Selects cuDNN's kernel if it runs here forward and backward; the name of what is used."""
    if runtime.device.type != "cuda":
        return "sdpa"

    def allow(cudnn: bool) -> None:
        for backend in ("cudnn", "flash", "mem_efficient", "math"):
            getattr(torch.backends.cuda, f"enable_{backend}_sdp")(cudnn == (backend == "cudnn"))

    # cuDNN: 2.23 ms forward + backward at 48x2048, 8/4 heads of 64, on an H100; FlashAttention 2,
    # PyTorch's own first choice: 3.64 ms.
    allow(cudnn=True)
    like = {"device": runtime.device, "dtype": runtime.dtype, "requires_grad": True}
    heads, head_dim = (hp.num_heads, hp.num_kv_heads, hp.num_kv_heads), hp.model_dim // hp.num_heads
    try:
        attend(*(torch.ones(1, 256, n, head_dim, **like) for n in heads)).sum().backward()
    except RuntimeError as error:  # not on this device, or not for these heads
        reason = str(error).partition("\n")[0]
        log.event("attention_skipped", kernel="sdpa_cudnn", reason=reason)
        allow(cudnn=False)
        return "sdpa"
    return "sdpa_cudnn"


# --------------------------------------------------------------------------------------------------
# 6. Recurrence: the core applied K times, and what keeps that stable


class Stability(NamedTuple):
    """How the passes behaved on one batch; norms are of each sequence, over (T, D), in float32."""

    jacobian_proxy: Tensor  # (B,), the only one with a gradient
    growth: Tensor  # (K,) mean over B of |h_{k+1}| / |h_k|
    update: Tensor  # (K,) mean over B of |h_{k+1} - h_k| / |h_k|
    feedback: Tensor  # (K,) mean over B of |c_k| / |h_k|


def sequence_norm(x: Tensor) -> Tensor:
    # (B, T, D) -> (B,); vector_norm's gradient at 0 is 0, where a square root's is infinite
    return torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float32)


def correction(h: Tensor, U: Tensor, V: Tensor, d: Tensor | None) -> Tensor:
    """c = d * (U V'h): h (B, T, D), U and V (D, rank), d (D,) or None for 1."""
    c = (h @ V.to(h.dtype)) @ U.to(h.dtype).T
    return c if d is None else d.to(h.dtype) * c


def advance(
    h: Tensor, c: Tensor | None, core_output: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """h_{k+1} (B, T, D), the pass's term of the proxy (B,), and its three mean ratios (3,)."""
    h_next = core_output
    if scale is not None:
        z = h if c is None else h + c
        h_next = h + scale.to(h.dtype) * (core_output - z)
    size = sequence_norm(h) + 1e-6
    update = sequence_norm(h_next - h) / size
    feedback = torch.zeros_like(size) if c is None else sequence_norm(c) / size
    ratios = torch.stack([sequence_norm(h_next) / size, update, feedback])
    return h_next, F.relu(update - 1).square(), ratios.mean(1).detach()


class Recurrence(nn.Module):
    """h_{k+1} = h_k + a_k F(h_k + c_k),  F(z) = core(z) - z,  c_k = d * (U V'h_k).

    Pass 0 is the plain core, a_0 = 1 and c_0 = 0, so that a model grows without a jump in it.
    The proxy J = sum_k relu(|h_{k+1} - h_k| / |h_k| - 1)^2 is taken of each sequence and averaged
    (not of the whole batch), so that it does not depend on how the batch is cut among ranks.
    """

    def __init__(self, hp: Hyperparameters) -> None:
        super().__init__()
        later = hp.max_passes - 1  # passes with a scale; pass k uses entry k-1
        self.mode = hp.feedback_mode if later else "none"
        self.interpass_rmsnorm = hp.interpass_rmsnorm
        self.residual_scale = nn.Parameter(torch.full((later,), hp.residual_scale_init))
        if self.mode != "none":
            # Exactly one factor starts at zero: the correction is 0, U's gradient is not. (With
            # all of them at zero every gradient is zero for ever: the branch would never learn.)
            self.U = nn.Parameter(torch.zeros(hp.model_dim, hp.feedback_rank))
            self.V = nn.Parameter(torch.randn_like(self.U) / math.sqrt(hp.model_dim))
        if self.mode == "diagonal":
            rows = later if hp.per_pass_feedback else 1
            self.d = nn.Parameter(torch.ones(rows, hp.model_dim))

    def forward(
        self, h: Tensor, core: Callable[[Tensor], Tensor], num_passes: int, region: Callable
    ) -> tuple[Tensor, Stability]:
        """h_0 (B, T, D) -> h_K. A pass beyond those of training uses the last scale and d."""
        terms, ratios, c, scale = [], [], None, None
        for k in range(num_passes):
            if k > 0:
                h = rms_norm(h) if self.interpass_rmsnorm else h
                scale = self.residual_scale[min(k, len(self.residual_scale)) - 1]
                if self.mode != "none":
                    d = self.d[min(k, len(self.d)) - 1] if self.mode == "diagonal" else None
                    c = region(correction)(h, self.U, self.V, d)
            output = core(h if c is None else h + c)
            h, term, ratio = region(advance)(h, c, output, scale)
            terms.append(term)
            ratios.append(ratio)
        return h, Stability(torch.stack(terms).sum(0), *torch.stack(ratios).unbind(1))


# --------------------------------------------------------------------------------------------------
# 7. Model: banks of matrices, stem -> core x passes -> tail, tied head


@cache
def compiled(function: Callable) -> Callable:
    """One compilation of a region for the whole process, whichever model calls it."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def any_size(x: Tensor) -> Tensor:
    """x, for which one compiled graph is to serve all sizes of its first dim."""
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


class GPT(nn.Module):
    """The model. Parameters are float32; `dtype` is what it computes in."""

    def __init__(
        self, hp: Hyperparameters, dtype: torch.dtype = torch.float32, compile_regions: bool = False
    ) -> None:
        super().__init__()
        self.hp, self.dtype = hp, dtype
        self.region = compiled if compile_regions else lambda function: function
        L, D, width = hp.num_layers, hp.model_dim, hp.model_dim // hp.num_heads * hp.num_kv_heads
        shapes = {
            "qo_bank": (2 * L, D, D), "kv_bank": (2 * L, width, D),
            "mlp_up_bank": (L, hp.mlp_dim, D), "mlp_down_bank": (L, D, hp.mlp_dim),
            "tok_emb": (hp.vocab_size, D), "smear_gate": (D,), "resid_mix": (L, 2, D),
            "attn_scale": (L, D), "mlp_scale": (L, D), "q_gain": (L, hp.num_heads),
            "skip_weight": (min(hp.core_start, L - hp.core_end), D),
        }  # fmt: skip
        if hp.bigram_vocab_size:
            shapes |= {"bigram_table": (hp.bigram_vocab_size, hp.bigram_dim)}
            shapes |= {"bigram_proj": (D, hp.bigram_dim), "bigram_scale": ()}
        if hp.ve_layer_ids:
            shapes |= {"ve_table": (hp.vocab_size, hp.ve_dim), "ve_proj": (width, hp.ve_dim)}
            shapes |= {"ve_scale": (), "ve_layer_scale": (len(hp.ve_layer_ids),)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.recurrence = Recurrence(hp)
        ln_scale, names = torch.arange(1, L + 1).float().rsqrt(), ("cos", "sin", "ln_scale")
        for name, buffer in zip(names, (*rotary_table(hp), ln_scale), strict=True):
            self.register_buffer(name, buffer, persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Orthogonal inputs and zero outputs: every block starts as the identity."""
        hp, L = self.hp, self.hp.num_layers
        for matrix in (*self.qo_bank[:L], *self.kv_bank, *self.mlp_up_bank):
            nn.init.orthogonal_(matrix)
        for zeros in (self.qo_bank[L:], self.mlp_down_bank, self.smear_gate, self.resid_mix):
            zeros.zero_()
        for ones in (self.attn_scale, self.mlp_scale, self.skip_weight, self.resid_mix[:, 0]):
            ones.fill_(1.0)
        self.q_gain.fill_(hp.qk_gain_init)
        nn.init.normal_(self.tok_emb, std=hp.tied_embed_init_std)
        if hp.bigram_vocab_size:
            # One factor at zero, not both: rows of pairs that were never seen stay silent.
            self.bigram_table.zero_()
            nn.init.normal_(self.bigram_proj, std=hp.bigram_dim**-0.5)
            self.bigram_scale.fill_(0.05)
        if hp.ve_layer_ids:
            nn.init.normal_(self.ve_table, std=0.01)
            self.ve_proj.zero_()
            self.ve_scale.fill_(0.1)
            self.ve_layer_scale.fill_(1.0)

    def layers(self, qat_floor: Tensor | None) -> list[Layer]:
        """The weights of each unique layer; with `qat_floor`, fake-quantized in QAT's scope."""
        hp, L = self.hp, self.hp.num_layers
        start, end = (hp.core_start, hp.core_end) if hp.qat_scope == "core" else (0, L)

        def by_layer(bank: Tensor) -> Tensor:  # (N, rows, cols) -> (N/L, L, rows, cols)
            w = bank.unflatten(0, (-1, L))
            if qat_floor is None:
                return w
            before, scope, after = w.split([start, end - start, L - end], dim=1)
            stored = self.region(fake_quantize)(any_size(scope.flatten(0, 2)), qat_floor)
            return torch.cat([before, stored.view_as(scope), after], dim=1)

        (q, out), (k, v) = by_layer(self.qo_bank), by_layer(self.kv_bank)
        [up], [down] = by_layer(self.mlp_up_bank), by_layer(self.mlp_down_bank)
        ln_scale = self.ln_scale[:, None, None]
        matrices = (ln_scale * torch.cat([q, k, v], dim=1), self.attn_scale[..., None] * out)
        matrices += (ln_scale * up, self.mlp_scale[..., None] * down)
        # unbind, not indexing: its backward is one stack, not a full-size zero for every layer.
        rows = [t.to(self.dtype).unbind() for t in (*matrices, self.resid_mix, self.q_gain)]
        xsa = [i >= L - hp.xsa_last_n and not hp.core_start <= i < hp.core_end for i in range(L)]
        return [Layer(*row) for row in zip(*rows, xsa, strict=True)]

    def value_embeddings(self, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """For each layer that has them: the value embeddings (B, T, G*E) and what scales them."""
        if not self.hp.ve_layer_ids:
            return {}
        value = F.embedding(ids, self.ve_table.to(self.dtype)) @ self.ve_proj.to(self.dtype).T
        scales = (self.ve_scale * self.ve_layer_scale).to(self.dtype).unbind()
        return {i: (value, s) for i, s in zip(self.hp.ve_layer_ids, scales, strict=True)}

    def forward(
        self, ids: Tensor, targets: Tensor, num_passes: int,
        qat_floor: Tensor | None = None, score_last: int | None = None,
    ) -> tuple[Tensor, Stability]:  # fmt: skip
        """ids, targets (B, T) int32 -> the losses in nats (B, T) float32, and the stability.

        score_last: score only so many last positions -> (B, score_last).
        """
        hp, L = self.hp, self.hp.num_layers
        layers, rope = self.layers(qat_floor), (self.cos, self.sin, hp.rope_dims // 2)
        for i, value in self.value_embeddings(ids).items():
            layers[i] = layers[i]._replace(value=value)
        names = ("bigram_table", "bigram_proj", "bigram_scale") if hp.bigram_vocab_size else ()
        bigram = tuple(getattr(self, name) for name in names)
        x0 = self.region(embed)(any_size(ids), self.tok_emb, bigram, self.smear_gate, self.dtype)

        def run(x: Tensor, start: int, end: int, keep: int = 1) -> list[Tensor]:
            """x, then the last `keep` outputs of layers start to end - 1."""
            inputs = (layers[start:end], x0, rope)
            if not torch.is_grad_enabled():  # three kinds of layer to compile, not three stacks
                first = x.view_as(x)  # if x were x0 itself, that would be a fourth kind
                return [x, *stack(first, *inputs, keep=keep, block=self.region(block))]
            added = [pair[0] for layer in inputs[0] for pair in (layer.value, layer.skip) if pair]
            for t in (x, x0, *added):
                any_size(t)
            return [x, *self.region(stack)(x, *inputs, keep=keep)]

        stem = run(x0, 0, hp.core_start, keep=hp.core_start)
        core = lambda x: run(x, hp.core_start, hp.core_end)[-1]  # noqa: E731
        x, stability = self.recurrence(stem[-1], core, num_passes, self.region)
        skips = zip(stem[:0:-1], self.skip_weight.to(self.dtype).unbind(), strict=False)
        for i, skip in enumerate(skips, hp.core_end):
            layers[i] = layers[i]._replace(skip=skip)
        x = run(x, hp.core_end, L)[-1]
        if score_last:
            x, targets = x[:, -score_last:], targets[:, -score_last:]
        scored = any_size(x.flatten(0, 1)), any_size(targets.flatten())
        losses = self.region(token_losses)(*scored, self.tok_emb, hp.logit_softcap)
        return losses.view_as(targets), stability


def parameter_group(name: str) -> str:
    """How a parameter is optimized: `muon`, or AdamW's group `table`, `projection` or `scalar`."""
    known = {"muon": BANKS, "table": TABLES, "projection": PROJECTIONS}
    return next((group for group, names in known.items() if name in names), "scalar")


# --------------------------------------------------------------------------------------------------
# 8. Optimization: flat parameters, Parallel Muon and AdamW, the plan of a step, weight averages


class FlatParameters:
    """All parameters as views of one float32 buffer, their gradients as views of another.

    Muon's banks come first, each padded to `world_size` equal shards of rows, then AdamW's
    groups. So a reduce-scatter reads a bank where autograd wrote it, an all-gather writes it where
    the model reads it, and clipping, averaging, snapshots and SGD are one kernel each.
    """

    ALIGNMENT = 64  # elements; kernels want every parameter to start at a multiple of 16 bytes

    def __init__(self, model: GPT, world_size: int = 1) -> None:
        named = dict(model.named_parameters())
        self.shapes = {name: p.shape for name, p in named.items()}
        self.places: dict[str, slice] = {}  # of each parameter
        self.spans: dict[str, slice] = {}  # of each bank with its padding, and of each AdamW group
        size = 0
        for group in (*BANKS, "table", "projection", "scalar"):
            start = size
            for name in [n for n in named if group in (n, parameter_group(n))]:
                self.places[name] = slice(size, size + named[name].numel())
                unit = self.ALIGNMENT
                if group in BANKS:
                    unit = world_size * math.lcm(named[name][0].numel(), self.ALIGNMENT)
                size += math.ceil(named[name].numel() / unit) * unit
            self.spans[group] = slice(start, size)
        assert set(self.places) == set(named), "every parameter is optimized exactly once"
        self.data, self.grad = torch.zeros(2, size, device=model.tok_emb.device).unbind()
        for name, p in named.items():
            p.data = self.data[self.places[name]].view(p.shape).copy_(p.data)
            p.grad = self.grad[self.places[name]].view(p.shape)

    def shard(self, flat: Tensor, bank: str, runtime: Runtime) -> Tensor:
        """This rank's rows (N/R, rows, cols) of a bank inside `flat`."""
        rows = flat[self.spans[bank]].view(-1, *self.shapes[bank][1:])
        return rows.chunk(runtime.world_size)[runtime.rank]

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Every parameter's tensor inside `flat`, in the model's order."""
        return {name: flat[self.places[name]].view(shape) for name, shape in self.shapes.items()}

    def whole(self, span: slice) -> nn.Parameter:
        """A part of the buffer, with its gradient, as one parameter for an optimizer."""
        parameter = nn.Parameter(self.data[span])
        parameter.grad = self.grad[span]
        return parameter


def newton_schulz(g: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """About U V' of g = U S V' (n, rows, cols): x <- a x + (b A + c A^2) x with A = x x'."""
    a, b, c = NEWTON_SCHULZ
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimizer:
    """Parallel Muon on the banks, AdamW on the rest; call `reduce` after backward, then `step`.

    Each rank holds the momentum of, and orthogonalizes, its own rows of each bank:
        reduce-scatter all banks, all-reduce the rest      -> summed gradients, their global norm
        for each bank: momentum, Newton-Schulz, update     -> all-gather while the next one works
        AdamW                                              -> while the last all-gathers fly
    `first` and `second` are the moments in the layout of `flat.data` (Muon has but the first).
    """

    def __init__(self, flat: FlatParameters, hp: Hyperparameters, runtime: Runtime) -> None:
        self.flat, self.hp, self.runtime = flat, hp, runtime
        self.first, self.second = torch.zeros_like(flat.data), torch.zeros_like(flat.data)
        self.momentum = {bank: flat.shard(self.first, bank, runtime) for bank in BANKS}
        self.bank_grads = {bank: flat.shard(flat.grad, bank, runtime) for bank in BANKS}
        self.rest = flat.grad[flat.spans["table"].start :]
        rates = {"table": (hp.tied_embed_lr, hp.adam_wd), "projection": (hp.scalar_lr, hp.adam_wd)}
        rates["scalar"] = (hp.scalar_lr, 0.0)
        groups, state = [], {}
        for name, (lr, decay) in rates.items():
            span = flat.spans[name]
            parameter, step = flat.whole(span), torch.zeros((), device=flat.data.device)
            groups.append({"params": [parameter], "base_lr": lr, "weight_decay": decay})
            moments = {"exp_avg": self.first[span], "exp_avg_sq": self.second[span]}
            state[parameter] = moments | {"step": step}
        betas, eps = (hp.beta1, hp.beta2), hp.adam_eps
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
        self.adam.state.update(state)

    def reduce(self) -> Tensor:
        """Sums the gradients over the ranks; returns their global norm, a scalar tensor.

        Each rank's loss is divided by the tokens of the whole batch, so that the sum over ranks
        is the gradient of the global mean.
        """
        flat, runtime = self.flat, self.runtime
        if runtime.world_size > 1:
            works = []
            for bank in BANKS:
                self.bank_grads[bank] = shard = torch.empty_like(self.momentum[bank])
                source = flat.grad[flat.spans[bank]]
                works.append(dist.reduce_scatter_tensor(shard.view(-1), source, async_op=True))
            works.append(dist.all_reduce(self.rest, async_op=True))
            for work in works:
                work.wait()
        squares = torch.stack([g.square().sum() for g in self.bank_grads.values()]).sum()
        return (runtime.sum_(squares) + self.rest.square().sum()).sqrt()

    def gather(self, flat: Tensor, bank: str) -> Any:
        """Starts to fill a bank of `flat` with every rank's rows of it."""
        rows = self.flat.shard(flat, bank, self.runtime).view(-1)
        return dist.all_gather_into_tensor(flat[self.flat.spans[bank]], rows, async_op=True)

    @torch.no_grad()
    def step(self, norm: Tensor, lr_scale: float, momentum: float) -> None:
        """One update from the reduced gradients, clipped by their global norm."""
        works = []
        clip = (self.hp.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for bank in BANKS:
            self.update_rows(bank, self.bank_grads[bank] * clip, lr_scale, momentum)
            if self.runtime.world_size > 1:
                works.append(self.gather(self.flat.data, bank))
        self.rest.mul_(clip)
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adam.step()
        for work in works:
            work.wait()

    def update_rows(self, bank: str, grad: Tensor, lr_scale: float, momentum: float) -> None:
        """Muon with Nesterov momentum and decoupled weight decay on this rank's rows of a bank."""
        hp, lr = self.hp, self.hp.matrix_lr * lr_scale
        rows = self.flat.shard(self.flat.data, bank, self.runtime)  # (n, rows, cols)
        buffer = self.momentum[bank].mul_(momentum).add_(grad)
        dtype = torch.bfloat16 if rows.is_cuda else torch.float32
        grad = grad.add_(buffer, alpha=momentum)
        grad = F.normalize(grad, dim=-1, eps=1e-7) if hp.muon_row_norm else grad
        update = newton_schulz(grad, hp.muon_backend_steps, dtype)
        shape_scale = math.sqrt(max(1.0, rows.size(-2) / rows.size(-1)))
        rows.mul_(1 - lr * hp.muon_wd).add_(update, alpha=-lr * shape_scale)


class StepPlan(NamedTuple):
    """What a step does; a function of its number and of the run's progress alone."""

    num_passes: int
    qat: bool
    swa: bool
    lr_scale: float
    momentum: float


def plan_step(hp: Hyperparameters, step: int, progress: float) -> StepPlan:
    """progress: from 0 to 1, the larger of step / iterations and elapsed / wall-clock cap."""
    reached = [n for start, n in hp.growth if (progress if start % 1 else step) >= start]
    lr_scale = min(1.0, max(0.0, 1 - progress) / max(hp.warmdown_frac, 1e-9))
    rise = hp.muon_momentum_warmup_frac
    warm = min(1.0, progress / rise) if rise else 1.0
    momentum = (1 - warm) * hp.muon_momentum_warmup_start + warm * hp.muon_momentum
    longest = 1 - progress / max(1, step) / hp.muon_momentum_frac  # by the steps' mean duration
    momentum = min(momentum, max(LEAST_MOMENTUM, longest))
    qat, swa = lr_scale < hp.late_qat_threshold, lr_scale < hp.swa_lr_scale
    return StepPlan(reached[-1], qat, swa, lr_scale, momentum)


def run_graphs(hp: Hyperparameters) -> list[tuple[int, bool]]:
    """Every (passes, QAT) that a step can have."""
    kinds = (False, True)[: 1 + (hp.late_qat_threshold > 0)]
    return [(passes, qat) for passes in sorted({n for _, n in hp.growth}) for qat in kinds]


class WeightAverage:
    """EMA and SWA in the time of the run's progress, so that a run of any length averages alike."""

    def __init__(self, hp: Hyperparameters, weights: Tensor) -> None:
        self.hp, self.weights = hp, weights
        self.ema = weights.clone() if "ema" in hp.weight_average else None
        self.swa = torch.zeros_like(weights) if "swa" in hp.weight_average else None
        self.samples, self.last_progress, self.last_sample = 0, 0.0, -1.0

    def update(self, progress: float, swa: bool) -> None:
        """After a step that began at `progress`."""
        passed, self.last_progress = progress - self.last_progress, progress
        if self.ema is not None:
            self.ema.lerp_(self.weights, -math.expm1(-passed / self.hp.ema_frac))
        if self.swa is not None and swa and progress - self.last_sample >= self.hp.swa_frac:
            self.samples, self.last_sample = self.samples + 1, progress
            self.swa.lerp_(self.weights if self.ema is None else self.ema, 1 / self.samples)

    def result(self) -> Tensor:
        """The weights to export; where both are on, SWA averaged EMA's."""
        return self.swa if self.samples else self.weights if self.ema is None else self.ema


# --------------------------------------------------------------------------------------------------
# 9. Compression: GPTQ-lite int6, one knob for the size, lzma, and a reader that trusts nothing


def row_scales(w: Tensor, levels: int, floor: Tensor) -> Tensor:
    """The quantization step (..., rows, 1) of each row of w (..., rows, cols).

    GPTQ-lite: of the clips at CLIP_QUANTILES of the row's |w| the one with the least squared
    error, counted with the step as stored: float16 and no finer than `floor`, a scalar tensor.
    """
    places = [(1 - quantile) * (w.size(-1) - 1) for quantile in CLIP_QUANTILES]  # from the largest
    top = w.abs().topk(min(w.size(-1), 2 + int(max(places)))).values
    best = least = None
    for place in places:
        low, high = int(place), min(int(place) + 1, top.size(-1) - 1)
        clip = torch.lerp(top[..., low, None], top[..., high, None], place - low)
        scale = torch.maximum(clip / levels, floor).half().float()
        error = (quantize(w, scale, levels) * scale - w).square().sum(-1, keepdim=True)
        better = error < (math.inf if least is None else least)
        best = scale if best is None else torch.where(better, scale, best)
        least = error if least is None else torch.minimum(error, least)
    return best


def quantize(w: Tensor, scale: Tensor, levels: int) -> Tensor:
    """w in steps of `scale`: whole numbers in -levels..levels, as floats."""
    return torch.round(w / scale).clamp(-levels, levels)


def fake_quantize(w: Tensor, floor: Tensor) -> Tensor:
    """What the export stores of w (..., rows, cols), with the gradient of w itself."""
    with torch.no_grad():
        scale = row_scales(w, INT6_LEVELS, floor)
        stored = quantize(w, scale, INT6_LEVELS) * scale
    return stored + (w - w.detach())  # the second term is exactly 0


def floor_value(index: int) -> float:
    return 2.0 ** (-index / FLOOR_STEPS_PER_OCTAVE)


def storage_levels(name: str, shape: torch.Size) -> int:
    """Largest integer that a tensor is quantized to: 31 (int6), 127 (int8), or 0 for float16."""
    int8 = len(shape) == 2 and shape.numel() > SMALL_TENSOR
    return INT6_LEVELS if name in BANKS else INT8_LEVELS if int8 else 0


def payload_bytes(shapes: Mapping[str, torch.Size]) -> int:
    """Bytes that `pack` makes: 2 an element of float16, else 1 and 2 for each row's scale."""
    kinds = [(storage_levels(name, shape), shape) for name, shape in shapes.items()]
    return sum(s.numel() + 2 * s[:-1].numel() if k else 2 * s.numel() for k, s in kinds)


def pack(tensors: Mapping[str, Tensor], floor: float) -> bytes:
    """Every tensor in order: its row scales in float16, then integers as unsigned bytes."""
    parts = []
    for name, w in tensors.items():
        levels = storage_levels(name, w.shape)
        if levels:
            least = floor if levels == INT6_LEVELS else floor_value(FINEST_FLOOR_INDEX)
            scale = row_scales(w, levels, torch.tensor(least, device=w.device))
            parts += [scale.half(), (quantize(w, scale, levels) + levels).to(torch.uint8)]
        else:
            parts.append(w.half())
    return b"".join(part.cpu().numpy().tobytes() for part in parts)


def unpack(payload: bytes, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The dequantized float32 tensors of a payload of `payload_bytes(shapes)`."""
    tensors, stream = {}, io.BytesIO(payload)

    def take(dtype: type, shape: tuple[int, ...]) -> Tensor:
        array = np.frombuffer(stream.read(math.prod(shape) * np.dtype(dtype).itemsize), dtype)
        return torch.from_numpy(array.astype(np.float32)).view(shape)

    for name, shape in shapes.items():
        levels = storage_levels(name, shape)
        scale = take(np.float16, (*shape[:-1], 1)) if levels else 1.0
        tensors[name] = (take(np.uint8 if levels else np.float16, shape) - levels) * scale
    return tensors


def compress(hp: Hyperparameters, tensors: Mapping[str, Tensor], floor_index: int) -> bytes:
    """The artifact: xz( magic, header length, JSON header, payload )."""
    header = json.dumps(hp.architecture(), separators=(",", ":")).encode()
    start = ARTIFACT_MAGIC + struct.pack("<I", len(header)) + header
    payload = pack(tensors, floor_value(floor_index))
    return lzma.compress(start + payload, format=lzma.FORMAT_XZ, filters=XZ_FILTERS)


def entropy_bytes(tensors: Mapping[str, Tensor], floor: float) -> float:
    """Bytes of the artifact if each bank were coded at its integers' entropy.

    Close to lzma's result and a thousand times faster: it starts the search for the floor, and
    tells QAT the floor that the export will need.
    """
    total = float(payload_bytes({n: w.shape for n, w in tensors.items()}))
    for w in (tensors[name] for name in BANKS):
        scale = row_scales(w, INT6_LEVELS, torch.tensor(floor, device=w.device))
        integers = (quantize(w, scale, INT6_LEVELS) + INT6_LEVELS).to(torch.uint8).flatten()
        share = torch.bincount(integers, minlength=2 * INT6_LEVELS + 1).double() / w.numel()
        bits = torch.special.entr(share).sum().item() / math.log(2)
        total -= w.numel() * (1 - 1.01 * bits / 8)  # lzma takes about 1% more than the entropy
    return total


def estimate_floor_index(tensors: Mapping[str, Tensor], limit_bytes: int) -> int:
    """The finest floor whose estimated size fits."""
    indices = range(FINEST_FLOOR_INDEX + 1)
    too_large = lambda i: entropy_bytes(tensors, floor_value(i)) > limit_bytes  # noqa: E731
    return max(0, bisect.bisect_left(indices, True, key=too_large) - 1)


def finest_fitting(size_of: Callable[[int], int], guess: int, limit: int, log: Log) -> int | None:
    """The largest floor index whose real size fits `limit`, or None: bisection, 7 probes a round.

    The probes of a round share the CPU's cores (lzma releases the interpreter's lock).
    """
    fits, too_large = -1, FINEST_FLOOR_INDEX + 1
    probes = {guess + offset for offset in (-64, -24, -8, 0, 8, 24, 64)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while too_large - fits > 1:
            probes = sorted({min(max(i, fits + 1), too_large - 1) for i in probes})
            for index, size in zip(probes, pool.map(size_of, probes), strict=True):
                log.event("export_probe", floor_index=index, artifact_bytes=size)
                fits = max(fits, index) if size <= limit else fits
                too_large = min(too_large, index) if size > limit else too_large
            probes = {fits + (too_large - fits) * i // 8 for i in range(1, 8)}
    return fits if fits >= 0 else None


def read_artifact(path: Path) -> tuple[Hyperparameters, dict[str, Tensor]]:
    """The architecture (other settings at their defaults) and the float32 tensors of an artifact.

    The file is untrusted and nothing in it is executed: the settings in its header are checked
    like a user's, and the payload must have exactly the size that they imply. Raises UserError.
    """
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 26)

    def read(size: int, data: bytes = b"") -> bytes:
        result = stream.decompress(data, size)
        while len(result) < size and not stream.eof and not stream.needs_input:
            result += stream.decompress(b"", size - len(result))
        require(len(result) == size, "it ends early")
        return result

    try:
        magic, length = struct.unpack("<4sI", read(8, path.read_bytes()))
        require(magic == ARTIFACT_MAGIC and length < 1 << 16, "it does not begin like an artifact")
        header = json.loads(read(length))
        names = Hyperparameters().architecture()
        require(isinstance(header, dict) and set(header) == set(names), "its header is another one")
        T = header["train_seq_len"]
        header |= {"train_batch_tokens": T, "micro_batch_tokens": T, "eval_stride": 1}
        hp, _ = read_configuration({k.upper(): str(v) for k, v in header.items()}, [])
        with torch.device("meta"):  # shapes without memory
            shapes = {name: p.shape for name, p in GPT(hp).named_parameters()}
        size = payload_bytes(shapes)
        require(size <= MAX_MODEL_BYTES, f"it claims {size} bytes of weights")
        payload = read(size)
        rest = b"" if stream.eof else stream.decompress(b"", 1)
        require(stream.eof and not rest and not stream.unused_data, "it has too many bytes")
    except OSError as error:
        raise UserError(f"artifact {path} cannot be read: {error.strerror}") from None
    except (lzma.LZMAError, EOFError, ValueError, RecursionError) as error:
        text = f"artifact {path} is damaged or foreign ({error}): copy or export it again"
        raise UserError(text) from None
    return hp, unpack(payload, shapes)


# --------------------------------------------------------------------------------------------------
# 10. Evaluation: every token scored exactly once, plain, sliding, and before each TTT update


def scoring_windows(first: int, last: int, seq_len: int, stride: int) -> np.ndarray:
    """Windows that score targets first..last-1 once each, in order: rows (start, from, to).

    Target t is token t+1. A window feeds the `seq_len` tokens from `start` and scores targets
    from..to-1; it ends with the last of them, unless the text has only just begun.
    """
    opening = min(last, max(first + stride, seq_len))
    to = np.array([*range(opening, last, stride), last], dtype=np.int64)
    return np.stack([np.maximum(to - seq_len, 0), np.append(first, to[:-1]), to], axis=1)


def micro_batches(rows: Tensor, hp: Hyperparameters) -> list[Tensor]:
    """Cuts rows (B, ...) into the fewest near-equal parts that fit micro_batch_tokens."""
    parts = math.ceil(len(rows) / (hp.micro_batch_tokens // hp.train_seq_len))
    return list(rows.tensor_split(parts)) if parts else []


class Evaluator:
    """Scores a text of tokens; the loss of target t is that of token t+1."""

    def __init__(
        self, tokens: np.ndarray, table: TokenBytes, hp: Hyperparameters, runtime: Runtime, log: Log
    ) -> None:
        T = hp.train_seq_len
        text = f"data_path: {len(tokens)} validation tokens are not more than a window of {T}"
        require(len(tokens) > T, f"{text}: prepare more text or lower train_seq_len")
        self.hp, self.table, self.runtime, self.log = hp, table, runtime, log
        self.tokens = torch.from_numpy(tokens.astype(np.int32)).to(runtime.device)
        self.num_targets = len(tokens) - 1
        self.bytes = table.of(self.tokens[:-1], self.tokens[1:])
        self.deadline = math.inf  # on the clock of time.perf_counter
        self.clear()

    def clear(self) -> None:
        """Forgets all scores; one more slot takes what is computed but not to be kept."""
        self.losses = torch.zeros(self.num_targets + 1, device=self.runtime.device)
        self.times_scored = torch.zeros_like(self.losses, dtype=torch.int32)
        self.started = self.mark = time.perf_counter()

    @torch.no_grad()
    def score(self, model: GPT, windows: np.ndarray, passes: int, stride: int) -> None:
        """Scores this rank's share of `windows`, in batches of one shape, with a head on the last
        `stride` positions only where all that a window scores lies in them."""
        T, size, device = self.hp.train_seq_len, self.hp.eval_batch_seqs, self.runtime.device
        mine = windows[self.runtime.share(len(windows))]
        late = mine[:, 1] >= mine[:, 0] + T - stride
        for chosen, count in ((mine[late], stride), (mine[~late], T)):
            for part in (chosen[at : at + size] for at in range(0, len(chosen), size)):
                rows = np.pad(part, ((0, size - len(part)), (0, 0)))  # the added ones score nothing
                start, first, last = torch.from_numpy(rows).to(device).unsqueeze(2).unbind(1)
                batch = self.tokens[start + torch.arange(T + 1, device=device)]
                losses, _ = model(batch[:, :-1], batch[:, 1:], passes, score_last=count)
                target = start + torch.arange(T - count, T, device=device)
                kept = (target >= first) & (target < last)
                place = torch.where(kept, target, self.num_targets).flatten()
                self.losses.index_copy_(0, place, losses.flatten())
                self.times_scored.index_add_(0, place, torch.ones_like(place, dtype=torch.int32))

    def report(self, name: str, *first: tuple[str, Any], **last: Any) -> None:
        """Logs val_loss (nats a token) and val_bpb of all ranks' scores."""
        for scores in (self.losses, self.times_scored):
            self.runtime.sum_(scores)
        assert bool((self.times_scored[:-1] == 1).all()), "every target is scored exactly once"
        nats, text_bytes = self.losses[:-1].double().sum().item(), int(self.bytes.sum())
        result = {"val_loss": f"{nats / self.num_targets:.8f}"}
        result |= {"val_bpb": f"{nats / math.log(2) / text_bytes:.8f}"}
        counts = {"tokens": self.num_targets, "bytes": text_bytes}
        seconds = f"{time.perf_counter() - self.started:.3f}"
        self.log.event(name, **dict(first), **result, **counts, seconds=seconds, **last)

    def run(self, name: str, model: GPT, stride: int, passes: int, **extra: Any) -> None:
        """Scores the whole text with windows `stride` apart."""
        self.clear()
        windows = scoring_windows(0, self.num_targets, self.hp.train_seq_len, stride)
        parts = math.ceil(len(windows) / (8 * self.hp.eval_batch_seqs * self.runtime.world_size))
        for i, part in enumerate(np.array_split(windows, parts)):
            self.score(model, part, passes, stride)
            self.log.progress((i + 1) / parts, name)
        self.report(name, *extra.items())

    def run_ttt(self, model: GPT, passes: int) -> None:
        """Score-first test-time training: each chunk is scored, then trained on (not the last)."""
        hp, flat = self.hp, FlatParameters(model)
        sgd = torch.optim.SGD([flat.whole(slice(None))], hp.ttt_lr, hp.ttt_momentum)
        self.clear()
        starts, spent, trained = range(0, self.num_targets, hp.ttt_chunk_tokens), np.zeros(2), 0
        for i, first in enumerate(starts):
            last, left = min(first + hp.ttt_chunk_tokens, self.num_targets), len(starts) - i - 1
            windows = scoring_windows(first, last, hp.train_seq_len, hp.eval_stride)
            self.score(model, windows, passes, hp.eval_stride)
            self.report_chunk(i + 1, len(starts), last)
            spent[0] += self.lap()
            if left:
                cosine = 0.5 * (1 + math.cos(math.pi * i / (len(starts) - 1)))
                sgd.param_groups[0]["lr"] = hp.ttt_lr * cosine
                scoring, epoch = spent / (i + 1, max(trained, 1))  # mean seconds of a chunk
                epochs = self.affordable_epochs(left * scoring, left * epoch)
                self.train_on(model, flat, sgd, range(first, last), passes, epochs)
                spent[1], trained = spent[1] + self.lap(), trained + epochs
        self.report("legal_ttt_exact", epochs=f"{trained}/{hp.ttt_epochs * (len(starts) - 1)}")

    def lap(self) -> float:
        """Seconds since the last lap, the devices' work included."""
        self.runtime.barrier()
        before, self.mark = self.mark, time.perf_counter()
        return self.mark - before

    def affordable_epochs(self, scoring: float, epoch: float) -> int:
        """The epochs that the deadline leaves time for, if scoring all chunks that are left takes
        `scoring` seconds and training an epoch on each `epoch`; rank 0 decides."""
        spare = 0.95 * (self.deadline - self.mark - scoring)
        epochs = min(max(spare / max(epoch, 1e-9), 0), self.hp.ttt_epochs)
        return self.runtime.from_main(int(epochs))

    def report_chunk(self, done: int, chunks: int, last: int) -> None:
        self.log.progress(done / chunks, "legal_ttt")
        if done % max(1, chunks // 20) == 0:
            nats = self.runtime.sum_(self.losses[:last].double().sum()).item()
            bpb = nats / math.log(2) / int(self.bytes[:last].sum())
            seconds = f"{time.perf_counter() - self.started:.1f}s"
            self.log.event("ttt_chunk", chunk=f"{done}/{chunks}", val_bpb=bpb, time=seconds)

    def train_on(
        self, model: GPT, flat: FlatParameters, sgd: Any, targets: range, passes: int, epochs: int
    ) -> None:
        """Epochs of SGD over the whole windows of a scored chunk; ranks share each batch."""
        hp, T = self.hp, self.hp.train_seq_len
        whole = range(targets.start, targets.stop - T + 1, T)  # none in a chunk below T tokens
        starts = torch.tensor(whole, dtype=torch.int64, device=self.tokens.device)
        for batch in list(starts.split(hp.ttt_batch_seqs)) * epochs:
            mine = batch[self.runtime.share(len(batch))]
            for part in micro_batches(mine, hp):
                rows = self.tokens[part[:, None] + torch.arange(T + 1, device=part.device)]
                losses, _ = model(rows[:, :-1], rows[:, 1:], passes)
                (losses.sum() / (len(batch) * T)).backward()
            norm = self.runtime.sum_(flat.grad).norm()
            flat.grad.mul_((hp.ttt_grad_clip / (norm + 1e-6)).clamp(max=1.0))
            sgd.step()
            flat.grad.zero_()


# --------------------------------------------------------------------------------------------------
# 11. Training: warm-up, then the clock and the loop


def graphs_compiled() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Clock:
    """The run's progress and stops, decided once and followed by all ranks at the same step.

    What rank 0 knows when a step begins is shared while that step runs and used for the next, so
    that no host waits for another. The time at which the next step will begin and end is
    extrapolated: training stops before a step that would end after the cap, were it as slow as the
    slowest of the last ones. As a context, it notes SIGTERM and SIGINT; any rank's stops all.
    """

    def __init__(
        self, hp: Hyperparameters, runtime: Runtime, elapsed: float = 0.0, progress: float = 0.0
    ) -> None:
        """elapsed, progress: of the run that is resumed."""
        self.hp, self.runtime, self.work, self.signal = hp, runtime, None, 0
        self.ahead = 2 if runtime.device.type == "cuda" else 1  # steps from now to the next's start
        # progress, stop, checkpoint, signals
        self.shared = torch.tensor([progress, 0.0, 0.0, 0.0], dtype=torch.float64)
        self.recent = deque([0.0], maxlen=16)  # seconds of the last steps
        self.checkpoint = self.interrupted = False
        runtime.barrier()
        self.last = self.last_checkpoint = time.perf_counter()
        self.started = self.last - elapsed

    def __enter__(self) -> None:
        def note(number: int, frame: Any) -> None:
            self.signal = number

        self.handlers = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def exclude(self, seconds: float) -> None:
        """Takes a pause out of the run's time."""
        self.started, self.last = self.started + seconds, self.last + seconds

    def progress(self, step: int) -> float:
        """The run's progress as `step` begins; at 1 or more training stops."""
        iterations = self.hp.iterations
        if self.work is not None:
            self.work.wait()
        by_time, stop, checkpoint, signals = self.shared.tolist()
        self.checkpoint, self.interrupted = checkpoint > 0, signals > 0
        by_steps = 0.0 if iterations is None else step / iterations if iterations else 1.0
        progress = 1.0 if stop or self.interrupted else max(by_time, by_steps)
        if progress < 1:
            self.tell()
        return progress

    def tell(self) -> None:
        """Starts to tell all ranks where rank 0's clock will stand when the next step begins."""
        hp, now = self.hp, time.perf_counter()
        step_seconds, self.last = now - self.last, now
        begin = self.elapsed() + self.ahead * step_seconds
        cap = (hp.max_wallclock_seconds or math.inf) - hp.reserve_seconds
        self.recent.append(step_seconds)
        every = hp.checkpoint_seconds or math.inf  # none at the end: it would come after the cap
        due = now - self.last_checkpoint >= every and cap - begin >= every
        self.last_checkpoint = now if due else self.last_checkpoint
        by_time = max(float(self.shared[0]), min(begin / cap, 1.0))  # it never goes back
        facts = [by_time, begin + max(self.recent) > cap, due]
        facts = [float(fact) * self.runtime.is_main for fact in facts]
        self.shared = torch.tensor([*facts, float(self.signal)], dtype=torch.float64)
        if self.runtime.world_size > 1:
            self.work = dist.all_reduce(self.shared, async_op=True)


class Trainer:
    """Trains `model` for the run's budget; what it leaves in `flat.data` is what to export."""

    def __init__(
        self, model: GPT, loader: BatchLoader, evaluator: Evaluator, checkpoints: Path | None = None
    ) -> None:
        self.hp, self.model, self.loader, self.evaluator = model.hp, model, loader, evaluator
        self.runtime, self.log, self.table = evaluator.runtime, evaluator.log, evaluator.table
        self.flat, self.checkpoints = FlatParameters(model, self.runtime.world_size), checkpoints
        self.floor_index: int | None = None  # of QAT, once it has begun
        self.norms: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def accumulate(self, batch: Tensor, passes: int, floor: Tensor | None) -> Tensor:
        """Gradients of this rank's sequences (B, T+1); returns sums over them for the log:
        nats, text bytes, proxy, then growth, update and feedback of each pass, times B.
        """
        hp = self.hp
        sums = torch.zeros(3 + 3 * passes, device=self.runtime.device)
        for part in micro_batches(batch, hp):
            ids, targets = part[:, :-1], part[:, 1:]
            losses, stability = self.model(ids, targets, passes, floor)
            nats, proxy = losses.sum(), stability.jacobian_proxy.sum()
            weighted = hp.jacobian_proxy_weight * proxy / hp.batch_seqs
            (nats / hp.train_batch_tokens + weighted).backward()
            counts = torch.stack([nats.detach(), self.table.of(ids, targets).sum(), proxy.detach()])
            sums += torch.cat([counts, len(part) * torch.cat(stability[1:])])
        return sums

    def warm_up(self) -> None:
        """Runs every graph of the run on random tokens of its own, then restores the weights.

        What is compiled, tuned or allocated on first use is none of the timed section's; the
        throwaway optimizer opens the ranks' communication, the evaluation runs on a copy.
        """
        hp, flat, runtime, kept = self.hp, self.flat, self.runtime, self.flat.data.clone()
        generator = torch.Generator().manual_seed(hp.seed)
        random = partial(torch.randint, hp.vocab_size, generator=generator, dtype=torch.int32)
        optimizer, floor = Optimizer(flat, hp, runtime), torch.ones((), device=runtime.device)
        graphs = run_graphs(hp)
        steps = max(hp.warmup_steps, len(graphs)) if hp.warmup_steps else 0
        for i in range(steps):
            passes, qat = graphs[i * len(graphs) // steps]
            batch = random(self.loader.shape).to(runtime.device)
            self.accumulate(batch, passes, floor if qat else None)
            optimizer.step(optimizer.reduce(), 1.0, 0.9)
            flat.grad.zero_()
            self.log.progress((i + 1) / steps, "warm-up")
        if steps and self.model.region is compiled:
            text = random((hp.ttt_chunk_tokens + 2 * hp.train_seq_len,)).numpy()
            throwaway = Evaluator(text, self.table, hp, runtime, Log(None))
            evaluate_model(copy.deepcopy(self.model), throwaway)
        flat.data.copy_(kept)

    def train(self) -> int:
        """Returns the run's exit code; the weights are averaged unless they are to be resumed."""
        hp, flat, log = self.hp, self.flat, self.log
        optimizer, average = Optimizer(flat, hp, self.runtime), WeightAverage(hp, flat.data)
        step, before, elapsed = self.resume(optimizer, average)
        graphs, clock = graphs_compiled(), Clock(hp, self.runtime, elapsed, average.last_progress)
        with clock:
            while (progress := clock.progress(step)) < 1:
                if clock.checkpoint:
                    self.save(step, optimizer, average, clock)
                    clock.last = time.perf_counter()  # the next step will not be as long
                plan = plan_step(hp, step, progress)
                floor = self.announce(step, progress, before, plan)
                sums = self.accumulate(self.loader.batch(step), plan.num_passes, floor)
                norm = optimizer.reduce()
                optimizer.step(norm, plan.lr_scale, plan.momentum)
                flat.grad.zero_()
                average.update(progress, plan.swa)
                self.watch(step, norm)
                step, before = step + 1, plan
                if step % hp.train_log_every == 0 or step in (1, 10):
                    self.log_step(step, plan, sums, norm, clock)
                if hp.val_loss_every and step % hp.val_loss_every == 0:
                    self.validate(step, plan.num_passes, clock)
                log.progress(progress, f"step {step}, {plan.num_passes} passes")
            self.watch(step, None)
            self.runtime.barrier()
            spent, late = time_fields(clock, step), graphs_compiled() - graphs
            memory = torch.cuda.max_memory_allocated() >> 20 if torch.cuda.is_initialized() else 0
            facts = {"graphs_compiled_after_start": late, "peak_memory_mib": memory}
            log.event("stop", step=step, **spent, **facts, interrupted=int(clock.interrupted))
            wanted = clock.interrupted and hp.on_signal == "checkpoint"
            if wanted and self.save(step, optimizer, average, clock):
                return EXIT_CHECKPOINTED
        log.event("weight_average", kind=hp.weight_average, swa_samples=average.samples)
        flat.data.copy_(average.result())
        return EXIT_EXPORTED if clock.interrupted else 0

    def announce(
        self, step: int, progress: float, before: StepPlan | None, plan: StepPlan
    ) -> Tensor | None:
        """Logs what this step is the first to do; fixes and returns QAT's floor once it is on."""
        at = {"step": step, "progress": progress}
        if before is None or plan.num_passes != before.num_passes:
            self.log.event("progressive_passes", **at, num_passes=plan.num_passes)
        if plan.swa and not (before and before.swa) and "swa" in self.hp.weight_average:
            self.log.event("swa", **at)
        if not plan.qat:
            return None
        if self.floor_index is None:
            limit = self.hp.artifact_limit_bytes - code_bytes()
            guess = estimate_floor_index(self.flat.named(self.flat.data), limit)
            self.floor_index = index = self.runtime.from_main(guess)
            self.log.event("late_qat", **at, floor_index=index, floor=floor_value(index))
        return torch.full((), floor_value(self.floor_index), device=self.runtime.device)

    def watch(self, step: int, norm: Tensor | None) -> None:
        """Raises FloatingPointError at a non-finite gradient; looks one step back on a GPU.

        So the host is at most two steps ahead, and the GPU never waits for it.
        """
        if norm is not None:
            event = torch.cuda.Event() if norm.is_cuda else None
            self.norms.append((step, norm.detach().to("cpu", non_blocking=True), event))
            if event is not None:
                event.record()
        while len(self.norms) > (norm is not None and norm.is_cuda):
            at, value, event = self.norms.pop(0)
            if event is not None:
                event.synchronize()
            if not math.isfinite(value):
                text = f"step {at + 1}: the gradient's norm is {value.item()}, the run has diverged"
                raise FloatingPointError(f"{text}: lower matrix_lr or residual_scale_init")

    def log_step(self, step: int, plan: StepPlan, sums: Tensor, norm: Tensor, clock: Clock) -> None:
        hp = self.hp
        nats, text_bytes, proxy, *ratios = self.runtime.sum_(sums).tolist()
        ratios = (np.array(ratios).reshape(3, -1) / hp.batch_seqs).tolist()
        facts = {"step": f"{step}/{hp.iterations}" if hp.iterations else step}
        facts |= {"train_loss": f"{nats / hp.train_batch_tokens:.4f}"}
        facts |= {"train_bpb": f"{nats / math.log(2) / text_bytes:.4f}"}
        facts |= {"jacobian_proxy": proxy / hp.batch_seqs, "grad_norm": norm.item()}
        facts |= {"lr_scale": plan.lr_scale, "passes": plan.num_passes, "qat": int(plan.qat)}
        facts |= zip(("growth", "update", "feedback_norm"), ratios, strict=True)
        facts |= {"residual_scale": self.model.recurrence.residual_scale.tolist()}
        self.log.event(**facts, **time_fields(clock, step))

    def validate(self, step: int, passes: int, clock: Clock) -> None:
        """Scores the validation text as it is now, outside the run's time."""
        self.runtime.barrier()
        since = time.perf_counter()
        self.evaluator.run("validation", self.model, self.hp.train_seq_len, passes, step=step)
        clock.exclude(time.perf_counter() - since)

    def run_state(self, optimizer: Optimizer, average: WeightAverage) -> dict[str, Tensor]:
        """Every tensor that training carries from step to step, in the layout of `flat.data`."""
        state = {"data": self.flat.data, "first": optimizer.first, "second": optimizer.second}
        state |= {"ema": average.ema, "swa": average.swa}
        return {name: tensor for name, tensor in state.items() if tensor is not None}

    def fixed_settings(self) -> dict[str, Any]:
        """What a resumed run must share with the one that it continues."""
        names = ("seed", "train_batch_tokens", "shuffle", "weight_average")
        return self.hp.architecture() | {name: getattr(self.hp, name) for name in names}

    def save(self, step: int, optimizer: Optimizer, average: WeightAverage, clock: Clock) -> bool:
        """Writes a checkpoint: a digest, then torch.save's bytes; on every rank: whether it did.

        Tensors are stored by name, for any number of ranks. Training draws no random numbers and
        the loader's place is the step, so that nothing else has to be kept.
        """
        if self.runtime.world_size > 1:
            for work in [optimizer.gather(optimizer.first, bank) for bank in BANKS]:
                work.wait()
        main = self.runtime.is_main and self.checkpoints is not None
        return self.runtime.from_main(main and self.write(step, optimizer, average, clock))

    def write(self, step: int, optimizer: Optimizer, average: WeightAverage, clock: Clock) -> bool:
        """Writes the checkpoint aside, then keeps it and the one before it."""
        tensors = self.run_state(optimizer, average).items()
        counts = (average.samples, average.last_progress, average.last_sample)
        facts = {"step": step, "elapsed": clock.elapsed(), "floor_index": self.floor_index}
        facts |= {"average": counts, "settings": self.fixed_settings()}
        named = {kind: self.flat.named(t.to("cpu", copy=True)) for kind, t in tensors}
        buffer, path = io.BytesIO(), self.checkpoints / f"step_{step:08d}.pt"
        torch.save(facts | {"tensors": named}, buffer)
        digest = hashlib.sha256(buffer.getbuffer()).digest()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_aside(path, digest + buffer.getvalue())
            # Later ones first: a resumed run has found them damaged.
            found = sorted(path.parent.glob("step_*.pt"), key=lambda other: (other <= path, other))
            for old in [*found[:-2], *path.parent.glob("step_*.tmp")]:
                old.unlink()
        except OSError as error:  # the run goes on, and older checkpoints stay
            self.log.event("checkpoint_failed", path=path, reason=error.strerror)
            return False
        self.log.event("checkpoint", step=step, path=path, bytes=32 + buffer.tell())
        return True

    def resume(
        self, optimizer: Optimizer, average: WeightAverage
    ) -> tuple[int, StepPlan | None, float]:
        """The step to go on with, the plan of the one before it, and the seconds spent so far."""
        state = self.hp.resume and read_checkpoint(self.checkpoints, self.runtime, self.log)
        if not state:
            return 0, None, 0.0
        new, step = self.fixed_settings(), state["step"]
        differ = [f"{k}={new[k]} (was {v})" for k, v in state["settings"].items() if new[k] != v]
        require(not differ, f"resume: the checkpoint has other settings: {', '.join(differ)}")
        for kind, tensor in self.run_state(optimizer, average).items():
            for name, view in self.flat.named(tensor).items():
                view.copy_(state["tensors"][kind][name])
        for moments in optimizer.adam.state.values():
            moments["step"].fill_(step)
        self.floor_index = state["floor_index"]
        average.samples, average.last_progress, average.last_sample = state["average"]
        before = plan_step(self.hp, step - 1, average.last_progress)
        self.log.event("resume", step=step, train_time=f"{1000 * state['elapsed']:.0f}ms")
        return step, before, state["elapsed"]


def read_checkpoint(folder: Path, runtime: Runtime, log: Log) -> dict[str, Any] | None:
    """The newest whole checkpoint, the same on every rank, or None. Nothing in it is executed."""
    found = sorted(folder.glob("step_*.pt"), reverse=True)
    for path in runtime.from_main(found):
        data = runtime.from_main(path.read_bytes() if runtime.is_main else None)
        if hashlib.sha256(data[32:]).digest() == data[:32]:
            return torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True)
        log.event("checkpoint_damaged", path=path)
    return None


def time_fields(clock: Clock, step: int) -> dict[str, str]:
    spent = 1000 * clock.elapsed()
    return {"train_time": f"{spent:.0f}ms", "step_avg": f"{spent / max(1, step):.2f}ms"}


# --------------------------------------------------------------------------------------------------
# 12. Main: configuration -> data -> training -> artifact -> evaluation of the artifact


def code_bytes() -> int:
    return Path(__file__).stat().st_size


def write_aside(path: Path, data: bytes) -> None:
    """Writes a file that is either whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # what is left of it may be what fills the disk
        raise


def log_header(hp: Hyperparameters, sources: Mapping[str, str], runtime: Runtime, log: Log) -> None:
    code = Path(__file__).read_bytes()
    digest = hashlib.sha256(code).hexdigest()
    log.event("code", name=Path(__file__).name, bytes=len(code), sha256=digest)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "numpy": np.__version__}
    versions |= {"sentencepiece": spm.__version__, "triton": getattr(triton, "__version__", None)}
    log.event("versions", python=platform.python_version(), **versions)
    on_gpu = runtime.device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} x{os.cpu_count()}"
    log.event("device", name=name, world_size=runtime.world_size, dtype=str(runtime.dtype)[6:])
    for f in fields(hp):
        log.event("config", name=f.name, value=getattr(hp, f.name), source=sources[f.name])


def build_model(hp: Hyperparameters, runtime: Runtime, log: Log) -> GPT:
    name = choose_attention(hp, runtime, log)
    on = hp.compile == "on" or (hp.compile == "auto" and runtime.device.type == "cuda")
    torch._dynamo.config.recompile_limit = 128
    if hasattr(torch._inductor.config.triton, "mix_order_reduction"):  # since torch 2.10
        # It joins resid_mix's gradient, sums over tokens, to the norms' backward: in a step of
        # 786,432 tokens on an H100 50 ms, where apart they take 38 (torch 2.11).
        torch._inductor.config.triton.mix_order_reduction = False
    torch.manual_seed(hp.seed)
    model = GPT(hp, runtime.dtype, on).to(runtime.device)
    count = sum(p.numel() for p in model.parameters())
    fused = int(fuses_mlp(runtime.device, runtime.dtype, model.mlp_up_bank.shape[1:]))
    kernels = {"attention": name, "fused_mlp": fused, "compile": "on" if on else "off"}
    log.event("model", parameters=count, **kernels)
    return model


def export(hp: Hyperparameters, tensors: Mapping[str, Tensor], path: Path, log: Log) -> Path:
    """Writes the finest artifact that fits beside the code. Raises UserError if none does.

    Returns where it lies: in the temporary folder if `path` cannot be written.
    """
    code, packed = code_bytes(), cache(partial(compress, hp, tensors))
    limit = hp.artifact_limit_bytes - code
    guess = estimate_floor_index(tensors, limit)
    index = finest_fitting(lambda index: len(packed(index)), guess, limit, log)
    fits, index = index is not None, index or 0
    path = path if fits else path.with_suffix(".oversize.xz")
    try:
        write_aside(path, packed(index))
    except OSError as error:
        path = Path(tempfile.mkdtemp(prefix="train_gpt_")) / path.name
        log.event("warning", text=f"output_dir: {error.strerror}; the artifact is {path}")
        write_aside(path, packed(index))
    model, margin = path.stat().st_size, limit - path.stat().st_size
    sizes = {"code_bytes": code, "model_bytes": model, "total_bytes": code + model}
    knob = {"floor_index": index, "floor": floor_value(index)}
    log.event("artifact", path=path, **sizes, margin_bytes=margin, **knob)
    text = f"artifact_limit_bytes={hp.artifact_limit_bytes}: code and model need {code + model}"
    require(fits, f"{text} at the coarsest setting, kept as {path}: make the model smaller")
    return path


def adopt(hp: Hyperparameters, stored: Hyperparameters) -> Hyperparameters:
    """The run's settings with the architecture of an artifact; what only training needs, fitted."""
    T = stored.train_seq_len
    fitted = {"train_batch_tokens": T, "micro_batch_tokens": max(T, hp.micro_batch_tokens)}
    fitted |= {"eval_stride": min(T, hp.eval_stride)}
    fitted |= {"eval_passes": hp.eval_passes or stored.passes_in_evaluation}
    return replace(hp, **(stored.architecture() | fitted))


def evaluate_model(model: GPT, evaluator: Evaluator) -> None:
    """Plain, sliding, test-time training; the last of them leaves its losses in `evaluator`."""
    hp, passes = evaluator.hp, evaluator.hp.passes_in_evaluation
    evaluator.run("final_int6_roundtrip_exact", model, hp.train_seq_len, passes)
    if hp.sliding_eval:
        evaluator.run("final_int6_sliding_window_exact", model, hp.eval_stride, passes)
    if hp.ttt_enabled:
        evaluator.run_ttt(model, passes)


def open_data(
    hp: Hyperparameters, runtime: Runtime, log: Log
) -> tuple[BatchLoader | None, Evaluator]:
    """Checks all data before anything expensive: the loader (for training only), the evaluator."""
    tokenizer = load_tokenizer(Path(hp.tokenizer_path), hp.vocab_size)
    table, loader = TokenBytes(tokenizer, runtime.device), None
    for split in ("val",) if hp.evaluate else ("train", "val"):
        paths = find_data_shards(Path(hp.data_path), split)
        check_token_ids(paths[runtime.rank :: runtime.world_size], hp.vocab_size)
        shards = [open_data_shard(path) for path in paths]
        counts = {"shards": len(shards), "tokens": sum(map(len, shards))}
        log.event("data", split=split, **counts, fingerprint=data_fingerprint(paths))
        if split == "train":
            loader = BatchLoader(shards, hp, runtime)
    tokens = np.concatenate(shards)
    check_token_bytes(tokenizer, table, tokens)
    return loader, Evaluator(tokens, table, hp, runtime, log)


def check_outputs(hp: Hyperparameters) -> None:
    """Raises UserError if there is no place for what the run will write."""
    losses, folder = Path(hp.token_losses or "losses.npy"), Path(hp.output_dir)
    text = f"token_losses={losses} must be a file in a folder that exists: choose another path"
    require(losses.parent.is_dir() and not losses.is_dir(), text)
    folder = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, need = shutil.disk_usage(folder).free, hp.artifact_limit_bytes
    text = f"output_dir={hp.output_dir} has {free} bytes left for an artifact of up to {need}"
    require(bool(hp.evaluate) or free > need, f"{text}: make room or choose another folder")


def run(hp: Hyperparameters, sources: dict[str, str], runtime: Runtime, began: float) -> int:
    """Returns the exit code. began: when the program did, on the clock of time.perf_counter."""
    stamp = time.strftime("%Y%m%d_%H%M%S")
    run_id = runtime.from_main(hp.run_id or f"{stamp}_seed{hp.seed}")
    check_outputs(hp)
    if hp.evaluate:
        stored = read_artifact(Path(hp.evaluate))[0] if runtime.is_main else None
        hp = adopt(hp, runtime.from_main(stored))
        sources |= dict.fromkeys(hp.architecture(), "artifact")
    log = Log(Path(hp.output_dir) / f"{run_id}.txt" if runtime.is_main else None, hp.resume)
    log.event("run", run_id=run_id, started=stamp)
    log_header(hp, sources, runtime, log)
    log.since = began
    log.phase("start")
    loader, evaluator = open_data(hp, runtime, log)
    runtime.barrier()  # if any rank refuses its data there is no log, and the run_id can be used
    log.open()
    log.phase("data")
    artifact = Path(hp.evaluate or Path(hp.output_dir) / f"{run_id}.int6.xz")
    try:
        return train_and_evaluate(hp, loader, evaluator, artifact)
    except Exception as error:
        log.event("failed", text=(str(error) or repr(error)).splitlines()[0])
        raise


def train_and_evaluate(
    hp: Hyperparameters, loader: BatchLoader | None, evaluator: Evaluator, artifact: Path
) -> int:
    """Returns the exit code."""
    runtime, log, code = evaluator.runtime, evaluator.log, 0
    if loader is not None:
        checkpoints = artifact.with_name(artifact.name.replace(".int6.xz", ".checkpoints"))
        trainer = Trainer(build_model(hp, runtime, log), loader, evaluator, checkpoints)
        trainer.warm_up()
        log.phase("warm_up")
        code = trainer.train()
        log.phase("training")
        if code == EXIT_CHECKPOINTED:
            return code
        evaluator.run("pre_quant_exact", trainer.model, hp.train_seq_len, hp.passes_in_evaluation)
        log.phase("pre_quant_evaluation")
        if runtime.is_main:
            artifact = export(hp, trainer.flat.named(trainer.flat.data), artifact, log)
        log.phase("export")
    evaluator.deadline = time.perf_counter() + (hp.eval_wallclock_seconds or math.inf)
    graphs = graphs_compiled()
    stored, tensors = runtime.from_main(read_artifact(artifact) if runtime.is_main else None)
    model = build_model(adopt(hp, stored), runtime, log)
    model.load_state_dict(tensors)
    evaluate_model(model, evaluator)
    log.event("evaluated", graphs_compiled=graphs_compiled() - graphs)
    log.phase("evaluation")
    if hp.token_losses and runtime.is_main:
        buffer = io.BytesIO()
        np.save(buffer, evaluator.losses[:-1].cpu().numpy())
        write_aside(Path(hp.token_losses), buffer.getvalue())
    return code


def main() -> int:
    """Returns the exit code; see the head of this file."""
    runtime, began = None, time.perf_counter()
    try:
        hp, sources = read_configuration(os.environ, sys.argv[1:])
        runtime = Runtime.start(hp)
        code = run(hp, sources, runtime, began)
        runtime.barrier()  # torchrun ends the others as soon as one leaves with another code than 0
        return code
    except (UserError, FloatingPointError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return EXIT_MISTAKE if isinstance(error, UserError) else EXIT_DIVERGED
    finally:
        if runtime is not None and runtime.world_size > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
