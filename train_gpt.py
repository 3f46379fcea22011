"""Stable Growing Recurrence: a GPT that grows by re-applying its core while it trains.

    stem -> core, core, ... -> tail      1 pass, then 2, then 3 as the run proceeds

Sharing the core buys depth that costs no bytes; residual scaling, error feedback and a Jacobian
proxy loss keep the repetition stable. One run trains for a fixed wall clock, averages and
quantizes the weights to int6, compresses them so that code + model fit 16,000,000 bytes, reloads
the file, and scores the validation text in bits per byte: plain, with sliding windows, and with
score-first test-time training.

    torchrun --standalone --nproc_per_node=8 train_gpt.py        one node of 8 GPUs, 600 s
    python train_gpt.py                                          one process, GPU or CPU
    torchrun --nnodes 2 --nproc_per_node=8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        train_gpt.py                                             two nodes (run it on each)
    python train_gpt.py --evaluate logs/RUN.int6.xz              score an artifact again
    python train_gpt.py --help                                   every setting, its unit and default

Contents (grep -n '^# [0-9]*\\. ' train_gpt.py):
    1. Constants    2. Configuration  3. Runtime and log  4. Data        5. Layers
    6. Recurrence   7. Model          8. Optimization     9. Compression 10. Evaluation
    11. Training    12. Main

Shapes: B batch, T time, D model, H query heads, G kv heads, E head dim, F mlp, V vocabulary,
L unique layers, K passes, N bank rows, R ranks. Every setting is an environment variable
(RESIDUAL_SCALE_INIT) and a flag (--residual-scale-init); the flag wins.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import json
import lzma
import math
import os
import platform
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------------
# 1. Constants
# --------------------------------------------------------------------------------------------------

# The field's shard format: 256 little-endian int32 header words, then uint16 tokens.
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_WORDS = 20240520, 1, 256

# Quintic iteration whose slope at 0 is as steep as it can be while singular values stay within
# about [0.7, 1.2] (Jordan et al., Muon, 2024). Fast convergence matters here, exactness does not.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

# Clip candidates of GPTQ-lite, as quantiles of a row's |w|; 1.0 (no clipping) is always among them.
CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
INT6_LEVELS, INT8_LEVELS = 31, 127
# The export's size knob is an integer n: no row's quantization step is finer than 2^(-n/512).
FLOOR_STEPS_PER_OCTAVE, FINEST_FLOOR_INDEX = 512, 512 * 14
# A quantized weight is nearly incompressible but for its entropy. A dictionary as small as lzma
# allows and no context bits code it best: 4.788 bits a weight at 4.740 bits of entropy, against
# 4.863 for preset 6, in a quarter of the time.
LZMA_FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 4096, "lc": 0, "lp": 0, "pb": 0}
]
ARTIFACT_MAGIC = b"SGR1"
MAX_MODEL_BYTES = 1 << 30  # an artifact that claims more is refused before anything is allocated
SMALL_TENSOR = 65_536  # elements; up to here a tensor is stored as float16, not quantized

RMS_EPS = 1e-6


class UserError(ValueError):
    """A mistake in what the program was given; the text names the value, the rule, the remedy."""


# --------------------------------------------------------------------------------------------------
# 2. Configuration: every setting once, with its type, bounds, default and help
# --------------------------------------------------------------------------------------------------


def option(
    group: str,
    default: Any,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field of `Hyperparameters`; bounds `low`, `high` include their value."""
    rule = {"low": low, "high": high, "above": above, "choices": choices}
    return field(default=default, metadata={"group": group, "text": text, **rule})


run_option = partial(option, "run")
data_option = partial(option, "data")
model_option = partial(option, "model")
recurrence_option = partial(option, "recurrence")
optim_option = partial(option, "optimization")
average_option = partial(option, "averaging and quantization-aware training")
eval_option = partial(option, "evaluation")


@dataclass(frozen=True)
class Hyperparameters:
    """The configuration of a run. Fractions (`_frac`) are of the run's progress from 0 to 1."""

    # Run
    run_id: str | None = run_option(None, "name of the log and artifact; none: date, time and seed")
    seed: int = run_option(1337, "seed of the weights and of the data order", low=0)
    output_dir: str = run_option("logs", "folder of the log and the artifact")
    iterations: int | None = run_option(None, "steps after which training ends; none: no limit")
    max_wallclock_seconds: float | None = run_option(
        600.0, "seconds of training after which it ends; none: no limit", above=0
    )
    warmup_steps: int = run_option(20, "steps before the clock starts, then undone", low=0)
    train_log_every: int = run_option(50, "steps between lines of the log", low=1)
    val_loss_every: int | None = run_option(
        None, "steps between validations, the clock stopped; none: only at the end", low=1
    )
    dtype: str = run_option(
        "auto",
        "arithmetic of the model; auto: bfloat16 on a GPU, else float32",
        choices=("auto", "bfloat16", "float32"),
    )
    compile: str = run_option(
        "auto",
        "what torch.compile compiles; auto: regions on a GPU, else off",
        choices=("auto", "off", "regions", "model"),
    )
    attention: str = run_option(
        "auto",
        "attention kernel; auto: the first of fa3, sdpa, plain that runs",
        choices=("auto", "fa3", "sdpa", "plain"),
    )
    # Data
    data_path: str = data_option(
        "./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin shards"
    )
    tokenizer_path: str = data_option(
        "./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model of the shards"
    )
    train_batch_tokens: int = data_option(786_432, "tokens of a step, all ranks together", low=1)
    micro_batch_tokens: int = data_option(
        98_304, "most tokens that a rank takes through the model at once", low=1
    )
    shuffle: bool = data_option(True, "read windows of all shards in a seeded random order")
    # Model
    vocab_size: int = model_option(1024, "pieces of the tokenizer", low=8, high=65_536)
    train_seq_len: int = model_option(2048, "tokens of a training and evaluation window", low=8)
    num_layers: int = model_option(11, "unique layers", low=1, high=256)
    model_dim: int = model_option(512, "width of the residual stream", low=8, high=16_384)
    num_heads: int = model_option(8, "query heads", low=1, high=256)
    num_kv_heads: int = model_option(4, "key and value heads", low=1, high=256)
    mlp_mult: float = model_option(3.0, "MLP width over model width", above=0, high=64)
    rope_base: float = model_option(10_000.0, "RoPE base at a length of 1,024", above=1)
    rope_dims: int = model_option(16, "dims of each head that RoPE turns", low=0)
    qk_gain_init: float = model_option(1.5, "start of the gain of each query head")
    xsa_last_n: int = model_option(4, "last layers with XSA (never the core's)", low=0)
    bigram_vocab_size: int = model_option(512, "rows of BigramHash; 0: off", low=0, high=1 << 20)
    bigram_dim: int = model_option(32, "width of BigramHash's rows", low=1, high=16_384)
    ve_dim: int = model_option(128, "width of the value embedding table", low=1, high=16_384)
    ve_layers: str = model_option("9,10", "layers with value embeddings; none: off")
    logit_softcap: float = model_option(30.0, "bound of the logits", above=0)
    tied_embed_init_std: float = model_option(0.005, "std of the embedding at the start", above=0)
    # Recurrence
    core_start: int = recurrence_option(4, "first layer of the core", low=0)
    core_end: int = recurrence_option(7, "layer after the core's last", low=1)
    passes_schedule: str = recurrence_option(
        "0.0:1,0.626:2,0.813:3",
        "start:passes,...; a start with a point is a fraction of the run, without one a step",
    )
    num_passes: int | None = recurrence_option(
        None, "train with this fixed number of passes; none: the schedule", low=1, high=64
    )
    eval_passes: int | None = recurrence_option(
        None, "passes in evaluation; none: the schedule's last", low=1, high=64
    )
    residual_scale_init: float = recurrence_option(0.5, "start of each later pass's scale")
    feedback_mode: str = recurrence_option(
        "diagonal",
        "error feedback: d*U(V'h), U(V'h) or off",
        choices=("none", "identity", "diagonal"),
    )
    feedback_rank: int = recurrence_option(2, "columns of U and V", low=1, high=1024)
    per_pass_feedback: bool = recurrence_option(False, "a diagonal d for each pass")
    jacobian_proxy_weight: float = recurrence_option(0.01, "weight of the proxy in the loss", low=0)
    interpass_rmsnorm: bool = recurrence_option(
        False, "rms_norm of h before passes after the first"
    )
    # Optimization
    matrix_lr: float = optim_option(0.025, "Muon's learning rate", low=0)
    tied_embed_lr: float = optim_option(0.035, "AdamW's learning rate of the tables", low=0)
    scalar_lr: float = optim_option(0.025, "AdamW's learning rate of all else", low=0)
    muon_momentum: float = optim_option(0.99, "Muon's momentum", low=0, high=1)
    muon_momentum_warmup_start: float = optim_option(0.92, "Muon's first momentum", low=0, high=1)
    muon_momentum_warmup_frac: float = optim_option(
        0.237, "fraction in which the momentum rises (1,500 of 6,330 steps)", low=0, high=1
    )
    muon_backend_steps: int = optim_option(5, "Newton-Schulz iterations", low=1, high=20)
    muon_wd: float = optim_option(0.04, "decoupled weight decay of the banks", low=0)
    adam_wd: float = optim_option(0.04, "decoupled weight decay of tables and projections", low=0)
    beta1: float = optim_option(0.9, "AdamW's first decay", low=0, high=1)
    beta2: float = optim_option(0.95, "AdamW's second decay", low=0, high=1)
    adam_eps: float = optim_option(1e-8, "AdamW's epsilon", above=0)
    grad_clip_norm: float = optim_option(0.3, "bound of the global gradient's norm", above=0)
    warmdown_frac: float = optim_option(
        0.55, "last fraction, in which the learning rate falls to 0", low=0, high=1
    )
    # Averaging and QAT
    weight_average: str = average_option(
        "ema", "weights that are exported", choices=("none", "ema", "swa", "ema_swa")
    )
    ema_frac: float = average_option(
        0.0526, "EMA's horizon (decay 0.997 in 6,330 steps)", above=0, high=1
    )
    swa_frac: float = average_option(
        0.0079, "fraction between SWA's samples (50 of 6,330 steps)", low=0, high=1
    )
    swa_lr_scale: float = average_option(0.2, "SWA starts below this lr scale", low=0, high=1)
    late_qat_threshold: float = average_option(
        0.15, "fake quantization starts below this lr scale; 0: never", low=0, high=1
    )
    qat_scope: str = average_option("core", "layers under QAT", choices=("core", "all"))
    # Evaluation
    evaluate: str | None = eval_option(None, "score this artifact instead of training")
    artifact_limit_bytes: int = eval_option(
        16_000_000, "most bytes of code and compressed model together", low=1
    )
    eval_stride: int = eval_option(64, "tokens that a sliding window scores", low=1)
    eval_batch_seqs: int = eval_option(64, "windows that a rank scores at once", low=1)
    sliding_eval: bool = eval_option(True, "score with sliding windows")
    ttt_enabled: bool = eval_option(True, "score with score-first test-time training")
    ttt_lr: float = eval_option(0.002, "SGD's learning rate for the first chunk", low=0)
    ttt_momentum: float = eval_option(0.9, "SGD's momentum", low=0, high=1)
    ttt_epochs: int = eval_option(3, "epochs over each chunk once it is scored", low=0)
    ttt_chunk_tokens: int = eval_option(32_768, "tokens of a chunk", low=1)
    ttt_batch_seqs: int = eval_option(32, "most sequences of an SGD step, all ranks", low=1)
    ttt_grad_clip: float = eval_option(1.0, "bound of the gradient's norm", above=0)
    token_losses: str | None = eval_option(
        None, "write the last evaluation's float32 loss of every token to this .npy file"
    )

    def __post_init__(self) -> None:
        errors = [e for f in fields(self) if (e := bound_error(f, getattr(self, f.name)))]
        errors += list(self.rule_errors()) if not errors else []
        if errors:
            raise UserError("\n".join(errors))

    def rule_errors(self) -> Iterator[str]:
        """What no single field can check: a text for each rule that is broken."""

        def check(ok: bool, text: str) -> Iterator[str]:
            if not ok:
                yield text

        n = self.num_layers
        yield from check(
            self.iterations is not None or self.max_wallclock_seconds is not None,
            "iterations and max_wallclock_seconds are both none: set one, or training never ends",
        )
        yield from check(
            self.iterations is None or self.iterations >= 0,
            f"iterations={self.iterations} is negative: give a number of steps, or none",
        )
        yield from check(
            self.train_batch_tokens % self.train_seq_len == 0,
            f"train_batch_tokens={self.train_batch_tokens} is no multiple of train_seq_len="
            f"{self.train_seq_len}: use {max(1, self.batch_seqs) * self.train_seq_len}",
        )
        yield from check(
            self.micro_batch_tokens >= self.train_seq_len,
            f"micro_batch_tokens={self.micro_batch_tokens} holds no window of train_seq_len="
            f"{self.train_seq_len}: raise it",
        )
        yield from check(
            self.core_start < self.core_end <= n,
            f"core_start={self.core_start}, core_end={self.core_end}: the core must be a non-empty "
            f"range inside the {n} layers (0 <= core_start < core_end <= {n})",
        )
        yield from check(
            self.model_dim % self.num_heads == 0 and self.num_heads % self.num_kv_heads == 0,
            f"model_dim={self.model_dim}, num_heads={self.num_heads}, num_kv_heads="
            f"{self.num_kv_heads}: each must be a multiple of the next",
        )
        head_dim = self.model_dim // self.num_heads
        yield from check(
            self.rope_dims % 2 == 0 and self.rope_dims <= head_dim,
            f"rope_dims={self.rope_dims} must be even and at most the head dim {head_dim}",
        )
        yield from check(
            self.bigram_vocab_size != 1,
            "bigram_vocab_size=1 leaves no row for a pair: use 0 (off) or at least 2",
        )
        yield from check(
            self.eval_stride <= self.train_seq_len,
            f"eval_stride={self.eval_stride} exceeds the window train_seq_len={self.train_seq_len} "
            "and would skip tokens: lower it",
        )
        try:
            layers = self.ve_layer_ids
            yield from check(
                len(set(layers)) == len(layers) and all(0 <= i < n for i in layers),
                f"ve_layers={self.ve_layers}: layers must differ and lie in 0..{n - 1}",
            )
        except ValueError:
            yield f"ve_layers={self.ve_layers} is no list of layers: write 9,10 or none"
        try:
            passes = self.max_passes
            yield from check(
                passes > 1 or (self.eval_passes or 1) == 1,
                f"eval_passes={self.eval_passes} needs a second pass in training: {passes} is the "
                "most that the schedule reaches",
            )
        except UserError as error:
            yield str(error)

    @property
    def batch_seqs(self) -> int:
        return self.train_batch_tokens // self.train_seq_len

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def ve_layer_ids(self) -> tuple[int, ...]:
        off = self.ve_layers.strip().lower() in ("", "none")
        return () if off else tuple(int(i) for i in self.ve_layers.split(","))

    @property
    def growth(self) -> tuple[tuple[int | float, int], ...]:
        """The schedule as (start, passes): an int start is a step, a float a fraction."""
        if self.num_passes is not None:
            return ((0, self.num_passes),)
        return parse_passes_schedule(self.passes_schedule)

    @property
    def max_passes(self) -> int:
        return max(passes for _, passes in self.growth)

    @property
    def passes_in_evaluation(self) -> int:
        return self.eval_passes or self.growth[-1][1]

    def architecture(self) -> dict[str, Any]:
        """The settings that an artifact must carry for its weights to mean anything."""
        groups = ("model", "recurrence")
        return {
            f.name: getattr(self, f.name) for f in fields(self) if f.metadata["group"] in groups
        }


def bound_error(f: Any, value: Any) -> str | None:
    """The rule of field `f` that `value` breaks, or None."""
    rule = f.metadata
    if value is None:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"{f.name}={value} must be finite"
    if rule["choices"] and value not in rule["choices"]:
        return f"{f.name}={value} must be one of {', '.join(rule['choices'])}"
    if rule["low"] is not None and value < rule["low"]:
        return f"{f.name}={value} must be at least {rule['low']}"
    if rule["above"] is not None and value <= rule["above"]:
        return f"{f.name}={value} must be above {rule['above']}"
    if rule["high"] is not None and value > rule["high"]:
        return f"{f.name}={value} must be at most {rule['high']}"
    return None


def parse_passes_schedule(text: str) -> tuple[tuple[int | float, int], ...]:
    """`0.0:1,0.626:2` -> ((0.0, 1), (0.626, 2)). Starts are all steps or all fractions."""
    remedy = "write start:passes,... such as 0.0:1,0.626:2,0.813:3 or 0:1,4500:2"
    try:
        pairs = [item.split(":") for item in text.split(",")]
        entries = tuple((float(s) if "." in s else int(s), int(p)) for s, p in pairs)
    except ValueError:
        raise UserError(f"passes_schedule={text} is malformed: {remedy}") from None
    starts = [start for start, _ in entries]
    if starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:], strict=False)):
        raise UserError(f"passes_schedule={text}: starts must begin at 0 and rise: {remedy}")
    if len({type(s) for s in starts if s}) > 1 or any(
        isinstance(s, float) and s >= 1 for s in starts
    ):
        raise UserError(f"passes_schedule={text}: starts are all steps or all below 1.0: {remedy}")
    if any(not 1 <= passes <= 64 for _, passes in entries):
        raise UserError(f"passes_schedule={text}: passes must lie in 1..64: {remedy}")
    return entries


def parse_value(kind: str, text: str) -> Any:
    """The text of a flag or variable as the annotated type. Raises ValueError."""
    base = kind.removesuffix(" | None")
    if base != kind and text.strip().lower() in ("", "none"):
        return None
    if base == "bool":
        known = {"1": True, "true": True, "0": False, "false": False}
        if text.strip().lower() not in known:
            raise ValueError("not a boolean: use 0, 1, false or true")
        return known[text.strip().lower()]
    if base in ("int", "float"):
        try:
            return {"int": int, "float": float}[base](text)
        except ValueError:
            article = {"int": "an integer", "float": "a number"}[base]
            raise ValueError(f"not {article}") from None
    return text


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def build_parser() -> argparse.ArgumentParser:
    summary, launches = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="train_gpt.py",
        description=summary,
        epilog=launches,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups: dict[str, Any] = {}
    for f in fields(Hyperparameters):
        rule, kind = f.metadata, str(f.type)
        group = groups.setdefault(rule["group"], parser.add_argument_group(rule["group"]))
        text = f"{rule['text']} [{f.name.upper()}={f.default}]".replace("%", "%%")
        if kind == "bool":
            action = argparse.BooleanOptionalAction
            group.add_argument(flag_name(f.name), action=action, help=text)
        else:
            choices = "{" + ",".join(rule["choices"]) + "}" if rule["choices"] else ""
            metavar = choices or kind.removesuffix(" | None").upper()
            group.add_argument(flag_name(f.name), metavar=metavar, help=text)
    return parser


def read_configuration(
    env: Mapping[str, str], argv: Sequence[str]
) -> tuple[Hyperparameters, dict[str, str]]:
    """Settings from defaults, then `env`, then `argv`; and where each came from.

    Raises UserError with every mistake at once.
    """
    known, unknown = build_parser().parse_known_args(argv)
    flags = vars(known)
    values, sources, errors = {}, {}, [f"unknown argument {a}: see --help" for a in unknown]
    for f in fields(Hyperparameters):
        sources[f.name] = (
            "flag" if f.name in flags else "env" if f.name.upper() in env else "default"
        )
        if sources[f.name] == "default":
            continue
        raw = flags[f.name] if sources[f.name] == "flag" else env[f.name.upper()]
        try:
            values[f.name] = raw if isinstance(raw, bool) else parse_value(str(f.type), raw)
        except ValueError as error:
            errors.append(f"{f.name}={raw} ({sources[f.name]}) is {error}")
    try:
        hp = Hyperparameters(**values)
    except UserError as error:
        errors.append(str(error))
    if errors:
        raise UserError("\n".join(errors))
    return hp, sources


# --------------------------------------------------------------------------------------------------
# 3. Runtime and log: which process this is, what it computes on, and the one writer of the log
# --------------------------------------------------------------------------------------------------


@dataclass
class Runtime:
    """One process of the job. Collectives are no-ops when it is alone."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def start(cls, hp: Hyperparameters) -> Runtime:
        """Joins the process group that torchrun describes; alone without torchrun."""
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if device.index >= torch.cuda.device_count():
                raise UserError(
                    f"LOCAL_RANK={device.index} has no GPU: {torch.cuda.device_count()} are visible; "
                    "lower --nproc_per_node"
                )
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
        if "RANK" in os.environ and world_size > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
        auto = torch.bfloat16 if device.type == "cuda" else torch.float32
        dtype = auto if hp.dtype == "auto" else getattr(torch, hp.dtype)
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
        if self.world_size > 1:
            self.sum_(torch.zeros(1, device=self.device)).item()

    def from_main(self, value: Any) -> Any:
        """Rank 0's value (anything small), on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def share(self, count: int) -> range:
        """This rank's contiguous part of range(count); parts differ by at most one."""
        return range(
            self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size
        )

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def log_text(value: Any) -> str:
    """A value as the log's grammar allows: no white space; sequences joined by commas."""
    if isinstance(value, (tuple, list)):
        return ",".join(log_text(v) for v in value) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return quote(str(value), safe="!\"#$&'()*+,-./:;<=>?@[]^_`{|}~") or "none"


class Log:
    """Writes lines `event key:value key:value`; white space in a value is percent-encoded."""

    def __init__(self, path: Path | None) -> None:
        self.started = time.perf_counter()
        self.file = None
        self.bar = False
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("x", encoding="utf-8")
        except FileExistsError:
            raise UserError(
                f"run_id: the log {path} exists and is never overwritten: choose another run_id"
            ) from None
        except OSError as error:
            raise UserError(
                f"output_dir: cannot write {path} ({error.strerror}): choose another output_dir"
            ) from None

    def event(self, name: str = "", **pairs: Any) -> None:
        """One line; `name` is empty for the lines of single steps, as is the field's custom."""
        if self.file is None:
            return
        words = [name] if name else []
        line = " ".join(words + [f"{key}:{log_text(value)}" for key, value in pairs.items()])
        self.clear_bar()
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()

    def progress(self, fraction: float, what: str) -> None:
        """A bar on a terminal; nothing elsewhere, where the lines of the log show progress."""
        if self.file is None or not sys.stdout.isatty():
            return
        filled = round(30 * min(fraction, 1.0))
        bar = "#" * filled + "." * (30 - filled)
        print(f"\r[{bar}] {fraction:4.0%} {what}\033[K", end="", flush=True)
        self.bar = True

    def clear_bar(self) -> None:
        if self.bar:
            print("\r\033[K", end="")
            self.bar = False

    def phase(self, name: str, since: float) -> float:
        """Logs the seconds of a phase that began at `since`; returns now."""
        now = time.perf_counter()
        self.event("phase", name=name, seconds=f"{now - since:.3f}")
        return now


# --------------------------------------------------------------------------------------------------
# 4. Data: shards on disk -> the same global batches for every world size
# --------------------------------------------------------------------------------------------------


def find_data_shards(data_path: Path, split: str) -> list[Path]:
    """The shards of split `train` or `val`, in order. Raises UserError if there are none."""
    paths = sorted(data_path.glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise UserError(
            f"data_path={data_path} holds no fineweb_{split}_*.bin: download the data with "
            "data/download_fineweb.py, make it with data/prepare_text.py, or set DATA_PATH"
        )
    return paths


def open_data_shard(path: Path) -> np.ndarray:
    """The tokens of a shard as a read-only memory map of uint16. Raises UserError."""
    remedy = "download or prepare it again"
    if not path.is_file():
        raise UserError(f"data shard {path} is missing: {remedy}")
    size, header_bytes = path.stat().st_size, 4 * SHARD_HEADER_WORDS
    if size < header_bytes:
        raise UserError(f"data shard {path} has {size} bytes, less than its header: {remedy}")
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_WORDS)
    if (header[0], header[1]) != (SHARD_MAGIC, SHARD_VERSION):
        raise UserError(
            f"data shard {path} starts with {header[0]}, {header[1]} instead of magic "
            f"{SHARD_MAGIC} and version {SHARD_VERSION}: it is no token shard; {remedy}"
        )
    count = int(header[2])
    if size != header_bytes + 2 * count:
        raise UserError(
            f"data shard {path}: its header counts {count} tokens, its {size} bytes hold "
            f"{(size - header_bytes) / 2:g}: {remedy}"
        )
    if count == 0:
        raise UserError(f"data shard {path} holds no tokens: {remedy}")
    return np.memmap(path, dtype="<u2", mode="r", offset=header_bytes, shape=(count,))


def data_fingerprint(paths: Sequence[Path]) -> str:
    """A hash of every shard's name, header and 4,096 tokens at each end: 16 hex digits."""
    digest = hashlib.sha256()
    for path in paths:
        tokens = open_data_shard(path)
        digest.update(f"{path.name}:{len(tokens)}:".encode())
        digest.update(tokens[:4096].tobytes() + tokens[-4096:].tobytes())
    return digest.hexdigest()[:16]


def check_token_ids(paths: Sequence[Path], vocab_size: int) -> None:
    """Raises UserError if a token of a shard is no piece of the vocabulary."""
    for path in paths:
        largest = int(open_data_shard(path).max())
        if largest >= vocab_size:
            raise UserError(
                f"data shard {path} holds token {largest}, outside the vocabulary of "
                f"vocab_size={vocab_size}: use the tokenizer that it was made with"
            )


def load_tokenizer(path: Path, vocab_size: int) -> spm.SentencePieceProcessor:
    """The SentencePiece model at `path`. Raises UserError unless it has `vocab_size` pieces."""
    if not path.is_file():
        raise UserError(
            f"tokenizer_path={path} is missing: set TOKENIZER_PATH to the shards' model"
        )
    tokenizer = spm.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError):
        raise UserError(f"tokenizer_path={path} is no SentencePiece model") from None
    if tokenizer.vocab_size() != vocab_size:
        raise UserError(
            f"tokenizer_path={path} has {tokenizer.vocab_size()} pieces, the model vocab_size="
            f"{vocab_size}: set VOCAB_SIZE={tokenizer.vocab_size()} or use another tokenizer"
        )
    if tokenizer.IsUnknown(tokenizer.PieceToId("▁")):
        raise UserError(
            f"tokenizer_path={path} has no piece for the space, so bytes are miscounted"
        )
    return tokenizer


class TokenBytes:
    """The bytes of text that each target token stands for: what val_bpb divides by.

    A byte-fallback piece is 1 byte; another piece its UTF-8 length without a leading `▁`, plus 1
    for that `▁` unless the token before it is a boundary (control, unknown or unused); a
    boundary token is 0 bytes.
    """

    def __init__(self, tokenizer: spm.SentencePieceProcessor, device: torch.device) -> None:
        length, space, boundary = [], [], []
        for i in range(tokenizer.vocab_size()):
            piece = tokenizer.IdToPiece(i)
            is_boundary = tokenizer.IsControl(i) or tokenizer.IsUnknown(i) or tokenizer.IsUnused(i)
            is_byte = tokenizer.IsByte(i)
            has_space = piece.startswith("▁") and not (is_boundary or is_byte)
            text_bytes = 1 if is_byte else len(piece.removeprefix("▁").encode())
            length.append(0 if is_boundary else text_bytes)
            space.append(has_space)
            boundary.append(is_boundary)
        self.length = torch.tensor(length, dtype=torch.int32, device=device)
        self.space = torch.tensor(space, dtype=torch.int32, device=device)
        self.inner = 1 - torch.tensor(boundary, dtype=torch.int32, device=device)

    def of(self, previous: Tensor, target: Tensor) -> Tensor:
        """Bytes of each `target` that follows `previous` (any equal shapes), int32."""
        return self.length[target] + self.space[target] * self.inner[previous]


def check_token_bytes(tokenizer: Any, table: TokenBytes, tokens: np.ndarray) -> int:
    """The bytes of a prefix of `tokens`. Raises UserError if the table and its text disagree.

    Decoding is the independent reference: it knows nothing of the table. The space that opens a
    document (its first `▁`) is not counted, as in the table.
    """
    prefix = tokens[:200_000].astype(np.int64)
    while len(prefix) > 1 and tokenizer.IsByte(int(prefix[-1])):
        prefix = prefix[:-1]  # a character cut in two would decode to U+FFFD
    boundaries = [i for i, t in enumerate(prefix.tolist()) if not table.inner[t]]
    decoded = 0
    for start, end in zip([-1, *boundaries], [*boundaries, len(prefix)], strict=True):
        ids = prefix[start + 1 : end].tolist()
        text = tokenizer.Decode(ids)
        opens = start >= 0 and ids and tokenizer.IdToPiece(ids[0]).startswith("▁")
        decoded += len((text.removeprefix(" ") if opens else text).encode())
    ids = torch.from_numpy(prefix).to(table.length.device)
    first = len(tokenizer.Decode(prefix[:1].tolist()).encode())
    counted = first + int(table.of(ids[:-1], ids[1:]).sum())
    if counted != decoded:
        raise UserError(
            f"the tokenizer's pieces count {counted} bytes for a text of {decoded}: val_bpb would "
            "be wrong; use a SentencePiece model with byte fallback and a piece for the space"
        )
    return counted


class BatchLoader:
    """Windows of T+1 tokens in a global order that depends on the seed and nothing else.

    The order of an epoch is a permutation of the windows of all shards; each epoch cuts the
    shards at another phase, so that a repeated text is at least cut elsewhere. Step s takes the
    next `batch_seqs` windows of the order and a rank its share of them, so every world size
    trains on the same global batches, and no window repeats before all were used.
    """

    def __init__(self, shards: Sequence[np.ndarray], hp: Hyperparameters, runtime: Runtime) -> None:
        self.shards, self.runtime = shards, runtime
        self.seq_len, self.seed, self.shuffle = hp.train_seq_len, hp.seed, hp.shuffle
        self.batch_seqs, self.share = hp.batch_seqs, runtime.share(hp.batch_seqs)
        windows = [max(0, (len(tokens) - self.seq_len) // self.seq_len) for tokens in shards]
        self.first_window = np.cumsum([0, *windows])
        self.epoch_windows = int(self.first_window[-1])
        if self.epoch_windows == 0:
            raise UserError(
                f"data_path: no training shard holds two windows of train_seq_len={self.seq_len} "
                "tokens: prepare more text or lower train_seq_len"
            )
        self.epoch = -1
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.pending: dict[int, Future[Tensor]] = {}

    def start_epoch(self, epoch: int) -> None:
        rng = np.random.default_rng([self.seed, epoch])
        self.epoch, self.phase, self.order = epoch, 0, np.arange(self.epoch_windows)
        if self.shuffle:
            self.phase = int(rng.integers(self.seq_len))
            rng.shuffle(self.order)

    def window(self, index: int) -> np.ndarray:
        """The T+1 tokens of the window at `index` of the endless global order."""
        epoch, place = divmod(index, self.epoch_windows)
        if epoch != self.epoch:
            self.start_epoch(epoch)
        number = int(self.order[place])
        shard = bisect.bisect_right(self.first_window, number) - 1
        start = self.phase + (number - int(self.first_window[shard])) * self.seq_len
        return self.shards[shard][start : start + self.seq_len + 1]

    def gather(self, step: int) -> Tensor:
        shape = (len(self.share), self.seq_len + 1)
        batch = torch.empty(shape, dtype=torch.int32, pin_memory=self.runtime.device.type == "cuda")
        rows = batch.numpy()
        for row, i in enumerate(self.share):
            rows[row] = self.window(step * self.batch_seqs + i)
        return batch

    def batch(self, step: int) -> Tensor:
        """This rank's windows of `step`, (B, T+1) int32, copied to the device asynchronously."""
        for ahead in (step, step + 1, step + 2):
            if ahead not in self.pending:
                self.pending[ahead] = self.pool.submit(self.gather, ahead)
        return self.pending.pop(step).result().to(self.runtime.device, non_blocking=True)
